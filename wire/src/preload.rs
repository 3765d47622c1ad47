//! What the preload and the engine agree on, inside one process.
//!
//! `libflexmodel.so` is in every process of a job and links nothing but the C library. The engine lies beside it and
//! is loaded where torch comes. The preload may not link std, so it includes this file instead of this crate: there
//! is nothing in it but constants and a plain struct.

use core::ffi::CStr;

/// Name of [`crate::env::HOOKS`].
pub const HOOKS: &CStr = c"FLEXMODEL_HOOKS";
/// Name of [`crate::env::DISABLE`].
pub const DISABLE: &CStr = c"FLEXMODEL_DISABLE";

/// The engine's file, in the folder of `libflexmodel.so`.
pub const ENGINE: &CStr = c"libflexmodel_engine.so";
/// The engine's one exported function: [`Start`].
pub const START_SYMBOL: &CStr = c"flexmodel_engine_start";
/// Version of this module. The two files may be of different installs, where one replaced the other under a job.
pub const PRELOAD_ABI: u32 = 1;

/// What the preload saw when the process began.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Preload {
    /// [`PRELOAD_ABI`].
    pub abi: u32,
    /// Whether descriptor 2 was open.
    pub has_stderr: u32,
    /// The device of the file that it was.
    pub stderr_device: u64,
    /// The inode of that file.
    pub stderr_inode: u64,
}

/// Type of [`START_SYMBOL`]: torch is about to be loaded. `false`: the preload is of another version.
pub type Start = unsafe extern "C" fn(*const Preload) -> bool;
