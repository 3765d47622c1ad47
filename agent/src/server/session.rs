//! One slab of a rank, and how far along it is.

use std::{
    os::fd::{AsRawFd, BorrowedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use flexmodel_run::format::JobId;
use tokio::sync::Notify;
use wire::slab::Mapping;

/// Shared by the connection, which says when the rank is gone, and the ingest thread, which ends when nothing is left.
#[derive(Debug)]
pub struct Session {
    /// Global rank.
    pub rank: u32,
    /// The job that it is of.
    pub job: JobId,
    mapping: Arc<Mapping>,
    phase: Mutex<Phase>,
    /// Connections so far, but for the first.
    connections: AtomicU32,
    /// Position in the slab up to which it is emptied when the agent finishes.
    stop_at: AtomicU64,
    /// Wakes the connection when the slab turned out damaged.
    damaged: Mutex<Arc<Notify>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The rank is there, by its connection of this number.
    Attached(u32),
    /// It said goodbye on that connection.
    Parting(u32),
    /// That connection is gone.
    HungUp(u32),
    /// Nothing more is read.
    Done,
}

impl Session {
    /// Of a rank that just attached; `damaged` wakes its connection.
    pub fn new(rank: u32, job: JobId, mapping: Arc<Mapping>, damaged: Arc<Notify>) -> Self {
        Self {
            rank,
            job,
            mapping,
            phase: Mutex::new(Phase::Attached(0)),
            connections: AtomicU32::new(0),
            stop_at: AtomicU64::new(u64::MAX),
            damaged: Mutex::new(damaged),
        }
    }

    /// The shared memory.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// A rank that lost its connection comes back with the memory it had. If the thread that reads it goes on, this is
    /// the number of the new connection.
    pub fn adopt(&self, damaged: Arc<Notify>) -> Option<u32> {
        let mut phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        if *phase == Phase::Done {
            return None;
        }
        let number = self.connections.fetch_add(1, Ordering::AcqRel) + 1;
        *phase = Phase::Attached(number);
        *self.damaged.lock().unwrap_or_else(PoisonError::into_inner) = damaged;
        Some(number)
    }

    /// The slab turned out damaged: its connection ends.
    pub fn tell_of_damage(&self) {
        self.damaged.lock().unwrap_or_else(PoisonError::into_inner).notify_one();
    }

    /// The rank said on this connection that nothing follows, but for what some thread may still be at.
    pub fn part(&self, connection: u32) {
        self.advance(connection, Phase::Parting(connection));
    }

    /// A connection is gone. It may have been replaced before that was noticed.
    pub fn hang_up(&self, connection: u32) {
        self.advance(connection, Phase::HungUp(connection));
    }

    fn advance(&self, connection: u32, next: Phase) {
        let mut phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*phase, Phase::Attached(last) | Phase::Parting(last) if last == connection) {
            *phase = next;
        }
    }

    /// The connection that is gone.
    pub fn hung_up(&self) -> Option<u32> {
        match *self.phase.lock().unwrap_or_else(PoisonError::into_inner) {
            Phase::HungUp(connection) => Some(connection),
            _ => None,
        }
    }

    /// The connection that is gone, or on which the rank said goodbye.
    pub fn leaving(&self) -> Option<u32> {
        match *self.phase.lock().unwrap_or_else(PoisonError::into_inner) {
            Phase::Parting(connection) | Phase::HungUp(connection) => Some(connection),
            _ => None,
        }
    }

    /// Ends the session, unless the rank has come back since that connection; whether it did. What `closing` does is done
    /// when the rank comes back later.
    pub fn end_after(&self, connection: u32, closing: impl FnOnce()) -> bool {
        let mut phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        let ends = matches!(*phase, Phase::Parting(last) | Phase::HungUp(last) if last == connection);
        if ends {
            closing();
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

    fn session_of(slab: &SlabWriter) -> Session {
        Session::new(0, JobId::default(), slab.mapping().clone(), Arc::default())
    }

    #[test]
    fn a_session_ends_after_its_last_connection_only() {
        let slab = SlabWriter::create(1 << 20, 0).unwrap();
        let session = session_of(&slab);
        session.part(0);
        assert_eq!((session.hung_up(), session.leaving()), (None, Some(0)));
        session.hang_up(0);
        assert_eq!((session.hung_up(), session.leaving()), (Some(0), Some(0)));
        assert_eq!(session.adopt(Arc::default()), Some(1));
        assert!(!session.end_after(0, || panic!("it has come back")));
        session.hang_up(0);
        assert_eq!(session.hung_up(), None, "the end of the old connection was noticed late");
        session.hang_up(1);
        let mut closed = false;
        assert!(session.end_after(1, || closed = true) && session.is_done() && closed);
        assert_eq!(session.adopt(Arc::default()), None);
    }

    #[test]
    fn other_memory_is_told_apart() {
        let (slab, other) = (SlabWriter::create(1 << 20, 0).unwrap(), SlabWriter::create(1 << 20, 0).unwrap());
        assert_ne!(inode_of(slab.mapping().fd().unwrap()).unwrap(), inode_of(other.mapping().fd().unwrap()).unwrap());
    }

    #[test]
    fn a_busy_rank_does_not_push_the_end_ahead_of_itself() {
        let mut slab = SlabWriter::create(1 << 20, 0).unwrap();
        let session = session_of(&slab);
        assert!(!session.is_drained());
        session.stop_at_head();
        slab.try_reserve(1, b"m", 0, 64, 64).unwrap().commit();
        session.stop_at_head();
        assert!(session.is_drained());
    }
}
