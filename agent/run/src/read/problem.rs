//! What is wrong with a run directory, and what is worth saying of it.

use std::fmt;

use serde::{Serialize, Serializer, ser::SerializeStruct};

use crate::{
    format::{MANIFEST_FILE, RUN_FILE},
    text,
};

/// Something that is wrong with a run directory, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The node whose run it is of; empty for a run of one folder.
    pub node: String,
    /// What it is.
    pub found: Found,
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// There is no `run.json`.
    NoInfo,
    /// `run.json` does not read, and why.
    Info(String),
    /// There is no manifest.
    NoManifest,
    /// A line of the manifest does not read.
    Line {
        /// From 1.
        number: u64,
        /// Why.
        why: String,
    },
    /// So many more lines do not read.
    MoreLines(u64),
    /// What a look at the bytes found.
    Other {
        /// The file, or the record in it.
        place: String,
        /// What is wrong there.
        what: String,
    },
}

impl Problem {
    /// A problem at a place.
    pub fn new(place: impl Into<String>, what: impl Into<String>) -> Self {
        Found::Other { place: place.into(), what: what.into() }.into()
    }

    /// The same problem, of a node's run.
    pub fn within(self, node: &str) -> Self {
        Self { node: node.to_owned(), ..self }
    }

    /// The file that it is in.
    pub fn file(&self) -> String {
        let name = match &self.found {
            Found::NoInfo | Found::Info(_) => RUN_FILE,
            Found::NoManifest | Found::Line { .. } | Found::MoreLines(_) => MANIFEST_FILE,
            Found::Other { place, .. } => place,
        };
        if self.node.is_empty() { name.to_owned() } else { format!("{}/{name}", self.node) }
    }

    /// The file, and the line, bytes or record in it.
    pub fn place(&self) -> String {
        match self.found {
            Found::Line { number, .. } => format!("{} line {number}", self.file()),
            _ => self.file(),
        }
    }

    /// What is wrong there.
    pub fn what(&self) -> String {
        match &self.found {
            Found::NoInfo => "missing; what the command and the world were is not known".to_owned(),
            Found::Info(why) => format!("damaged ({why})"),
            Found::NoManifest => "missing; nothing was captured, or it was copied in part".to_owned(),
            Found::Line { why, .. } => why.clone(),
            Found::MoreLines(more) => format!("and {more} more lines do not read"),
            Found::Other { what, .. } => what.clone(),
        }
    }
}

impl From<Found> for Problem {
    fn from(found: Found) -> Self {
        Self { node: String::new(), found }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place(), self.what())
    }
}

impl Serialize for Problem {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut fields = to.serialize_struct("Problem", 2)?;
        fields.serialize_field("place", &self.place())?;
        fields.serialize_field("what", &self.what())?;
        fields.end()
    }
}

/// Something that is worth saying of a run, and is no damage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// The node whose run it is of; empty for a run of one folder.
    pub node: String,
    /// What is said.
    pub said: Said,
}

/// What is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// The run ended before it began.
    NothingCaptured,
    /// The manifest ends in half a line.
    HalfALine,
    /// So many parts were captured again.
    CapturedAgain(u64),
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.node.is_empty() {
            write!(f, "{}: ", self.node)?;
        }
        match self.said {
            Said::NothingCaptured => f.write_str("nothing was captured: the agent was stopped before the first record"),
            Said::HalfALine => write!(f, "the last line of {MANIFEST_FILE} is half a line; its part is not served"),
            Said::CapturedAgain(parts) => write!(
                f,
                "{} captured under a name that another one has: kept beside it, as again=1 and so on",
                text::count(parts, "part")
            ),
        }
    }
}

impl Serialize for Note {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}
