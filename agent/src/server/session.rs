//! A rank's slab, and how far along it is.

use std::{
    os::fd::{AsRawFd, BorrowedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use tokio::sync::Notify;
use wire::slab::Mapping;

/// Shared by the connection, which says when the rank is gone, and the ingest thread, which ends when nothing is left.
#[derive(Debug)]
pub struct Session {
    /// Global rank.
    pub rank: u32,
    mapping: Arc<Mapping>,
    phase: Mutex<Phase>,
    /// Connections so far, but for the first.
    connections: AtomicU32,
    /// Position in the slab up to which it is emptied when the agent finishes.
    stop_at: AtomicU64,
    /// Wakes the connection when the slab turned out damaged.
    pub damaged: Notify,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The rank is there, by its connection of this number.
    Attached(u32),
    /// That connection is gone; `true`: in good order.
    HungUp(u32, bool),
    /// Nothing more is read.
    Done,
}

impl Session {
    /// Of a rank that just attached.
    pub fn new(rank: u32, mapping: Arc<Mapping>) -> Self {
        Self {
            rank,
            mapping,
            phase: Mutex::new(Phase::Attached(0)),
            connections: AtomicU32::new(0),
            stop_at: AtomicU64::new(u64::MAX),
            damaged: Notify::new(),
        }
    }

    /// The shared memory.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// A rank that lost its connection comes back with the memory it had. If the thread that reads it goes on, this is
    /// the number of the new connection.
    pub fn adopt(&self) -> Option<u32> {
        let mut phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        if *phase == Phase::Done {
            return None;
        }
        let number = self.connections.fetch_add(1, Ordering::AcqRel) + 1;
        *phase = Phase::Attached(number);
        Some(number)
    }

    /// A connection is gone. It may have been replaced before that was noticed.
    pub fn hang_up(&self, connection: u32, in_good_order: bool) {
        let mut phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        if *phase == Phase::Attached(connection) {
            *phase = Phase::HungUp(connection, in_good_order);
        }
    }

    /// The connection that is gone, and whether in good order.
    pub fn hung_up(&self) -> Option<(u32, bool)> {
        match *self.phase.lock().unwrap_or_else(PoisonError::into_inner) {
            Phase::HungUp(connection, in_good_order) => Some((connection, in_good_order)),
            _ => None,
        }
    }

    /// Ends the session, unless the rank has come back since that connection; whether it did.
    pub fn end_after(&self, connection: u32) -> bool {
        let mut phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        let ends = matches!(*phase, Phase::HungUp(last, _) if last == connection);
        if ends {
            *phase = Phase::Done;
        }
        ends
    }

    /// Ends the session in any case.
    pub fn end(&self) {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner) = Phase::Done;
    }

    /// Whether nothing more is read.
    pub fn is_done(&self) -> bool {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner) == Phase::Done
    }

    /// The agent finishes: what the rank writes from now on is not read.
    pub fn stop_at_head(&self) {
        let head = self.mapping.header().head.load(Ordering::Acquire);
        // Only the first call counts: a busy job must not push the end ahead of itself.
        let _ = self.stop_at.compare_exchange(u64::MAX, head, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Whether the agent finishes.
    pub fn is_stopping(&self) -> bool {
        self.stop_at.load(Ordering::Acquire) != u64::MAX
    }

    /// Whether the agent finishes and everything up to then is read.
    pub fn is_drained(&self) -> bool {
        self.tail() >= self.stop_at.load(Ordering::Acquire)
    }

    /// How far the slab is read.
    pub fn tail(&self) -> u64 {
        self.mapping.header().tail.load(Ordering::Acquire)
    }
}

/// Which memory a descriptor is.
pub fn inode_of(fd: BorrowedFd<'_>) -> std::io::Result<(u64, u64)> {
    // SAFETY: stat is plain data.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open and the buffer is a stat.
    if unsafe { libc::fstat(fd.as_raw_fd(), &mut stat) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok((stat.st_dev, stat.st_ino))
}

#[cfg(test)]
mod tests {
    use wire::slab::SlabWriter;

    use super::*;

    #[test]
    fn a_session_ends_after_its_last_connection_only() {
        let slab = SlabWriter::create(1 << 20, 0).unwrap();
        let session = Session::new(0, slab.mapping().clone());
        session.hang_up(0, false);
        assert_eq!(session.hung_up(), Some((0, false)));
        assert_eq!(session.adopt(), Some(1));
        assert!(!session.end_after(0), "it has come back");
        session.hang_up(0, true);
        assert_eq!(session.hung_up(), None, "the end of the old connection was noticed late");
        session.hang_up(1, true);
        assert!(session.end_after(1) && session.is_done());
        assert_eq!(session.adopt(), None);
    }

    #[test]
    fn other_memory_is_told_apart() {
        let (slab, other) = (SlabWriter::create(1 << 20, 0).unwrap(), SlabWriter::create(1 << 20, 0).unwrap());
        assert_ne!(inode_of(slab.mapping().fd().unwrap()).unwrap(), inode_of(other.mapping().fd().unwrap()).unwrap());
    }

    #[test]
    fn a_busy_rank_does_not_push_the_end_ahead_of_itself() {
        let mut slab = SlabWriter::create(1 << 20, 0).unwrap();
        let session = Session::new(0, slab.mapping().clone());
        assert!(!session.is_drained());
        session.stop_at_head();
        slab.try_reserve(1, b"m", 0, 64, 64).unwrap().commit();
        session.stop_at_head();
        assert!(session.is_drained());
    }
}
