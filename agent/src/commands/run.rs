//! `flexmodel run`: the agent beside a command, and the command with taps in it.

mod interpreter;
mod job;
mod prepare;
pub mod private;
mod sidecar;

use std::{
    ffi::OsString,
    io::{IsTerminal, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use crate::{commands::agent::close_for_the_dead, store::format::Totals, summary};
use job::{Ended, Job};
use prepare::{Plan, Prepared};
use sidecar::{News, Sidecar};

/// What to run, and how.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to tap: clauses, or the path of a TOML file [default: FLEXMODEL_HOOKS]
    #[arg(long)]
    pub hooks: Option<String>,
    /// Where captures go; {node} in it is this node's name [default: runs/ and the time]
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Loopback port of the dashboard; 0 takes a free one
    #[arg(long, default_value_t = 0)]
    pub port: u16,
    /// What a tap does when the agent cannot keep up
    #[arg(long, value_name = "wait|drop", value_parser = ["wait", "drop"], hide_possible_values = true)]
    pub on_full: Option<String>,
    /// The command and its arguments, behind --
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// Longest time between two signs of life of an agent that is finishing.
const FINISHING: Duration = Duration::from_secs(300);

/// Runs it.
pub fn main(args: Args) -> anyhow::Result<ExitCode> {
    match prepare::prepare(args)? {
        Prepared::Exit(code) => Ok(code),
        Prepared::Ready(plan) => run(*plan),
    }
}

fn run(plan: Plan) -> anyhow::Result<ExitCode> {
    // From here on signals are for the command.
    let signals = job::block_signals()?;
    let mut agent = Sidecar::start(&plan)?;
    eprintln!("flexmodel: live at {}", agent.dashboard());
    let job = match Job::start(&plan, &agent, &signals) {
        Ok(job) => job,
        Err(e) => {
            agent.finish(Some(i32::from(e.code)));
            agent.wait_for_totals(FINISHING);
            eprintln!("flexmodel: {}", e.text);
            return Ok(ExitCode::from(e.code));
        }
    };
    agent.tell_job(&plan, job.pid());
    let mut progress = Progress::new();
    let ended = loop {
        match agent.news() {
            News::Progress(totals) => progress.show(&totals),
            News::AgentDied(how) => {
                progress.clear();
                eprintln!("flexmodel: the agent {how}; the job goes on, and what it captures from now on is lost");
            }
            News::JobEnded(ended) => break ended,
        }
    };
    progress.clear();
    let totals = conclude(&mut agent, ended)?;
    eprint!("{}", summary::text(agent.run(), &totals));
    Ok(ExitCode::from(ended.exit_code()))
}

/// Final counters: the agent's, or if it died those that it leaves behind, and what no agent has read.
fn conclude(agent: &mut Sidecar, ended: Ended) -> anyhow::Result<Totals> {
    let exit_code = Some(i32::from(ended.exit_code()));
    agent.finish(exit_code);
    let totals = agent.wait_for_totals(FINISHING);
    if totals.is_none() && agent.is_alive() {
        eprintln!("flexmodel: the agent is still writing to {}; it ends by itself", summary::relative(agent.run()));
        return Ok(agent.last_totals());
    }
    if let Some(how) = agent.untold_death() {
        eprintln!("flexmodel: the agent {how}; what it had captured is kept");
    }
    let lost = agent.never_read();
    if let Some(totals) = totals.filter(|_| lost.is_empty()) {
        return Ok(totals);
    }
    match close_for_the_dead(agent.run(), exit_code, totals.is_none(), &lost) {
        Ok(info) => Ok(info.totals),
        Err(e) => {
            // The command's exit code counts, not ours.
            eprintln!("flexmodel: {e:#}");
            Ok(agent.last_totals())
        }
    }
}

/// One line that is written over, on a terminal only.
struct Progress {
    terminal: bool,
    shown: Option<Totals>,
}

impl Progress {
    fn new() -> Self {
        Self { terminal: std::io::stderr().is_terminal(), shown: None }
    }

    fn show(&mut self, totals: &Totals) {
        if self.terminal && self.shown != Some(*totals) && totals.parts > 0 {
            self.shown = Some(*totals);
            self.write(&format!("\r\x1b[Kflexmodel: {}\r", summary::counts(totals)));
        }
    }

    fn clear(&mut self) {
        if self.shown.take().is_some() {
            self.write("\r\x1b[K");
        }
    }

    fn write(&self, text: &str) {
        // A terminal that is gone is no reason to stop.
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
}

/// The command as words, for `run.json`.
fn words(command: &[OsString]) -> Vec<String> {
    command.iter().map(|w| w.to_string_lossy().into_owned()).collect()
}

/// `path` from the root, without resolving links.
fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    Ok(std::path::absolute(path)?)
}
