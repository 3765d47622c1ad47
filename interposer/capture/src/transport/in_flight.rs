//! One record on its way through one slab.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use wire::slab::Mapping;

use super::pinning::Pinning;

/// Shared by the tap that sends a tensor and the thread that waits for its copies from a device.
pub struct InFlight {
    /// The slab. A process that turns out to be another rank gets another one.
    pub map: Arc<Mapping>,
    /// The tensor's number in it.
    pub record: u64,
    /// Most bytes of a piece.
    pub max_piece: u64,
    /// Of the slab, where it is the one for tensors of a device.
    pub pinning: Option<Arc<Pinning>>,
    lost: AtomicBool,
}

impl InFlight {
    /// A tensor that is about to be sent.
    pub fn new(map: Arc<Mapping>, record: u64, max_piece: u64, pinning: Option<Arc<Pinning>>) -> Self {
        Self { map, record, max_piece, pinning, lost: AtomicBool::new(false) }
    }

    /// The tensor will not arrive whole. It is counted once, whichever of its pieces fail.
    pub fn lose(&self) {
        if !self.lost.swap(true, Ordering::Relaxed) {
            self.map.header().dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether more pieces are of no use.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }
}
