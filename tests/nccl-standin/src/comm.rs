//! Communicators: handles that are never used twice, and a thread for each.

use std::{
    collections::{HashMap, VecDeque},
    ffi::c_int,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::{
    Outcome, code, faults,
    group::{self, Transfer},
    log,
    room::{ABORTED, Id, LEFT, MOST, Room},
    stream::{self, Gate},
};

/// Groups that were begun in this process.
static GROUPS: AtomicU32 = AtomicU32::new(0);
/// Groups that are not done, by stream.
static PENDING: Mutex<Option<HashMap<usize, c_int>>> = Mutex::new(None);
static ALL: Mutex<Option<HashMap<usize, Known>>> = Mutex::new(None);
/// Between looks at what another rank does.
const SHORT: Duration = Duration::from_micros(200);

/// What a handle stands for.
enum Known {
    Alive(Arc<Comm>),
    /// How it ended.
    Ended(&'static str),
}

enum Job {
    Group(u32, Vec<Transfer>, Option<Gate>),
    Finalize,
}

/// One rank's end of a communicator.
pub struct Comm {
    /// This rank.
    pub rank: usize,
    /// How many there are.
    pub size: usize,
    /// What `ncclCommGetAsyncError` says.
    state: AtomicI32,
    aborted: AtomicBool,
    finalized: AtomicBool,
    jobs: Mutex<VecDeque<Job>>,
    more: Condvar,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// `ncclCommInitRankConfig`: a handle.
pub fn begin(size: c_int, id: Id, rank: c_int) -> Result<usize, c_int> {
    let (ranks, number) = (size as usize, rank as usize);
    if size < 1 || rank < 0 || rank >= size || ranks > MOST {
        return Err(log::refuse(
            None,
            code::ARGUMENT,
            &format!("rank {rank} of {size} (the stand-in has {MOST} at most)"),
        ));
    }
    let comm = Arc::new(Comm {
        rank: number,
        size: ranks,
        state: AtomicI32::new(code::IN_PROGRESS),
        aborted: AtomicBool::new(false),
        finalized: AtomicBool::new(false),
        jobs: Mutex::default(),
        more: Condvar::new(),
        thread: Mutex::default(),
    });
    let worker = comm.clone();
    let thread =
        thread::Builder::new().name("nccl-standin".into()).spawn(move || worker.work(&id)).map_err(|_| code::SYSTEM)?;
    *lock(&comm.thread) = Some(thread);
    let mut all = lock(&ALL);
    let all = all.get_or_insert_with(|| {
        // SAFETY: a function without arguments, of a library that is never unloaded.
        unsafe { libc::atexit(count_left) };
        HashMap::new()
    });
    // No pointer to anything: a stale one is known as such.
    let handle = (all.len() + 1) << 12;
    all.insert(handle, Known::Alive(comm));
    Ok(handle)
}

/// The communicator of a handle.
pub fn find(name: &str, handle: usize) -> Result<Arc<Comm>, c_int> {
    let why = match lock(&ALL).get_or_insert_default().get(&handle) {
        Some(Known::Alive(comm)) => return Ok(comm.clone()),
        Some(Known::Ended(how)) => format!("{name} on a communicator that was {how}"),
        None => format!("{name} on what is no communicator"),
    };
    Err(log::refuse(None, code::ARGUMENT, &why))
}

/// The communicator of a handle, if nothing of it goes on.
pub fn ready(name: &str, handle: usize) -> Result<Arc<Comm>, c_int> {
    let comm = find(name, handle)?;
    match comm.state() {
        code::SUCCESS => {}
        code::IN_PROGRESS => {
            return Err(log::refuse(
                Some(comm.rank),
                code::ARGUMENT,
                &format!("{name} while the call before it goes on"),
            ));
        }
        code => return Err(code),
    }
    if comm.finalized.load(Ordering::Acquire) && name != "ncclCommDestroy" {
        return Err(log::refuse(
            Some(comm.rank),
            code::ARGUMENT,
            &format!("{name} on a communicator that was finalized"),
        ));
    }
    Ok(comm)
}

/// `ncclCommFinalize`.
pub fn finalize(handle: usize) -> Outcome {
    group::none_open("ncclCommFinalize")?;
    let comm = ready("ncclCommFinalize", handle)?;
    comm.finalized.store(true, Ordering::Release);
    comm.set(code::IN_PROGRESS);
    comm.give(Job::Finalize);
    Ok(code::IN_PROGRESS)
}

/// `ncclCommDestroy`.
pub fn destroy(handle: usize) -> Outcome {
    group::none_open("ncclCommDestroy")?;
    let comm = ready("ncclCommDestroy", handle)?;
    if !comm.finalized.load(Ordering::Acquire) {
        return Err(log::refuse(Some(comm.rank), code::USAGE, "ncclCommDestroy without ncclCommFinalize"));
    }
    end(handle, &comm, "destroyed");
    Ok(code::SUCCESS)
}

/// `ncclCommAbort`.
pub fn abort(handle: usize) -> Outcome {
    group::none_open("ncclCommAbort")?;
    let comm = find("ncclCommAbort", handle)?;
    comm.aborted.store(true, Ordering::Release);
    comm.more.notify_all();
    end(handle, &comm, "aborted");
    Ok(code::SUCCESS)
}

/// Ends its thread, and its handle.
fn end(handle: usize, comm: &Comm, how: &'static str) {
    lock(&ALL).get_or_insert_default().insert(handle, Known::Ended(how));
    if let Some(thread) = lock(&comm.thread).take() {
        // A thread that panicked has said so.
        let _ = thread.join();
    }
}

/// At the process's orderly end.
extern "C" fn count_left() {
    let left = lock(&ALL).iter().flat_map(HashMap::values).filter(|known| matches!(known, Known::Alive(_))).count();
    if left > 0 {
        log::violation(None, &format!("the process ends, and {left} of its communicators did not"));
    }
}

/// Groups on a stream that are not done.
pub fn pending(stream: usize) -> c_int {
    lock(&PENDING).get_or_insert_default().get(&stream).copied().unwrap_or_default()
}

fn count(streams: &[usize], by: c_int) {
    let mut pending = lock(&PENDING);
    let pending = pending.get_or_insert_default();
    streams.iter().for_each(|stream| *pending.entry(*stream).or_default() += by);
}

fn streams_of(transfers: &[Transfer]) -> Vec<usize> {
    let mut streams: Vec<usize> = transfers.iter().map(|t| t.stream).collect();
    streams.sort_unstable();
    streams.dedup();
    streams
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each is a table that one statement changes: a panic elsewhere leaves it whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Comm {
    /// What `ncclCommGetAsyncError` says.
    pub fn state(&self) -> c_int {
        self.state.load(Ordering::Acquire)
    }

    /// Whether what goes on is to stop.
    pub fn is_aborted(&self) -> bool {
        self.aborted.load(Ordering::Acquire)
    }

    /// Gives a group to the thread.
    pub fn launch(&self, transfers: Vec<Transfer>) -> Outcome {
        let streams = streams_of(&transfers);
        let gate = stream::gate(&streams).map_err(|why| log::refuse(Some(self.rank), code::USAGE, &why))?;
        count(&streams, 1);
        if !faults::get().late && gate.is_none() {
            self.set(code::IN_PROGRESS);
        }
        self.give(Job::Group(GROUPS.fetch_add(1, Ordering::Relaxed) + 1, transfers, gate));
        Ok(code::IN_PROGRESS)
    }

    fn give(&self, job: Job) {
        lock(&self.jobs).push_back(job);
        self.more.notify_all();
    }

    fn set(&self, state: c_int) {
        self.state.store(state, Ordering::Release);
    }

    /// The thread.
    fn work(&self, id: &Id) {
        let room = match Room::enter(id, self.size, self.rank) {
            Ok(room) => room,
            Err(why) => return self.set(log::refuse(Some(self.rank), code::ARGUMENT, &why)),
        };
        let begin = Instant::now();
        while !room.is_full() && !self.is_aborted() {
            if begin.elapsed() > faults::get().bound {
                self.set(log::refuse(Some(self.rank), code::SYSTEM, "not all ranks joined, and no one aborted it"));
                self.await_abort();
            }
            thread::sleep(SHORT);
        }
        if !self.is_aborted() {
            self.set(code::SUCCESS);
        }
        while let Some(job) = self.next() {
            match job {
                Job::Group(number, mut transfers, gate) => self.make(&room, number, &mut transfers, gate),
                Job::Finalize => return self.finish(&room),
            }
        }
        for job in lock(&self.jobs).drain(..) {
            if let Job::Group(_, transfers, _gate) = job {
                count(&streams_of(&transfers), -1);
            }
        }
        room.leave(ABORTED);
    }

    fn await_abort(&self) {
        while !self.is_aborted() {
            thread::sleep(SHORT);
        }
    }

    /// The next job, or none after an abort.
    fn next(&self) -> Option<Job> {
        let mut jobs = lock(&self.jobs);
        loop {
            if self.is_aborted() {
                return None;
            }
            if let Some(job) = jobs.pop_front() {
                return Some(job);
            }
            jobs = self.more.wait_timeout(jobs, Duration::from_millis(1)).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The streams go on when the gate is dropped.
    fn make(&self, room: &Room, number: u32, transfers: &mut [Transfer], gate: Option<Gate>) {
        let come = gate.as_ref().is_none_or(|gate| gate.is_come_to(|| self.is_aborted()));
        let outcome = if come {
            group::run(self, room, number, transfers)
        } else {
            log::note(self.rank, &format!("group {number}: aborted before its stream came to it"));
            Ok(())
        };
        match outcome {
            Ok(()) if faults::get().late || gate.is_some() => {}
            Ok(()) => self.set(code::SUCCESS),
            // The stream stands still until an abort.
            Err(code) => {
                self.set(code);
                self.await_abort();
            }
        }
        count(&streams_of(transfers), -1);
    }

    /// Whoever still sends to this rank, or receives from it, finds that it has left.
    fn finish(&self, room: &Room) {
        room.leave(LEFT);
        self.set(code::SUCCESS);
    }
}
