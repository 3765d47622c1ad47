//! The ranks' way between devices, over the NCCL that torch has loaded.

use nccl_sys::{Error, Nccl};
use wire::env;

use crate::{ffi::bridge::Communicator, host};

/// Joins all ranks, who exchange through `words` whether they can. `None`, on all of them, where one cannot.
pub fn join(words: &Communicator, index: u32, size: u32, device: i32) -> Option<devices::Ranks> {
    let stand_in = std::env::var(env::TEST_NCCL).ok().filter(|path| !path.is_empty());
    let nccl = match &stand_in {
        Some(path) => Nccl::loaded_as(path),
        None if device < 0 => {
            // Tells the others that this rank cannot.
            let _ = words.exchange(&[]);
            return None;
        }
        None => Nccl::loaded(),
    };
    let exchange = |mine: &[u8]| Some(words.exchange(mine).ok()?.into_iter().map(|words| words.bytes).collect());
    devices::Ranks::join(nccl, index, size, device, exchange, report)
}

fn report(why: &Error) {
    host::notice(&format!("tensors on devices are not gathered: {why}"));
}
