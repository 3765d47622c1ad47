//! A `libcuda.so.1` without a device: the driver's calls that FlexModel makes, and those that a job makes in its tests.
//!
//! It is stricter than a driver: what FlexModel must not do is a line of [`cuStandinViolations`] besides an error:
//!
//! - a call on an event or a stream while another context is current, or none;
//! - a call that a capture forbids on this thread, which breaks the capture, as in a driver;
//! - the last context taken off a thread that has none.
//!
//! # The model
//!
//! A device has memory of the host, and a primary context, which is made by whoever retains it first. A stream is a thread
//! that does one thing after the other ([`queue`]): functions of the host, copies, records of events and waits for them. A
//! copy into memory that is not page-locked makes its caller wait for all that was queued before, as CUDA does. Captures
//! record nothing: it is only known which stream is captured, by whom, how, and whether something broke it ([`capture`]).
//!
//! # Faults
//!
//! [`cuStandinFail`] asks for an error of a call that can have one: `cuMemcpyDtoHAsync`, `cuStreamCreateWithPriority`,
//! `cuStreamIsCapturing`, `cuStreamSynchronize`.
//!
//! # Where it is
//!
//! As for NCCL's stand-in: `cargo build -p cuda-standin` leaves `target/PROFILE/libcuda.so`, with the SONAME
//! `libcuda.so.1`. Where it is loaded, NCCL's stand-in puts its groups on these streams.

#![allow(non_snake_case, reason = "the names are CUDA's")]

mod capture;
mod context;
mod faults;
mod queue;
#[cfg(test)]
mod tests;

use std::{
    ffi::{CStr, CString, c_char, c_int, c_uint, c_void},
    sync::{Mutex, MutexGuard, PoisonError},
};

use queue::Work;

/// `CUresult`.
pub(crate) mod code {
    use std::ffi::c_int;
    pub const SUCCESS: c_int = 0;
    pub const VALUE: c_int = 1;
    pub const CONTEXT: c_int = 201;
    pub const HANDLE: c_int = 400;
    pub const NOT_READY: c_int = 600;
    pub const LAUNCH_FAILED: c_int = 719;
    pub const CAPTURE_UNSUPPORTED: c_int = 900;
    pub const CAPTURE_INVALIDATED: c_int = 901;
    pub const CAPTURE_IMPLICIT: c_int = 906;
}

/// What a call returns: an error, or success.
pub(crate) type Outcome<T> = Result<T, c_int>;

static VIOLATIONS: Mutex<Vec<CString>> = Mutex::new(Vec::new());

/// Says what must not be done, and is the error of it.
pub(crate) fn refuse<T>(code: c_int, why: &str) -> Outcome<T> {
    lock(&VIOLATIONS).push(CString::new(why).unwrap_or_default());
    Err(code)
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each is a table that one statement changes: a panic elsewhere leaves it whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a call; what it gives goes to `out`.
///
/// # Safety
/// `out` points to a `T`.
unsafe fn give<T>(out: *mut T, body: impl FnOnce() -> Outcome<T>) -> c_int {
    match body() {
        Ok(value) => {
            // SAFETY: the caller's.
            unsafe { out.write(value) };
            code::SUCCESS
        }
        Err(code) => code,
    }
}

fn done(outcome: Outcome<()>) -> c_int {
    outcome.err().unwrap_or(code::SUCCESS)
}

/// The device of an ordinal.
///
/// # Safety
/// `device` points to an int.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> c_int {
    // SAFETY: the caller's.
    unsafe { give(device, || context::device(ordinal)) }
}

/// Whether its primary context is there.
///
/// # Safety
/// Both point to ints.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxGetState(device: c_int, flags: *mut c_uint, active: *mut c_int) -> c_int {
    // SAFETY: the caller's.
    unsafe {
        flags.write(0);
        give(active, || context::device(device).map(|device| c_int::from(context::is_active(device))))
    }
}

/// Its primary context, which is made if it is not there.
///
/// # Safety
/// `context` points to a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, device: c_int) -> c_int {
    // SAFETY: the caller's.
    unsafe { give(context, || context::device(device).map(context::retain)) }
}

/// Puts a context on this thread's stack.
#[unsafe(no_mangle)]
pub extern "C" fn cuCtxPushCurrent_v2(context: *mut c_void) -> c_int {
    done(context::push(context))
}

/// Takes it off.
///
/// # Safety
/// `context` points to a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxPopCurrent_v2(context: *mut *mut c_void) -> c_int {
    // SAFETY: the caller's.
    unsafe { give(context, context::pop) }
}

/// Puts a context in the place of this thread's.
#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(context: *mut c_void) -> c_int {
    done(context::set(context))
}

/// This thread's, or null.
///
/// # Safety
/// `context` points to a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetCurrent(context: *mut *mut c_void) -> c_int {
    // SAFETY: the caller's.
    unsafe { give(context, || Ok(context::current().unwrap_or(std::ptr::null_mut()))) }
}

/// Waits for all that was queued on all streams of this thread's context.
#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSynchronize() -> c_int {
    done(context::needed("cuCtxSynchronize").map(queue::drain))
}

/// What priorities there are.
///
/// # Safety
/// Both point to ints.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetStreamPriorityRange(lowest: *mut c_int, highest: *mut c_int) -> c_int {
    // SAFETY: the caller's.
    unsafe {
        highest.write(-5);
        give(lowest, || context::needed("cuCtxGetStreamPriorityRange").map(|_| 0))
    }
}

/// A new stream.
///
/// # Safety
/// `stream` points to a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreateWithPriority(
    stream: *mut *mut c_void,
    _flags: c_uint,
    _priority: c_int,
) -> c_int {
    let make = || {
        faults::passes("cuStreamCreateWithPriority")?;
        let context = context::needed("cuStreamCreateWithPriority")?;
        capture::permits("cuStreamCreateWithPriority")?;
        queue::make(context)
    };
    // SAFETY: the caller's.
    unsafe { give(stream, make) }
}

/// Waits for all that was queued on a stream.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(stream: *mut c_void) -> c_int {
    let passed = faults::passes("cuStreamSynchronize").and_then(|()| capture::permits("cuStreamSynchronize"));
    done(passed.and_then(|()| queue::of("cuStreamSynchronize", stream)).map(|queue| queue.drain()))
}

/// Has a stream wait for an event, as it was recorded last.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamWaitEvent(stream: *mut c_void, event: *mut c_void, _flags: c_uint) -> c_int {
    done(queue::await_event("cuStreamWaitEvent", stream, event))
}

/// Begins a capture.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamBeginCapture_v2(stream: *mut c_void, mode: c_int) -> c_int {
    done(queue::of("cuStreamBeginCapture", stream).and_then(|_| capture::begin(stream, mode)))
}

/// Ends it: an error if something broke it. No graph comes of it.
///
/// # Safety
/// `graph` points to a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamEndCapture(stream: *mut c_void, graph: *mut *mut c_void) -> c_int {
    // SAFETY: the caller's.
    unsafe { give(graph, || capture::end(stream).map(|()| std::ptr::null_mut())) }
}

/// Whether a stream is being captured.
///
/// # Safety
/// `status` points to an int.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamIsCapturing(stream: *mut c_void, status: *mut c_int) -> c_int {
    let ask = || {
        faults::passes("cuStreamIsCapturing")?;
        queue::of("cuStreamIsCapturing", stream).and_then(|_| capture::status(stream))
    };
    // SAFETY: the caller's.
    unsafe { give(status, ask) }
}

/// Swaps how strictly this thread minds captures.
///
/// # Safety
/// `mode` points to an int.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuThreadExchangeStreamCaptureMode(mode: *mut c_int) -> c_int {
    // SAFETY: the caller's.
    unsafe {
        let wanted = mode.read();
        give(mode, || context::needed("cuThreadExchangeStreamCaptureMode").map(|_| capture::exchange(wanted)))
    }
}

/// A new event.
///
/// # Safety
/// `event` points to a pointer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut *mut c_void, _flags: c_uint) -> c_int {
    // SAFETY: the caller's.
    unsafe { give(event, || context::needed("cuEventCreate").map(queue::make_event)) }
}

/// Records it on a stream.
#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecord(event: *mut c_void, stream: *mut c_void) -> c_int {
    done(queue::record("cuEventRecord", event, stream))
}

/// Whether it has come.
#[unsafe(no_mangle)]
pub extern "C" fn cuEventQuery(event: *mut c_void) -> c_int {
    let come = capture::permits("cuEventQuery").and_then(|()| queue::has_come("cuEventQuery", event));
    done(come.and_then(|come| if come { Ok(()) } else { Err(code::NOT_READY) }))
}

/// Forgets it.
#[unsafe(no_mangle)]
pub extern "C" fn cuEventDestroy_v2(event: *mut c_void) -> c_int {
    done(capture::permits("cuEventDestroy").and_then(|()| queue::forget("cuEventDestroy", event)))
}

/// Copies to the host.
///
/// # Safety
/// The memory can be read and written until the stream has passed it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, stream: *mut c_void) -> c_int {
    let copy = Work::Copy { to: to.expose_provenance(), from: from as usize, bytes };
    let queued = faults::passes("cuMemcpyDtoHAsync").and_then(|()| queue::put("cuMemcpyDtoHAsync", stream, copy));
    done(queued.map(|queue| {
        if !queue::is_locked(to.addr(), bytes) {
            queue.drain()
        }
    }))
}

/// Page-locks memory of the host.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostRegister_v2(at: *mut c_void, bytes: usize, _flags: c_uint) -> c_int {
    let needed = context::needed("cuMemHostRegister").and_then(|_| capture::permits("cuMemHostRegister"));
    done(needed.map(|()| queue::lock_pages(at.addr(), bytes)))
}

/// Calls a function of the host when a stream comes to it.
///
/// # Safety
/// The function may be called with this data, from any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchHostFunc(
    stream: *mut c_void,
    function: unsafe extern "C" fn(*mut c_void),
    data: *mut c_void,
) -> c_int {
    done(queue::put("cuLaunchHostFunc", stream, Work::Call { function, data: data.expose_provenance() }).map(drop))
}

/// The `nth` call of this name from now on, counted from 1, is an error and does nothing; 0: none is. Not in CUDA.
///
/// # Safety
/// `call` is a string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStandinFail(call: *const c_char, nth: usize) {
    // SAFETY: the caller's.
    faults::ask(unsafe { CStr::from_ptr(call) }.to_string_lossy().into_owned(), nth);
}

/// The `n`-th thing that must not be done and was, or null. Not in CUDA.
#[unsafe(no_mangle)]
pub extern "C" fn cuStandinViolation(n: usize) -> *const c_char {
    // They are never taken off.
    lock(&VIOLATIONS).get(n).map_or(std::ptr::null(), |line| line.as_ptr())
}
