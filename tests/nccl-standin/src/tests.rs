//! What must not be done, done.

use std::{ptr, thread, time::Duration};

use super::*;

const NONE: *mut c_void = ptr::null_mut();

fn config(blocking: c_int) -> Config {
    Config { size: size_of::<Config>(), magic: 0xcafe_beef, version: 21_400, blocking }
}

fn join(size: c_int, id: Id, rank: c_int, blocking: c_int) -> (c_int, *mut c_void) {
    let mut comm = NONE;
    // SAFETY: both live on.
    let code = unsafe { ncclCommInitRankConfig(&mut comm, size, id, rank, &config(blocking)) };
    (code, comm)
}

fn state(comm: *mut c_void) -> c_int {
    let mut state = -1;
    // SAFETY: as above.
    let code = unsafe { ncclCommGetAsyncError(comm, &mut state) };
    if code == code::SUCCESS { state } else { code }
}

fn settled(comm: *mut c_void) -> c_int {
    while state(comm) == code::IN_PROGRESS {
        thread::sleep(Duration::from_millis(1));
    }
    state(comm)
}

#[track_caller]
fn refused(code: c_int, expected: c_int, why: &str) {
    // SAFETY: never freed.
    let last = unsafe { CStr::from_ptr(ncclGetLastError(NONE)) }.to_str().unwrap();
    assert_eq!((code, last), (expected, why));
}

/// One test: the last warning is the process's.
#[test]
fn what_flexmodel_must_not_do_is_refused_by_name() {
    let mut id = Id::random().unwrap();
    // SAFETY: 128 bytes.
    assert_eq!(unsafe { ncclGetUniqueId(&mut id) }, code::SUCCESS);

    refused(join(1, id, 0, 1).0, code::ARGUMENT, "the communicator is blocking: no one could abort it");
    refused(join(2, id, 2, 0).0, code::ARGUMENT, "rank 2 of 2 (the stand-in has 16 at most)");
    let foreign = join(1, Id::zero(), 0, 0).1;
    refused(
        settled(foreign),
        code::ARGUMENT,
        "the unique id is not one of the stand-in's: its bytes did not come over",
    );
    assert_eq!(ncclCommAbort(foreign), code::SUCCESS);

    let (first, comm) = join(2, id, 0, 0);
    assert_eq!(first, code::IN_PROGRESS);
    let mut byte = 7u8;
    let at = (&raw mut byte).cast::<c_void>();
    let send = |peer, datatype, comm| ncclSend(at, 1, datatype, peer, comm, NONE);
    assert_eq!(ncclGroupStart(), code::SUCCESS);
    refused(send(1, 1, comm), code::ARGUMENT, "ncclSend while the call before it goes on");
    // A group that failed says so at its end, and is over.
    assert_eq!(ncclGroupEnd(), code::ARGUMENT);
    refused(ncclGroupEnd(), code::USAGE, "ncclGroupEnd without ncclGroupStart");

    let other = join(2, id, 1, 0).1;
    assert_eq!((settled(comm), settled(other)), (code::SUCCESS, code::SUCCESS));
    refused(send(1, 1, comm), code::USAGE, "ncclSend outside of a group");
    ncclGroupStart();
    refused(send(1, 7, comm), code::ARGUMENT, "ncclSend of datatype 7, not bytes");
    refused(send(2, 1, comm), code::ARGUMENT, "ncclSend with rank 2 of 2");
    refused(join(1, id, 0, 0).0, code::USAGE, "ncclCommInitRankConfig in a group");
    refused(ncclCommAbort(comm), code::USAGE, "ncclCommAbort in a group");
    refused(ncclGroupStart(), code::USAGE, "ncclGroupStart in a group");
    ncclGroupEnd();

    // Whole after all that.
    let mut got = 0u8;
    ncclGroupStart();
    assert_eq!(send(1, 1, comm), code::SUCCESS);
    assert_eq!(ncclGroupEnd(), code::IN_PROGRESS);
    ncclGroupStart();
    assert_eq!(ncclRecv((&raw mut got).cast(), 1, 1, 0, other, NONE), code::SUCCESS);
    assert_eq!(ncclGroupEnd(), code::IN_PROGRESS);
    assert_eq!((settled(comm), settled(other), got), (code::SUCCESS, code::SUCCESS, 7));

    refused(ncclCommDestroy(comm), code::USAGE, "ncclCommDestroy without ncclCommFinalize");
    assert_eq!(ncclCommFinalize(comm), code::IN_PROGRESS);
    assert_eq!(settled(comm), code::SUCCESS);
    refused(ncclCommFinalize(comm), code::ARGUMENT, "ncclCommFinalize on a communicator that was finalized");
    assert_eq!(ncclCommDestroy(comm), code::SUCCESS);
    refused(ncclCommAbort(comm), code::ARGUMENT, "ncclCommAbort on a communicator that was destroyed");
    assert_eq!(ncclCommAbort(other), code::SUCCESS);
    ncclGroupStart();
    refused(send(0, 1, other), code::ARGUMENT, "ncclSend on a communicator that was aborted");
    ncclGroupEnd();
    refused(state(NONE), code::ARGUMENT, "ncclCommGetAsyncError on what is no communicator");
}
