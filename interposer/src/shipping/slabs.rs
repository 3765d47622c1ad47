//! The slabs of this process: the one that tensors begin in, and those before it in which some still end.
//!
//! The first is small. One that is full while an agent reads it is followed by one twice as large, as long as all
//! together stay within what the user allows and the machine has. The first tensor of a device begins the last one, of all
//! that is left, which is pinned.

use std::sync::Arc;

use wire::{
    env::{self, MIN_SLAB_BYTES},
    slab::{HEADER_LEN, Mapping, SlabWriter},
};

use super::{
    memory::{Bytes, Memory},
    pinning::Pinning,
};

/// The slabs, and how many bytes they may have.
pub struct Slabs {
    /// Most bytes of all together.
    bound: u64,
    memory: Memory,
    /// The one that tensors begin in.
    current: Option<SlabWriter>,
    /// Those before it that the agent has not settled, oldest first.
    retiring: Vec<SlabWriter>,
    /// Whether the current one is the one for tensors of a device, and is pinned.
    pinning: Option<Pinning>,
    /// A tensor found the current one full.
    pub full: bool,
    /// What the user should be told.
    pub news: Option<String>,
}

impl Slabs {
    /// None yet, of at most `bound` bytes together.
    pub fn new(bound: u64, memory: Memory) -> Self {
        let bound = bound.max(MIN_SLAB_BYTES) / 4096 * 4096;
        Self { bound, memory, current: None, retiring: Vec::new(), pinning: None, full: false, news: None }
    }

    /// So many ranks have slabs on this machine.
    pub fn shared_by(&mut self, ranks: u32) {
        self.memory = Memory::new(ranks);
    }

    /// Most bytes of all together.
    pub fn bound(&self) -> u64 {
        self.bound
    }

    /// The one that tensors begin in.
    pub fn current(&mut self) -> Option<&mut SlabWriter> {
        self.current.as_mut()
    }

    /// All that an agent has to read, oldest first.
    pub fn live(&self) -> impl Iterator<Item = &SlabWriter> {
        self.retiring.iter().chain(&self.current)
    }

    /// The one with this number.
    pub fn numbered(&self, id: u64) -> Option<&SlabWriter> {
        self.live().find(|writer| writer.mapping().header().id == id)
    }

    /// The one that is this memory. `None` if the process has left it.
    pub fn writer_of(&mut self, map: &Arc<Mapping>) -> Option<&mut SlabWriter> {
        self.current.iter_mut().chain(&mut self.retiring).find(|writer| Arc::ptr_eq(writer.mapping(), map))
    }

    /// Makes the first slab if there is none.
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn begin(&mut self, rank: u32) -> Result<(), String> {
        if self.current.is_some() {
            return Ok(());
        }
        let shortage = |why| format!("{why}; there is none for slabs");
        self.memory.look().fits(MIN_SLAB_BYTES).map_err(shortage)?;
        self.current = Some(make(MIN_SLAB_BYTES, rank)?);
        Ok(())
    }

    /// Bytes of the slab that would follow the current one: twice as many, if all live ones stay within the bound. An agent
    /// must be reading the current one, and the last one has no successor.
    fn following(&self) -> Option<u64> {
        let current = self.current.as_ref().filter(|writer| writer.is_being_read() && self.pinning.is_none())?;
        let bytes = size(current).checked_mul(2)?;
        (bytes <= self.left()).then_some(bytes)
    }

    /// Bytes that further slabs may have.
    fn left(&self) -> u64 {
        self.bound.saturating_sub(self.live().map(size).sum())
    }

    /// Whether [`grow`](Self::grow) would be tried.
    pub fn may_grow(&self) -> bool {
        self.following().is_some()
    }

    /// Follows the current slab with one twice as large; its number. What does not fit is asked for once.
    pub fn grow(&mut self, rank: u32) -> Option<u64> {
        let bytes = self.following()?;
        let made = self.memory.look().fits(bytes).map_err(|why| why.to_string()).and_then(|()| make(bytes, rank));
        match made {
            Ok(writer) => Some(self.follow(writer)),
            Err(why) => {
                self.stay(&why);
                None
            }
        }
    }

    /// The first tensor of a device: makes the slab for it, of all bytes that are left and fit, and `pin`s that. The number
    /// of the new slab, if there is one: where too little is left the current one is pinned.
    pub fn begin_for_device(&mut self, rank: u32, pin: impl FnOnce(&Mapping) -> bool) -> Option<u64> {
        if self.pinning.is_some() {
            return None;
        }
        let least = self.current.as_ref().map_or(0, size).max(MIN_SLAB_BYTES);
        let (mut bytes, mut why) = (self.left(), None);
        let there_is = self.memory.look();
        while bytes > least
            && let Err(shortage) = there_is.fits(bytes)
        {
            why.get_or_insert_with(|| shortage.to_string());
            bytes = bytes / 2 / 4096 * 4096;
        }
        let mut followed = None;
        if bytes > least {
            match make(bytes, rank) {
                Ok(writer) => followed = Some(self.follow(writer)),
                Err(refused) => why = Some(refused),
            }
        }
        let current = self.current.as_ref()?;
        self.pinning = Some(Pinning::new(|| pin(current.mapping())));
        if let Some(why) = why {
            self.stay(&why);
        }
        followed
    }

    /// A copy has come from a device into `map`: pins that if it is the slab for it and was not pinned. Whether it is now
    /// clear that such copies will stay slow.
    pub fn device_copied(&mut self, map: &Arc<Mapping>, pin: impl FnOnce() -> bool) -> bool {
        let current = self.current.as_ref().is_some_and(|writer| Arc::ptr_eq(writer.mapping(), map));
        current && self.pinning.as_mut().is_some_and(|pinning| pinning.device_copied(pin))
    }

    fn follow(&mut self, writer: SlabWriter) -> u64 {
        let id = writer.mapping().header().id;
        self.retiring.extend(self.current.replace(writer));
        self.full = false;
        self.sweep();
        id
    }

    /// No more is asked for; the user is told why.
    fn stay(&mut self, why: &str) {
        let live: u64 = self.live().map(size).sum();
        self.bound = live;
        self.news = Some(format!(
            "{why}: captures go through {} of slabs; free some, or set {} to what may be used",
            Bytes(live),
            env::SLAB
        ));
    }

    /// Says of retiring slabs that they are complete when no tensor is under way in them (SLAB-7), and lets those go that
    /// the agent has settled (SLAB-8).
    pub fn sweep(&mut self) {
        if self.retiring.is_empty() {
            return;
        }
        for writer in &mut self.retiring {
            if !writer.is_complete() && writer.is_idle() {
                writer.complete();
            }
        }
        self.retiring.retain(|writer| !(writer.is_complete() && writer.is_settled()));
    }

    /// Leaves all of them; oldest first. The next tensor begins another first one. What a device may write to stays mapped.
    pub fn leave(&mut self) -> Vec<SlabWriter> {
        if self.pinning.take() == Some(Pinning::Pinned)
            && let Some(writer) = &self.current
        {
            std::mem::forget(writer.mapping().clone());
        }
        self.full = false;
        let mut left = std::mem::take(&mut self.retiring);
        left.extend(self.current.take());
        left
    }
}

/// Bytes of a slab in all.
fn size(writer: &SlabWriter) -> u64 {
    writer.mapping().ring_len() + HEADER_LEN
}

fn make(bytes: u64, rank: u32) -> Result<SlabWriter, String> {
    SlabWriter::create(bytes.saturating_sub(HEADER_LEN), rank).map_err(|why| why.to_string())
}
