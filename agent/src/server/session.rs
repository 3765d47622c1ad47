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
    /// Which memfd it is.
    inode: (u64, u64),
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
    /// The connection is gone; `true`: in good order.
    HungUp(bool),
    /// Nothing more is read.
    Done,
}

impl Session {
    /// Of a rank that just attached.
    pub fn new(rank: u32, mapping: Arc<Mapping>) -> std::io::Result<Self> {
        let inode = inode_of(mapping.fd())?;
        Ok(Self {
            rank,
            mapping,
            inode,
            phase: Mutex::new(Phase::Attached(0)),
            connections: AtomicU32::new(0),
            stop_at: AtomicU64::new(u64::MAX),
            damaged: Notify::new(),
        })
    }

    /// The shared memory.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// A rank that lost its connection comes back with the memory it had. If the thread that reads it goes on, this is
    /// the number of the new connection.
    pub fn adopt(&self, fd: BorrowedFd<'_>) -> Option<u32> {
        let mut phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        if *phase == Phase::Done || !inode_of(fd).is_ok_and(|i| i == self.inode) {
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
            *phase = Phase::HungUp(in_good_order);
        }
    }

    /// Whether the connection is gone, and whether in good order.
    pub fn hung_up(&self) -> Option<bool> {
        match *self.phase.lock().unwrap_or_else(PoisonError::into_inner) {
            Phase::HungUp(in_good_order) => Some(in_good_order),
            _ => None,
        }
    }

    /// Ends the session if the rank is gone; whether it did.
    pub fn end_if_hung_up(&self) -> bool {
        let mut phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*phase, Phase::HungUp(_)) {
            *phase = Phase::Done;
        }
        *phase == Phase::Done
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

fn inode_of(fd: BorrowedFd<'_>) -> std::io::Result<(u64, u64)> {
    // SAFETY: stat is plain data.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open and the buffer is a stat.
    if unsafe { libc::fstat(fd.as_raw_fd(), &mut stat) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok((stat.st_dev, stat.st_ino))
}
