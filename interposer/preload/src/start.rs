//! What happens when the object is loaded: it reads the environment and notes what this process is.

use core::{
    cell::UnsafeCell,
    ffi::c_int,
    sync::atomic::{AtomicBool, Ordering},
};

use crate::{
    libc,
    wire::{DISABLE, HOOKS, PRELOAD_ABI, Preload},
};

/// Hooks are wanted, and torch has not come yet.
static ARMED: AtomicBool = AtomicBool::new(false);
/// What was seen at load.
static SEEN: Seen = Seen(UnsafeCell::new(None));

struct Seen(UnsafeCell<Option<(c_int, Preload)>>);

// SAFETY: it is written once, by the constructor, before this process has a second thread or has called dlopen.
unsafe impl Sync for Seen {}

/// Runs before `main` of every process that inherits the preload. musl passes nothing to it.
extern "C" fn at_load() {
    if !wanted() {
        return;
    }
    let stderr = libc::identity(2);
    let (stderr_device, stderr_inode) = stderr.unwrap_or_default();
    let seen = Preload { abi: PRELOAD_ABI, has_stderr: u32::from(stderr.is_some()), stderr_device, stderr_inode };
    // SAFETY: as for Sync; getpid has no effects.
    unsafe { *SEEN.0.get() = Some((libc::getpid(), seen)) };
    ARMED.store(true, Ordering::Release);
}

#[used]
#[unsafe(link_section = ".init_array")]
static AT_LOAD: extern "C" fn() = at_load;

/// INERT-1.
fn wanted() -> bool {
    // SAFETY: NUL-terminated names; what getenv returns is a NUL-terminated string or null, and nothing changes the
    // environment while objects are being loaded.
    unsafe {
        let hooks = libc::getenv(HOOKS.as_ptr());
        let disable = libc::getenv(DISABLE.as_ptr());
        !hooks.is_null() && (disable.is_null() || libc::strcmp(disable, c"1".as_ptr()) != 0)
    }
}

/// Whether this process waits for torch.
pub fn is_armed() -> bool {
    ARMED.load(Ordering::Acquire)
}

/// What was seen at load, for the one caller that is to load the engine (FORK-1).
pub fn take() -> Option<&'static Preload> {
    if !ARMED.swap(false, Ordering::AcqRel) {
        return None;
    }
    // SAFETY: written before ARMED was, and never again.
    let (pid, seen) = unsafe { (*SEEN.0.get()).as_ref()? };
    // SAFETY: getpid has no effects.
    (*pid == unsafe { libc::getpid() }).then_some(seen)
}
