//! Streams, each a thread that does one thing after the other, and events.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    ffi::c_void,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use crate::{Outcome, capture, code, context, lock, refuse};

/// What a stream does.
pub enum Work {
    Call { function: unsafe extern "C" fn(*mut c_void), data: usize },
    Copy { to: usize, from: usize, bytes: usize },
    Record { event: usize, version: u64 },
    Await { event: usize, version: u64 },
}

/// A stream.
pub struct Queue {
    context: usize,
    backlog: Mutex<Backlog>,
    /// Something was queued, or done.
    news: Condvar,
}

#[derive(Default)]
struct Backlog {
    work: VecDeque<Work>,
    /// What it does now is not in there any more.
    busy: bool,
}

#[derive(Default)]
struct Event {
    context: usize,
    /// How often it was recorded, and which record has come.
    recorded: u64,
    come: u64,
}

/// By handle. The default stream of a context has the context's.
static STREAMS: Mutex<BTreeMap<usize, Arc<Queue>>> = Mutex::new(BTreeMap::new());
static EVENTS: Mutex<Option<HashMap<usize, Event>>> = Mutex::new(None);
static COME: Condvar = Condvar::new();
static LOCKED: Mutex<Vec<(usize, usize)>> = Mutex::new(Vec::new());

impl Queue {
    /// Waits until all that was queued is done.
    pub fn drain(&self) {
        let under_way = |backlog: &mut Backlog| backlog.busy || !backlog.work.is_empty();
        drop(self.news.wait_while(lock(&self.backlog), under_way).unwrap_or_else(PoisonError::into_inner));
    }

    fn work(&self) {
        loop {
            let idle = |backlog: &mut Backlog| backlog.work.is_empty();
            let backlog = self.news.wait_while(lock(&self.backlog), idle);
            let mut backlog = backlog.unwrap_or_else(PoisonError::into_inner);
            let work = backlog.work.pop_front();
            backlog.busy = true;
            drop(backlog);
            work.into_iter().for_each(Work::run);
            lock(&self.backlog).busy = false;
            self.news.notify_all();
        }
    }
}

impl Work {
    fn run(self) {
        match self {
            // SAFETY: who queued it vouched for it.
            Work::Call { function, data } => unsafe { function(std::ptr::with_exposed_provenance_mut(data)) },
            Work::Copy { to, from, bytes } => {
                let (from, to) =
                    (std::ptr::with_exposed_provenance::<u8>(from), std::ptr::with_exposed_provenance_mut::<u8>(to));
                // SAFETY: as above.
                unsafe { from.copy_to_nonoverlapping(to, bytes) };
            }
            Work::Record { event, version } => {
                if let Some(event) = events().get_or_insert_default().get_mut(&event) {
                    event.come = event.come.max(version);
                }
                COME.notify_all();
            }
            Work::Await { event, version } => {
                let waits = |all: &mut Option<HashMap<usize, Event>>| {
                    all.get_or_insert_default().get(&event).is_some_and(|event| event.come < version)
                };
                drop(COME.wait_while(events(), waits).unwrap_or_else(PoisonError::into_inner));
            }
        }
    }
}

fn events() -> MutexGuard<'static, Option<HashMap<usize, Event>>> {
    lock(&EVENTS)
}

/// A stream of a context.
pub fn make(context: usize) -> Outcome<*mut c_void> {
    static MADE: AtomicUsize = AtomicUsize::new(0);
    // As CUDA's it is even, and it is no context's.
    let handle = (MADE.fetch_add(1, Ordering::Relaxed) + 1) << 20;
    make_as(handle, context)?;
    Ok(std::ptr::without_provenance_mut(handle))
}

fn make_as(handle: usize, context: usize) -> Outcome<Arc<Queue>> {
    let queue = Arc::new(Queue { context, backlog: Mutex::default(), news: Condvar::new() });
    let worker = queue.clone();
    thread::Builder::new().name("cuda-standin".into()).spawn(move || worker.work()).map_err(|_| code::VALUE)?;
    lock(&STREAMS).insert(handle, queue.clone());
    Ok(queue)
}

/// The stream of a handle, which is of this thread's context.
pub fn of(call: &str, stream: *mut c_void) -> Outcome<Arc<Queue>> {
    let context = context::needed(call)?;
    let handle = if stream.is_null() { context } else { stream.addr() };
    let found = lock(&STREAMS).get(&handle).cloned();
    match found {
        None if stream.is_null() => make_as(handle, context),
        None => Err(code::HANDLE),
        Some(queue) if queue.context == context => Ok(queue),
        Some(_) => refuse(code::HANDLE, &format!("{call} on a stream of another context")),
    }
}

/// Queues something, unless the stream is captured: then it goes nowhere.
pub fn put(call: &str, stream: *mut c_void, work: Work) -> Outcome<Arc<Queue>> {
    let queue = of(call, stream)?;
    if !capture::is_captured(stream) {
        lock(&queue.backlog).work.push_back(work);
        queue.news.notify_all();
    }
    Ok(queue)
}

/// Waits for all streams of a context.
pub fn drain(context: usize) {
    let all: Vec<_> = lock(&STREAMS).values().filter(|queue| queue.context == context).cloned().collect();
    all.iter().for_each(|queue| queue.drain());
}

/// An event of a context.
pub fn make_event(context: usize) -> *mut c_void {
    let mut all = events();
    let all = all.get_or_insert_default();
    let handle = (all.len() + 1) << 4;
    all.insert(handle, Event { context, ..Event::default() });
    std::ptr::without_provenance_mut(handle)
}

/// Does something with an event, which is of this thread's context.
fn with_event<T>(call: &str, event: *mut c_void, body: impl FnOnce(&mut Event) -> T) -> Outcome<T> {
    let context = context::needed(call)?;
    match events().get_or_insert_default().get_mut(&event.addr()) {
        None => Err(code::HANDLE),
        Some(event) if event.context == context => Ok(body(event)),
        Some(_) => refuse(code::CONTEXT, &format!("{call} on an event of another context")),
    }
}

pub fn record(call: &str, event: *mut c_void, stream: *mut c_void) -> Outcome<()> {
    let version = with_event(call, event, |event| {
        event.recorded += 1;
        event.recorded
    })?;
    put(call, stream, Work::Record { event: event.addr(), version }).map(drop)
}

pub fn await_event(call: &str, stream: *mut c_void, event: *mut c_void) -> Outcome<()> {
    let version = with_event(call, event, |event| event.recorded)?;
    put(call, stream, Work::Await { event: event.addr(), version }).map(drop)
}

pub fn has_come(call: &str, event: *mut c_void) -> Outcome<bool> {
    with_event(call, event, |event| event.come == event.recorded)
}

/// Its handle stays unused.
pub fn forget(call: &str, event: *mut c_void) -> Outcome<()> {
    with_event(call, event, |event| event.context = 0)
}

pub fn lock_pages(at: usize, bytes: usize) {
    lock(&LOCKED).push((at, bytes));
}

pub fn is_locked(at: usize, bytes: usize) -> bool {
    lock(&LOCKED).iter().any(|&(from, len)| from <= at && at + bytes <= from + len)
}
