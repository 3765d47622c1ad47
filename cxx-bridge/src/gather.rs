//! A communicator as the interposer sees it: words between ranks, and tensors, those of the CPU over Gloo, those of
//! devices over NCCL.

use std::{
    ffi::c_void,
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use cxx::UniquePtr;
use devices::Transfer;
use wire::{codes::MoveState, tap_abi};

use crate::{
    ffi::bridge::{self, Communicator, Move},
    host, nccl,
    staging::Staged,
    table::report,
};

/// What an exception says, without its stack.
pub fn first_line(why: &cxx::Exception) -> &str {
    why.what().lines().next().unwrap_or_default()
}

/// The ranks of the job, joined.
pub struct Ranks {
    words: UniquePtr<Communicator>,
    /// Used by one thread.
    devices: Option<Mutex<devices::Ranks>>,
    /// This rank's, or -1.
    device: i32,
    cut: AtomicBool,
    /// Why there was no room once. It is not asked for again: torch would give all that it keeps back to the device each time.
    no_room: OnceLock<String>,
}

impl Ranks {
    /// Joined by `words`. `device` is this rank's, or -1.
    pub fn new(words: UniquePtr<Communicator>, index: u32, size: u32, device: i32) -> Self {
        let devices = nccl::join(&words, index, size, device).map(Mutex::new);
        Self { words, devices, device, cut: AtomicBool::new(false), no_room: OnceLock::new() }
    }

    /// The device whose tensors can be transferred, or -1.
    pub fn device(&self) -> i32 {
        if self.devices.is_some() { self.device } else { -1 }
    }

    /// Carries out moves. What is received has its tensor then, also after an error. Where ranks have devices, nothing begins
    /// before all have room for what they are to receive: a kernel whose other end never comes holds its device up.
    fn transfer(&self, moves: &mut [tap_abi::Move]) -> Result<MoveState, String> {
        let room = self.make_room(moves);
        if self.devices.is_some() {
            let ready = self.words.exchange(&[u8::from(room.is_ok())]).map_err(|why| first_line(&why).to_owned())?;
            let _ = room.inspect_err(|why| report("some tensors are not gathered", why));
            if ready.iter().any(|words| words.bytes != [1]) {
                return Ok(MoveState::NotReady);
            }
        } else {
            room?;
        }
        // In tests NCCL takes what is on the CPU.
        let far = |one: &&tap_abi::Move| self.devices.is_some() && (one.on_device || self.device < 0);
        let near = moves.iter().filter(|one| !far(one)).filter_map(|one| {
            // SAFETY: the tensors are the caller's, or were made above, and live through the call.
            let staged = unsafe { one.tensor.cast::<Staged>().as_ref()? };
            Some(Move { peer: one.peer, send: one.send, tensor: std::ptr::from_ref(&*staged.tensor) as usize })
        });
        let near: Vec<Move> = near.collect();
        if !near.is_empty() {
            self.words.transfer(&near).map_err(|why| first_line(&why).to_owned())?;
        }
        let far = moves.iter().filter(far).filter_map(|one| {
            // SAFETY: as above.
            Some((one, unsafe { one.tensor.cast::<Staged>().as_ref()? }))
        });
        self.transfer_far(&far.collect::<Vec<_>>()).map(|()| MoveState::Done)
    }

    fn make_room(&self, moves: &mut [tap_abi::Move]) -> Result<(), String> {
        for one in moves.iter_mut().filter(|one| !one.send) {
            if let Some(why) = self.no_room.get() {
                return Err(why.clone());
            }
            // SAFETY: the sizes are the caller's and live through the call (BridgeTable).
            let sizes = unsafe { std::slice::from_raw_parts(one.sizes, one.ndim as usize) };
            let room = Staged::receiver(one.dtype, sizes, if one.on_device { self.device } else { -1 });
            let room = room.inspect_err(|why| drop(self.no_room.set(why.clone())))?;
            one.tensor = Box::into_raw(Box::new(room)).cast();
        }
        Ok(())
    }

    fn transfer_far(&self, moves: &[(&tap_abi::Move, &Staged)]) -> Result<(), String> {
        let Some(devices) = self.devices.as_ref().filter(|_| !moves.is_empty()) else { return Ok(()) };
        let transfer = |(one, staged): &(&tap_abi::Move, &Staged)| Transfer {
            peer: one.peer,
            send: one.send,
            at: bridge::address_of(&staged.tensor),
            bytes: bridge::bytes_of(&staged.tensor),
        };
        let transfers: Vec<Transfer> = moves.iter().map(transfer).collect();
        let mut devices = devices.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the tensors are on this rank's device and there, as the caller has asked (`come`); they live through the
        // call, or are shared below.
        let outcome = unsafe { devices.transfer(&transfers, &self.cut) };
        if outcome.is_err() {
            // The stream may not have passed them. It has after a success: the host has waited for it.
            moves.iter().for_each(|(_, staged)| std::mem::forget(bridge::share(&staged.tensor)));
        }
        outcome.map_err(|why| why.to_string())
    }
}

/// C++ has joined the ranks: hands their communicator to the host.
pub fn joined(words: UniquePtr<Communicator>, index: u32, size: u32, device: i32) {
    let Some(host) = host::host() else { return };
    let ranks = Ranks::new(words, index, size, device);
    let device = ranks.device();
    // SAFETY: the host leaves the communicator once, through the bridge's table.
    unsafe { (host.joined)(Box::into_raw(Box::new(ranks)).cast(), index, size, device) };
}

/// # Safety
/// `comm` must be of [`Ranks`] that were not left yet.
unsafe fn borrow<'a>(comm: *mut c_void) -> &'a Ranks {
    // SAFETY: the caller vouches for it.
    unsafe { &*comm.cast() }
}

/// What came of it; after an error the host hears that there is no communicator any more.
fn settled<T>(outcome: Result<T, String>) -> Option<T> {
    outcome.inspect_err(|why| host::per_rank(why)).ok()
}

pub unsafe extern "C" fn exchange(
    comm: *mut c_void,
    bytes: *const u8,
    len: usize,
    context: *mut c_void,
    hear: unsafe extern "C" fn(*mut c_void, *const u8, usize),
) -> bool {
    // SAFETY: the communicator is the interposer's until it leaves it; the bytes live through the call (BridgeTable).
    let heard = unsafe { borrow(comm).words.exchange(std::slice::from_raw_parts(bytes, len)) };
    let heard = heard.map(|heard| {
        for words in heard {
            // SAFETY: `hear` takes bytes that live through its call, and the context that came with it.
            unsafe { hear(context, words.bytes.as_ptr(), words.bytes.len()) };
        }
    });
    settled(heard.map_err(|why| first_line(&why).to_owned())).is_some()
}

pub unsafe extern "C" fn transfer(comm: *mut c_void, moves: *mut tap_abi::Move, count: usize) -> MoveState {
    // SAFETY: the caller's `count` moves live through the call (BridgeTable); so does the communicator.
    let outcome = unsafe { borrow(comm).transfer(std::slice::from_raw_parts_mut(moves, count)) };
    settled(outcome).unwrap_or(MoveState::Failed)
}

pub unsafe extern "C" fn cut(comm: *mut c_void) {
    // SAFETY: the communicator is the interposer's until it leaves it.
    let ranks = unsafe { borrow(comm) };
    ranks.cut.store(true, Ordering::Release);
    // It is of no use any more either way.
    let _ = ranks.words.cut();
}

pub unsafe extern "C" fn leave(comm: *mut c_void) {
    // SAFETY: the ranks came from `host::joined` and are given back once (BridgeTable).
    drop(unsafe { Box::from_raw(comm.cast::<Ranks>()) });
}
