//! The one exported function: the preload calls it in a process that is about to load torch.

use wire::preload::{PRELOAD_ABI, Preload};

use crate::{boot, log, state};

/// Starts what there is to start. `false`: the preload is of another version, and nothing was started.
///
/// # Safety
/// `preload` points to what a preload of this or another version passes, whose first field is its version.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flexmodel_engine_start(preload: *const Preload) -> bool {
    // SAFETY: the version is the first field in every version.
    if preload.is_null() || unsafe { (&raw const (*preload).abi).read() } != PRELOAD_ABI {
        return false;
    }
    // SAFETY: a preload of this version passes a struct of this type.
    let preload = unsafe { &*preload };
    log::remember_stderr(preload);
    state::watch_forks();
    boot::torch_is_loading();
    true
}
