//! What must not be done, done.

use std::{ffi::CStr, ptr};

use super::*;

fn violations() -> Vec<String> {
    // SAFETY: lines are never taken off.
    let at =
        |n| unsafe { cuStandinViolation(n).as_ref().map(|line| CStr::from_ptr(line).to_str().unwrap().to_owned()) };
    (0..).map_while(at).collect()
}

fn retained(device: c_int) -> *mut c_void {
    let mut context = ptr::null_mut();
    // SAFETY: one pointer.
    assert_eq!(unsafe { cuDevicePrimaryCtxRetain(&mut context, device) }, code::SUCCESS);
    context
}

/// One test: violations are the process's.
#[test]
fn what_a_driver_forbids_is_refused_by_name() {
    let mut mode = 2;
    // SAFETY: one int.
    assert_eq!(unsafe { cuThreadExchangeStreamCaptureMode(&mut mode) }, code::CONTEXT);
    let (first, second) = (retained(0), retained(1));
    let (mut stream, mut event, mut status) = (ptr::null_mut(), ptr::null_mut(), 0);
    cuCtxPushCurrent_v2(first);
    // SAFETY: one handle each.
    unsafe {
        assert_eq!(cuStreamCreateWithPriority(&mut stream, 1, 0), code::SUCCESS);
        assert_eq!(cuEventCreate(&mut event, 2), code::SUCCESS);
    }
    assert_eq!(cuEventRecord(event, stream), code::SUCCESS);
    assert_eq!(cuCtxSynchronize(), code::SUCCESS);
    assert_eq!(cuEventQuery(event), code::SUCCESS);

    cuCtxPushCurrent_v2(second);
    assert_eq!(cuEventQuery(event), code::CONTEXT);
    assert_eq!(cuEventRecord(event, ptr::null_mut()), code::CONTEXT);
    let mut popped = ptr::null_mut();
    // SAFETY: one pointer.
    unsafe { cuCtxPopCurrent_v2(&mut popped) };
    assert_eq!(popped, second);

    assert_eq!(cuStreamBeginCapture_v2(stream, 0), code::SUCCESS);
    // SAFETY: one int each.
    unsafe {
        assert_eq!((cuStreamIsCapturing(stream, &mut status), status), (code::SUCCESS, 1));
        assert_eq!(cuStreamIsCapturing(ptr::null_mut(), &mut status), code::CAPTURE_IMPLICIT);
    }
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            cuCtxPushCurrent_v2(ptr::without_provenance_mut(1 << 8));
            let mut mode = 2;
            // SAFETY: one int.
            unsafe { cuThreadExchangeStreamCaptureMode(&mut mode) };
            (mode, cuMemHostRegister_v2(ptr::null_mut(), 1, 1))
        });
        assert_eq!(other.join().unwrap(), (0, code::SUCCESS), "a relaxed thread may");
    });
    assert_eq!(cuMemHostRegister_v2(ptr::null_mut(), 1, 1), code::CAPTURE_UNSUPPORTED);
    let mut graph = ptr::null_mut();
    // SAFETY: one pointer.
    assert_eq!(unsafe { cuStreamEndCapture(stream, &mut graph) }, code::CAPTURE_INVALIDATED);
    let expected = [
        "cuThreadExchangeStreamCaptureMode on a thread without a context",
        "cuEventQuery on an event of another context",
        "cuEventRecord on an event of another context",
        "cuMemHostRegister breaks a capture",
    ];
    assert_eq!(violations(), expected);
}
