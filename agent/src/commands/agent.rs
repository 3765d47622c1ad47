//! `flexmodel agent`.

use std::path::PathBuf;

/// Where it listens and writes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The unix socket that jobs attach to
    #[arg(long)]
    pub socket: PathBuf,
    /// The run directory; a run that is there already is continued
    #[arg(long)]
    pub out: PathBuf,
    /// Loopback port of the dashboard; 0 takes a free one
    #[arg(long, default_value_t = 0)]
    pub port: u16,
}

/// Runs it.
pub fn main(_args: Args) -> anyhow::Result<std::process::ExitCode> {
    anyhow::bail!("agent is not there yet")
}
