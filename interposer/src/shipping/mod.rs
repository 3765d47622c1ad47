//! Carries tensors from taps into the slab, or drops and counts them.
//!
//! | what happens | what the job pays |
//! |---|---|
//! | the agent is absent | nothing: the slab fills, then captures are dropped; it is looked for twice a second |
//! | the slab is full, `drop` | nothing |
//! | the slab is full, `wait` | it waits while the agent's heart beats and its tail moves |
//! | the agent dies while we wait | at most [`GLANCE`] |
//! | the agent stops (SIGSTOP, a wedged disk) | once 2 s (no heartbeat) or 60 s (no progress), until it moves again (WAIT-1) |
//! | the agent does not read its messages | nothing: they wait, in a bounded number |
//! | taps go off | at most two [`GLANCE`]s for the word of it |
//! | the process turns out to be another rank | at most [`MOVE`] for copies that are under way, and [`WORD`] |
//! | the process ends | at most [`FAREWELL`] for copies from a device that are under way, and [`WORD`] |

mod left;
mod link;
mod outbox;
mod pending;
mod pinning;
mod room;
mod socket;
mod voyage;

#[cfg(test)]
mod tests;

use std::{
    ffi::c_void,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, atomic::Ordering},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use wire::{
    control::{ModuleInfo, ToAgent},
    env::{self, OnFull},
    record::{Axis, Place, RecordMeta},
    slab::{Mapping, Reservation, SlabError, SlabWriter},
    tap_abi::Rank,
};

use crate::{boot, log, state};
use left::LeftSlab;
use link::Link;
use pinning::Pinning;
use voyage::Voyage;

/// How long one look at a full slab lasts.
pub const GLANCE: Duration = Duration::from_millis(50);
/// How long a process that becomes another rank waits for copies from a device.
pub const MOVE: Duration = Duration::from_secs(2);
/// How long the end of a process waits for copies from a device.
pub const FAREWELL: Duration = Duration::from_secs(10);
/// How long an agent is given to take the last message.
pub const WORD: Duration = Duration::from_millis(500);

static SHIPPER: Mutex<Option<Shipper>> = Mutex::new(None);

/// A tensor on its way.
pub struct Cargo {
    /// What it is.
    pub meta: RecordMeta,
    /// The bridge's tensor.
    pub handle: *const c_void,
    /// It is one that the bridge keeps for us, not the job's.
    pub kept: bool,
    /// It is to be gathered from all ranks first.
    pub collective: bool,
}

struct Shipper {
    link: Link,
    slab_bytes: u64,
    replicas_once: bool,
    on_full: OnFull,
    writer: Option<SlabWriter>,
    /// The one before it, if the job has closed its descriptor.
    left: Option<LeftSlab>,
    pinning: Pinning,
    /// Set while an agent that stood still has not moved again: its heartbeat and tail then.
    stalled: Option<(u32, u64)>,
    /// Tensors of an earlier slab that no agent ever saw.
    unseen: u64,
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

/// Reads the environment: where the agent is, the slab's size, what to do when it is full. `replicas_once`: of replicas one
/// rank sends the bytes, the others a checksum.
pub fn configure(hooks: &str, replicas_once: bool) -> Result<(), String> {
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
        replicas_once,
        on_full,
        writer: None,
        left: None,
        pinning: Pinning::NotYet,
        stalled: None,
        unseen: 0,
    });
    Ok(())
}

/// Size of the slab.
pub fn slab_bytes() -> u64 {
    with(|s| s.slab_bytes)
}

/// Says who this process is: before it attaches, and again when more is known. A process that captured before it knew
/// its rank leaves the slab it has and begins another one.
pub fn describe(rank: Rank, torch: &str, python: &str, wrapper: &str) {
    if with(|s| s.writer.is_some() && s.link.rank() != rank.rank) {
        pending::drain(MOVE);
        with(Shipper::leave_slab);
    }
    with(|s| s.link.describe(rank, torch, python, wrapper));
}

/// Tells the agent a model's modules, if they are news.
pub fn model(model: u32, modules: Vec<ModuleInfo>) {
    with(|s| s.link.say(ToAgent::Model { model, modules }));
}

/// Tells the agent the modules of a model of which nothing is captured here.
pub fn other_model(modules: Vec<String>) {
    with(|s| s.link.say(ToAgent::Others { modules }));
}

/// One line for the user: on stderr now, and in the run.
pub fn notice(text: String) {
    log::line(&text);
    with(|s| s.link.say(ToAgent::Notice(text)));
}

/// The word that taps went off in this process: best effort, and no longer than two glances. Called from anywhere, also
/// before anything is configured.
pub fn last_words(text: &str) {
    let say = || {
        let end = Instant::now() + GLANCE;
        let mut guard = loop {
            match SHIPPER.try_lock() {
                Ok(guard) => break guard,
                Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
                Err(TryLockError::WouldBlock) if Instant::now() < end => thread::sleep(Duration::from_millis(1)),
                Err(TryLockError::WouldBlock) => return,
            }
        };
        match guard.as_mut() {
            Some(Shipper { link, writer, .. }) => {
                link.last_words(text, writer.as_ref().map(|w| &**w.mapping()), GLANCE)
            }
            None => {
                let agent = std::env::var(env::AGENT).unwrap_or_default();
                if let Ok(socket) = env::agent_socket(&agent) {
                    link::leave_word(Path::new(socket), text);
                }
            }
        }
    };
    // A panic here would be one in the handling of a panic.
    let _ = catch_unwind(AssertUnwindSafe(say));
}

/// Carries a tensor into the slab, in pieces where it is larger than a quarter of it.
pub fn ship(mut cargo: Cargo) {
    if is_replica(&cargo.meta) && with(|s| s.replicas_once) {
        cargo.meta.same = checksum(&cargo);
    }
    let Some(total) = cargo.meta.payload_len() else { return };
    let item = cargo.meta.dtype.size() as u64;
    let mut meta = Vec::with_capacity(256);
    cargo.meta.encode(&mut meta);
    let Some(voyage) = begin() else { return };
    let mut at = 0;
    while !voyage.is_lost() {
        let len = (total - at).min(voyage.max_piece);
        let head: &[u8] = if at == 0 { &meta } else { &[] };
        match room::reserve(&voyage, head, at, len, total) {
            Some(slot) if len == 0 => slot.commit(),
            Some(slot) => fill(slot, &cargo, at / item, len / item, &voyage),
            None => voyage.lose(),
        }
        at += len;
        if at >= total {
            return;
        }
    }
}

/// Whether the first of its members holds the same tensor, as torch says.
fn is_replica(meta: &RecordMeta) -> bool {
    let sends = |axis: &Axis| axis.place != Place::Replicate || axis.index == 0;
    !meta.axes.iter().all(sends) && !meta.stats_only && meta.refused.is_empty()
}

fn checksum(cargo: &Cargo) -> Option<u32> {
    let mut crc = 0;
    // SAFETY: the handle is the tensor of the tap that is firing, or one that is kept.
    let known = unsafe { (boot::bridge()?.checksum)(cargo.handle, cargo.meta.dtype as u8, &raw mut crc) };
    known.then_some(crc)
}

/// Copies elements into a reserved frame and commits it. A copy from a device is finished by another thread.
fn fill(slot: Reservation, cargo: &Cargo, first: u64, elements: u64, voyage: &Arc<Voyage>) {
    let Some(bridge) = boot::bridge() else { return voyage.lose() };
    // SAFETY: the handle is the tensor of the tap that is firing, or is kept; the slot holds elements * item bytes.
    let copied =
        unsafe { (bridge.copy)(cargo.handle, cargo.kept, cargo.meta.dtype as u8, first, elements, slot.payload()) };
    match copied.code {
        0 => slot.commit(),
        1 => {
            pending::finish_later(copied.ticket, slot, voyage.clone());
            device_copied(&voyage.map);
        }
        _ => voyage.lose(),
    }
}

/// Pins the slab if there was no device yet when it was made.
fn device_copied(map: &Arc<Mapping>) {
    let slow = with(|s| {
        let current = s.writer.as_ref().is_some_and(|w| Arc::ptr_eq(w.mapping(), map));
        current && s.pinning.device_copied(|| pin(map))
    });
    if slow {
        notice("the slab cannot be pinned: copies from the device are slower than they could be".into());
    }
}

fn pin(map: &Mapping) -> bool {
    let (base, len) = map.whole();
    // SAFETY: a mapping that is pinned is never unmapped (leave_slab), and SHIPPER is never emptied.
    boot::bridge().is_some_and(|bridge| unsafe { (bridge.pin)(base, len) })
}

/// Makes the slab with the first tensor and looks after the link.
fn begin() -> Option<Arc<Voyage>> {
    let mut guard = lock();
    let shipper = guard.as_mut()?;
    if let Err(why) = shipper.make_slab() {
        drop(guard);
        state::off(&why);
        return None;
    }
    shipper.tend();
    let writer = shipper.writer.as_mut()?;
    Some(Arc::new(Voyage::new(writer.mapping().clone(), writer.begin_record(), writer.max_piece())))
}

impl Shipper {
    fn make_slab(&mut self) -> Result<(), String> {
        if self.writer.is_none() {
            let writer = SlabWriter::create(self.slab_bytes, self.link.rank()).map_err(|why| match why {
                SlabError::System { .. } => format!("{why}; a smaller {} may fit", env::SLAB),
                _ => why.to_string(),
            })?;
            writer.mapping().header().dropped.store(std::mem::take(&mut self.unseen), Ordering::Relaxed);
            self.pinning = Pinning::new(|| pin(writer.mapping()));
            self.writer = Some(writer);
        }
        Ok(())
    }

    /// Looks after the link, and after slabs whose descriptor the job has closed.
    fn tend(&mut self) {
        let Some(writer) = &self.writer else { return };
        self.link.tend(writer.mapping());
        if self.link.takes_wish_for_slab() {
            // Where no other slab can be made, this one goes on without an agent.
            let _ = self.follow_closed_slab();
        }
        if let (Some(left), Some(writer)) = (&mut self.left, &self.writer)
            && let Some(lost) = left.lost()
        {
            writer.mapping().header().dropped.fetch_add(lost, Ordering::Relaxed);
            self.left = None;
        }
    }

    /// Another slab after one that cannot be sent any more, which takes over what that one had lost.
    fn follow_closed_slab(&mut self) -> Result<(), String> {
        let Some(old) = self.writer.take() else { return Ok(()) };
        self.unseen = old.mapping().header().dropped.load(Ordering::Relaxed);
        // No more than one is kept for the agent that may still read it.
        self.unseen += self.left.take().map_or(0, |mut left| left.lost().unwrap_or_default());
        let pinned = self.pinning == Pinning::Pinned;
        if let Err(why) = self.make_slab() {
            (self.writer, self.unseen) = (Some(old), 0);
            return Err(why);
        }
        if pinned {
            // What a device may write to has to stay where it is.
            std::mem::forget(old.mapping().clone());
        }
        self.left = Some(LeftSlab::new(old));
        (self.stalled, self.link.tried) = (None, None);
        if let Some(writer) = &self.writer {
            self.link.tend(writer.mapping());
        }
        Ok(())
    }

    /// The slab is complete; another one will be made for the next tensor.
    fn leave_slab(&mut self) {
        let Some(writer) = self.writer.take() else { return };
        let map = writer.mapping();
        let taken = self.link.farewell(map, WORD);
        self.link.leave();
        if !taken && map.header().tail.load(Ordering::Acquire) == 0 {
            self.unseen += writer.begun();
        }
        if self.pinning == Pinning::Pinned {
            // What a device may write to has to stay where it is.
            std::mem::forget(map.clone());
        }
        self.stalled = None;
    }
}

/// The process ends in good order: waits for copies under way, and tells the agent, which has the slab and goes on.
pub fn finish() {
    pending::drain(FAREWELL);
    with(|s| {
        if s.writer.is_none() && s.link.tells_others() {
            // A slab is how a rank attaches.
            s.slab_bytes = env::MIN_SLAB_BYTES;
            let _ = s.make_slab();
        }
        let there = s.writer.as_ref().is_none_or(|writer| s.link.farewell(writer.mapping(), WORD));
        if !there && s.link.takes_wish_for_slab() {
            // It only tells what was lost.
            s.slab_bytes = env::MIN_SLAB_BYTES;
            let _ = s.follow_closed_slab();
            s.tend();
            if let Some(writer) = &s.writer {
                s.link.farewell(writer.mapping(), WORD);
            }
        }
    });
}
