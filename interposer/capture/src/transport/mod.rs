//! Carries tensors from taps into the slab, or drops and counts them.
//!
//! | what happens | what the job pays |
//! |---|---|
//! | the agent is absent | nothing: the slab fills, then captures are dropped; it is looked for twice a second |
//! | the slab is full and an agent reads it | a slab twice as large, once each, as long as `FLEXMODEL_SLAB` and the machine allow it |
//! | the last slab is full, `drop` | nothing |
//! | the last slab is full, `wait` | it waits while the agent's heart beats and its tail moves |
//! | a copy from a device fails and cannot be waited for | nothing: its room in the slab stays taken |
//! | there is no memory for a slab | nothing: captures are dropped; it is asked for again every [`ASK`] |
//! | the agent dies while we wait | at most [`GLANCE`] |
//! | the agent stops (SIGSTOP, a wedged disk) | once 2 s (no heartbeat) or 60 s (no progress), until it moves again (WAIT-1) |
//! | the agent does not read its messages | nothing: they wait, in a bounded number |
//! | a rank whose job was started again attaches | at most 1 s for the agent's welcome, with which comes the plan in force |
//! | taps go off | at most two [`GLANCE`]s for the word of it |
//! | the process turns out to be another rank | at most [`MOVE`] for copies that are under way, and [`WORD`] |
//! | the process ends | at most [`FAREWELL`] for copies from a device that are under way, and [`WORD`] |
//!
//! A thread hears what the agent says, answers it and attaches to an agent that has come ([`ear`]): a job may be in a long step.
//! The job's own threads look at the socket too, without waiting, when a tensor is sent.

mod copies;
mod ear;
mod in_flight;
mod link;
mod memory;
mod outbox;
mod pinning;
mod room;
mod slabs;
mod socket;
mod state;

#[cfg(test)]
mod tests;

use std::{
    ffi::c_void,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use wire::{
    codes::CopyState,
    control::{Hello, ToAgent},
    counts::Counts,
    record::{Axis, Placement, RecordMeta},
    slab::Reservation,
    tap_abi::{BridgeTable, Cut, Rank},
};

use crate::{answers::Answers, engine::Reports, process::Process};
use copies::{Copies, Trouble};
use ear::Ear;
use in_flight::InFlight;
use link::{Heard, Link};
use memory::Memory;
use slabs::Slabs;
use state::State;

pub use link::leave_word;

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

/// What a process is started with.
pub struct Settings {
    /// Path of the agent's socket.
    pub socket: String,
    /// Most bytes of all slabs together.
    pub slab_bytes: u64,
    /// Where `flexmodel run` looks how much was to be captured.
    pub counts: Option<Counts>,
    /// This process, as far as it is known before its rank is.
    pub hello: Hello,
}

/// What a slice takes of a tensor.
pub struct Cutting {
    /// For each dimension.
    pub cuts: Vec<Cut>,
    /// The record needs a checksum of the whole tensor.
    pub bytes_tell: bool,
}

/// A tensor to be sent, and the record that it becomes.
pub struct Captured {
    /// What it is.
    pub meta: RecordMeta,
    /// The bridge's tensor.
    pub handle: *const c_void,
    /// It is on a device, not the CPU.
    pub on_device: bool,
    /// It is a staged copy of ours, not the job's tensor.
    pub staged: bool,
    /// It is to be gathered from all ranks first.
    pub collective: bool,
    /// Of replicas one rank sends the bytes, the others a checksum.
    pub replicas_once: bool,
    /// A slice of the tensor is the record, and is yet to be taken.
    pub cut: Option<Cutting>,
}

/// The way of records to the agent.
pub struct Transport {
    state: Mutex<State>,
    process: Arc<dyn Process>,
    bridge: &'static BridgeTable,
    copies: Copies,
    ear: Ear,
    /// One thread at a time deals with what an agent has said.
    hearing: Mutex<()>,
    /// Who knows what an agent asks, once there is somebody.
    answers: OnceLock<Answers>,
    this: Weak<Self>,
    /// It was said that the agent writes nonsense.
    said_astray: AtomicBool,
}

impl Transport {
    /// Nothing is sent, made or connected yet.
    pub fn new(settings: Settings, process: Arc<dyn Process>, bridge: &'static BridgeTable) -> Arc<Self> {
        let Settings { socket, slab_bytes, counts, hello } = settings;
        let on_full = hello.on_full;
        let link = Link::new(&socket, hello, process.clone());
        let slabs = Slabs::new(slab_bytes, Memory::new(1));
        let state = Mutex::new(State::new(link, slabs, counts, on_full, process.clone()));
        Arc::new_cyclic(|this| Self {
            state,
            copies: Copies::new(bridge, trouble_with_copies(this.clone())),
            ear: Ear::default(),
            hearing: Mutex::default(),
            answers: OnceLock::new(),
            this: this.clone(),
            process,
            bridge,
            said_astray: AtomicBool::new(false),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Most bytes of all slabs together.
    pub fn slab_bytes(&self) -> u64 {
        self.lock().slabs.bound()
    }

    /// One line for the user: on stderr now, and in the run.
    pub fn notice(&self, text: String) {
        self.process.line(&text);
        self.say(ToAgent::Notice(text));
    }

    /// From now on an agent is answered.
    pub fn answer_with(&self, answers: Answers) {
        let _ = self.answers.set(answers);
    }

    /// Hears what an agent says, answers it, and sends what waits.
    fn hear(&self) {
        // Whoever waits for what was heard waits until it is dealt with, too.
        let _hearing = self.hearing.lock().unwrap_or_else(PoisonError::into_inner);
        self.lock().look();
        let Some(answers) = self.answers.get() else { return };
        loop {
            // Whoever captures may have heard it.
            let heard = self.lock().link.next_heard();
            match heard {
                None => return,
                Some(Heard::InForce(plan)) => answers.in_force(&plan),
                Some(Heard::Question { connection, id, question, fd }) => {
                    let this = self.this.clone();
                    answers.to(question, fd, move |answer| {
                        let Some(this) = this.upgrade() else { return };
                        let State { link, slabs, .. } = &mut *this.lock();
                        link.answer(connection, ToAgent::Answer { id, answer }, slabs);
                    });
                }
            }
        }
    }

    /// Waits until an agent has taken this process in. Whether one has.
    pub fn is_taken_in(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        loop {
            self.hear();
            let state = self.lock();
            if state.link.is_welcome() {
                drop(state);
                // What was said before the welcome may be in another thread's hands.
                self.hear();
                return true;
            }
            let gone = state.link.is_alone();
            drop(state);
            if gone || Instant::now() > end {
                return false;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// The word that taps went off in this process: best effort, and no longer than two glances. Called from anywhere.
    pub fn last_words(&self, text: &str) {
        let end = Instant::now() + GLANCE;
        let mut guard = loop {
            match self.state.try_lock() {
                Ok(guard) => break guard,
                Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
                Err(TryLockError::WouldBlock) if Instant::now() < end => thread::sleep(Duration::from_millis(1)),
                Err(TryLockError::WouldBlock) => return,
            }
        };
        let State { link, slabs, .. } = &mut *guard;
        link.last_words(text, slabs, GLANCE);
    }

    /// Carries a tensor into the slab, in pieces where it is larger than a quarter of it.
    pub fn send(&self, mut tensor: Captured) {
        if is_replica(&tensor.meta) && tensor.replicas_once {
            tensor.meta.same = self.checksum(&tensor);
        }
        let Some(total) = tensor.meta.payload_len() else { return };
        let item = tensor.meta.dtype.size() as u64;
        let mut meta = Vec::with_capacity(256);
        tensor.meta.encode(&mut meta);
        let Some((record, mut first)) = self.begin(&tensor, &meta, total) else { return };
        let mut at = 0;
        while !record.is_lost() {
            let len = (total - at).min(record.max_piece);
            let head: &[u8] = if at == 0 { &meta } else { &[] };
            match first.take().or_else(|| self.reserve(&record, head, at, len, total)) {
                Some(slot) if len == 0 => slot.commit(),
                Some(slot) => self.fill(slot, &tensor, at / item, len / item, &record),
                None => record.lose(),
            }
            at += len;
            if at >= total {
                return;
            }
        }
    }

    /// crc32c of its elements; `None` where they are on a device, or cannot be read.
    pub fn checksum(&self, tensor: &Captured) -> Option<u32> {
        let mut crc = 0;
        // SAFETY: the handle is the tensor of the tap that is triggered, or one that is staged.
        let known =
            unsafe { (self.bridge.checksum)(tensor.handle, tensor.staged, tensor.meta.dtype as u8, &raw mut crc) };
        known.then_some(crc)
    }

    /// Copies elements into a reserved frame and commits it. A copy from a device is finished by another thread.
    fn fill(&self, slot: Reservation, tensor: &Captured, first: u64, elements: u64, record: &Arc<InFlight>) {
        let dtype = tensor.meta.dtype as u8;
        // SAFETY: the handle is the tensor of the tap that is triggered, or is staged; the slot holds elements * item bytes.
        let copied =
            unsafe { (self.bridge.copy)(tensor.handle, tensor.staged, dtype, first, elements, slot.payload()) };
        match copied.state {
            CopyState::Done => slot.commit(),
            CopyState::Pending => self.copies.finish_later(copied.ticket, slot, record.clone()),
            CopyState::Failed => record.lose(),
        }
    }

    /// Whether a tensor needs the slab for those of a device, which is not made in the middle of a CUDA graph that the job
    /// captures.
    fn is_for_device(&self, tensor: &Captured) -> bool {
        // SAFETY: the handle is the tensor of the tap that is triggered: what is staged can be read whenever.
        tensor.on_device && (tensor.staged || unsafe { (self.bridge.readable)(tensor.handle) })
    }

    /// A tensor that is about to be sent, and the frame for its first piece if there is room for it at once.
    fn begin(&self, tensor: &Captured, meta: &[u8], total: u64) -> Option<(Arc<InFlight>, Option<Reservation>)> {
        let for_device = self.is_for_device(tensor);
        let mut state = self.lock();
        if let Some(counts) = &state.counts {
            counts.captured(tensor.meta.rank);
        }
        let begun = state.begin(for_device, meta, total);
        let (news, has_slab) = (state.slabs.news.take(), state.slabs.current().is_some());
        drop(state);
        match news {
            Some(text) if has_slab => self.notice(text),
            // No slab, no connection: the agent hears of it all the same.
            Some(text) => {
                self.process.line(&text);
                self.last_words(&format!("{}: {text}", self.process.who()));
            }
            None => {}
        }
        begun.map(|(record, slot)| (Arc::new(record), slot))
    }

    /// The process ends in good order: waits for copies under way, and tells the agent, which has the slabs and goes on.
    pub fn finish(&self) {
        self.ear.stop();
        self.copies.drain(FAREWELL);
        self.lock().finish();
    }
}

impl Reports for Transport {
    /// Says who this process is, and attaches; again when more is known. A process that captured before it knew
    /// its rank, or that goes on in another process group, leaves the slabs it has and begins another one: a slab is of one
    /// rank of one job.
    fn describe(&self, rank: Rank, wrapper: &str) {
        let is_another = |state: &mut State| state.slabs.current().is_some() && state.link.is_another(rank);
        if is_another(&mut self.lock()) {
            self.copies.drain(MOVE);
            self.lock().leave_slabs();
        }
        let ranks_of_node = self.process.ranks_of_node().unwrap_or(rank.world);
        let mut state = self.lock();
        let State { link, slabs, .. } = &mut *state;
        slabs.shared_by(ranks_of_node);
        link.describe(rank, wrapper, slabs);
        state.attach();
        drop(state);
        self.ear.listen(&self.this, self.process.as_ref());
    }

    fn say(&self, message: ToAgent) {
        let mut state = self.lock();
        // A slab is how a rank attaches. One whose tensors other ranks send has passes to tell of all the same.
        if matches!(message, ToAgent::Passed(_)) {
            state.make_slab();
        }
        let State { link, slabs, .. } = &mut *state;
        link.say(message, slabs);
    }

    fn notice(&self, text: String) {
        Transport::notice(self, text);
    }
}

/// Says each thing once that is wrong with copies from a device.
fn trouble_with_copies(transport: Weak<Transport>) -> Arc<dyn Fn(Trouble) + Send + Sync> {
    let (slow, failed) = (AtomicBool::new(false), AtomicBool::new(false));
    Arc::new(move |trouble| {
        let (said, text) = match trouble {
            Trouble::Slow => (&slow, "the slab cannot be pinned: copies from the device are slower than they could be"),
            Trouble::Failed => {
                (&failed, "a copy from the device failed: that capture is lost, and so are others like it")
            }
        };
        if !said.swap(true, Ordering::Relaxed)
            && let Some(transport) = transport.upgrade()
        {
            transport.notice(text.into());
        }
    })
}

/// Whether the first of its members holds the same tensor, as torch says.
fn is_replica(meta: &RecordMeta) -> bool {
    let sends = |axis: &Axis| axis.place != Placement::Replicate || axis.index == 0;
    !meta.axes.iter().all(sends) && !meta.stats_only && meta.refused.is_empty()
}
