//! The umask of this process, and the one that the user's commands get.
//!
//! What FlexModel makes is its owner's alone, by the modes that it is made with ([`flexmodel_run::owner_only`]); but a
//! umask that takes the owner's own bits away (0777) would leave files that not even we can open. What a user asks to be
//! written elsewhere (`flexmodel export`) is made as that user's umask says.

use std::{
    os::unix::process::CommandExt,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

/// The umask that goes with files and folders that are their owner's alone.
const UMASK: libc::mode_t = 0o077;

/// The umask that this process was started with; `u32::MAX`: it still has it.
static BEFORE: AtomicU32 = AtomicU32::new(u32::MAX);

/// Sets this process's umask. To be called while there is one thread.
pub fn begin() {
    // SAFETY: umask has no memory effects and cannot fail.
    BEFORE.store(unsafe { libc::umask(UMASK) }, Ordering::Relaxed);
}

/// Gives a command of the user's the umask that we were started with.
pub fn as_before(command: &mut Command) -> &mut Command {
    let before = BEFORE.load(Ordering::Relaxed);
    if before == u32::MAX {
        return command;
    }
    // SAFETY: umask is async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            libc::umask(before);
            Ok(())
        })
    }
}
