//! `flexmodel run`.

use std::{ffi::OsString, path::PathBuf};

/// What to run, and how.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to tap: clauses, or the path of a TOML file; default: FLEXMODEL_HOOKS
    #[arg(long)]
    pub hooks: Option<String>,
    /// Where captures go; default: runs/ and the time
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Loopback port of the dashboard; 0 takes a free one
    #[arg(long, default_value_t = 0)]
    pub port: u16,
    /// What a tap does when the agent cannot keep up
    #[arg(long, value_name = "wait|drop", value_parser = ["wait", "drop"])]
    pub on_full: Option<String>,
    /// The command and its arguments, behind --
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// Runs it.
pub fn main(_args: Args) -> anyhow::Result<std::process::ExitCode> {
    anyhow::bail!("run is not there yet")
}
