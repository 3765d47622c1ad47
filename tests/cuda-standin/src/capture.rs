//! Captures: which stream, by which thread, how strictly, and whether something broke it.

use std::{
    cell::Cell,
    ffi::{c_int, c_void},
    sync::Mutex,
    thread::{self, ThreadId},
};

use crate::{Outcome, code, lock, refuse};

/// `CU_STREAM_CAPTURE_MODE_GLOBAL`, in which every thread starts.
const GLOBAL: c_int = 0;
/// `CU_STREAM_CAPTURE_MODE_RELAXED`.
const RELAXED: c_int = 2;

struct Capture {
    stream: usize,
    mode: c_int,
    by: ThreadId,
    broken: bool,
}

static UNDER_WAY: Mutex<Vec<Capture>> = Mutex::new(Vec::new());

thread_local! {
    static MODE: Cell<c_int> = const { Cell::new(GLOBAL) };
}

/// Swaps this thread's mode.
pub fn exchange(mode: c_int) -> c_int {
    MODE.replace(mode)
}

pub fn begin(stream: *mut c_void, mode: c_int) -> Outcome<()> {
    lock(&UNDER_WAY).push(Capture { stream: stream.addr(), mode, by: thread::current().id(), broken: false });
    Ok(())
}

pub fn end(stream: *mut c_void) -> Outcome<()> {
    let mut all = lock(&UNDER_WAY);
    let at = all.iter().position(|one| one.stream == stream.addr()).ok_or(code::VALUE)?;
    if all.swap_remove(at).broken { Err(code::CAPTURE_INVALIDATED) } else { Ok(()) }
}

/// `CUstreamCaptureStatus`. Of the default stream nothing can be said while another one is captured.
pub fn status(stream: *mut c_void) -> Outcome<c_int> {
    let all = lock(&UNDER_WAY);
    match all.iter().find(|one| one.stream == stream.addr()) {
        Some(one) => Ok(if one.broken { 2 } else { 1 }),
        None if stream.is_null() && !all.is_empty() => Err(code::CAPTURE_IMPLICIT),
        None => Ok(0),
    }
}

/// Whether this thread may make a call that a capture could trip over.
pub fn permits(call: &str) -> Outcome<()> {
    let (mode, me) = (MODE.get(), thread::current().id());
    let forbids = |one: &Capture| match mode {
        RELAXED => false,
        GLOBAL => one.mode == GLOBAL || (one.by == me && one.mode != RELAXED),
        _ => one.by == me && one.mode != RELAXED,
    };
    let mut broke = false;
    for one in lock(&UNDER_WAY).iter_mut().filter(|one| forbids(one)) {
        (one.broken, broke) = (true, true);
    }
    match broke {
        true => refuse(code::CAPTURE_UNSUPPORTED, &format!("{call} breaks a capture")),
        false => Ok(()),
    }
}

/// Whether this stream's work would go into a graph.
pub fn is_captured(stream: *mut c_void) -> bool {
    lock(&UNDER_WAY).iter().any(|one| one.stream == stream.addr())
}
