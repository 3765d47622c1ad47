//! A `libnccl.so.2` without a GPU: the calls that FlexModel makes, between processes of one machine.
//!
//! Bytes move over POSIX shared memory between host pointers. It is stricter than NCCL: whatever FlexModel does not do,
//! or must not do, is refused and written to the file that [`LOG`] names, a line each, `rank R: violation: ...`:
//!
//! - sizes, or their order, that differ between the two ranks of a transfer; a send that nobody receives, and the
//!   reverse;
//! - a call on a communicator that was aborted or destroyed, or while the call before goes on; a blocking one;
//! - a group in a group, a transfer in none, an end without a start, a communicator begun or ended in one; another type
//!   than bytes, another rank than there is;
//! - an end that is not finalize, success, destroy, and none at all.
//!
//! What is no fault but worth knowing, such as a transfer that an abort cut off, is a line `rank R: note: ...`.
//!
//! # The model
//!
//! Each communicator has a thread, which makes groups one after the other. Where the stand-in for the driver is loaded
//! (`tests/cuda-standin`), that is done on the streams that a group is given: it begins when these have come to it, and what
//! is behind it on them waits for it ([`stream`]); success is said once it is on them, as NCCL does. Elsewhere the thread
//! is the stream, whichever is given. The transfers of a group progress together. One is done when the other rank has taken or given the last byte:
//! NCCL may let a send go earlier, into a buffer, so what works here cannot depend on that. A rank that dies or aborts
//! is not noticed by the others, as within a node; they wait. As a communicator is non-blocking, `ncclGroupEnd`
//! returns `ncclInProgress`. `ncclCommGetAsyncError` goes on saying that until the group is *done*: there is no event
//! on a CPU by which to wait for it. With the clause `late` it says success as soon as the group is on its stream, as
//! NCCL does, and [`ncclStandinPending`] tells what an event would.
//!
//! # Where it is
//!
//! `cargo build -p nccl-standin` leaves `target/PROFILE/libnccl.so`, whose SONAME is `libnccl.so.2`: once a process has
//! opened it by its path, it is found by that name. In a process that has opened the real one before, the path must be
//! given (`nccl_sys::Nccl::loaded_as`). Do not preload it below a CUDA build of torch, which would then be linked to
//! it.
//!
//! # Faults
//!
//! [`FAULTS`] is clauses separated by `;`, each for all ranks, or with `@R` at its end for the process with `RANK=R`:
//!
//! | clause | does |
//! |---|---|
//! | `fail=NAME:K:CODE` | the `K`-th call of `NAME` in this process returns `CODE` and does nothing |
//! | `hang=NAME:K` | the `K`-th call does not return (for `ncclSend` and `ncclRecv`: returns, and never completes) |
//! | `error=K:CODE` | the `K`-th group of this process is begun, and then its communicator has the error `CODE` |
//! | `late` | success is said when a group is on its stream, not when it is done |
//! | `trace` | every transfer is a line `rank R: trace: ...` in the log when it is begun |
//! | `bound=MS` | how long anything here may stand still (60000): then it is a violation |

#![allow(non_snake_case, reason = "the names are NCCL's")]

mod comm;
mod faults;
mod group;
mod log;
mod ring;
mod room;
mod stream;
#[cfg(test)]
mod tests;

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    ptr,
};

use faults::Verdict;
use group::Transfer;
use room::Id;

/// The environment variable that names the file for violations. Without it they go to stderr.
pub const LOG: &str = "FLEXMODEL_NCCL_STANDIN_LOG";
/// The environment variable that asks for faults.
pub const FAULTS: &str = "FLEXMODEL_NCCL_STANDIN";

/// `ncclResult_t`.
pub(crate) mod code {
    use std::ffi::c_int;
    pub const SUCCESS: c_int = 0;
    pub const SYSTEM: c_int = 2;
    pub const ARGUMENT: c_int = 4;
    pub const USAGE: c_int = 5;
    pub const REMOTE: c_int = 6;
    pub const IN_PROGRESS: c_int = 7;
}

/// What NCCL would return: an error of one call.
pub(crate) type Outcome = Result<c_int, c_int>;

/// The part of `ncclConfig_t` that every version has.
#[repr(C)]
pub struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
}

/// Runs a call, or the fault that it was told to have.
fn call(name: &'static str, body: impl FnOnce() -> Outcome) -> c_int {
    match faults::enter(name) {
        Verdict::Go => body().unwrap_or_else(|code| code),
        Verdict::Fail(code) => {
            log::set_last(&format!("{name} was told to fail"));
            code
        }
        Verdict::Hang => {
            std::thread::sleep(faults::get().bound);
            log::violation(None, &format!("{name} was told to hang, and was waited for to the end"));
            code::SYSTEM
        }
    }
}

/// The version that torch 2.11 brings.
///
/// # Safety
/// `version` points to an int.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetVersion(version: *mut c_int) -> c_int {
    call("ncclGetVersion", || {
        // SAFETY: the caller's.
        unsafe { *version = 22809 };
        Ok(code::SUCCESS)
    })
}

/// A name for a room in shared memory.
///
/// # Safety
/// `id` points to 128 bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetUniqueId(id: *mut Id) -> c_int {
    call("ncclGetUniqueId", || {
        // SAFETY: the caller's.
        unsafe { *id = Id::random()? };
        Ok(code::SUCCESS)
    })
}

/// Begins to join; `ncclCommGetAsyncError` says when all have.
///
/// # Safety
/// `comm` points to a pointer, `config` to a config whose first field is its size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommInitRankConfig(
    comm: *mut *mut c_void,
    size: c_int,
    id: Id,
    rank: c_int,
    config: *const Config,
) -> c_int {
    call("ncclCommInitRankConfig", || {
        // SAFETY: the caller's.
        let (given, config) = unsafe { ((*config).size, &*config) };
        if given < size_of::<Config>() - 4 || config.magic != 0xcafe_beef || config.version < 21_400 {
            return Err(log::refuse(None, code::ARGUMENT, "the config is not initialised as NCCL 2.14's"));
        }
        if config.blocking != 0 {
            return Err(log::refuse(None, code::ARGUMENT, "the communicator is blocking: no one could abort it"));
        }
        group::none_open("ncclCommInitRankConfig")?;
        let handle = comm::begin(size, id, rank)?;
        // SAFETY: the caller's.
        unsafe { *comm = ptr::without_provenance_mut(handle) };
        Ok(code::IN_PROGRESS)
    })
}

/// How it is with a communicator.
///
/// # Safety
/// `state` points to an int.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommGetAsyncError(comm: *mut c_void, state: *mut c_int) -> c_int {
    call("ncclCommGetAsyncError", || {
        let found = comm::find("ncclCommGetAsyncError", comm.addr())?.state();
        // SAFETY: the caller's.
        unsafe { *state = found };
        Ok(code::SUCCESS)
    })
}

/// Begins to end a communicator in good order.
#[unsafe(no_mangle)]
pub extern "C" fn ncclCommFinalize(comm: *mut c_void) -> c_int {
    call("ncclCommFinalize", || comm::finalize(comm.addr()))
}

/// Frees one that was finalized.
#[unsafe(no_mangle)]
pub extern "C" fn ncclCommDestroy(comm: *mut c_void) -> c_int {
    call("ncclCommDestroy", || comm::destroy(comm.addr()))
}

/// Ends one at once. Its transfers touch no memory after this.
#[unsafe(no_mangle)]
pub extern "C" fn ncclCommAbort(comm: *mut c_void) -> c_int {
    call("ncclCommAbort", || comm::abort(comm.addr()))
}

/// Opens this thread's group.
#[unsafe(no_mangle)]
pub extern "C" fn ncclGroupStart() -> c_int {
    call("ncclGroupStart", group::start)
}

/// Closes this thread's group, and gives its transfers to their communicators.
#[unsafe(no_mangle)]
pub extern "C" fn ncclGroupEnd() -> c_int {
    let outcome = call("ncclGroupEnd", group::end);
    // A call that was told to fail has ended the group too.
    group::forget();
    outcome
}

/// Sends bytes.
#[unsafe(no_mangle)]
pub extern "C" fn ncclSend(
    from: *const c_void,
    count: usize,
    datatype: c_int,
    peer: c_int,
    comm: *mut c_void,
    stream: *mut c_void,
) -> c_int {
    transfer("ncclSend", Transfer::new(true, from.cast_mut().cast(), count, peer, stream.addr()), datatype, comm)
}

/// Receives bytes.
#[unsafe(no_mangle)]
pub extern "C" fn ncclRecv(
    to: *mut c_void,
    count: usize,
    datatype: c_int,
    peer: c_int,
    comm: *mut c_void,
    stream: *mut c_void,
) -> c_int {
    transfer("ncclRecv", Transfer::new(false, to.cast(), count, peer, stream.addr()), datatype, comm)
}

fn transfer(name: &'static str, mut transfer: Transfer, datatype: c_int, comm: *mut c_void) -> c_int {
    let outcome = match faults::enter(name) {
        Verdict::Fail(code) => {
            log::set_last(&format!("{name} was told to fail"));
            Err(code)
        }
        verdict => {
            transfer.hangs = matches!(verdict, Verdict::Hang);
            group::add(name, transfer, datatype, comm.addr())
        }
    };
    outcome.unwrap_or_else(|code| {
        group::fail(code);
        code
    })
}

/// What a code means.
#[unsafe(no_mangle)]
pub extern "C" fn ncclGetErrorString(result: c_int) -> *const c_char {
    let text: &CStr = match result {
        code::SUCCESS => c"no error",
        code::SYSTEM => c"unhandled system error (stand-in)",
        code::ARGUMENT => c"invalid argument (stand-in)",
        code::USAGE => c"invalid usage (stand-in)",
        code::REMOTE => c"remote process exited or there was a network error (stand-in)",
        code::IN_PROGRESS => c"operation in progress (stand-in)",
        _ => c"unknown result code (stand-in)",
    };
    text.as_ptr()
}

/// The last warning in this process.
#[unsafe(no_mangle)]
pub extern "C" fn ncclGetLastError(_comm: *mut c_void) -> *const c_char {
    log::last()
}

/// How many groups that were given this stream are not done: what an event behind them would tell. Not in NCCL.
#[unsafe(no_mangle)]
pub extern "C" fn ncclStandinPending(stream: *mut c_void) -> c_int {
    comm::pending(stream.addr())
}
