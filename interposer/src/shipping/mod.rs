//! Carries tensors from taps into the slab, or drops and counts them.
//!
//! | what happens | what the job pays |
//! |---|---|
//! | the agent is absent | nothing: the slab fills, then captures are dropped; it is looked for twice a second |
//! | the slab is full and an agent reads it | a slab twice as large, once each, as long as `FLEXMODEL_SLAB` and the machine allow it |
//! | the last slab is full, `drop` | nothing |
//! | the last slab is full, `wait` | it waits while the agent's heart beats and its tail moves |
//! | there is no memory for a slab | nothing: captures are dropped; it is asked for again every [`ASK`] |
//! | the agent dies while we wait | at most [`GLANCE`] |
//! | the agent stops (SIGSTOP, a wedged disk) | once 2 s (no heartbeat) or 60 s (no progress), until it moves again (WAIT-1) |
//! | the agent does not read its messages | nothing: they wait, in a bounded number |
//! | taps go off | at most two [`GLANCE`]s for the word of it |
//! | the process turns out to be another rank | at most [`MOVE`] for copies that are under way, and [`WORD`] |
//! | the process ends | at most [`FAREWELL`] for copies from a device that are under way, and [`WORD`] |

mod link;
mod memory;
mod outbox;
mod pending;
mod pinning;
mod room;
mod slabs;
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
    codes::CopyState,
    control::{ModuleInfo, ToAgent},
    counts::Counts,
    env::{self, OnFull},
    record::{Axis, Place, RecordMeta},
    slab::{Mapping, Reservation, SlabWriter},
    tap_abi::Rank,
};

use crate::{boot, log};
use link::Link;
use memory::Memory;
use slabs::Slabs;
use voyage::Voyage;

/// How long one look at a full slab lasts.
pub const GLANCE: Duration = Duration::from_millis(50);
/// How long a process that becomes another rank waits for copies from a device.
pub const MOVE: Duration = Duration::from_secs(2);
/// How long the end of a process waits for copies from a device.
pub const FAREWELL: Duration = Duration::from_secs(10);
/// How long an agent is given to take the last message.
pub const WORD: Duration = Duration::from_millis(500);
/// How often memory is asked for that was refused.
pub const ASK: Duration = Duration::from_secs(30);

static SHIPPER: Mutex<Option<Shipper>> = Mutex::new(None);

/// A tensor on its way.
pub struct Cargo {
    /// What it is.
    pub meta: RecordMeta,
    /// The bridge's tensor.
    pub handle: *const c_void,
    /// It is on a device, not the CPU.
    pub on_device: bool,
    /// It is one that the bridge keeps for us, not the job's.
    pub kept: bool,
    /// It is to be gathered from all ranks first.
    pub collective: bool,
}

struct Shipper {
    link: Link,
    slabs: Slabs,
    /// Where `flexmodel run` looks how much was to be captured.
    counts: Option<Counts>,
    replicas_once: bool,
    on_full: OnFull,
    /// Set while an agent that stood still has not moved again: a slab and its tail then.
    stalled: Option<(u64, u64)>,
    /// When there was no memory for a slab.
    refused: Option<Instant>,
    /// Tensors of an earlier slab that no agent ever saw, or that there was no slab for.
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
        slabs: Slabs::new(slab_bytes, Memory::new(1)),
        counts: set(env::COUNTS).and_then(|name| Counts::open(&name, &agent)),
        replicas_once,
        on_full,
        stalled: None,
        refused: None,
        unseen: 0,
    });
    Ok(())
}

/// Most bytes of all slabs together.
pub fn slab_bytes() -> u64 {
    with(|s| s.slabs.bound())
}

/// Says who this process is: before it attaches, and again when more is known. A process that captured before it knew
/// its rank leaves the slabs it has and begins another one.
pub fn describe(rank: Rank, torch: &str, python: &str, wrapper: &str) {
    if with(|s| s.slabs.current().is_some() && s.link.rank() != rank.rank) {
        pending::drain(MOVE);
        with(Shipper::leave_slabs);
    }
    with(|s| {
        s.slabs.shared_by(ranks_of_this_node(rank.world));
        s.link.describe(rank, torch, python, wrapper, &s.slabs);
    });
}

/// Ranks that share this machine's memory: what the launcher says, or all.
fn ranks_of_this_node(world: u32) -> u32 {
    let said = std::env::var("LOCAL_WORLD_SIZE").ok().and_then(|text| text.parse().ok());
    said.filter(|n| *n > 0).unwrap_or(world)
}

/// Tells the agent a model's modules, if they are news.
pub fn model(model: u32, modules: Vec<ModuleInfo>) {
    say(ToAgent::Model { model, modules });
}

/// Tells the agent the modules of a model of which nothing is captured here.
pub fn other_model(modules: Vec<String>) {
    say(ToAgent::Others { modules });
}

fn say(message: ToAgent) {
    with(|s| s.link.say(message, &s.slabs));
}

/// One line for the user: on stderr now, and in the run.
pub fn notice(text: String) {
    log::line(&text);
    say(ToAgent::Notice(text));
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
            Some(Shipper { link, slabs, .. }) => link.last_words(text, slabs, GLANCE),
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
    let Some((voyage, mut first)) = begin(&cargo, &meta, total) else { return };
    let mut at = 0;
    while !voyage.is_lost() {
        let len = (total - at).min(voyage.max_piece);
        let head: &[u8] = if at == 0 { &meta } else { &[] };
        match first.take().or_else(|| room::reserve(&voyage, head, at, len, total)) {
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
    match copied.state {
        CopyState::Done => slot.commit(),
        CopyState::Pending => {
            pending::finish_later(copied.ticket, slot, voyage.clone());
            device_copied(&voyage.map);
        }
        CopyState::Failed => voyage.lose(),
    }
}

/// Pins the slab if that was not possible when it was made.
fn device_copied(map: &Arc<Mapping>) {
    if with(|s| s.slabs.device_copied(map, || pin(map))) {
        notice("the slab cannot be pinned: copies from the device are slower than they could be".into());
    }
}

fn pin(map: &Mapping) -> bool {
    let (base, len) = map.whole();
    // SAFETY: the range is mapped, and stays so if it is pinned.
    let pinned = boot::bridge().is_some_and(|bridge| unsafe { (bridge.pin)(base, len) });
    if pinned {
        map.keep_mapped();
    }
    pinned
}

/// A tensor that is about to be shipped, and the frame for its first piece if there is room for it at once.
fn begin(cargo: &Cargo, meta: &[u8], total: u64) -> Option<(Arc<Voyage>, Option<Reservation>)> {
    let mut guard = lock();
    let shipper = guard.as_mut()?;
    if let Some(counts) = &shipper.counts {
        counts.captured(cargo.meta.rank);
    }
    let begun = shipper.begin(cargo.on_device, meta, total);
    let (news, has_slab) = (shipper.slabs.news.take(), shipper.slabs.current().is_some());
    drop(guard);
    match news {
        Some(text) if has_slab => notice(text),
        // No slab, no connection: the agent hears of it all the same.
        Some(text) => {
            log::line(&text);
            last_words(&format!("{}: {text}", log::who()));
        }
        None => {}
    }
    begun.map(|(voyage, slot)| (Arc::new(voyage), slot))
}

impl Shipper {
    /// Makes the first slab with the first tensor, a larger one where need be, and looks after the link.
    fn begin(&mut self, on_device: bool, meta: &[u8], total: u64) -> Option<(Voyage, Option<Reservation>)> {
        if !self.make_slab() {
            self.unseen += 1;
            return None;
        }
        self.sweep();
        if on_device && let Some(id) = self.slabs.begin_for_device(self.link.rank(), pin) {
            self.link.say(ToAgent::Slab { id }, &self.slabs);
        }
        self.link.tend(&self.slabs);
        self.begin_again();
        if std::mem::take(&mut self.slabs.full) {
            self.grow();
        }
        loop {
            let writer = self.slabs.current()?;
            let max_piece = writer.max_piece();
            let slot = writer.try_reserve(writer.next_record(), meta, 0, total.min(max_piece), total);
            // It is moved before it has begun: from its first frame on it stays where it is.
            if slot.is_none() && self.grow() {
                continue;
            }
            let writer = self.slabs.current()?;
            return Some((Voyage::new(writer.mapping().clone(), writer.begin_record(), max_piece), slot));
        }
    }

    /// Lets slabs go that are over, and tells of those that no agent can be given any more.
    fn sweep(&mut self) {
        self.slabs.sweep();
        for (id, begun) in self.slabs.take_out_of_reach() {
            self.link.say(ToAgent::OutOfReach { id, begun }, &self.slabs);
        }
    }

    /// Begins another slab where an agent is there that cannot be given the current one. Where none can be made, this one
    /// goes on without an agent. Whether it was made.
    fn begin_again(&mut self) -> bool {
        let begun = self.link.takes_wish_for_slab() && self.slabs.begin_again(self.link.rank());
        if begun {
            (self.stalled, self.link.tried) = (None, None);
            self.sweep();
            self.link.tend(&self.slabs);
        }
        begun
    }

    /// Whether there is a slab now.
    fn make_slab(&mut self) -> bool {
        if self.slabs.current().is_some() {
            return true;
        }
        if self.refused.is_some_and(|at| at.elapsed() < ASK) {
            return false;
        }
        match self.slabs.begin(self.link.rank()) {
            Ok(()) => {
                self.refused = None;
                let unseen = std::mem::take(&mut self.unseen);
                if let Some(writer) = self.slabs.current() {
                    writer.lost_before(unseen);
                }
                true
            }
            Err(why) => {
                if self.refused.replace(Instant::now()).is_none() {
                    self.slabs.news = Some(format!("{}: captures are dropped: {why}", log::who()));
                }
                false
            }
        }
    }

    /// Follows a slab that is full, and that an agent reads, with a larger one. Whether it did.
    fn grow(&mut self) -> bool {
        if !self.slabs.may_grow() || self.stalled.is_some() || !self.link.alive(&self.slabs) {
            return false;
        }
        let Some(id) = self.slabs.grow(self.link.rank()) else { return false };
        self.link.say(ToAgent::Slab { id }, &self.slabs);
        true
    }

    /// The slabs are complete; another one will be made for the next tensor.
    fn leave_slabs(&mut self) {
        let taken = self.link.farewell(&self.slabs, WORD);
        self.link.leave();
        for writer in self.slabs.leave() {
            if !taken && !writer.is_being_read() {
                self.unseen += writer.begun();
            }
        }
        self.stalled = None;
    }

    /// Says goodbye, or how much was lost to whoever did not take it.
    fn finish(&mut self) {
        if self.link.tells_others() {
            // A slab is how a rank attaches.
            self.make_slab();
        }
        self.sweep();
        let untaken = |writer: &SlabWriter| writer.mapping().header().heartbeat.load(Ordering::Acquire) == 0;
        let there =
            self.link.farewell(&self.slabs, WORD) || self.begin_again() && self.link.farewell(&self.slabs, WORD);
        if !there {
            let untaken = self.slabs.live().filter(|writer| untaken(writer)).map(SlabWriter::begun).sum::<u64>();
            let lost = self.unseen + untaken;
            if lost > 0 {
                self.link.leave_losses(lost);
            }
        }
    }
}

/// The process ends in good order: waits for copies under way, and tells the agent, which has the slabs and goes on.
pub fn finish() {
    pending::drain(FAREWELL);
    with(Shipper::finish);
}
