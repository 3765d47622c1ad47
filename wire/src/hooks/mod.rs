//! The `FLEXMODEL_HOOKS` grammar: what is tapped, when, and what is done to it.
//!
//! ```text
//! selector[:kind,kind...][@option=value,...][|edit]     clauses separated by ;
//! ```
//!
//! [`parse`] reads clauses or a TOML file's path; every error names the place, the reason and the way out.

mod edit;
mod error;
mod parse;
mod select;
mod slice;
mod toml_form;
mod value;

use std::ops::Range;

pub use edit::Edit;
pub use error::{HookError, Position};
pub use parse::{names_a_file, parse, parse_clauses, parse_one};
pub use select::nearest;
pub use slice::{Index, Slice};
pub use toml_form::parse_toml;

pub use crate::codes::Kind;
use crate::dtype::DType;
use edit::built_in_forms;

/// How the model itself is written, whose name is empty.
pub const ROOT: &str = "(root)";

/// Which modules (or, for `param` and `grad`, parameters) a clause means.
#[derive(Clone, Debug)]
pub enum Selector {
    /// Dotted name with `*` for one segment (also within a segment: `h*`) and `**` for any number. No segments: the
    /// model itself.
    Glob(Vec<String>),
    /// A regular expression between slashes, searched in the whole name.
    Regex(regex::Regex),
    /// `class=NAME`: the class's own name, or its full dotted name.
    Class(String),
}

/// Where shards are laid into the whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Assemble {
    /// In the agent, from every rank's slab.
    #[default]
    Agent,
    /// In the job, by a private collective.
    Collective,
}

/// What is kept of a tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reduce {
    /// All of its bytes.
    #[default]
    Whole,
    /// Its statistics only.
    Stats,
}

/// Which passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Those that train: gradients are enabled when the model is called, and some module of it is in training mode.
    Train,
    /// All others.
    Eval,
}

/// `shard=DIM@AXIS`: the user's word on a layout that cannot be inferred.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardHint {
    /// Dimension; negative counts from the end.
    pub dim: i32,
    /// Mesh axis name, such as `dp` or `tp`.
    pub axis: String,
}

/// The `@` part of a clause.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Only steps divisible by this (at least 1). `None`: every step.
    pub every: Option<u64>,
    /// Only these steps, first included, last **included** as written `a..b`; either side may be left out.
    pub steps: Option<(u64, u64)>,
    /// Only these microbatches of a step, as for `steps`; training passes and others are numbered apart.
    pub micro: Option<(u64, u64)>,
    /// Only passes that train, or only others.
    pub mode: Option<Mode>,
    /// Only these ranks, ascending and unique: `ranks=0`, `ranks=0+2+5`, `ranks=0..3` (both ends included).
    pub ranks: Option<Vec<u32>>,
    /// Convert to this element type before it leaves the job.
    pub dtype: Option<DType>,
    /// What is kept.
    pub reduce: Reduce,
    /// The hook group this clause belongs to.
    pub group: Option<String>,
    /// Where shards are put together.
    pub assemble: Assemble,
    /// The user's layout.
    pub shard: Option<ShardHint>,
    /// Only this leaf of the structure, such as `out[0]` or `in.states`.
    pub path: Option<String>,
    /// Only these elements of a leaf are recorded; an edit is of all.
    pub slice: Option<Slice>,
}

/// One clause.
#[derive(Clone, Debug)]
pub struct Hook {
    /// The clause as written, for messages.
    pub text: String,
    /// Byte range of the clause in the whole `FLEXMODEL_HOOKS` text (zero for TOML).
    pub span: Range<usize>,
    /// Which modules.
    pub selector: Selector,
    /// Which kinds, unique, in the order written; `[Forward]` when none was written.
    pub kinds: Vec<Kind>,
    /// The options.
    pub options: Options,
    /// The edit, if any.
    pub edit: Option<Edit>,
}

impl Hook {
    /// All kinds as a mask of [`Kind::bit`]s.
    pub fn kind_mask(&self) -> u32 {
        self.kinds.iter().fold(0, |mask, kind| mask | kind.bit())
    }

    /// Whether this hook captures in a step: within `steps`, and a multiple of `every`.
    pub fn wants_step(&self, step: u64, turn: u64) -> bool {
        let o = &self.options;
        o.steps.is_none_or(|(first, last)| (first..=last).contains(&step))
            && o.every.is_none_or(|n| turn.is_multiple_of(n.max(1)))
    }

    /// Whether it captures in a pass of such a step.
    pub fn wants_pass(&self, micro: u32, train: bool) -> bool {
        let o = &self.options;
        o.micro.is_none_or(|(first, last)| (first..=last).contains(&u64::from(micro)))
            && o.mode.is_none_or(|mode| (mode == Mode::Train) == train)
    }

    /// What this version of FlexModel understands but cannot do yet, as a sentence with the way out; `None` if all is well.
    pub fn unsupported(&self) -> Option<String> {
        matches!(self.edit, Some(Edit::Python { .. })).then(|| {
            format!("Python edits are not available in this version; those that are built in are: {}", built_in_forms())
        })
    }
}
