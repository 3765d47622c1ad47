//! The one interposed symbol.
//!
//! glibc resolves a `dlopen` by the RUNPATH of its *caller*, which it knows from the return address. A wrapper that
//! calls the real `dlopen` becomes that caller and breaks libraries that load siblings through their own RUNPATH.
//! So this is a naked function: it asks [`before`] what to do and then jumps, with every argument and the return
//! address as they were.

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    sync::atomic::{AtomicPtr, Ordering},
};

use crate::{boot, state};

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("FlexModel interposes dlopen on x86-64 Linux only");

static REAL: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());

/// Interposes `dlopen(3)`.
///
/// # Safety
/// As for `dlopen(3)`.
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void {
    // Two pushes keep the arguments and leave the stack 8 bytes off the alignment a call needs.
    std::arch::naked_asm!(
        "push rdi",
        "push rsi",
        "sub rsp, 8",
        "call {before}",
        "add rsp, 8",
        "pop rsi",
        "pop rdi",
        "jmp rax",
        before = sym before,
    )
}

/// Looks at a path that is about to be loaded; returns the real `dlopen`.
unsafe extern "C" fn before(path: *const c_char) -> *mut c_void {
    if state::is_armed() && !path.is_null() {
        // SAFETY: dlopen's caller passes a NUL-terminated string.
        let path = unsafe { CStr::from_ptr(path) }.to_bytes();
        if is_torch(path) {
            boot::torch_is_loading();
        }
    }
    real()
}

/// `.../torch/_C.cpython-311-x86_64-linux-gnu.so`.
fn is_torch(path: &[u8]) -> bool {
    path.windows(b"/torch/_C.".len()).any(|w| w == b"/torch/_C.")
}

fn real() -> *mut c_void {
    let known = REAL.load(Ordering::Relaxed);
    if !known.is_null() {
        return known;
    }
    // SAFETY: a NUL-terminated name. RTLD_NEXT is looked up from this library, so it never finds ourselves.
    let found = unsafe { libc::dlsym(libc::RTLD_NEXT, c"dlopen".as_ptr()) };
    let found = if found.is_null() { absent as *mut c_void } else { found };
    REAL.store(found, Ordering::Relaxed);
    found
}

/// Stands in where the process has no `dlopen` at all.
extern "C" fn absent(_: *const c_char, _: c_int) -> *mut c_void {
    std::ptr::null_mut()
}
