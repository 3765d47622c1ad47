//! The few things asked of the CUDA driver itself, where there is one.

use std::sync::OnceLock;

use cudarc::driver::sys;

/// Whether there is a driver. A machine without a GPU is a normal machine: cudarc panics on a missing driver.
fn has_driver() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    // SAFETY: looks for the library only.
    *FOUND.get_or_init(|| unsafe { sys::is_culib_present() })
}

/// Whether work on this CUDA stream goes into a graph instead of being run.
pub fn is_capturing(stream: usize) -> bool {
    if !has_driver() {
        return false;
    }
    let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    // SAFETY: the handle is a live stream of torch's.
    let outcome = unsafe { sys::cuStreamIsCapturing(stream as sys::CUstream, &mut status) };
    outcome == sys::CUresult::CUDA_SUCCESS && status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE
}

/// Sets how strictly this thread minds graphs that are being captured, one of `CUstreamCaptureMode`; what it was.
pub fn capture_mode(mode: u32) -> u32 {
    if !has_driver() {
        return mode;
    }
    let mut mode = match mode {
        0 => sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL,
        1 => sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
        _ => sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED,
    };
    // SAFETY: the driver is present; swaps a variable of this thread's.
    let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) };
    mode as u32
}

/// Page-locks the slab so that a device can copy into it while the job goes on: registers `len` bytes at `base` with the
/// driver, if the process has one *and* uses it. `false` is normal.
pub fn register(base: *mut u8, len: usize) -> bool {
    if !has_driver() {
        return false;
    }
    let mut context = std::ptr::null_mut();
    // SAFETY: the driver is present; an uninitialised driver or a thread without context answers with an error or null.
    let current = unsafe { sys::cuCtxGetCurrent(&mut context) };
    if current != sys::CUresult::CUDA_SUCCESS || context.is_null() {
        return false;
    }
    // SAFETY: the slab is mapped for the life of the process.
    let outcome = unsafe { sys::cuMemHostRegister_v2(base.cast(), len, sys::CU_MEMHOSTREGISTER_PORTABLE) };
    outcome == sys::CUresult::CUDA_SUCCESS
}
