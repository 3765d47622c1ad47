//! The bridge's communicator, owned.

use std::{
    ffi::c_void,
    sync::{Arc, atomic::AtomicU64},
};

use wire::{
    codes::MoveState,
    tap_abi::{self, BridgeTable},
};

use super::{
    agreement::{Held, OfferedPart},
    staging::Staged,
};

/// A communicator that ranks share. It is left once, by the thread that uses it.
#[derive(Clone, Copy)]
pub struct Communicator {
    comm: *mut c_void,
    index: usize,
    /// The device whose tensors it takes, or -1.
    device: i32,
    bridge: &'static BridgeTable,
}

// SAFETY: a communicator may be used from any thread, by one at a time, and cut from any (BridgeTable).
unsafe impl Send for Communicator {}

/// One tensor's way to another rank, or from it.
pub struct Transfer<'a> {
    peer: usize,
    what: What<'a>,
}

enum What<'a> {
    Send(&'a Staged),
    Receive(&'a OfferedPart),
}

impl<'a> Transfer<'a> {
    /// To `peer`.
    pub fn send(peer: usize, staged: &'a Staged) -> Self {
        Self { peer, what: What::Send(staged) }
    }

    /// From the rank that has it.
    pub fn receive(part: &'a OfferedPart) -> Self {
        Self { peer: part.member, what: What::Receive(part) }
    }

    fn as_abi(&self) -> tap_abi::Move {
        let nothing = tap_abi::Move {
            peer: self.peer as u32,
            send: true,
            on_device: false,
            tensor: std::ptr::null_mut(),
            dtype: 0,
            sizes: std::ptr::null(),
            ndim: 0,
        };
        match self.what {
            What::Send(staged) => {
                tap_abi::Move { on_device: staged.is_on_device(), tensor: staged.tensor(), ..nothing }
            }
            What::Receive(part) => tap_abi::Move {
                send: false,
                on_device: part.held == Held::Device,
                dtype: part.meta.dtype as u8,
                sizes: part.meta.shape.as_ptr(),
                ndim: part.meta.shape.len() as u32,
                ..nothing
            },
        }
    }
}

impl Communicator {
    /// Of the bridge's making. `index` is this rank among its members, `device` whose tensors it takes beside those of the
    /// CPU, or -1.
    pub fn new(comm: *mut c_void, index: usize, device: i32, bridge: &'static BridgeTable) -> Self {
        Self { comm, index, device, bridge }
    }

    /// Whether it takes a tensor. NCCL looks at no address: what is on another device than the communicator's may fault there,
    /// and cost the job its context.
    pub fn takes(&self, staged: &Staged) -> bool {
        !staged.is_on_device() || staged.device() == self.device
    }

    /// This rank among the members.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Sends `mine` to all members; what each of them sent, in order. `None`: the communicator is of no use any more.
    pub fn exchange(&self, mine: &[u8]) -> Option<Vec<Vec<u8>>> {
        unsafe extern "C" fn hear(heard: *mut c_void, bytes: *const u8, len: usize) {
            // SAFETY: `heard` is the list below, and the bytes live through the call.
            unsafe { (*heard.cast::<Vec<Vec<u8>>>()).push(std::slice::from_raw_parts(bytes, len).to_vec()) };
        }
        let mut heard: Vec<Vec<u8>> = Vec::new();
        let list = std::ptr::from_mut(&mut heard).cast();
        // SAFETY: the communicator is not left yet; `list` lives through the call, as `hear` wants it.
        unsafe { (self.bridge.exchange)(self.comm, mine.as_ptr(), mine.len(), list, hear) }.then_some(heard)
    }

    /// Carries out transfers; what was received, in order, counted in `budget`. All members must begin theirs.
    pub fn transfer(
        &self,
        transfers: Vec<Transfer<'_>>,
        replicas_once: bool,
        budget: &Arc<AtomicU64>,
    ) -> (MoveState, Vec<Staged>) {
        let mut list: Vec<tap_abi::Move> = transfers.iter().map(Transfer::as_abi).collect();
        // SAFETY: the communicator is not left yet; tensors and sizes live through the call.
        let outcome = unsafe { (self.bridge.transfer)(self.comm, list.as_mut_ptr(), list.len()) };
        let received = |(done, one): (&tap_abi::Move, &Transfer<'_>)| {
            let What::Receive(part) = one.what else { return None };
            // A rank that describes more bytes than there can be gets no tensor.
            let bytes = part.meta.payload_len().unwrap_or_default();
            let device = if done.on_device { self.device } else { -1 };
            Staged::received(done.tensor, device, bytes, replicas_once, self.bridge, budget)
        };
        (outcome, list.iter().zip(&transfers).filter_map(received).collect())
    }

    /// Makes what is under way fail. From any thread.
    pub fn cut(&self) {
        // SAFETY: the communicator is not left yet: its thread says so under the lock that the caller holds.
        unsafe { (self.bridge.cut)(self.comm) };
    }

    /// Gives it back.
    pub fn leave(&self) {
        // SAFETY: called once, by the thread that used it.
        unsafe { (self.bridge.leave)(self.comm) };
    }
}

#[cfg(test)]
mod tests {
    use wire::{dtype::DType, record::RecordMeta};

    use super::*;
    use crate::{
        testing::{BRIDGE, Tensor},
        transport::Captured,
    };

    fn staged_on(device: i32) -> Staged {
        let tensor = Tensor { device, ..Tensor::of(4) };
        let captured = Captured {
            meta: RecordMeta::output("m", DType::Float32, vec![4]),
            handle: std::ptr::from_ref(&tensor).cast(),
            on_device: device >= 0,
            staged: false,
            collective: true,
            replicas_once: false,
            cut: None,
        };
        Staged::new(&captured, 1 << 20, &BRIDGE, &Arc::default()).unwrap()
    }

    #[test]
    fn what_is_on_another_device_than_the_communicators_is_not_given_to_it() {
        let takes = |device| {
            let comm = Communicator::new(std::ptr::null_mut(), 0, device, &BRIDGE);
            [-1, 0, 1].map(|tensor| comm.takes(&staged_on(tensor)))
        };
        assert_eq!(takes(1), [true, false, true]);
        assert_eq!(takes(-1), [true, false, false], "it has none");
    }
}
