//! A slab that was left because the job has closed its descriptor: no other agent can be given it. The agent that has
//! it goes on reading, if it lives; what nobody reads is counted in the slab that follows.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use wire::slab::{Mapping, SlabWriter};

/// A heart that stands still this long reads nothing more.
const STILL: Duration = Duration::from_secs(2);

/// The slab, until it is certain what of it is lost.
pub struct LeftSlab {
    writer: SlabWriter,
    heart: u32,
    beat_at: Instant,
}

impl LeftSlab {
    /// From now on nothing is written to it, but what is under way.
    pub fn new(writer: SlabWriter) -> Self {
        let heart = writer.mapping().header().heartbeat.load(Ordering::Acquire);
        Self { writer, heart, beat_at: Instant::now() }
    }

    /// The memory.
    pub fn mapping(&self) -> &Arc<Mapping> {
        self.writer.mapping()
    }

    /// Tensors of it that are lost, once that is certain: it has been read to its end, or its agent is dead.
    pub fn lost(&mut self) -> Option<u64> {
        let unread = self.writer.unread();
        let heart = self.mapping().header().heartbeat.load(Ordering::Acquire);
        if heart != self.heart {
            (self.heart, self.beat_at) = (heart, Instant::now());
        }
        // A heart that never beat is that of a slab that no agent had.
        (unread == 0 || heart == 0 || self.beat_at.elapsed() > STILL).then_some(unread)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slab(tensors: usize) -> SlabWriter {
        let mut slab = SlabWriter::create(1 << 20, 0).unwrap();
        for _ in 0..tensors {
            let record = slab.begin_record();
            slab.try_reserve(record, b"meta", 0, 64, 128).unwrap().commit();
            slab.try_reserve(record, b"", 64, 64, 128).unwrap().commit();
        }
        slab
    }

    #[test]
    fn of_a_slab_that_no_agent_had_all_is_lost() {
        assert_eq!(LeftSlab::new(slab(3)).lost(), Some(3));
        assert_eq!(LeftSlab::new(slab(0)).lost(), Some(0));
    }

    #[test]
    fn what_a_living_agent_has_is_not_lost_yet() {
        let slab = slab(3);
        slab.mapping().header().heartbeat.store(1, Ordering::Release);
        let mut left = LeftSlab::new(slab);
        assert_eq!(left.lost(), None);
        left.beat_at -= STILL * 2;
        assert_eq!(left.lost(), Some(3));
        let heartbeat = &left.mapping().clone();
        heartbeat.header().heartbeat.store(2, Ordering::Release);
        assert_eq!(left.lost(), None, "it beats again");
    }
}
