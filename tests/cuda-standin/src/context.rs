//! Devices, their primary contexts, and which of them a thread has.

use std::{
    cell::RefCell,
    ffi::{c_int, c_void},
    sync::atomic::{AtomicBool, Ordering},
};

use crate::{Outcome, code, refuse};

/// How many devices there are.
const DEVICES: usize = 9;

static ACTIVE: [AtomicBool; DEVICES] = [const { AtomicBool::new(false) }; DEVICES];

thread_local! {
    static STACK: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

/// The device of an ordinal.
pub fn device(ordinal: c_int) -> Outcome<c_int> {
    if (0..DEVICES as c_int).contains(&ordinal) { Ok(ordinal) } else { Err(code::VALUE) }
}

/// Whether somebody made its primary context.
pub fn is_active(device: c_int) -> bool {
    ACTIVE[device as usize].load(Ordering::Acquire)
}

/// Its primary context: no pointer to anything.
pub fn retain(device: c_int) -> *mut c_void {
    ACTIVE[device as usize].store(true, Ordering::Release);
    std::ptr::without_provenance_mut((device as usize + 1) << 8)
}

/// This thread's.
pub fn current() -> Option<*mut c_void> {
    STACK.with_borrow(|stack| stack.last().copied().filter(|&top| top != 0)).map(std::ptr::without_provenance_mut)
}

/// This thread's, for a call that needs one.
pub fn needed(call: &str) -> Outcome<usize> {
    match current() {
        Some(context) => Ok(context.addr()),
        None => refuse(code::CONTEXT, &format!("{call} on a thread without a context")),
    }
}

pub fn push(context: *mut c_void) -> Outcome<()> {
    STACK.with_borrow_mut(|stack| stack.push(context.addr()));
    Ok(())
}

pub fn pop() -> Outcome<*mut c_void> {
    match STACK.with_borrow_mut(Vec::pop) {
        Some(context) => Ok(std::ptr::without_provenance_mut(context)),
        None => refuse(code::CONTEXT, "cuCtxPopCurrent on a thread without a context"),
    }
}

pub fn set(context: *mut c_void) -> Outcome<()> {
    STACK.with_borrow_mut(|stack| {
        stack.pop();
        stack.push(context.addr());
    });
    Ok(())
}
