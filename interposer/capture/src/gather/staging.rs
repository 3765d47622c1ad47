//! Staged copies: what a rank holds for the others until it is gathered.

use std::{
    ffi::c_void,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use wire::{codes::CopyState, record::RecordMeta, tap_abi::BridgeTable};

use super::agreement::Held;
use crate::transport::Captured;

/// A row-major tensor of our own, on the device that it was captured on.
pub struct Staged {
    tensor: *mut c_void,
    /// The index of its device, or -1 for the CPU.
    device: i32,
    bytes: u64,
    /// As in [`Captured`].
    replicas_once: bool,
    bridge: &'static BridgeTable,
    /// Bytes that are staged in this process.
    budget: Arc<AtomicU64>,
}

// SAFETY: a staged tensor may be used from any thread (BridgeTable).
unsafe impl Send for Staged {}

impl Staged {
    /// A copy of what a tap captures; `None` if all together were more than `most` bytes, or there is no memory.
    pub fn new(captured: &Captured, most: u64, bridge: &'static BridgeTable, budget: &Arc<AtomicU64>) -> Option<Self> {
        let bytes = captured.meta.payload_len()?;
        let within = |staged: u64| staged.checked_add(bytes).filter(|&sum| sum <= most);
        budget.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within).ok()?;
        let mut device = -1;
        // SAFETY: the handle is the tensor of the tap that is triggered.
        let tensor = unsafe { (bridge.stage)(captured.handle, captured.meta.dtype as u8, &raw mut device) };
        if tensor.is_null() {
            budget.fetch_sub(bytes, Ordering::Relaxed);
            return None;
        }
        let replicas_once = captured.replicas_once;
        Some(Self { tensor, device, bytes, replicas_once, bridge, budget: budget.clone() })
    }

    /// What was received from another rank, which is staged whatever there is already; `None` if nothing was.
    pub fn received(
        tensor: *mut c_void,
        device: i32,
        bytes: u64,
        replicas_once: bool,
        bridge: &'static BridgeTable,
        budget: &Arc<AtomicU64>,
    ) -> Option<Self> {
        if tensor.is_null() {
            return None;
        }
        budget.fetch_add(bytes, Ordering::Relaxed);
        Some(Self { tensor, device, bytes, replicas_once, bridge, budget: budget.clone() })
    }

    /// The bridge's tensor.
    pub fn tensor(&self) -> *mut c_void {
        self.tensor
    }

    /// The index of its device, or -1 for the CPU.
    pub fn device(&self) -> i32 {
        self.device
    }

    /// Whether it is on a device, not the CPU.
    pub fn is_on_device(&self) -> bool {
        self.device >= 0
    }

    /// Where it is.
    pub fn held(&self) -> Held {
        if self.is_on_device() { Held::Device } else { Held::Host }
    }

    /// How far it is: a part is offered to other ranks once it is there, so that no transfer waits for what the job has
    /// queued on its device.
    pub fn state(&self) -> CopyState {
        // SAFETY: the tensor came from the bridge and was not given back.
        unsafe { (self.bridge.come)(self.tensor) }
    }

    /// To be sent; this has to outlive it.
    pub fn captured(&self, meta: RecordMeta) -> Captured {
        let Self { tensor: handle, replicas_once, .. } = *self;
        let on_device = self.is_on_device();
        Captured { meta, handle, on_device, staged: true, collective: false, replicas_once, cut: None }
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        self.budget.fetch_sub(self.bytes, Ordering::Relaxed);
        // SAFETY: the tensor came from the bridge and is given back once.
        unsafe { (self.bridge.release)(self.tensor) };
    }
}
