//! The jobs of a run: which one a rank is of, and which attempt of it.
//!
//! Several jobs may come to one agent, in turn or at once, each with a rank 0 and a world of its own. What a rank says of its job
//! ([`JobSigns`]) decides:
//!
//! - Ranks whose process group has one number are of one attempt, whatever else they say.
//! - A rank without such a number joins the newest attempt whose launch is the same, as long as some rank of that is
//!   attached and the rank itself was no other process there. A process that captured before it had a group stays where
//!   it was, and its attempt has that group from then on.
//! - Whoever fits nowhere begins something new: another attempt of a job whose launcher says that it has started its ranks
//!   again, and else another job.
//!
//! So what is not known to belong together is apart. A group's number that a rank has from another process than before was left
//! in a store by an earlier attempt: it is another attempt's too.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use flexmodel_run::{
    format::{JobId, JobInfo},
    limits,
};
use wire::{
    control::{ALONE, Hello, JobSigns},
    passes::{Run, runs},
};

use super::board::{now_ns, short, start_of};
use crate::secrets;

/// Most attempts of a run.
const MAX_JOBS: usize = 1 << 12;
/// Newest attempts whose processes are remembered.
const REMEMBERED: usize = 16;
/// Most processes that are remembered of an attempt.
const MAX_RANKS: usize = 1 << 16;
/// Most bytes of a sign that are kept.
const MAX_SIGN: usize = 256;
/// Most bytes of a job's command, and of its hooks, that are kept.
const MAX_COMMAND: usize = 16 << 10;

/// An attempt of a job.
#[derive(Debug)]
struct Known {
    /// Without command and hooks.
    info: JobInfo,
    /// Its group's number; 0 for none.
    group: u64,
    restarts: Option<u32>,
    /// The process of each rank; those of the newest attempts.
    pids: HashMap<u32, u32>,
    /// Connections of its ranks.
    attached: usize,
    /// Of some rank it is not known which others are on its node.
    somewhere: bool,
}

/// All of them, the newest last.
#[derive(Debug)]
pub struct Jobs(Arc<Mutex<Vec<Known>>>);

/// A connection of a rank of a job, as long as it lasts.
#[derive(Debug)]
pub struct Member {
    /// Which.
    pub id: JobId,
    /// What is now known of it, if that is news.
    pub news: Option<JobInfo>,
    jobs: Arc<Mutex<Vec<Known>>>,
}

impl Jobs {
    /// Of a run that has these already.
    pub fn new(before: Vec<JobInfo>) -> Self {
        Self(Arc::new(Mutex::new(before.into_iter().map(Known::again).collect())))
    }

    /// Number of ranks of an attempt.
    pub fn world(&self, id: JobId) -> u32 {
        lock(&self.0).iter().find(|known| known.info.id == id).map_or(0, |known| known.info.world)
    }

    /// The number of an attempt's process group; 0: it has none, or none is known.
    pub fn group(&self, id: JobId) -> u64 {
        lock(&self.0).iter().find(|known| known.info.id == id).map_or(0, |known| known.group)
    }

    /// The ranks of an attempt that its launcher started on this node, if it says so.
    pub fn here(&self, id: JobId) -> Option<BTreeSet<u32>> {
        let all = lock(&self.0);
        let known = all.iter().find(|known| known.info.id == id)?;
        let here: BTreeSet<u32> = known.info.here.iter().copied().flat_map(Run::ranks).collect();
        (!here.is_empty()).then_some(here)
    }

    /// A rank attaches.
    ///
    /// # Errors
    /// There are too many jobs.
    pub fn join(&self, hello: &Hello) -> Result<Member, String> {
        let mut all = lock(&self.0);
        let in_group = all.iter().rposition(|known| known.has_group_of(hello));
        let at = match in_group.or_else(|| all.iter().rposition(|known| known.is_like(hello))) {
            Some(at) => at,
            None if all.len() >= MAX_JOBS => {
                return Err(format!("this run has {MAX_JOBS} jobs already; give the next ones another --out"));
            }
            None => {
                let begun = Known::begun(&all, hello);
                all.push(begun);
                if let Some(old) = all.len().checked_sub(REMEMBERED + 1).and_then(|at| all.get_mut(at)) {
                    old.pids = HashMap::new();
                }
                all.len() - 1
            }
        };
        let name = name_of(&all, hello.job.group);
        let Some(known) = all.get_mut(at) else { return Err("there is no job of it".into()) };
        Ok(Member { news: known.take(hello, name), id: known.info.id, jobs: self.0.clone() })
    }
}

impl Known {
    /// One of which the manifest tells.
    fn again(info: JobInfo) -> Self {
        let number = info.group.split('.').next().unwrap_or_default();
        Self {
            group: u64::from_str_radix(number, 16).unwrap_or_default(),
            restarts: None,
            pids: HashMap::new(),
            attached: 0,
            somewhere: info.here.is_empty(),
            info: JobInfo { command: Vec::new(), hooks: String::new(), ..info },
        }
    }

    /// What begins with a rank that fits nowhere.
    fn begun(all: &[Self], hello: &Hello) -> Self {
        let JobSigns { launch, launcher, restarts, .. } = &*hello.job;
        let launcher = start_of(launcher, MAX_SIGN);
        let attempt = restarts.unwrap_or_default();
        // Where several jobs of one launcher are started again, they come in the same order.
        let of_launcher = all.iter().filter(|known| !launcher.is_empty() && known.info.launcher == launcher);
        let mut last: BTreeMap<u32, u32> = BTreeMap::new();
        for JobId { job, attempt } in of_launcher.map(|known| known.info.id) {
            last.entry(job).and_modify(|last| *last = attempt.max(*last)).or_insert(attempt);
        }
        let again = last.into_iter().find(|(_, last)| *last < attempt).map(|(job, _)| job);
        let next = || all.iter().map(|known| known.info.id.job).max().map_or(0, |job| job + 1);
        let info = JobInfo {
            id: JobId { job: again.unwrap_or_else(next), attempt },
            launch: start_of(launch, MAX_SIGN).to_owned(),
            launcher: launcher.to_owned(),
            started_ns: now_ns(),
            ..JobInfo::default()
        };
        Self { info, group: 0, restarts: *restarts, pids: HashMap::new(), attached: 0, somewhere: false }
    }

    /// Whether a rank is in the process group of this attempt.
    fn has_group_of(&self, hello: &Hello) -> bool {
        hello.job.group != 0 && self.group == hello.job.group && self.is_free_for(hello)
    }

    /// No other process was this rank.
    fn is_free_for(&self, hello: &Hello) -> bool {
        self.pids.get(&hello.rank).is_none_or(|pid| *pid == hello.pid)
    }

    /// Whether a rank is of this attempt, where not both have a group.
    fn is_like(&self, hello: &Hello) -> bool {
        let JobSigns { group, launch, restarts, .. } = &*hello.job;
        let has_group = *group != 0;
        if (has_group && self.group != 0) || launch.is_empty() || self.info.launch != start_of(launch, MAX_SIGN) {
            return false;
        }
        if launch.starts_with(ALONE) {
            return !has_group;
        }
        let was_here = self.pids.get(&hello.rank) == Some(&hello.pid);
        let fits = was_here || !has_group && self.attached > 0 && self.is_free_for(hello);
        fits && self.restarts == *restarts && self.info.world == hello.world
    }

    /// A rank's launcher has started these on this node; another's may have started others.
    fn is_here(&mut self, ranks: Option<Run>, hello: &Hello) {
        // A rank that its launcher did not start, but another one, has the environment of that.
        let can_be = |run: &Run| {
            let end = u64::from(run.first) + u64::from(run.count);
            let own = u64::from(hello.rank);
            run.by == 1
                && u64::from(run.first) <= own
                && own < end
                && end <= u64::from(hello.world.min(limits::RANKS as u32))
        };
        match ranks.filter(|run| !self.somewhere && can_be(run)) {
            Some(run) if self.info.here.contains(&run) => {}
            Some(run) => {
                let known = self.info.here.iter().copied().flat_map(Run::ranks);
                let all: BTreeSet<u32> = known.chain(run.ranks()).collect();
                self.info.here = runs(&all.into_iter().collect::<Vec<_>>());
            }
            None => (self.somewhere, self.info.here) = (true, Vec::new()),
        }
    }

    /// Takes a rank in, whose group is called `name`; what is known now, if that is news.
    fn take(&mut self, hello: &Hello, name: String) -> Option<JobInfo> {
        let before = (self.info.world, self.info.here.clone(), self.info.group.clone());
        if self.group == 0 {
            (self.group, self.info.group) = (hello.job.group, name);
        }
        self.info.world = self.info.world.max(hello.world);
        self.is_here(hello.job.here, hello);
        if self.pids.len() < MAX_RANKS {
            self.pids.insert(hello.rank, hello.pid);
        }
        self.attached += 1;
        (before != (self.info.world, self.info.here.clone(), self.info.group.clone())).then(|| JobInfo {
            command: short(secrets::hidden(&hello.command), MAX_COMMAND),
            hooks: start_of(&hello.hooks, MAX_COMMAND).to_owned(),
            ..self.info.clone()
        })
    }
}

/// What a group is called that no attempt has yet: its number, and where an earlier attempt had the same, which of them it is.
fn name_of(all: &[Known], group: u64) -> String {
    match (group, all.iter().filter(|known| known.group == group).count()) {
        (0, _) => String::new(),
        (_, 0) => format!("{group:016x}"),
        (_, earlier) => format!("{group:016x}.{earlier}"),
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if let Some(known) = lock(&self.jobs).iter_mut().find(|known| known.info.id == self.id) {
            known.attached = known.attached.saturating_sub(1);
        }
    }
}

fn lock(jobs: &Mutex<Vec<Known>>) -> MutexGuard<'_, Vec<Known>> {
    jobs.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use wire::{control::CONTROL_VERSION, env::OnFull};

    use super::*;

    fn hello(rank: u32, pid: u32, group: u64, launch: &str) -> Hello {
        Hello {
            version: CONTROL_VERSION,
            rank,
            world: 2,
            pid,
            node: String::new(),
            torch: String::new(),
            python: String::new(),
            command: vec!["train.py".into(), "--api-key=SECRET".into()],
            hooks: "*".into(),
            on_full: OnFull::Wait,
            wrapper: String::new(),
            job: Box::new(JobSigns {
                group,
                launch: launch.into(),
                launcher: "torchrun".into(),
                restarts: Some(0),
                here: None,
            }),
        }
    }

    fn again(restarts: u32, hello: Hello) -> Hello {
        Hello { job: Box::new(JobSigns { restarts: Some(restarts), ..*hello.job }), ..hello }
    }

    /// Job and attempt of each, while all are attached.
    fn ids(jobs: &Jobs, hellos: &[Hello]) -> Vec<(u32, u32)> {
        let members: Vec<Member> = hellos.iter().map(|hello| jobs.join(hello).unwrap()).collect();
        members.iter().map(|member| (member.id.job, member.id.attempt)).collect()
    }

    fn none() -> Jobs {
        Jobs::new(Vec::new())
    }

    #[test]
    fn jobs_at_once_are_told_apart_by_their_groups() {
        let at_once = [hello(0, 1, 7, "none"), hello(0, 2, 8, "none"), hello(1, 3, 8, "none"), hello(1, 4, 7, "none")];
        assert_eq!(ids(&none(), &at_once), [(0, 0), (1, 0), (1, 0), (0, 0)]);
    }

    #[test]
    fn ranks_that_were_started_again_are_another_attempt() {
        let jobs = none();
        let elastic = |pid, group, restarts| [0, 1].map(|rank| again(restarts, hello(rank, pid + rank, group, "x")));
        assert_eq!(ids(&jobs, &elastic(10, 7, 0)), [(0, 0); 2]);
        assert_eq!(ids(&jobs, &elastic(20, 8, 2)), [(0, 2); 2]);
        // Another group that the same ranks make is another job of that attempt.
        assert_eq!(ids(&jobs, &elastic(20, 9, 2)), [(1, 2); 2]);
        assert_eq!(ids(&jobs, &elastic(30, 10, 3)), [(0, 3); 2]);
        assert_eq!(ids(&jobs, &elastic(30, 11, 3)), [(1, 3); 2]);
    }

    #[test]
    fn a_number_that_another_process_had_is_of_an_earlier_attempt() {
        let jobs = none();
        let of = |pid| [hello(0, pid, 7, "x"), hello(1, pid + 1, 7, "x")];
        assert_eq!(ids(&jobs, &of(10)), [(0, 0); 2]);
        assert_eq!(ids(&jobs, &of(20)), [(1, 0); 2]);
        let news = |hello: Hello| jobs.join(&hello).unwrap().news.take().map(|info| info.group);
        assert_eq!(news(hello(0, 30, 7, "x")), Some("0000000000000007.2".into()));
        assert_eq!(news(hello(1, 31, 7, "x")), None);
    }

    #[test]
    fn who_captured_before_it_had_a_group_stays_where_it_was() {
        let jobs = none();
        let early = [hello(0, 1, 0, "x"), hello(1, 2, 0, "x")].map(|hello| jobs.join(&hello).unwrap());
        assert_eq!(early.each_ref().map(|member| member.id.job), [0, 0]);
        assert_eq!(ids(&jobs, &[hello(1, 2, 7, "x"), hello(0, 1, 7, "x")]), [(0, 0); 2]);
        drop(early);
        assert_eq!(ids(&jobs, &[hello(0, 3, 0, "x")]), [(1, 0)], "none of its ranks is there any more");
    }

    #[test]
    fn processes_that_know_nothing_of_each_other_are_jobs_of_their_own() {
        let jobs = none();
        let alone = |pid: u32| Hello { world: 1, ..hello(0, pid, 0, &format!("{ALONE}{pid}")) };
        assert_eq!(ids(&jobs, &[alone(1), alone(2), alone(1)]), [(0, 0), (1, 0), (0, 0)]);
        // They turn out to be ranks of one job, whichever says so first.
        let of_one = |rank, pid| {
            let job = Box::new(JobSigns { group: 7, ..*alone(pid).job });
            Hello { job, ..hello(rank, pid, 7, "") }
        };
        assert_eq!(ids(&jobs, &[of_one(1, 2), of_one(0, 1)]), [(2, 0); 2]);
    }

    #[test]
    fn which_ranks_are_here_is_known_if_all_launchers_say_it() {
        let jobs = none();
        let here = |rank, here| {
            let hello = hello(rank, rank + 1, 7, "x");
            let job = Box::new(JobSigns { here, ..*hello.job });
            jobs.join(&Hello { job, world: 8, ..hello }).unwrap().news.take().map(|info| info.here)
        };
        let run = |first, count| Run { first, by: 1, count };
        assert_eq!(here(0, Some(run(0, 2))), Some(vec![run(0, 2)]));
        assert_eq!(here(1, Some(run(0, 2))), None);
        // Two launchers may share an agent.
        assert_eq!(here(2, Some(run(2, 2))), Some(vec![run(0, 4)]));
        assert_eq!(here(4, None), Some(vec![]));
        assert_eq!(here(5, Some(run(4, 2))), None);
        // What a launcher says of one process is not said of those that this one starts.
        let jobs = none();
        let spawned = |rank| {
            let hello = hello(rank, rank + 1, 7, "x");
            let job = Box::new(JobSigns { here: Some(run(0, 1)), ..*hello.job });
            jobs.join(&Hello { job, ..hello }).unwrap().news.take().map(|info| info.here)
        };
        assert_eq!([spawned(0), spawned(1)], [Some(vec![run(0, 1)]), Some(vec![])]);
    }

    #[test]
    fn an_agent_that_takes_a_run_over_knows_its_jobs() {
        let jobs = none();
        let first = jobs.join(&hello(0, 1, 7, "x")).unwrap();
        let alone = jobs.join(&Hello { world: 1, ..hello(0, 5, 0, &format!("{ALONE}5")) }).unwrap();
        let told: Vec<JobInfo> = [first, alone].into_iter().filter_map(|mut member| member.news.take()).collect();
        assert_eq!(told[0].command, ["train.py", "--api-key=***"]);
        let next = Jobs::new(told);
        let alone = Hello { world: 1, ..hello(0, 5, 0, &format!("{ALONE}5")) };
        assert_eq!(ids(&next, &[hello(1, 2, 7, "x"), alone, hello(0, 9, 8, "y")]), [(0, 0), (1, 0), (2, 0)]);
    }

    #[test]
    fn there_is_a_bound_on_jobs() {
        let jobs = none();
        let join = |n: usize| jobs.join(&hello(0, 1, n as u64 + 1, "x")).map(|_| ());
        assert!((0..MAX_JOBS).all(|n| join(n).is_ok()));
        assert!(join(MAX_JOBS).unwrap_err().contains("--out"));
    }
}
