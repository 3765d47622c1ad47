//! The slabs and the link of a process together: where a record begins, and what follows a slab that is full or left.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use wire::{
    control::ToAgent,
    counts::Counts,
    env::OnFull,
    slab::{Reservation, SlabWriter},
};

use super::{ASK, WORD, in_flight::InFlight, link::Link, slabs::Slabs};
use crate::process::Process;

/// What the taps of a process share, behind the lock of [`Transport`](super::Transport).
pub struct State {
    pub link: Link,
    pub slabs: Slabs,
    /// Where `flexmodel run` looks how much was to be captured.
    pub counts: Option<Counts>,
    pub on_full: OnFull,
    /// Set while an agent that stood still has not moved again: a slab and its tail then.
    pub stalled: Option<(u64, u64)>,
    /// When there was no memory for a slab.
    pub refused: Option<Instant>,
    /// Tensors of an earlier slab that no agent ever saw, or that there was no slab for.
    pub unseen: u64,
    process: Arc<dyn Process>,
}

impl State {
    /// No slab yet, and no look at the agent.
    pub fn new(link: Link, slabs: Slabs, counts: Option<Counts>, on_full: OnFull, process: Arc<dyn Process>) -> Self {
        Self { link, slabs, counts, on_full, stalled: None, refused: None, unseen: 0, process }
    }

    /// Makes the first slab with the first tensor, a larger one where need be, and looks after the link. `for_device`: the
    /// tensor needs the slab for those of a device.
    pub fn begin(&mut self, for_device: bool, meta: &[u8], total: u64) -> Option<(InFlight, Option<Reservation>)> {
        if !self.make_slab() {
            self.unseen += 1;
            return None;
        }
        self.link.matters = true;
        self.sweep();
        if for_device && let Some(id) = self.slabs.begin_for_device(self.link.rank()) {
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
            let pinning = self.slabs.pinning();
            let writer = self.slabs.current()?;
            return Some((InFlight::new(writer.mapping().clone(), writer.begin_record(), max_piece, pinning), slot));
        }
    }

    /// Whether an agent is there; one that has come is attached to.
    pub fn agent_is_there(&mut self) -> bool {
        self.link.alive(&self.slabs)
    }

    /// Attaches, if an agent is there.
    pub fn attach(&mut self) {
        if self.make_slab() {
            self.link.tend(&self.slabs);
        }
    }

    /// Hears what an agent says, and attaches to one that has come; there is nothing to do without a slab.
    pub fn look(&mut self) {
        if self.slabs.current().is_some() {
            self.link.alive(&self.slabs);
        }
    }

    /// Lets slabs go that are over, and tells of those that no agent can be given any more.
    pub fn sweep(&mut self) {
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
    pub fn make_slab(&mut self) -> bool {
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
                    self.slabs.news = Some(format!("{}: captures are dropped: {why}", self.process.who()));
                }
                false
            }
        }
    }

    /// Follows a slab that is full, and that an agent reads, with a larger one. Whether it did.
    fn grow(&mut self) -> bool {
        if !self.slabs.may_grow() || self.stalled.is_some() || !self.agent_is_there() {
            return false;
        }
        let Some(id) = self.slabs.grow(self.link.rank()) else { return false };
        self.link.say(ToAgent::Slab { id }, &self.slabs);
        true
    }

    /// The slabs are complete; another one will be made for the next tensor.
    pub fn leave_slabs(&mut self) {
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
    pub fn finish(&mut self) {
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
