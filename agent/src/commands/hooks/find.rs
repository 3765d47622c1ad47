//! The agent of a run, by the run's lock.

use std::{
    io,
    path::{Path, PathBuf},
};

use anyhow::{anyhow, bail};
use flexmodel_run::{
    format::LOCK_FILE,
    lock::{self, Holder},
    read::nodes,
};

use crate::text::{clip, count, safe};

/// Where an agent answers.
#[derive(Debug, PartialEq, Eq)]
pub struct Agent {
    /// The run, as the user wrote it.
    pub run: PathBuf,
    /// Its port on loopback.
    pub port: u16,
    /// What it wants to be shown.
    pub token: String,
}

/// The agent that writes to a run, or to that of a node of this host in a folder of these.
///
/// # Errors
/// There is none, or it cannot be asked from here.
pub fn agent_of(run: &Path) -> anyhow::Result<Agent> {
    let mut holders = Vec::new();
    for folder in nodes::folders(run)? {
        holders.extend(lock::holder(&folder).map_err(|e| unreadable(&folder, &e))?);
    }
    choose(run, holders)
}

fn unreadable(folder: &Path, error: &io::Error) -> anyhow::Error {
    anyhow!("cannot tell which agent writes to {}: {LOCK_FILE}: {error}", folder.display())
}

/// A host's name, for a message.
fn named(agent: &Holder) -> String {
    safe(&clip(&agent.node))
}

fn choose(run: &Path, holders: Vec<Holder>) -> anyhow::Result<Agent> {
    let shown = run.display();
    if holders.is_empty() {
        bail!(
            "no agent writes to {shown}: the run is over (its revisions: flexmodel ls {shown}), or its agent was killed (another \
             one: flexmodel agent --socket PATH --out {shown}, with the path of the job's FLEXMODEL_AGENT)"
        );
    }
    let (here, elsewhere): (Vec<Holder>, Vec<Holder>) = holders.into_iter().partition(Holder::is_here);
    for Holder { port, token, .. } in &here {
        if let (Some(port), Some(token)) = (port, token) {
            return Ok(Agent { run: run.to_owned(), port: *port, token: token.clone() });
        }
    }
    match (here.first(), elsewhere.as_slice()) {
        (Some(agent), _) if agent.node.is_empty() => {
            bail!("the agent of {shown} (process {}) is of an older version, whose hooks do not change", agent.pid)
        }
        (Some(agent), _) => {
            bail!("the agent of {shown} (process {}) cannot be asked yet, as it is only starting; try again", agent.pid)
        }
        (None, [agent]) => bail!("the agent of {shown} is on host {}: run this there", named(agent)),
        (None, agents) => {
            let first = agents.first().map(named).unwrap_or_default();
            let more = count(agents.len().saturating_sub(1) as u64, "other");
            bail!("the agents of {shown} are on host {first} and {more}: run this there")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(pid: u32, node: &str, port: Option<u16>) -> Holder {
        Holder { pid, node: node.into(), port, token: port.map(|port| format!("t{port}")), ..Holder::default() }
    }

    fn refusal(holders: &[Holder]) -> String {
        choose(Path::new("runs/x"), holders.to_vec()).unwrap_err().to_string()
    }

    #[test]
    fn the_agent_of_this_host_is_asked() {
        let host = wire::env::host();
        let all = [holder(1, "elsewhere", Some(1)), holder(2, &host, None), holder(3, &host, Some(3))];
        let found = choose(Path::new("runs/x"), all.to_vec()).unwrap();
        assert_eq!((found.port, found.token.as_str()), (3, "t3"));
    }

    #[test]
    fn where_none_can_be_asked_it_is_said_why_and_what_to_do() {
        let host = wire::env::host();
        assert!(
            refusal(&[]).starts_with("no agent writes to runs/x: the run is over (its revisions: flexmodel ls runs/x)")
        );
        assert_eq!(refusal(&[holder(1, "b", Some(1))]), "the agent of runs/x is on host b: run this there");
        let several = refusal(&[holder(1, "b", Some(1)), holder(1, "c", Some(1)), holder(1, "d", None)]);
        assert_eq!(several, "the agents of runs/x are on host b and 2 others: run this there");
        assert!(refusal(&[holder(7, "", None)]).contains("(process 7) is of an older version"));
        assert!(refusal(&[holder(7, &host, None)]).contains("(process 7) cannot be asked yet"));
    }

    #[test]
    fn a_path_that_is_no_run_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(agent_of(dir.path()).unwrap_err().to_string().contains("not a FlexModel run"));
        assert!(agent_of(&dir.path().join("x")).unwrap_err().to_string().contains("no such run directory"));
        std::fs::write(dir.path().join(LOCK_FILE), "12\n").unwrap();
        assert!(agent_of(dir.path()).unwrap_err().to_string().contains("the run is over"));
    }
}
