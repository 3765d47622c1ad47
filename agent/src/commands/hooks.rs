//! `flexmodel hooks`: what is tapped and edited in a job that runs, and how that is changed.

mod ask;
mod find;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use crate::{
    dashboard::hooks::Asked,
    server::changes::{Changed, Hooks},
    text,
};

/// Options of `flexmodel hooks`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The run's directory, of a job that runs on this host
    pub run: PathBuf,
    #[command(subcommand)]
    change: Option<Change>,
    /// Number of the job in the run [default: the only one that runs]
    #[arg(long, global = true, value_name = "N")]
    pub job: Option<u32>,
    /// Print JSON
    #[arg(long, global = true)]
    pub json: bool,
}

#[derive(clap::Subcommand, Clone, Debug)]
enum Change {
    /// Add clauses to those that are there
    Add {
        /// Clauses, separated by ;
        clauses: String,
    },
    /// Remove clauses
    Remove {
        /// Ids of clauses, as flexmodel hooks RUN lists them
        #[arg(required = true, value_name = "ID")]
        ids: Vec<u32>,
    },
    /// Put clauses in the place of all that are there
    Set {
        /// Clauses, separated by ;
        clauses: String,
    },
}

impl Change {
    fn asked(self, job: Option<u32>) -> Asked {
        match self {
            Self::Add { clauses } => Asked::Add { clauses, job },
            Self::Remove { ids } => Asked::Remove { ids, job },
            Self::Set { clauses } => Asked::Set { clauses, job },
        }
    }
}

/// Runs the command.
pub fn main(args: Args) -> anyhow::Result<ExitCode> {
    let Args { run, change, job, json } = args;
    let agent = find::agent_of(&run)?;
    let is_change = change.is_some();
    let answer = match change {
        Some(change) => ask::change(&agent, &change.asked(job)),
        None => ask::hooks(&agent, job),
    }?;
    if is_change {
        let changed: Changed = read(&answer)?;
        if !json {
            text::emit(&format!("{}\n", outcome(&changed)))?;
        }
        // They are in the JSON too.
        changed.notes.iter().filter(|_| !json).for_each(|note| text::complain("note", note));
    } else {
        let hooks = read(&answer)?;
        if !json {
            text::emit(&listing(&hooks))?;
        }
    }
    if json {
        text::emit_json(&answer)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn read<T: DeserializeOwned>(answer: &RawValue) -> anyhow::Result<T> {
    serde_json::from_str(answer.get()).context("the agent's answer is not understood; it may be of another version")
}

/// `revision 3 from step 120 on`.
fn when(revision: u64, step: Option<u64>) -> String {
    match step {
        Some(step) => format!("revision {revision} from step {step} on"),
        None => format!("revision {revision} from each rank's next pass on"),
    }
}

fn ranks(count: u32) -> String {
    text::count(u64::from(count), "rank")
}

fn outcome(changed: &Changed) -> String {
    format!("{}, {}", when(changed.revision, changed.step), ranks(changed.ranks))
}

/// The revision, its clauses, and what comes next.
fn listing(hooks: &Hooks) -> String {
    let mut out = format!("job {}, revision {}, {}\n", hooks.job, hooks.revision, ranks(hooks.ranks));
    let rows: Vec<Vec<String>> = hooks.clauses.iter().map(|c| vec![c.id.to_string(), c.text.clone()]).collect();
    match rows.is_empty() {
        true => out += "nothing is tapped\n",
        false => out += &text::table(&["id", "clause"], &rows, &[0]),
    }
    if let Some(next) = &hooks.pending {
        out += &format!("pending: {}\n", when(next.revision, next.step));
    }
    out
}

#[cfg(test)]
mod tests;
