//! A run directory: its format, what writes it, and the one reader of it.
//!
//! | module | subject |
//! |---|---|
//! | [`format`] | the one definition of a run directory |
//! | [`limits`], `check` | bounds of what is read |
//! | [`lock`] | which agent writes to a run, and where it is asked |
//! | [`manifest`] | lines of the manifest, read and written |
//! | [`files`], [`owner_only`] | opening files that somebody may have planted; making files that are ours alone |
//! | [`names`], [`unique`], [`text`] | the names of modules, each kept once; names that differ; text in messages |
//! | [`ownership`] | which ranks have which modules |
//! | `passes`, [`joining`] | which passes of several ranks are one; telling of parts once that is known |
//! | [`stats`] | statistics of tensors |
//! | [`read`] | [`Run`]: a finished, live, killed or damaged run, or several nodes' runs of one job |
//! | [`write`] | [`Store`]: where a part goes, its bytes, its line; recovery |
//! | [`compare`] | how far two tensors are apart |
//!
//! No byte that is read is trusted: what a run says is checked against [`limits`] first, and damage becomes a
//! [`Problem`] with its place.

mod check;
pub mod compare;
pub mod files;
pub mod format;
pub mod joining;
pub mod limits;
pub mod lock;
pub mod manifest;
pub mod names;
mod objects;
pub mod owner_only;
pub mod ownership;
mod passes;
pub mod read;
pub mod stats;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod text;
pub mod unique;
pub mod write;

pub use read::{OpenError, Problem, ReadError, Record, Run, Whole};
pub use write::{Options, Outcome, PartWriter, Store};
