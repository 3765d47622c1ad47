//! `libflexmodel.so`: preloaded into every process of a job, be it bash, git, a compiler or a DataLoader worker. It
//! must cost those nothing and start wherever they start, so it needs a C library and nothing else: no Rust runtime,
//! no libgcc, no function that an old glibc or musl lacks. All else is in the engine, which it loads where torch comes.
//!
//! | file | does |
//! |---|---|
//! | [`start`](mod@start) | at load: reads the environment; decides between inert and armed |
//! | [`dlopen`](mod@dlopen) | the one interposed symbol: notices `torch/_C` and steps aside |
//! | [`engine`] | loads `libflexmodel_engine.so` from beside this file, or says in one line why not |
//! | [`libc`] | the functions of the C library that are called, each in its oldest version |
//!
//! # Exported symbols
//!
//! The whole list; a test compares it with `nm -D`:
//!
//! - `dlopen`
//!
//! # Invariants
//!
//! - **INERT-1** Without `FLEXMODEL_HOOKS`, or with `FLEXMODEL_DISABLE=1`, nothing but `dlopen`'s jump remains.
//! - **FORK-1** A forked child is never armed: it has another process id than the one that was seen at load.

#![no_std]

// This object is built without unwinding (the profile `preload`). Lints build it like everything else, and then a
// handler of panics has to come from somewhere.
#[cfg(panic = "unwind")]
extern crate std;

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("FlexModel interposes dlopen on x86-64 Linux only");

mod dlopen;
mod engine;
mod libc;
mod start;
#[allow(dead_code, reason = "the engine uses the rest")]
#[path = "../../../wire/src/preload.rs"]
mod wire;

/// Asked for by the compiler. Nothing here panics: no code of it is in the object, which a test sees by `abort`.
#[cfg(not(panic = "unwind"))]
#[panic_handler]
fn never(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: abort takes nothing and does not return.
    unsafe { libc::abort() }
}
