//! What the interposer calls.

use std::{
    ffi::c_void,
    sync::atomic::{AtomicBool, Ordering},
};

use cxx::UniquePtr;
use wire::{
    codes::CopyState,
    dtype::DType,
    tap_abi::{self, BridgeTable, Copied, Cut, HostTable, TAP_ABI},
};

use crate::{
    ffi::bridge::{self, Tensor, Ticket},
    gather, host, pin, store,
};

/// A copy that failed is reported once; every one is counted.
static REPORTED: AtomicBool = AtomicBool::new(false);

static TABLE: BridgeTable = BridgeTable {
    abi: TAP_ABI,
    size: size_of::<BridgeTable>() as u32,
    python_module,
    copy,
    view,
    wait,
    checksum,
    stage,
    release,
    exchange: gather::exchange,
    transfer: gather::transfer,
    cut: gather::cut,
    leave: gather::leave,
    store_settle: store::settle,
    store_look: store::look,
    store_leave: store::leave,
    pin: pin_slab,
};

/// The one exported function ([`wire::tap_abi::OpenBridge`]): takes the host's table, gives the bridge's; null if
/// they are of different versions.
///
/// # Safety
/// `table` must point to a [`HostTable`] that lives as long as the process.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flexmodel_bridge_open(table: *const HostTable) -> *const BridgeTable {
    // SAFETY: the caller vouches for the pointer; `abi` and `size` come first in every version.
    let table = match unsafe { table.as_ref() } {
        Some(table) if table.abi == TAP_ABI && table.size as usize == size_of::<HostTable>() => table,
        _ => return std::ptr::null(),
    };
    if host::set(table) { &TABLE } else { std::ptr::null() }
}

unsafe extern "C" fn python_module() -> *mut c_void {
    bridge::python_module() as *mut c_void
}

unsafe extern "C" fn copy(
    handle: *const c_void,
    staged: bool,
    dtype: u8,
    first: u64,
    count: u64,
    dst: *mut u8,
) -> Copied {
    let failed = Copied { state: CopyState::Failed, ticket: std::ptr::null_mut() };
    // SAFETY: the handle is the tensor of the tap that is triggered (tap_abi::Leaf), or a staged one.
    let Some(tensor) = (unsafe { handle.cast::<Tensor>().as_ref() }) else { return failed };
    // SAFETY: the interposer reserved room for `count` elements at `dst` and keeps it until `wait`.
    match unsafe { bridge::copy_out(tensor, staged, dtype, first, count, dst) } {
        Ok(ticket) if ticket.is_null() => Copied { state: CopyState::Done, ticket: std::ptr::null_mut() },
        Ok(ticket) => Copied { state: CopyState::Pending, ticket: ticket.into_raw().cast() },
        Err(why) => {
            report("tensors are dropped", &why);
            failed
        }
    }
}

unsafe extern "C" fn view(handle: *const c_void, cuts: *const Cut, count: usize) -> *mut c_void {
    // SAFETY: the handle is the tensor of the tap that is trigger (tap_abi::Leaf).
    let Some(tensor) = (unsafe { handle.cast::<Tensor>().as_ref() }) else { return std::ptr::null_mut() };
    // SAFETY: the interposer gives `count` cuts, which live through the call.
    let cuts = unsafe { tap_abi::array(cuts, count) };
    let cuts: Vec<_> =
        cuts.iter().map(|&Cut { start, len, step, keeps, .. }| bridge::Cut { start, len, step, keeps }).collect();
    match bridge::view_of(tensor, &cuts) {
        Ok(view) => view.into_raw().cast(),
        Err(why) => {
            report("slices are not taken", &why);
            std::ptr::null_mut()
        }
    }
}

/// Elements that are converted at a time.
const CHUNK: usize = 1 << 15;

unsafe extern "C" fn checksum(handle: *const c_void, dtype: u8, out: *mut u32) -> bool {
    // SAFETY: the handle is the tensor of the tap that is triggered (tap_abi::Leaf).
    let Some(tensor) = (unsafe { handle.cast::<Tensor>().as_ref() }) else { return false };
    let Some(item) = DType::from_code(dtype).map(DType::size).filter(|_| !bridge::is_on_device(tensor)) else {
        return false;
    };
    let count = bridge::elements_of(tensor);
    let mut crc = 0;
    if bridge::is_plain(tensor, dtype) {
        // SAFETY: a contiguous tensor of this type has `count` elements of `item` bytes there, and lives through the call.
        let bytes = unsafe { std::slice::from_raw_parts(bridge::address_of(tensor) as *const u8, count * item) };
        crc = crc32c::crc32c(if count == 0 { &[] } else { bytes });
    } else {
        let mut chunk = vec![0; count.min(CHUNK) * item];
        for first in (0..count).step_by(CHUNK) {
            let some = (count - first).min(CHUNK);
            // SAFETY: the chunk takes `some` elements, and a copy from the CPU is done when this returns.
            if unsafe { bridge::copy_out(tensor, false, dtype, first as u64, some as u64, chunk.as_mut_ptr()) }.is_err()
            {
                return false;
            }
            crc = crc32c::crc32c_append(crc, chunk.get(..some * item).unwrap_or_default());
        }
    }
    // SAFETY: `out` is the caller's to be written.
    unsafe { out.write(crc) };
    true
}

unsafe extern "C" fn stage(handle: *const c_void, dtype: u8, on_device: *mut bool) -> *mut c_void {
    // SAFETY: the handle is the tensor of the tap that is triggered (tap_abi::Leaf).
    let Some(tensor) = (unsafe { handle.cast::<Tensor>().as_ref() }) else { return std::ptr::null_mut() };
    match bridge::stage(tensor, dtype) {
        Ok(staged) => {
            // SAFETY: the flag is the caller's to be written.
            unsafe { on_device.write(bridge::is_on_device(&staged)) };
            staged.into_raw().cast()
        }
        Err(why) => {
            report("tensors are not gathered", &why);
            std::ptr::null_mut()
        }
    }
}

unsafe extern "C" fn release(staged: *mut c_void) {
    // SAFETY: the tensor came from `stage`, `view` or `transfer` and is given back once (BridgeTable).
    drop(unsafe { UniquePtr::from_raw(staged.cast::<Tensor>()) });
}

/// Says once what fails.
fn report(what: &str, why: &cxx::Exception) {
    if !REPORTED.swap(true, Ordering::Relaxed) {
        host::notice(&format!("{what}: {}", gather::first_line(why)));
    }
}

unsafe extern "C" fn wait(ticket: *mut c_void) -> bool {
    // SAFETY: the ticket came from `copy` and is given back once (BridgeTable).
    let ticket = unsafe { UniquePtr::from_raw(ticket.cast::<Ticket>()) };
    ticket.is_null() || ticket.wait().is_ok()
}

unsafe extern "C" fn pin_slab(base: *mut u8, len: usize) -> bool {
    pin::register(base, len)
}
