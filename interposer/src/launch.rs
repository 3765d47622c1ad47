//! Which job this process is of, as far as its launcher says it.

use std::fs;

use wire::{
    control::{ALONE, JobSigns},
    env::node,
    passes::Run,
};

/// Launchers that call a launch by a name, and what they are called here: variables that are all set make one up. A name of
/// [`NOBODY`] is none.
const NAMES: [(&str, &[&str]); 4] = [
    ("elastic", &["TORCHELASTIC_RUN_ID"]),
    ("slurm", &["SLURM_JOB_ID", "SLURM_STEP_ID"]),
    ("pmix", &["PMIX_NAMESPACE"]),
    ("mpi", &["OMPI_MCA_ess_base_jobid"]),
];
/// What torchrun calls a job that was given no name.
const NOBODY: &str = "none";
/// How many ranks a node has.
pub const RANKS_OF_NODE: [&str; 2] = ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"];
/// How often ranks were started again.
const RESTARTS: [&str; 2] = ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"];

fn set(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// All that is known before there is a process group.
pub fn signs() -> JobSigns {
    signs_of(&set, started, std::process::id(), std::os::unix::process::parent_id())
}

fn signs_of(set: &dyn Fn(&str) -> Option<String>, process: impl Fn(u32) -> String, own: u32, parent: u32) -> JobSigns {
    let named = |(launcher, names): &(&str, &[&str])| {
        let values = names.iter().map(|name| set(name)).collect::<Option<Vec<String>>>()?;
        values.iter().all(|value| value != NOBODY).then(|| format!("{launcher} {}", values.join(".")))
    };
    let name = NAMES.iter().find_map(named);
    let address = || Some(format!("at {}:{}", set("MASTER_ADDR")?, set("MASTER_PORT")?));
    let launch = match set("RANK") {
        // Who is given no rank may be one of many that know nothing of each other.
        None => None,
        Some(_) => name.clone().or_else(address),
    };
    let restarts = RESTARTS.iter().find_map(|name| set(name)?.parse().ok());
    JobSigns {
        group: 0,
        launch: launch.unwrap_or_else(|| format!("{ALONE}{} {}", node(), process(own))),
        launcher: match restarts {
            None => name.unwrap_or_default(),
            Some(_) => name.unwrap_or_else(|| format!("{ALONE}{} {}", node(), process(parent))),
        },
        restarts,
        here: here(set),
    }
}

/// The ranks of this node, as torchrun and DeepSpeed number them.
fn here(set: &dyn Fn(&str) -> Option<String>) -> Option<Run> {
    let number = |name: &&str| set(name)?.parse::<u32>().ok();
    let first = number(&"RANK")?.checked_sub(number(&"LOCAL_RANK")?)?;
    let count = RANKS_OF_NODE.iter().find_map(number).filter(|count| *count > 0)?;
    Some(Run { first, by: 1, count })
}

/// A process of this node, told from others of the same number by when it was started.
fn started(pid: u32) -> String {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name of the program, in parentheses, may have anything in it. The 22nd field is the time.
    let ticks = stat.rsplit_once(')').and_then(|(_, fields)| fields.split_whitespace().nth(19));
    format!("{pid}:{}", ticks.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signs(variables: &[(&str, &str)], own: u32) -> JobSigns {
        let set = |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
        signs_of(&set, |pid| pid.to_string(), own, 7)
    }

    #[test]
    fn ranks_of_one_launch_say_the_same_and_other_processes_do_not() {
        let torchrun = [
            ("RANK", "0"),
            ("TORCHELASTIC_RUN_ID", "none"),
            ("TORCHELASTIC_RESTART_COUNT", "2"),
            ("MASTER_ADDR", "here"),
            ("MASTER_PORT", "1"),
        ];
        let one = signs(&torchrun, 1);
        assert_eq!((one.launch.as_str(), one.restarts), ("at here:1", Some(2)));
        assert!(one.launcher.ends_with(" 7"), "{}", one.launcher);
        assert_eq!(signs(&torchrun, 2), one);
        assert_eq!(one.here, None, "it does not say which of its ranks this one is");
        let slurm = [("RANK", "1"), ("SLURM_JOB_ID", "5"), ("SLURM_STEP_ID", "0")];
        assert_eq!(signs(&slurm, 1).launch, "slurm 5.0");
        assert_eq!(signs(&slurm[1..], 1).launcher, "slurm 5.0");
        assert_ne!(signs(&slurm[1..], 1).launch, signs(&slurm[1..], 2).launch);
        assert!(signs(&[], 1).launch.starts_with(ALONE) && signs(&[], 1).launcher.is_empty());
    }

    #[test]
    fn the_ranks_of_a_node_follow_each_other() {
        let third = [("RANK", "6"), ("LOCAL_RANK", "2"), ("LOCAL_WORLD_SIZE", "4")];
        assert_eq!(signs(&third, 1).here, Some(Run { first: 4, by: 1, count: 4 }));
        assert_eq!(signs(&[("RANK", "1"), ("LOCAL_RANK", "2"), ("LOCAL_WORLD_SIZE", "4")], 1).here, None);
    }

    #[test]
    fn a_process_is_told_from_others_by_when_it_was_started() {
        let own = started(std::process::id());
        assert!(own.split_once(':').is_some_and(|(_, ticks)| ticks.parse::<u64>().is_ok()), "{own}");
        assert_eq!(own, started(std::process::id()));
    }
}
