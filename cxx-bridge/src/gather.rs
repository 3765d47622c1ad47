//! What the interposer asks of a communicator.

use std::ffi::c_void;

use cxx::UniquePtr;
use wire::tap_abi;

use crate::{
    ffi::bridge::{Communicator, Move},
    host,
};

/// What an exception says, without its stack.
pub fn first_line(why: &cxx::Exception) -> &str {
    why.what().lines().next().unwrap_or_default()
}

/// # Safety
/// `comm` must be a communicator that is not left yet.
unsafe fn borrow<'a>(comm: *mut c_void) -> &'a Communicator {
    // SAFETY: the caller vouches for it.
    unsafe { &*comm.cast() }
}

/// Whether it went well; if not, the host is told that there is no communicator any more.
fn settled(outcome: Result<(), cxx::Exception>) -> bool {
    outcome.inspect_err(|why| host::apart(first_line(why))).is_ok()
}

pub unsafe extern "C" fn exchange(
    comm: *mut c_void,
    bytes: *const u8,
    len: usize,
    context: *mut c_void,
    hear: unsafe extern "C" fn(*mut c_void, *const u8, usize),
) -> bool {
    // SAFETY: the communicator is the interposer's until it leaves it; the bytes live through the call (BridgeTable).
    let heard = unsafe { borrow(comm).exchange(std::slice::from_raw_parts(bytes, len)) };
    settled(heard.map(|heard| {
        for words in heard {
            // SAFETY: `hear` takes bytes that live through its call, and the context that came with it.
            unsafe { hear(context, words.bytes.as_ptr(), words.bytes.len()) };
        }
    }))
}

pub unsafe extern "C" fn transfer(comm: *mut c_void, moves: *mut tap_abi::Move, count: usize) -> bool {
    // SAFETY: so many moves, the caller's, live through the call (BridgeTable).
    let asked = unsafe { std::slice::from_raw_parts_mut(moves, count) };
    let mut list: Vec<Move> = asked.iter().map(given).collect();
    // SAFETY: the communicator is the interposer's until it leaves it.
    let outcome = unsafe { borrow(comm) }.transfer(&mut list);
    for (asked, done) in asked.iter_mut().zip(&list) {
        asked.tensor = done.tensor as *mut c_void;
    }
    settled(outcome)
}

fn given(one: &tap_abi::Move) -> Move {
    let sizes = if one.sizes.is_null() {
        Vec::new()
    } else {
        // SAFETY: so many sizes live through the call (BridgeTable).
        unsafe { std::slice::from_raw_parts(one.sizes, one.ndim as usize).to_vec() }
    };
    Move {
        peer: one.peer,
        send: one.send,
        on_device: one.on_device,
        tensor: one.tensor as usize,
        dtype: one.dtype,
        sizes,
    }
}

pub unsafe extern "C" fn cut(comm: *mut c_void) {
    // SAFETY: the communicator is the interposer's until it leaves it.
    let _ = unsafe { borrow(comm) }.cut();
}

pub unsafe extern "C" fn leave(comm: *mut c_void) {
    // SAFETY: the communicator came from the bridge and is given back once (BridgeTable).
    drop(unsafe { UniquePtr::from_raw(comm.cast::<Communicator>()) });
}
