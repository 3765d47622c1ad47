//! Which jobs there are in a run of several nodes: every agent numbers those that it has met, and here they get numbers of
//! the run, by what their ranks have in common.

use std::collections::{BTreeMap, BTreeSet};

use crate::format::{JobId, JobInfo, Revision};

/// The jobs of a folder, as its manifest tells them.
pub type Table = BTreeMap<JobId, JobInfo>;

/// The numbers of the run for those of its folders.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Numbers {
    /// By folder, for those that are others.
    of: Vec<BTreeMap<JobId, JobId>>,
    /// Folders with the same have jobs in common, be it by way of others.
    kin: Vec<usize>,
}

/// What an attempt is on whichever node: its group, or else the how manieth of its folder with that launch it is.
type Sign<'a> = (&'a str, u32, usize);

impl Numbers {
    /// Of folders with these tables. Those without one are of one job.
    pub fn of(tables: &[&Table]) -> Self {
        let unknown = Table::from([(JobId::default(), JobInfo::default())]);
        let mut classes: BTreeMap<Sign<'_>, Vec<(usize, JobId, u64)>> = BTreeMap::new();
        for (folder, table) in tables.iter().enumerate() {
            let mut met: BTreeMap<(&str, u32), usize> = BTreeMap::new();
            for (id, info) in if table.is_empty() { &unknown } else { *table } {
                let name = match info.group.as_str() {
                    "" => (info.launch.as_str(), id.attempt),
                    group => (group, 0),
                };
                let count = met.entry(name).or_default();
                classes.entry((name.0, name.1, *count)).or_default().push((folder, *id, info.started_ns));
                *count += 1;
            }
        }
        Self { kin: kin(tables.len(), classes.values()), of: numbered(tables.len(), classes.into_values()) }
    }

    /// The number of the run for one of a folder.
    pub fn number(&self, folder: usize, id: JobId) -> JobId {
        self.of.get(folder).and_then(|of| of.get(&id)).copied().unwrap_or(id)
    }

    /// Whether two folders have jobs in common.
    pub fn are_kin(&self, one: usize, other: usize) -> bool {
        self.kin.get(one) == self.kin.get(other)
    }

    /// The revisions of the run's jobs, of those that each folder tells of. Agents of several nodes may each tell of one: what they
    /// say of its ranks and of when it was decided, they may have learned at different times.
    pub fn revisions<'a>(&self, folders: impl Iterator<Item = impl Iterator<Item = &'a Revision>>) -> Vec<Revision> {
        let mut all: BTreeMap<(JobId, u64), Revision> = BTreeMap::new();
        for (folder, revisions) in folders.enumerate() {
            for revision in revisions {
                let job = self.number(folder, revision.job);
                let own = || Revision { job, ..revision.clone() };
                let known = all.entry((job, revision.revision)).or_insert_with(own);
                known.ranks = known.ranks.max(revision.ranks);
                known.time_ns = known.time_ns.min(revision.time_ns);
            }
        }
        all.into_values().collect()
    }

    /// The jobs of the run.
    pub fn joined(&self, tables: &[&Table]) -> Table {
        let mut all = Table::new();
        for (folder, table) in tables.iter().enumerate() {
            for (id, info) in *table {
                let id = self.number(folder, *id);
                let known = all.entry(id).or_insert_with(|| JobInfo { id, ..info.clone() });
                known.world = known.world.max(info.world);
                known.started_ns = known.started_ns.min(info.started_ns);
            }
        }
        all
    }
}

/// Gives each class a number: the lowest that an agent gave it, with the most attempts, since an agent may have missed
/// some. Where two would have one, the second gets one that is free.
fn numbered(folders: usize, classes: impl Iterator<Item = Vec<(usize, JobId, u64)>>) -> Vec<BTreeMap<JobId, JobId>> {
    let mut sorted: Vec<_> = classes
        .filter_map(|members| {
            let JobId { job, .. } = members.iter().map(|(_, id, _)| *id).min()?;
            let attempts = members.iter().filter(|(_, id, _)| id.job == job).map(|(_, id, _)| id.attempt);
            let wanted = JobId { job, attempt: attempts.max()? };
            Some((wanted, members.iter().map(|(.., since)| *since).min(), members))
        })
        .collect();
    sorted.sort();
    let mut free = sorted.last().map_or(0, |(wanted, ..)| wanted.job.saturating_add(1));
    let mut taken = BTreeSet::new();
    let mut of = vec![BTreeMap::new(); folders];
    for (wanted, _, members) in sorted {
        let number = match taken.insert(wanted) {
            true => wanted,
            false => {
                let number = JobId { job: free, ..wanted };
                free = free.saturating_add(1);
                number
            }
        };
        for (folder, id, _) in members.into_iter().filter(|(_, id, _)| *id != number) {
            if let Some(of) = of.get_mut(folder) {
                of.insert(id, number);
            }
        }
    }
    of
}

/// For each folder the first of those that it has jobs in common with.
fn kin<'a>(folders: usize, classes: impl Iterator<Item = &'a Vec<(usize, JobId, u64)>>) -> Vec<usize> {
    let mut kin: Vec<usize> = (0..folders).collect();
    for members in classes {
        let roots: BTreeSet<usize> = members.iter().filter_map(|(folder, ..)| kin.get(*folder).copied()).collect();
        let Some(&first) = roots.first() else { continue };
        kin.iter_mut().filter(|root| roots.contains(root)).for_each(|root| *root = first);
    }
    kin
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(jobs: &[(u32, u32, &str)]) -> Table {
        let info = |&(job, attempt, group): &(u32, u32, &str)| {
            let id = JobId { job, attempt };
            (id, JobInfo { id, group: group.into(), world: 2, ..JobInfo::default() })
        };
        jobs.iter().map(info).collect()
    }

    fn id(job: u32, attempt: u32) -> JobId {
        JobId { job, attempt }
    }

    #[test]
    fn what_has_one_group_is_one_job_however_agents_number_it() {
        let (a, b) = (table(&[(0, 0, "x"), (1, 0, "y"), (2, 0, "only a")]), table(&[(0, 0, "y"), (1, 0, "x")]));
        let numbers = Numbers::of(&[&a, &b]);
        assert_eq!(numbers.number(0, id(0, 0)), numbers.number(1, id(1, 0)));
        assert_eq!(numbers.number(0, id(1, 0)), numbers.number(1, id(0, 0)));
        assert_ne!(numbers.number(0, id(0, 0)), numbers.number(0, id(1, 0)));
        assert!(numbers.are_kin(0, 1));
        let all = numbers.joined(&[&a, &b]);
        assert_eq!(all.keys().map(|id| id.job).collect::<Vec<_>>(), [0, 2, 3]);
    }

    #[test]
    fn an_agent_that_counts_fewer_restarts_has_the_attempts_of_the_one_that_counts_them() {
        let (a, b) = (table(&[(0, 0, "x"), (0, 1, "y")]), table(&[(0, 0, "x"), (1, 0, "y")]));
        let numbers = Numbers::of(&[&b, &a]);
        assert_eq!((numbers.number(0, id(1, 0)), numbers.number(1, id(0, 1))), (id(0, 1), id(0, 1)));
    }

    #[test]
    fn jobs_that_have_nothing_in_common_are_two_and_so_are_their_folders() {
        let (a, b, c) = (table(&[(0, 0, "x")]), table(&[(0, 0, "y")]), table(&[(0, 0, "x"), (1, 0, "z")]));
        let numbers = Numbers::of(&[&a, &b, &c]);
        assert_ne!(numbers.number(0, id(0, 0)), numbers.number(1, id(0, 0)));
        assert_eq!([numbers.are_kin(0, 1), numbers.are_kin(0, 2), numbers.are_kin(1, 2)], [false, true, false]);
        let old = Table::new();
        assert!(Numbers::of(&[&old, &old]).are_kin(0, 1));
        assert_eq!(Numbers::of(&[&old, &old]).number(1, id(0, 0)), id(0, 0));
    }
}
