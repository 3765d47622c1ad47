//! What a rank keeps for the others, and how it gets there: the bridge's tensors and communicators, owned.

use std::ffi::c_void;

use wire::{record::RecordMeta, tap_abi};

use super::{
    agreement::{Held, Part},
    forget, lock,
};
use crate::{
    boot,
    shipping::{self, Cargo},
};

/// A row-major tensor of our own, on the device that it was captured on.
pub struct Kept {
    tensor: *mut c_void,
    on_device: bool,
    bytes: u64,
}

// SAFETY: a kept tensor may be used from any thread (BridgeTable).
unsafe impl Send for Kept {}

impl Kept {
    /// A copy of what a tap captures; `None` if more is kept than a slab holds, or there is no memory.
    pub fn new(cargo: &Cargo) -> Option<Self> {
        let bytes = cargo.meta.payload_len()?;
        let bridge = boot::bridge()?;
        {
            let mut gather = lock();
            if gather.bytes.saturating_add(bytes) > shipping::slab_bytes() {
                return None;
            }
            gather.bytes += bytes;
        }
        let mut on_device = false;
        // SAFETY: the handle is the tensor of the tap that is firing.
        let tensor = unsafe { (bridge.keep)(cargo.handle, cargo.meta.dtype as u8, &raw mut on_device) };
        if tensor.is_null() {
            forget(bytes);
            return None;
        }
        Some(Self { tensor, on_device, bytes })
    }

    /// Where it is.
    pub fn held(&self) -> Held {
        if self.on_device { Held::Device } else { Held::Host }
    }

    /// To be shipped; this has to outlive it.
    pub fn cargo(&self, meta: RecordMeta) -> Cargo {
        Cargo { meta, handle: self.tensor, on_device: self.on_device, kept: true, collective: false }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        forget(self.bytes);
        if let Some(bridge) = boot::bridge() {
            // SAFETY: the tensor came from the bridge and is given back once.
            unsafe { (bridge.discard)(self.tensor) };
        }
    }
}

/// One tensor's way to another rank, or from it.
pub struct Move<'a> {
    peer: usize,
    what: What<'a>,
}

enum What<'a> {
    Send(&'a Kept),
    Receive(&'a Part),
}

impl<'a> Move<'a> {
    /// To `peer`.
    pub fn send(peer: usize, kept: &'a Kept) -> Self {
        Self { peer, what: What::Send(kept) }
    }

    /// From the rank that has it.
    pub fn receive(part: &'a Part) -> Self {
        Self { peer: part.member, what: What::Receive(part) }
    }
}

/// The bridge's communicator. It is left once, by the thread that uses it.
#[derive(Clone, Copy)]
pub struct Communicator {
    comm: *mut c_void,
    index: usize,
    devices: bool,
}

// SAFETY: a communicator may be used from any thread, by one at a time, and cut from any (BridgeTable).
unsafe impl Send for Communicator {}

impl Communicator {
    /// Of the bridge's making. `index` is this rank among its members, `devices` whether it takes what is on devices.
    pub fn new(comm: *mut c_void, index: usize, devices: bool) -> Self {
        Self { comm, index, devices }
    }

    /// Whether it takes a tensor.
    pub fn takes(&self, kept: &Kept) -> bool {
        self.devices || !kept.on_device
    }

    /// This rank among the members.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Tells all members `mine`; what each of them told, in order. `None`: the communicator is of no use any more.
    pub fn exchange(&self, mine: &[u8]) -> Option<Vec<Vec<u8>>> {
        unsafe extern "C" fn hear(heard: *mut c_void, bytes: *const u8, len: usize) {
            // SAFETY: `heard` is the list below, and the bytes live through the call.
            unsafe { (*heard.cast::<Vec<Vec<u8>>>()).push(std::slice::from_raw_parts(bytes, len).to_vec()) };
        }
        let mut heard: Vec<Vec<u8>> = Vec::new();
        let list = std::ptr::from_mut(&mut heard).cast();
        // SAFETY: the communicator is not left yet; `list` lives through the call, as `hear` wants it.
        unsafe { (boot::bridge()?.exchange)(self.comm, mine.as_ptr(), mine.len(), list, hear) }.then_some(heard)
    }

    /// Carries out moves; what was received, in order. All members must begin theirs. `None`: as for `exchange`.
    pub fn transfer(&self, moves: Vec<Move<'_>>) -> Option<Vec<Kept>> {
        let bridge = boot::bridge()?;
        let mut list: Vec<tap_abi::Move> = moves.iter().map(|one| one.as_abi()).collect();
        // SAFETY: the communicator is not left yet; tensors and sizes live through the call.
        let went_well = unsafe { (bridge.transfer)(self.comm, list.as_mut_ptr(), list.len()) };
        let received = |(done, one): (&tap_abi::Move, &Move<'_>)| own(done, one);
        let received = list.iter().zip(&moves).filter_map(received).collect();
        went_well.then_some(received)
    }

    /// Makes what is under way fail. From any thread.
    pub fn cut(&self) {
        if let Some(bridge) = boot::bridge() {
            // SAFETY: the communicator is not left yet: its thread says so under the lock that the caller holds.
            unsafe { (bridge.cut)(self.comm) };
        }
    }

    /// Gives it back.
    pub fn leave(&self) {
        if let Some(bridge) = boot::bridge() {
            // SAFETY: called once, by the thread that used it.
            unsafe { (bridge.leave)(self.comm) };
        }
    }
}

impl Move<'_> {
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
            What::Send(kept) => tap_abi::Move { on_device: kept.on_device, tensor: kept.tensor, ..nothing },
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

/// What was received.
fn own(done: &tap_abi::Move, one: &Move<'_>) -> Option<Kept> {
    let What::Receive(part) = one.what else { return None };
    if done.tensor.is_null() {
        return None;
    }
    // A rank that describes more bytes than there can be gets no tensor.
    let bytes = part.meta.payload_len().unwrap_or_default();
    lock().bytes += bytes;
    Some(Kept { tensor: done.tensor, on_device: done.on_device, bytes })
}
