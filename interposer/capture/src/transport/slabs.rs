//! The slabs of this process: the one that tensors begin in, and those before it in which some still end.
//!
//! The first is small. One that is full while an agent reads it is followed by one twice as large, as long as all
//! together stay within what the user allows and the machine has. The first tensor of a device begins the last one, of all
//! that is left, which is pinned ([`Pinning`]).

use std::{os::fd::BorrowedFd, sync::Arc};

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
    /// Of the current one, if it is the one for tensors of a device.
    pinning: Option<Arc<Pinning>>,
    /// A tensor found the current one full.
    pub full: bool,
    /// What the user should hear.
    pub news: Option<String>,
}

impl Slabs {
    /// None yet, of at most `bound` bytes together.
    pub fn new(bound: u64, memory: Memory) -> Self {
        let bound = bound.max(MIN_SLAB_BYTES) / 4096 * 4096;
        Self { bound, memory, current: None, retiring: Vec::new(), pinning: None, full: false, news: None }
    }

    /// The number of ranks that have slabs on this machine.
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

    /// Those that an agent can be given, with their descriptors: the job has left these alone. Oldest first.
    pub fn within_reach(&self) -> impl Iterator<Item = (&SlabWriter, BorrowedFd<'_>)> {
        self.live().filter_map(|writer| Some((writer, writer.mapping().fd().ok()?)))
    }

    /// Whether the one that tensors begin in is such a one.
    pub fn is_current_within_reach(&self) -> bool {
        self.current.as_ref().is_some_and(|writer| writer.mapping().fd().is_ok())
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

    /// The first tensor of a device: makes the slab for it, of all bytes that are left and fit. The number of the new slab, if
    /// there is one: where too little is left it is the current one.
    pub fn begin_for_device(&mut self, rank: u32) -> Option<u64> {
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
        self.pinning = Some(Arc::default());
        if let Some(why) = why {
            self.stay(&why);
        }
        followed
    }

    /// Of the current one, if it is the one for tensors of a device.
    pub fn pinning(&self) -> Option<Arc<Pinning>> {
        self.pinning.clone()
    }

    /// Follows the current slab with a first one, since the job has closed its descriptor: no agent that comes can be given
    /// it. That may be above the bound until the last tensor has left the one before. Whether there is one.
    pub fn begin_again(&mut self, rank: u32) -> bool {
        let fits = self.memory.look().fits(MIN_SLAB_BYTES).is_ok();
        let Some(writer) = fits.then(|| make(MIN_SLAB_BYTES, rank).ok()).flatten() else { return false };
        self.pinning = None;
        self.follow(writer);
        true
    }

    /// Takes out those before the current one that no agent can be given any more, once no tensor is under way in them:
    /// the number of each, and how many tensors were begun in it. An agent that has it reads it to its end.
    pub fn take_out_of_reach(&mut self) -> Vec<(u64, u64)> {
        let mut gone = Vec::new();
        self.retiring.retain(|writer| {
            let stays = !writer.is_complete() || writer.mapping().fd().is_ok();
            if !stays {
                gone.push((writer.mapping().header().id, writer.begun()));
            }
            stays
        });
        gone
    }

    fn follow(&mut self, writer: SlabWriter) -> u64 {
        let id = writer.mapping().header().id;
        self.retiring.extend(self.current.replace(writer));
        self.full = false;
        self.sweep();
        id
    }

    /// No more is asked for; the user hears why.
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

    /// Leaves all of them; oldest first. The next tensor begins another first one.
    pub fn leave(&mut self) -> Vec<SlabWriter> {
        self.pinning = None;
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

#[cfg(test)]
mod tests {
    use wire::slab::{Fetched, SlabReader};

    use super::*;

    const MIB: u64 = 1 << 20;

    fn slabs(bound: u64) -> Slabs {
        let mut slabs = Slabs::new(bound, Memory::new(1));
        slabs.begin(0).unwrap();
        slabs
    }

    fn sizes(slabs: &Slabs) -> Vec<u64> {
        slabs.live().map(|writer| size(writer) / MIB).collect()
    }

    /// An agent that has read something of the current slab.
    fn read(slabs: &mut Slabs) -> SlabReader {
        let writer = slabs.current().unwrap();
        let record = writer.begin_record();
        writer.try_reserve(record, b"m", 0, 8, 8).unwrap().commit();
        let mut reader = SlabReader::attach(writer.mapping().fd().unwrap().try_clone_to_owned().unwrap()).unwrap();
        assert!(matches!(reader.fetch().unwrap(), Fetched::Frame(_)));
        reader.release().unwrap();
        reader
    }

    fn settle_complete(readers: &[SlabReader]) {
        readers.iter().filter(|reader| reader.is_complete()).for_each(SlabReader::settle);
    }

    #[test]
    fn slabs_double_as_long_as_all_live_ones_stay_within_the_bound() {
        let mut slabs = slabs(13 * MIB);
        let mut readers = Vec::new();
        for expected in [&[1][..], &[2], &[4], &[8]] {
            settle_complete(&readers);
            slabs.sweep();
            assert_eq!(sizes(&slabs), expected);
            readers.push(read(&mut slabs));
            // 8 MiB beside the 4 fit, 16 do not.
            assert_eq!(slabs.grow(0).is_some(), expected != [8]);
        }
        assert!(slabs.news.is_none(), "the user's own bound is no news");
    }

    #[test]
    fn what_is_not_settled_counts() {
        let mut slabs = slabs(8 * MIB);
        let _readers = [read(&mut slabs), {
            slabs.grow(0).unwrap();
            read(&mut slabs)
        }];
        // 1 and 2 MiB are there; 4 more are within 8, 8 more would not be.
        assert!(slabs.grow(0).is_some());
        assert_eq!(sizes(&slabs), [1, 2, 4]);
        let _reader = read(&mut slabs);
        assert!(slabs.grow(0).is_none());
    }

    #[test]
    fn a_slab_that_nobody_reads_is_not_left_behind() {
        let mut slabs = slabs(64 * MIB);
        assert!(!slabs.may_grow() && slabs.grow(0).is_none());
        read(&mut slabs);
        assert!(slabs.may_grow());
        assert!(slabs.grow(0).is_some());
        assert!(!slabs.may_grow(), "an agent that stopped has not read the new one");
    }

    /// SLAB-7, SLAB-8.
    #[test]
    fn a_slab_stays_until_its_last_tensor_and_the_agent_are_done() {
        let mut slabs = slabs(64 * MIB);
        let reader = read(&mut slabs);
        let writer = slabs.current().unwrap();
        let (map, record) = (writer.mapping().clone(), writer.begin_record());
        slabs.grow(0).unwrap();
        slabs.sweep();
        assert!(!reader.is_complete(), "a tensor is under way");
        let slot = slabs.writer_of(&map).unwrap().try_reserve(record, b"m", 0, 8, 8);
        slot.unwrap().commit();
        drop(map);
        slabs.sweep();
        assert!(reader.is_complete());
        assert_eq!(sizes(&slabs), [1, 2], "it was not read to its end");
        reader.settle();
        slabs.sweep();
        assert_eq!(sizes(&slabs), [2]);
    }

    #[test]
    fn what_does_not_fit_is_said_once_and_not_asked_for_again() {
        let mut slabs = slabs(1 << 62);
        slabs.shared_by(u32::MAX);
        let _reader = read(&mut slabs);
        assert!(slabs.grow(0).is_none());
        let news = slabs.news.take().unwrap();
        assert!(news.contains("2 MiB for each of 4294967295 ranks") && news.contains("FLEXMODEL_SLAB"), "{news}");
        assert_eq!(slabs.bound(), MIB);
        assert!(slabs.grow(0).is_none() && slabs.news.is_none());
    }

    #[test]
    fn not_even_the_first_slab_is_asked_for_where_there_is_nothing() {
        let mut slabs = Slabs::new(64 * MIB, Memory::new(u32::MAX));
        let why = slabs.begin(0).unwrap_err();
        assert!(why.contains("1 MiB for each of"), "{why}");
        assert!(slabs.current().is_none());
    }

    #[test]
    fn the_first_tensor_of_a_device_begins_all_that_is_left_and_that_is_the_last_slab() {
        let mut slabs = slabs(32 * MIB);
        assert!(slabs.pinning().is_none());
        assert!(slabs.begin_for_device(0).is_some());
        let pinning = slabs.pinning().unwrap();
        assert!(slabs.begin_for_device(0).is_none());
        assert!(Arc::ptr_eq(&pinning, &slabs.pinning().unwrap()), "pinned once");
        assert_eq!(sizes(&slabs), [1, 31]);
        let _reader = read(&mut slabs);
        assert!(!slabs.may_grow());
    }

    #[test]
    fn where_too_little_is_left_for_a_device_the_current_slab_is_the_one() {
        let mut slabs = slabs(MIB);
        assert!(slabs.begin_for_device(0).is_none());
        assert!(slabs.pinning().is_some());
        assert_eq!(sizes(&slabs), [1]);
        assert!(slabs.news.is_none());
    }

    #[test]
    fn a_device_gets_what_fits_and_the_user_a_line() {
        let mut slabs = slabs(1 << 62);
        slabs.shared_by(500);
        assert!(slabs.begin_for_device(0).is_some());
        let news = slabs.news.take().unwrap();
        assert!(news.contains("GiB") && news.contains("FLEXMODEL_SLAB"), "{news}");
        assert!(slabs.bound() < 1 << 50);
    }

    /// A device may still write to it.
    #[test]
    fn a_pinned_slab_stays_mapped_when_it_is_left() {
        let mut slabs = slabs(2 * MIB);
        slabs.begin_for_device(0);
        slabs.current().unwrap().mapping().keep_mapped();
        let start = slabs.current().unwrap().mapping().whole().0.addr();
        drop(slabs.leave());
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        assert!(maps.lines().any(|line| line.starts_with(&format!("{start:x}-"))));
        assert!(slabs.current().is_none());
    }
}
