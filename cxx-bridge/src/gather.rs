//! A communicator as the interposer sees it: words between ranks, and tensors, those of the CPU over Gloo, those of
//! devices over NCCL.

use std::{
    ffi::c_void,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use cxx::UniquePtr;
use wire::tap_abi;

use crate::{
    ffi::bridge::{self, Communicator, Move, Tensor},
    host,
    nccl::{Devices, Transfer},
};

/// What an exception says, without its stack.
pub fn first_line(why: &cxx::Exception) -> &str {
    why.what().lines().next().unwrap_or_default()
}

/// The ranks of the job, joined.
pub struct Ranks {
    words: UniquePtr<Communicator>,
    /// Used by one thread.
    devices: Option<Mutex<Devices>>,
    cut: AtomicBool,
}

impl Ranks {
    /// Joined by `words`. `device` is this rank's, or -1.
    pub fn new(words: UniquePtr<Communicator>, index: u32, size: u32, device: i32) -> Self {
        let devices = Devices::join(&words, index, size, device).map(Mutex::new);
        Self { words, devices, cut: AtomicBool::new(false) }
    }

    /// Whether tensors of devices can be transferred.
    pub fn takes_devices(&self) -> bool {
        self.devices.is_some()
    }

    /// Carries out moves. What is received has its tensor then, also after an error.
    fn transfer(&self, moves: &mut [tap_abi::Move]) -> Result<(), String> {
        let mut devices = self.devices.as_ref().map(|devices| devices.lock().unwrap_or_else(PoisonError::into_inner));
        let device = devices.as_ref().map_or(-1, |devices| devices.device());
        for one in moves.iter_mut().filter(|one| !one.send) {
            // SAFETY: the sizes are the caller's and live through the call (BridgeTable).
            let sizes = unsafe { std::slice::from_raw_parts(one.sizes, one.ndim as usize) };
            let tensor = bridge::receiver(one.dtype, sizes, if one.on_device { device } else { -1 });
            one.tensor = tensor.map_err(|why| first_line(&why).to_owned())?.into_raw().cast();
        }
        // In tests NCCL takes what is on the CPU.
        let far = |one: &&tap_abi::Move| devices.is_some() && (one.on_device || device < 0);
        let near = |one: &tap_abi::Move| Move { peer: one.peer, send: one.send, tensor: one.tensor as usize };
        let list: Vec<Move> = moves.iter().filter(|one| !far(one)).map(near).collect();
        if !list.is_empty() {
            self.words.transfer(&list).map_err(|why| first_line(&why).to_owned())?;
        }
        let list = moves.iter().filter(far).filter_map(|one| {
            // SAFETY: the tensors are the caller's, or were made above, and live through the call.
            let tensor = unsafe { one.tensor.cast::<Tensor>().as_ref()? };
            Some(Transfer { peer: one.peer, send: one.send, tensor })
        });
        let list: Vec<Transfer<'_>> = list.collect();
        match devices.as_mut().filter(|_| !list.is_empty()) {
            Some(devices) => devices.transfer(&list, &self.cut).map_err(|why| why.to_string()),
            None => Ok(()),
        }
    }
}

/// C++ has joined the ranks: hands their communicator to the host.
pub fn joined(words: UniquePtr<Communicator>, index: u32, size: u32, device: i32) {
    let Some(host) = host::host() else { return };
    let ranks = Ranks::new(words, index, size, device);
    let devices = ranks.takes_devices();
    // SAFETY: the host leaves the communicator once, through the bridge's table.
    unsafe { (host.joined)(Box::into_raw(Box::new(ranks)).cast(), index, size, devices) };
}

/// # Safety
/// `comm` must be of [`Ranks`] that were not left yet.
unsafe fn borrow<'a>(comm: *mut c_void) -> &'a Ranks {
    // SAFETY: the caller vouches for it.
    unsafe { &*comm.cast() }
}

/// Whether it went well; if not, the host hears that there is no communicator any more.
fn settled(outcome: Result<(), String>) -> bool {
    outcome.inspect_err(|why| host::per_rank(why)).is_ok()
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
    settled(heard.map_err(|why| first_line(&why).to_owned()))
}

pub unsafe extern "C" fn transfer(comm: *mut c_void, moves: *mut tap_abi::Move, count: usize) -> bool {
    // SAFETY: the caller's `count` moves live through the call (BridgeTable); so does the communicator.
    settled(unsafe { borrow(comm).transfer(std::slice::from_raw_parts_mut(moves, count)) })
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
