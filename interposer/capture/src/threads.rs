//! Threads of ours in the job's process. They take no signal of the job's.

use std::{io, thread};

/// Begins one, which ends by itself.
///
/// # Errors
/// The system has no thread.
pub fn begin(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let signals = without_signals();
    let begun = thread::Builder::new().name(name.into()).spawn(run);
    restore_signals(&signals);
    begun.map(drop)
}

/// Blocks all signals in this thread, and so in those that it starts. Those that were blocked before.
fn without_signals() -> libc::sigset_t {
    // SAFETY: sigset_t is plain data; both sets are valid for the calls.
    unsafe {
        let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        before
    }
}

fn restore_signals(before: &libc::sigset_t) {
    // SAFETY: the set is valid for the call.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before, std::ptr::null_mut()) };
}
