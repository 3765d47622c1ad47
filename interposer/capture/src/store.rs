//! The store of the job's process group, in which ranks of several nodes decide on a change of hooks.
//!
//! A thread of ours does in it what the agent asks and what registers need, over a connection of ours: nobody knows how long
//! a store takes to answer, so whoever waits has a bound of its own. While a value is waited for it looks every [`LOOK`].
//! It takes no lock of the engine's, which may be held by whoever waits here.

use std::{
    collections::VecDeque,
    ffi::c_void,
    fmt,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU8, Ordering},
        mpsc::sync_channel,
    },
    time::{Duration, Instant},
};

use wire::{
    control::MAX_QUESTIONS,
    revision::{Register, Verdict},
    store::{ABANDONED, MAX_VALUE, StoreOp},
    tap_abi::{self, BridgeTable, Str},
};

use crate::threads;

/// How long a rank that is to decide waits for the store.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// How often it is looked for a value that is waited for.
const LOOK: Duration = Duration::from_millis(100);
/// How long the end of a process waits for what is being done in the store.
const FAREWELL: Duration = Duration::from_millis(200);
/// Most that waits to be done: the questions of an agent and of the one before it, and two registers.
const MAX_OPEN: usize = 2 * MAX_QUESTIONS + 2;

/// A value that is there, or none; or why nobody can say.
pub type Found = Result<Option<Vec<u8>>, String>;
/// Who hears of it, on the store's thread.
type Done = Box<dyn FnOnce(Found) + Send>;

/// The store of this process's job, if it has one.
pub struct JobStore {
    at: Mutex<At>,
    bridge: &'static BridgeTable,
}

enum At {
    /// There is none, for this reason.
    Absent(String),
    Open(Arc<Service>),
}

impl JobStore {
    /// No process group is known yet.
    pub fn new(bridge: &'static BridgeTable) -> Self {
        let why = "this rank has joined no process group of several nodes";
        Self { at: Mutex::new(At::Absent(why.into())), bridge }
    }

    /// The bridge has opened this one, which takes the place of one before. The thread may not begin, with this error.
    ///
    /// # Safety
    /// `store` came from the bridge, which nobody else gives back.
    pub unsafe fn open(&self, store: *mut c_void) -> Result<(), String> {
        let handle = Handle { store, bridge: self.bridge };
        let service = Arc::new(Service::default());
        let serves = service.clone();
        let begun = threads::begin("flexmodel-store", move || serves.run(&handle));
        let (at, outcome) = match begun {
            Ok(()) => (At::Open(service), Ok(())),
            Err(e) => {
                let why = format!("no thread for the job's store: {e}");
                (At::Absent(why.clone()), Err(why))
            }
        };
        self.replace(at);
        outcome
    }

    /// There is none that ranks can decide in.
    pub fn absent(&self, why: &str) {
        self.replace(At::Absent(why.to_owned()));
    }

    fn replace(&self, at: At) {
        let before = std::mem::replace(&mut *self.lock(), at);
        if let At::Open(service) = before {
            service.end();
        }
    }

    fn lock(&self) -> MutexGuard<'_, At> {
        self.at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn service(&self) -> Result<Arc<Service>, String> {
        match &*self.lock() {
            At::Absent(why) => Err(why.clone()),
            At::Open(service) => Ok(service.clone()),
        }
    }

    /// Has it done by the store's thread, which tells `done`.
    pub fn ask(&self, op: StoreOp, done: impl FnOnce(Found) + Send + 'static) {
        match self.service() {
            Ok(service) => service.ask(op, Box::new(done)),
            Err(why) => done(Err(why)),
        }
    }

    /// A register under this key, which says commit by this value.
    ///
    /// # Errors
    /// Why there is no store.
    pub fn register(&self, key: String, commit: Vec<u8>) -> Result<StoreRegister, String> {
        Ok(StoreRegister { service: self.service()?, key, commit, known: Arc::default() })
    }

    /// The process ends: waits within a bound for the thread, which may be in torch.
    pub fn finish(&self) {
        if let Ok(service) = self.service() {
            service.end();
            service.wait_for_end(FAREWELL);
        }
    }
}

/// The bridge's store.
struct Handle {
    store: *mut c_void,
    bridge: &'static BridgeTable,
}

// SAFETY: the bridge's stores may be used from any thread, and this one is by the service's alone.
unsafe impl Send for Handle {}

impl Handle {
    fn settle(&self, key: &str, value: &[u8]) -> Found {
        hearing(|context| {
            // SAFETY: key and value live through the call, and `context` is what `hear` takes.
            unsafe {
                (self.bridge.store_settle)(self.store, Str::new(key), value.as_ptr(), value.len(), context, hear);
            }
        })
    }

    fn look(&self, key: &str) -> Found {
        // SAFETY: as in `settle`.
        hearing(|context| unsafe { (self.bridge.store_look)(self.store, Str::new(key), context, hear) })
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: it came from the bridge and is given back once.
        unsafe { (self.bridge.store_leave)(self.store) };
    }
}

/// What is heard in a call of the bridge's.
fn hearing(call: impl FnOnce(*mut c_void)) -> Found {
    let mut found: Found = Ok(None);
    call((&raw mut found).cast());
    found
}

unsafe extern "C" fn hear(context: *mut c_void, failed: bool, bytes: *const u8, len: usize) {
    // SAFETY: the context is that of `hearing`; the bytes live through the call.
    let (found, bytes) = unsafe { (&mut *context.cast::<Found>(), tap_abi::array(bytes, len)) };
    *found = if failed {
        Err(format!("the job's store fails: {}", String::from_utf8_lossy(bytes)))
    } else if len > MAX_VALUE {
        Err("a value in the job's store is longer than any of ours".into())
    } else {
        Ok(Some(bytes.to_vec()))
    };
}

/// What is to be done in a store, and the thread that does it.
#[derive(Default)]
struct Service {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    ops: VecDeque<(StoreOp, Done)>,
    waits: Vec<Wait>,
    /// How many of both the thread has taken out and not dealt with.
    in_hand: usize,
    /// When it was looked for what is waited for.
    looked: Option<Instant>,
    ending: bool,
    ended: bool,
}

struct Wait {
    key: String,
    until: Instant,
    done: Done,
}

enum Next {
    Op(StoreOp, Done),
    Look(Vec<Wait>),
    End,
}

impl Service {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self, op: StoreOp, done: Done) {
        let mut queue = self.lock();
        let why = match (queue.ending, queue.ops.len() + queue.waits.len() + queue.in_hand >= MAX_OPEN) {
            (true, _) => "the process group has ended",
            (_, true) => "the job's store does not answer",
            _ if !op.is_short() => "a key or a value is too long",
            _ => {
                queue.ops.push_back((op, done));
                drop(queue);
                return self.changed.notify_all();
            }
        };
        drop(queue);
        done(Err(why.into()));
    }

    fn end(&self) {
        self.lock().ending = true;
        self.changed.notify_all();
    }

    fn wait_for_end(&self, limit: Duration) {
        let queue = self.lock();
        let _ = self.changed.wait_timeout_while(queue, limit, |queue| !queue.ended);
    }

    fn run(&self, store: &Handle) {
        loop {
            match self.next() {
                Next::Op(StoreOp::Settle { key, value }, done) => done(store.settle(&key, &value)),
                Next::Op(StoreOp::WaitFor { key, limit_ms }, done) => {
                    let until = Instant::now() + Duration::from_millis(limit_ms.into());
                    self.look(store, vec![Wait { key, until, done }]);
                }
                Next::Look(waits) => self.look(store, waits),
                Next::End => break,
            }
        }
        let mut queue = self.lock();
        let (ops, waits) = (std::mem::take(&mut queue.ops), std::mem::take(&mut queue.waits));
        queue.ended = true;
        drop(queue);
        self.changed.notify_all();
        let each = ops.into_iter().map(|(_, done)| done).chain(waits.into_iter().map(|wait| wait.done));
        each.for_each(|done| done(Err("the process group has ended".into())));
    }

    /// What is to be done now, once there is something.
    fn next(&self) -> Next {
        let mut queue = self.lock();
        queue.in_hand = 0;
        loop {
            if queue.ending {
                return Next::End;
            }
            let due = queue.looked.map_or(Duration::ZERO, |looked| LOOK.saturating_sub(looked.elapsed()));
            if !queue.waits.is_empty() && due.is_zero() {
                queue.looked = Some(Instant::now());
                queue.in_hand = queue.waits.len();
                return Next::Look(std::mem::take(&mut queue.waits));
            }
            if let Some((op, done)) = queue.ops.pop_front() {
                queue.in_hand = 1;
                return Next::Op(op, done);
            }
            let rest = if queue.waits.is_empty() { Duration::MAX } else { due };
            queue = if rest == Duration::MAX {
                self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner)
            } else {
                self.changed.wait_timeout(queue, rest).unwrap_or_else(PoisonError::into_inner).0
            };
        }
    }

    /// Looks for values; what is not there is waited for on.
    fn look(&self, store: &Handle, waits: Vec<Wait>) {
        for wait in waits {
            match store.look(&wait.key) {
                Ok(None) if Instant::now() < wait.until => {
                    let mut queue = self.lock();
                    queue.waits.push(wait);
                    queue.in_hand = queue.in_hand.saturating_sub(1);
                }
                found => (wait.done)(found),
            }
        }
    }
}

const OPEN: u8 = 0;
const COMMIT: u8 = 1;
const GONE: u8 = 2;

/// What is known of a register.
#[derive(Default)]
struct Known {
    verdict: AtomicU8,
    looking: AtomicBool,
}

impl Known {
    fn verdict(&self) -> Verdict {
        match self.verdict.load(Ordering::Acquire) {
            OPEN => Verdict::Open,
            COMMIT => Verdict::Commit,
            _ => Verdict::Abandoned,
        }
    }

    fn read(&self, value: &[u8], commit: &[u8]) -> Verdict {
        self.verdict.store(if value == commit { COMMIT } else { GONE }, Ordering::Release);
        self.verdict()
    }
}

/// A [`Register`] in the job's store.
pub struct StoreRegister {
    service: Arc<Service>,
    key: String,
    commit: Vec<u8>,
    known: Arc<Known>,
}

impl fmt::Debug for StoreRegister {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreRegister").field("key", &self.key).finish_non_exhaustive()
    }
}

impl Register for StoreRegister {
    fn settle(&self, verdict: Verdict) -> Option<Verdict> {
        let known = self.known.verdict();
        let value = match verdict {
            _ if known != Verdict::Open => return Some(known),
            Verdict::Open => return Some(known),
            Verdict::Commit => self.commit.clone(),
            Verdict::Abandoned => ABANDONED.to_vec(),
        };
        let (tell, told) = sync_channel(1);
        // Nobody hears it after the wait.
        let done = move |found| _ = tell.try_send(found);
        self.service.ask(StoreOp::Settle { key: self.key.clone(), value }, Box::new(done));
        let there = told.recv_timeout(PATIENCE).ok()?.ok()??;
        Some(self.known.read(&there, &self.commit))
    }

    /// As it was at the last look, which begins another.
    fn peek(&self) -> Verdict {
        let verdict = self.known.verdict();
        if verdict == Verdict::Open && !self.known.looking.swap(true, Ordering::AcqRel) {
            let (known, commit) = (self.known.clone(), self.commit.clone());
            let done = move |found: Found| {
                if let Ok(Some(value)) = found {
                    known.read(&value, &commit);
                }
                known.looking.store(false, Ordering::Release);
            };
            let op = StoreOp::WaitFor { key: self.key.clone(), limit_ms: PATIENCE.as_millis() as u32 };
            self.service.ask(op, Box::new(done));
        }
        verdict
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc::channel, thread};

    use super::*;
    use crate::testing::{BRIDGE, Store};

    /// A bound for hangs.
    const HANG: Duration = Duration::from_secs(30);

    fn open(store: &Store) -> JobStore {
        let job = JobStore::new(&BRIDGE);
        // SAFETY: the store is the stand-in's, and given back by the thread.
        unsafe { job.open(store.handle()) }.unwrap();
        job
    }

    fn ask(job: &JobStore, op: StoreOp) -> Found {
        let (tell, told) = channel();
        job.ask(op, move |found| tell.send(found).unwrap());
        told.recv_timeout(HANG).unwrap()
    }

    fn settle(value: &[u8]) -> StoreOp {
        StoreOp::Settle { key: "k".into(), value: value.to_vec() }
    }

    fn wait(limit_ms: u32) -> StoreOp {
        StoreOp::WaitFor { key: "k".into(), limit_ms }
    }

    #[test]
    fn a_key_is_settled_once_and_whoever_waits_hears_it() {
        let store = Store::default();
        let (left, right) = (open(&store), open(&store));
        assert_eq!(ask(&left, wait(0)), Ok(None));
        let (tell, told) = channel();
        left.ask(wait(HANG.as_millis() as u32), move |found| tell.send(found).unwrap());
        assert_eq!(ask(&right, settle(b"one")), Ok(Some(b"one".to_vec())));
        assert_eq!(ask(&left, settle(b"two")), Ok(Some(b"one".to_vec())), "a wait holds nothing up");
        assert_eq!(told.recv_timeout(HANG).unwrap(), Ok(Some(b"one".to_vec())));
        left.finish();
        assert!(ask(&left, wait(0)).unwrap_err().contains("has ended"));
    }

    #[test]
    fn registers_of_two_ranks_say_the_same() {
        let store = Store::default();
        let (left, right) = (open(&store), open(&store));
        for (name, settled) in [("a", Verdict::Commit), ("b", Verdict::Abandoned)] {
            let of = |job: &JobStore| job.register(name.into(), b"word".to_vec()).unwrap();
            let (one, other) = (of(&left), of(&right));
            assert_eq!((one.peek(), one.settle(Verdict::Open)), (Verdict::Open, Some(Verdict::Open)));
            assert_eq!(other.settle(settled), Some(settled));
            assert_eq!(one.settle(Verdict::Abandoned), Some(settled));
            let late = of(&left);
            let begun = Instant::now();
            while late.peek() == Verdict::Open {
                assert!(begun.elapsed() < HANG);
                thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(late.peek(), settled);
        }
    }

    #[test]
    fn what_is_neither_is_abandoned_and_a_store_that_fails_says_nothing() {
        let store = Store::default();
        let job = open(&store);
        store.put("k", b"forged");
        assert_eq!(
            job.register("k".into(), b"word".to_vec()).unwrap().settle(Verdict::Commit),
            Some(Verdict::Abandoned)
        );
        store.fail();
        assert!(ask(&job, settle(b"x")).unwrap_err().contains("the job's store fails"));
        assert_eq!(job.register("other".into(), b"word".to_vec()).unwrap().settle(Verdict::Abandoned), None);
    }

    #[test]
    fn without_a_store_it_is_said_why() {
        let job = JobStore::new(&BRIDGE);
        assert!(ask(&job, wait(0)).unwrap_err().contains("no process group"));
        job.absent("the job's store is a X");
        assert_eq!(ask(&job, wait(0)), Err("the job's store is a X".into()));
        assert!(job.register("k".into(), Vec::new()).is_err());
    }

    #[test]
    fn questions_beyond_a_number_are_refused_and_not_kept() {
        let store = Store::default();
        let job = open(&store);
        let (tell, told) = channel();
        for _ in 0..=MAX_OPEN {
            let tell = tell.clone();
            job.ask(wait(HANG.as_millis() as u32), move |found| _ = tell.send(found));
        }
        assert!(told.recv_timeout(HANG).unwrap().unwrap_err().contains("does not answer"));
        store.put("k", b"x");
        assert_eq!(told.recv_timeout(HANG).unwrap(), Ok(Some(b"x".to_vec())));
    }
}
