//! Carries tensors from taps into the slab, or drops and counts them.
//!
//! | what happens | what the job pays |
//! |---|---|
//! | the agent is absent | nothing: the slab fills, then captures are dropped; it is looked for twice a second |
//! | the slab is full, `drop` | nothing |
//! | the slab is full, `wait` | it waits while the agent's heart beats and its tail moves |
//! | the agent dies while we wait | at most [`GLANCE`] |
//! | the agent stops (SIGSTOP, a wedged disk) | once [`NO_HEARTBEAT`] or [`NO_PROGRESS`], until it moves again (WAIT-1) |
//! | the process ends | at most [`FAREWELL`] for copies from a device that are under way |

mod link;
mod pending;

use std::{
    ffi::c_void,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use wire::{
    control::{Counts, ModuleInfo, ToAgent},
    env::{self, OnFull},
    record::RecordMeta,
    slab::{Mapping, Reservation, SlabWriter},
    tap_abi::Rank,
};

use crate::{boot, log, state};
use link::Link;

/// How long one look at a full slab lasts.
pub const GLANCE: Duration = Duration::from_millis(50);
/// An agent whose heart stands still this long is taken for stopped.
pub const NO_HEARTBEAT: Duration = Duration::from_secs(2);
/// An agent that frees nothing this long is taken for stuck.
pub const NO_PROGRESS: Duration = Duration::from_secs(60);
/// How long the end of a process waits for copies from a device.
pub const FAREWELL: Duration = Duration::from_secs(10);

static SHIPPER: Mutex<Option<Shipper>> = Mutex::new(None);
/// Tensors lost before there was a slab to count them in.
static LOST: AtomicU64 = AtomicU64::new(0);

/// A tensor on its way.
pub struct Cargo {
    /// What it is.
    pub meta: RecordMeta,
    /// The bridge's tensor.
    pub handle: *const c_void,
}

struct Shipper {
    link: Link,
    slab_bytes: u64,
    on_full: OnFull,
    writer: Option<SlabWriter>,
    /// Set while an agent that stood still has not moved again: its heartbeat and tail then.
    stalled: Option<(u32, u64)>,
}

fn lock() -> MutexGuard<'static, Option<Shipper>> {
    SHIPPER.lock().unwrap_or_else(PoisonError::into_inner)
}

fn with<T: Default>(f: impl FnOnce(&mut Shipper) -> T) -> T {
    lock().as_mut().map(f).unwrap_or_default()
}

/// Nanoseconds since the Unix epoch.
pub fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

/// Reads the environment: where the agent is, the slab's size, what to do when it is full.
pub fn configure(hooks: &str) -> Result<(), String> {
    let set = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
    let agent = set(env::AGENT).ok_or_else(|| {
        format!(
            "{} is not set; start one with: flexmodel agent --socket PATH --out DIR, or use flexmodel run",
            env::AGENT
        )
    })?;
    let socket = env::agent_socket(&agent).map_err(|why| format!("{}: {why}", env::AGENT))?;
    let slab_bytes = match set(env::SLAB) {
        Some(text) => env::parse_bytes(&text).map_err(|why| format!("{}: {why}", env::SLAB))?,
        None => env::DEFAULT_SLAB_BYTES,
    };
    let on_full =
        OnFull::parse(&set(env::ON_FULL).unwrap_or_default()).map_err(|why| format!("{}: {why}", env::ON_FULL))?;
    *lock() = Some(Shipper {
        link: Link::new(socket, hooks, on_full),
        slab_bytes: slab_bytes.max(env::MIN_SLAB_BYTES),
        on_full,
        writer: None,
        stalled: None,
    });
    Ok(())
}

/// Says who this process is, before it attaches.
pub fn describe(rank: Rank, torch: &str, python: &str, wrapper: &str) {
    with(|s| s.link.describe(rank, torch, python, wrapper));
}

/// Tells the agent a model's modules.
pub fn model(model: u32, modules: Vec<ModuleInfo>) {
    with(|s| s.link.say(ToAgent::Model { model, modules }));
}

/// One line for the user: on stderr now, and in the run.
pub fn notice(text: String) {
    log::line(&text);
    with(|s| s.link.say(ToAgent::Notice(text)));
}

/// Carries a tensor into the slab, in pieces where it is larger than a quarter of it.
pub fn ship(cargo: Cargo) {
    let Some(total) = cargo.meta.payload_len() else { return };
    let refused = !cargo.meta.refused.is_empty();
    let item = cargo.meta.dtype.size() as u64;
    let mut meta = Vec::with_capacity(256);
    cargo.meta.encode(&mut meta);
    let Some((record, max_piece)) = begin() else {
        LOST.fetch_add(1, Ordering::Relaxed);
        return;
    };
    if refused {
        count(|h| &h.refused);
    }
    let mut at = 0;
    loop {
        let len = (total - at).min(max_piece);
        let head: &[u8] = if at == 0 { &meta } else { &[] };
        let Some(slot) = reserve(record, head, at, len, total) else {
            count(|h| &h.dropped);
            return;
        };
        if len == 0 {
            slot.commit();
        } else if !fill(slot, &cargo, at / item, len / item) {
            count(|h| &h.dropped);
            return;
        }
        at += len;
        if at >= total {
            return;
        }
    }
}

/// Copies elements into a reserved frame and commits it. A copy from a device is finished by another thread.
fn fill(slot: Reservation, cargo: &Cargo, first: u64, elements: u64) -> bool {
    let Some(bridge) = boot::bridge() else { return false };
    // SAFETY: the handle is the tensor of the tap that is firing; the slot holds elements * item bytes.
    let copied = unsafe { (bridge.copy)(cargo.handle, cargo.meta.dtype as u8, first, elements, slot.payload()) };
    match copied.code {
        0 => slot.commit(),
        1 => pending::finish_later(copied.ticket, slot),
        _ => return false,
    }
    true
}

fn count(counter: impl Fn(&wire::slab::Header) -> &AtomicU64) {
    with(|s| {
        if let Some(writer) = &s.writer {
            counter(writer.mapping().header()).fetch_add(1, Ordering::Relaxed);
        }
    });
}

/// Makes the slab with the first tensor and looks after the link; a number for the tensor, and the largest piece.
fn begin() -> Option<(u64, u64)> {
    let mut guard = lock();
    let shipper = guard.as_mut()?;
    if shipper.writer.is_none() {
        match SlabWriter::create(shipper.slab_bytes, shipper.link.rank()) {
            Ok(writer) => {
                let (base, len) = writer.mapping().whole();
                if let Some(bridge) = boot::bridge() {
                    // SAFETY: the mapping lives as long as the process: SHIPPER is never emptied.
                    unsafe { (bridge.pin)(base, len) };
                }
                shipper.writer = Some(writer);
            }
            Err(why) => {
                drop(guard);
                state::off(&format!("{why}; a smaller {} may fit", env::SLAB));
                return None;
            }
        }
    }
    let writer = shipper.writer.as_mut()?;
    shipper.link.tend(writer.mapping());
    Some((writer.begin_record(), writer.max_piece()))
}

/// A frame, or `None` if the tensor has to be dropped.
fn reserve(record: u64, meta: &[u8], at: u64, len: u64, total: u64) -> Option<Reservation> {
    let mut patience: Option<Patience> = None;
    loop {
        let map = {
            let mut guard = lock();
            let shipper = guard.as_mut()?;
            let writer = shipper.writer.as_mut()?;
            if let Some(slot) = writer.try_reserve(record, meta, at, len, total) {
                shipper.stalled = None;
                return Some(slot);
            }
            let map = writer.mapping().clone();
            if shipper.on_full == OnFull::Drop || !shipper.link.alive(&map) || shipper.still_stalled(&map) {
                return None;
            }
            if patience.get_or_insert_with(|| Patience::new(&map)).spent(&map) {
                shipper.stalled = Some(pulse(&map));
                drop(guard);
                notice("the agent stands still: captures are dropped until it moves again".into());
                return None;
            }
            map
        };
        SlabWriter::wait_for_room(&map, GLANCE);
    }
}

/// Heartbeat and tail: what shows that an agent moves.
fn pulse(map: &Mapping) -> (u32, u64) {
    let header = map.header();
    (header.heartbeat.load(Ordering::Acquire), header.tail.load(Ordering::Acquire))
}

impl Shipper {
    /// Whether an agent that stood still has not moved since.
    fn still_stalled(&mut self, map: &Arc<Mapping>) -> bool {
        if self.stalled.is_some_and(|(_, tail)| tail == pulse(map).1) {
            return true;
        }
        self.stalled = None;
        false
    }
}

/// Bounds a wait for room (WAIT-1).
struct Patience {
    pulse: (u32, u64),
    beat_at: Instant,
    moved_at: Instant,
}

impl Patience {
    fn new(map: &Mapping) -> Self {
        let now = Instant::now();
        Self { pulse: pulse(map), beat_at: now, moved_at: now }
    }

    fn spent(&mut self, map: &Mapping) -> bool {
        let (beat, tail) = pulse(map);
        let now = Instant::now();
        if beat != self.pulse.0 {
            self.beat_at = now;
        }
        if tail != self.pulse.1 {
            self.moved_at = now;
        }
        self.pulse = (beat, tail);
        now.duration_since(self.beat_at) > NO_HEARTBEAT || now.duration_since(self.moved_at) > NO_PROGRESS
    }
}

/// The process ends in good order: waits for copies under way, and tells the agent, which has the slab and goes on.
pub fn finish() {
    pending::drain(FAREWELL);
    let mut guard = lock();
    let Some(shipper) = guard.as_mut() else { return };
    let Some(writer) = shipper.writer.as_ref() else { return };
    let map = writer.mapping().clone();
    shipper.link.tend(&map);
    let header = map.header();
    header.closed.store(1, Ordering::Release);
    let counts = Counts {
        records: header.records.load(Ordering::Relaxed),
        dropped: header.dropped.load(Ordering::Relaxed) + LOST.load(Ordering::Relaxed),
        refused: header.refused.load(Ordering::Relaxed),
    };
    shipper.link.say(ToAgent::Bye(counts));
}
