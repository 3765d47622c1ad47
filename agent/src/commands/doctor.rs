//! `flexmodel doctor`: what would work on this machine, what would not, and the way out.

mod machine;
mod software;

use std::{path::PathBuf, process::ExitCode};

use serde::Serialize;

use crate::text;

/// Options of `flexmodel doctor`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The interpreter that runs your jobs; default: the active environment's.
    #[arg(long)]
    pub python: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Works.
    Ok,
    /// Needed, and does not work.
    No,
    /// Not there, and not needed.
    Absent,
}

/// One line.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// How it came out.
    pub state: State,
    /// What was found, or why not.
    pub found: String,
    /// The way out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl Check {
    /// It works.
    pub fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, state: State::Ok, found: found.into(), fix: None }
    }

    /// It does not, and must.
    pub fn no(name: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name, state: State::No, found: found.into(), fix: Some(fix.into()) }
    }

    /// It is not there, which is fine.
    pub fn absent(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, state: State::Absent, found: found.into(), fix: None }
    }

    fn line(&self) -> String {
        let mark = match self.state {
            State::Ok => "ok",
            State::No => "no",
            State::Absent => "–",
        };
        let fix = self.fix.as_ref().map_or_else(String::new, |fix| format!("; {fix}"));
        format!("{mark:<3} {:<16} {}{fix}\n", self.name, text::safe(&self.found))
    }
}

/// Runs the command.
pub fn main(args: Args) -> anyhow::Result<ExitCode> {
    let mut checks = machine::checks();
    checks.extend(software::checks(args.python));
    let missing = checks.iter().filter(|c| c.state == State::No).count();
    if args.json {
        let answer = serde_json::json!({"ok": missing == 0, "checks": checks});
        text::emit(&(serde_json::to_string_pretty(&answer)? + "\n"))?;
    } else {
        let mut out: String = checks.iter().map(Check::line).collect();
        out += &match missing {
            0 => "everything that is needed works\n".to_owned(),
            1 => "one thing that is needed does not work\n".to_owned(),
            n => format!("{n} things that are needed do not work\n"),
        };
        text::emit(&out)?;
    }
    Ok(if missing == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
