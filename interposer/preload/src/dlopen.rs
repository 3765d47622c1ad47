//! The one interposed symbol.
//!
//! glibc resolves a `dlopen` by the RUNPATH of its *caller*, which it knows from the return address. A wrapper that
//! calls the real `dlopen` becomes that caller and breaks libraries that load siblings through their own RUNPATH.
//! So this is a naked function: it asks [`before`] what to do and then jumps, with every argument and the return
//! address as they were.

use core::{
    ffi::{c_char, c_int, c_void},
    ptr::null_mut,
    sync::atomic::{AtomicPtr, Ordering},
};

use crate::{engine, libc, start};

static REAL: AtomicPtr<c_void> = AtomicPtr::new(null_mut());

/// Interposes `dlopen(3)`.
///
/// # Safety
/// As for `dlopen(3)`.
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void {
    // Two pushes keep the arguments and leave the stack 8 bytes off the alignment a call needs.
    core::arch::naked_asm!(
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
    // SAFETY: dlopen's caller passes a NUL-terminated string, or null.
    if start::is_armed() && !path.is_null() && unsafe { is_torch(path) } {
        engine::torch_is_loading();
    }
    real()
}

/// `.../torch/_C.cpython-311-x86_64-linux-gnu.so`.
unsafe fn is_torch(path: *const c_char) -> bool {
    // SAFETY: two NUL-terminated strings (caller).
    unsafe { !libc::strstr(path, c"/torch/_C.".as_ptr()).is_null() }
}

/// The C library's `dlopen`, or that of whoever else interposes it behind us.
pub fn real() -> *mut c_void {
    let known = REAL.load(Ordering::Relaxed);
    if !known.is_null() {
        return known;
    }
    // RTLD_NEXT is looked up from this object, so it never finds ourselves.
    let found = libc::dlsym(libc::RTLD_NEXT, c"dlopen");
    let found = if found.is_null() { absent as *mut c_void } else { found };
    REAL.store(found, Ordering::Relaxed);
    found
}

/// Stands in where the process has no `dlopen` at all.
extern "C" fn absent(_: *const c_char, _: c_int) -> *mut c_void {
    null_mut()
}
