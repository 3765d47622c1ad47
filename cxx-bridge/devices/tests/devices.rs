//! Over the stand-in for the driver: whose context a thread has, and what a capture sees of us.
//!
//! The tests share a driver, so each has devices of its own, and its turn.

mod standin;

use std::{sync::mpsc, thread, time::Duration};

use devices::{Device, Error, Event};
use standin::{Cuda, Graph};

/// DEVICE-1.
#[test]
fn a_thread_that_never_chose_a_device_leaves_no_context_behind_and_has_none_after() {
    let (_alone, cuda) = Cuda::alone();
    assert_eq!(Device::of(3).err(), Some(Error::NotUsed(3)), "the job does not use it");
    let stream = cuda.stream_on(2);
    let device = Device::of(2).unwrap();
    let ours = thread::spawn(move || {
        let event = Event::record(device, stream).unwrap();
        event.wait().unwrap();
        event.hold(stream).unwrap();
        drop(event);
        Cuda::load().current()
    });
    assert_eq!(ours.join().unwrap(), 0, "it has the context that it had: none");
    assert_eq!((cuda.is_active(0), cuda.is_active(3)), (false, false));
    assert_eq!(Device::of(-1).err(), Some(Error::NotUsed(-1)));
    cuda.expect_no_violation();
}

/// DEVICE-1.
#[test]
fn a_job_that_is_on_another_device_stays_there() {
    let (_alone, cuda) = Cuda::alone();
    let (stream, job) = (cuda.stream_on(4), cuda.retained(5));
    cuda.push(job);
    let event = Event::record(Device::of(4).unwrap(), stream).unwrap();
    event.wait().unwrap();
    assert_eq!(cuda.current(), job);
    drop(event);
    assert_eq!(cuda.current(), job);
    cuda.expect_no_violation();
}

/// DEVICE-2.
#[test]
fn nothing_that_we_do_breaks_a_capture_of_the_job() {
    let (_alone, cuda) = Cuda::alone();
    let (stream, captured) = (cuda.stream_on(1), cuda.stream_on(1));
    let device = Device::of(1).unwrap();
    let kept = Event::record(device, stream).unwrap();
    let graph = Graph::begin(&cuda, captured);
    let failed = |code| Err(Error::Call { call: "cuStreamIsCapturing", code });
    assert_eq!(device.is_capturing(captured), Ok(true));
    assert_eq!(device.is_capturing(stream), Ok(false));
    assert_eq!(device.is_capturing(0), failed(906), "nobody can say");
    assert_eq!(device.is_capturing(0x77), failed(400), "no stream");
    cuda.fail(c"cuStreamIsCapturing", 1);
    assert_eq!(device.is_capturing(stream), failed(719));
    let ours = thread::spawn(move || {
        let (from, mut to) = (vec![7u8; 5 << 20], vec![0u8; 5 << 20]);
        device.pin(to.as_mut_ptr(), to.len()).unwrap();
        kept.wait().unwrap();
        // SAFETY: both vectors live on.
        unsafe { device.fetch(from.as_ptr().expose_provenance(), from.len(), to.as_mut_ptr()) }.unwrap();
        // Many at once: some are destroyed.
        drop((0..1100).map(|_| Event::record(device, stream).unwrap()).collect::<Vec<_>>());
        from == to
    });
    assert!(ours.join().unwrap());
    // On the thread that captures, too: what it does on other streams is its own.
    Event::record(device, stream).unwrap().wait().unwrap();
    assert_eq!(graph.end(), 0, "the capture is whole");
    cuda.expect_no_violation();
}

#[test]
fn an_event_comes_when_its_stream_has_come_to_it() {
    let (_alone, cuda) = Cuda::alone();
    let stream = cuda.stream_on(6);
    let (open, gate) = mpsc::channel::<()>();
    cuda.queue(6, stream, move || gate.recv_timeout(Duration::from_secs(60)).unwrap());
    let event = Event::record(Device::of(6).unwrap(), stream).unwrap();
    assert!(!event.has_come().unwrap());
    open.send(()).unwrap();
    event.wait().unwrap();
    assert!(event.has_come().unwrap());
    cuda.expect_no_violation();
}

#[test]
fn a_copy_that_fails_has_none_under_way_or_says_so() {
    let (_alone, cuda) = Cuda::alone();
    cuda.stream_on(8);
    let device = Device::of(8).unwrap();
    // Page-locked, so that pieces are queued; the eighth fails.
    let (from, mut to) = (vec![7u8; 32 << 20], vec![0u8; 32 << 20]);
    device.pin(to.as_mut_ptr(), to.len()).unwrap();
    let failed = Error::Call { call: "cuMemcpyDtoHAsync", code: 719 };
    let mut fetch = |nth| {
        cuda.fail(c"cuMemcpyDtoHAsync", nth);
        // SAFETY: both vectors live on until the device has stood still.
        let outcome = unsafe { device.fetch(from.as_ptr().expose_provenance(), from.len(), to.as_mut_ptr()) };
        (outcome, to.iter().filter(|&&byte| byte == 7).count())
    };
    assert_eq!(fetch(8), (Err(failed.clone()), 28 << 20), "what is queued has come");
    cuda.fail(c"cuStreamSynchronize", 1);
    assert_eq!(fetch(1).0, Err(failed.clone()), "nothing is queued");
    assert_eq!(fetch(8).0, Err(Error::Stuck(Box::new(failed))));
    cuda.synchronize(8);
    cuda.expect_no_violation();
}

/// DEVICE-3.
#[test]
fn transfers_are_on_a_stream_that_is_neither_the_jobs_nor_that_of_copies() {
    let (_alone, cuda) = Cuda::alone();
    let job = cuda.stream_on(7);
    let device = Device::of(7).unwrap();
    let transfers = device.transfers().unwrap();
    assert_eq!(device.transfers().unwrap(), transfers, "one for all");
    assert_ne!(transfers, job);
    let (open, gate) = mpsc::channel::<()>();
    cuda.queue(7, transfers, move || gate.recv_timeout(Duration::from_secs(60)).unwrap());
    let (from, mut to) = ([7u8; 8], [0u8; 8]);
    // Goes by while the other stands still.
    // SAFETY: both arrays live on.
    unsafe { device.fetch(from.as_ptr().expose_provenance(), from.len(), to.as_mut_ptr()) }.unwrap();
    assert_eq!(from, to);
    open.send(()).unwrap();
    cuda.synchronize(7);
    cuda.expect_no_violation();
}
