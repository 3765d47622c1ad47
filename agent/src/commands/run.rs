//! `flexmodel run`: the agent beside a command, and the command with taps in it.

mod interpreter;
mod job;
mod prepare;
pub mod private;
mod sidecar;

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::mpsc::channel,
    time::Duration,
};

use flexmodel_run::format::Totals;
use job::{Ended, Job};
use prepare::{Plan, Prepared};
use sidecar::{Counted, News, Sidecar};

use crate::{commands::agent::close_for_the_dead, say, summary};

/// What to run, and how.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to tap: clauses, or the path of a TOML file; '' for nothing yet [default: FLEXMODEL_HOOKS]
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
    /// Hooks cannot be changed while the job runs
    #[arg(long)]
    pub read_only: bool,
    /// The command and its arguments, behind --
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// Longest time for closing the run of an agent that died. It grows with the manifest, and waits for the disk.
const CLOSING: Duration = Duration::from_secs(30);

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
    say::line(&format!("live at {}", agent.dashboard()));
    say::beside_a_job();
    let job = match Job::start(&plan, &agent, &signals) {
        Ok(job) => job,
        Err(e) => {
            agent.finish(Some(i32::from(e.code)));
            agent.wait_for_totals();
            say::line(&e.text);
            return Ok(ExitCode::from(e.code));
        }
    };
    agent.tell_job(&plan, job.pid());
    let ended = loop {
        match agent.news() {
            News::AgentDied(how) => {
                say::line(&format!("the agent {how}; the job goes on, and what it captures from now on is lost"));
            }
            News::JobEnded(ended) => break ended,
        }
    };
    let totals = conclude(&mut agent, ended);
    say::lines(&summary::text(agent.run(), &totals));
    Ok(ExitCode::from(ended.exit_code()))
}

/// Final counters: the agent's, or if it died those that it leaves behind, and what no agent has read. Whatever fails here
/// is said, and the command's exit code counts.
fn conclude(agent: &mut Sidecar, ended: Ended) -> Totals {
    let exit_code = Some(i32::from(ended.exit_code()));
    agent.finish(exit_code);
    let totals = agent.wait_for_totals();
    let run = summary::relative(agent.run());
    if totals.is_none()
        && let Some(pid) = agent.alive()
    {
        say::line(&format!(
            "the agent (process {pid}) does not get on with writing to {run}: what is not there yet is lost, \
             unless the agent goes on after this; it ends by itself then"
        ));
        return agent.last_totals();
    }
    if let Some(how) = agent.untold_death() {
        say::line(&format!("the agent {how}; what it had captured is kept"));
    }
    let (send, closed) = channel();
    let (path, counted) = (agent.run().to_owned(), agent.counted());
    let close = move || _ = send.send(settle(&path, exit_code, totals, &counted));
    let started = std::thread::Builder::new().name("close".into()).spawn(close);
    match started.map_err(anyhow::Error::from).and_then(|_| Ok(closed.recv_timeout(CLOSING)?)) {
        Ok(Ok(totals)) => totals,
        Ok(Err(e)) => {
            say::line(&format!("{e:#}"));
            agent.last_totals()
        }
        Err(_) => {
            let seconds = CLOSING.as_secs();
            say::line(&format!("{run} could not be closed within {seconds} s; it can be read as it is"));
            agent.last_totals()
        }
    }
}

/// Counters of a run that nobody writes to any more: `totals`, if its agent told them and has read everything.
fn settle(run: &Path, exit_code: Option<i32>, totals: Option<Totals>, counted: &Counted) -> anyhow::Result<Totals> {
    let lost = counted.never_read(run);
    match totals.filter(|_| lost.is_empty()) {
        Some(totals) => Ok(totals),
        None => Ok(close_for_the_dead(run, exit_code, totals.is_none(), &lost)?.totals),
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
