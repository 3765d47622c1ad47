//! What the interposer calls.

use std::{
    ffi::c_void,
    sync::{Mutex, PoisonError},
};

use cxx::UniquePtr;
use wire::{
    codes::CopyState,
    dtype::DType,
    tap_abi::{self, BridgeTable, Copied, Cut, HostTable, TAP_ABI},
};

use crate::{
    ffi::bridge::{self, Tensor},
    gather, host,
    staging::{self, Staged, Ticket},
    store,
};

/// Texts that were said. What failed is counted each time, and said once.
static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());
/// How many are said.
const MOST: usize = 8;

static TABLE: BridgeTable = BridgeTable {
    abi: TAP_ABI,
    size: size_of::<BridgeTable>() as u32,
    python_module,
    readable,
    copy,
    view,
    release_view,
    pin,
    wait,
    checksum,
    stage,
    come,
    release,
    exchange: gather::exchange,
    transfer: gather::transfer,
    cut: gather::cut,
    leave: gather::leave,
    store_settle: store::settle,
    store_look: store::look,
    store_leave: store::leave,
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

unsafe extern "C" fn readable(handle: *const c_void) -> bool {
    // SAFETY: the handle is the tensor of the tap that is triggered (tap_abi::Leaf).
    unsafe { handle.cast::<Tensor>().as_ref() }.is_some_and(|tensor| staging::readable(tensor).is_ok())
}

/// A tensor that was asked for: a tap's, or one of ours.
///
/// # Safety
/// The handle is what `staged` says (BridgeTable), and lives for `'a`.
unsafe fn tensor_of<'a>(handle: *const c_void, staged: bool) -> Option<&'a Tensor> {
    if staged {
        // SAFETY: the caller's.
        unsafe { handle.cast::<Staged>().as_ref() }.and_then(|staged| staged.tensor.as_ref())
    } else {
        // SAFETY: the caller's.
        unsafe { handle.cast::<Tensor>().as_ref() }
    }
}

unsafe extern "C" fn copy(
    handle: *const c_void,
    staged: bool,
    dtype: u8,
    first: u64,
    count: u64,
    dst: *mut u8,
) -> Copied {
    // SAFETY: the handle is the tensor of the tap that is triggered (tap_abi::Leaf), or a staged one; the interposer reserved
    // room for `count` elements at `dst` and keeps it until `wait`.
    let copied = unsafe { begin_copy(handle, staged, dtype, first, count, dst) };
    match copied {
        Ok(None) => Copied { state: CopyState::Done, ticket: std::ptr::null_mut() },
        Ok(Some(ticket)) => Copied { state: CopyState::Pending, ticket: Box::into_raw(Box::new(ticket)).cast() },
        Err(why) => {
            report("tensors are dropped", &why);
            Copied { state: CopyState::Failed, ticket: std::ptr::null_mut() }
        }
    }
}

/// Copies from the CPU, or begins a copy from a device.
///
/// # Safety
/// As for `copy`.
unsafe fn begin_copy(
    handle: *const c_void,
    staged: bool,
    dtype: u8,
    first: u64,
    count: u64,
    dst: *mut u8,
) -> Result<Option<Ticket>, String> {
    // SAFETY: the caller's.
    let tensor = unsafe { tensor_of(handle, staged) }.ok_or("no tensor")?;
    if !bridge::is_on_device(tensor) {
        // SAFETY: the caller's.
        let copied = unsafe { bridge::copy_out(tensor, dtype, first, count, dst) };
        return copied.map(|()| None).map_err(|why| gather::first_line(&why).to_owned());
    }
    // SAFETY: the caller's.
    match unsafe { handle.cast::<Staged>().as_ref() }.filter(|_| staged) {
        Some(ours) => ours.ticket(dtype, first, count, dst),
        None => Ticket::of(tensor, dtype, first, count, dst),
    }
    .map(Some)
}

unsafe extern "C" fn view(handle: *const c_void, cuts: *const Cut, count: usize) -> *mut c_void {
    // SAFETY: the handle is the tensor of the tap that is triggered (tap_abi::Leaf).
    let Some(tensor) = (unsafe { handle.cast::<Tensor>().as_ref() }) else { return std::ptr::null_mut() };
    // SAFETY: the interposer gives `count` cuts, which live through the call.
    let cuts = unsafe { tap_abi::array(cuts, count) };
    let cuts: Vec<_> =
        cuts.iter().map(|&Cut { start, len, step, keeps, .. }| bridge::Cut { start, len, step, keeps }).collect();
    match bridge::view_of(tensor, &cuts) {
        Ok(view) => view.into_raw().cast(),
        Err(why) => {
            report("slices are not taken", gather::first_line(&why));
            std::ptr::null_mut()
        }
    }
}

unsafe extern "C" fn release_view(view: *mut c_void) {
    // SAFETY: the tensor came from `view` and is given back once (BridgeTable).
    drop(unsafe { UniquePtr::from_raw(view.cast::<Tensor>()) });
}

/// Elements that are converted at a time.
const CHUNK: usize = 1 << 15;

unsafe extern "C" fn checksum(handle: *const c_void, staged: bool, dtype: u8, out: *mut u32) -> bool {
    // SAFETY: the handle is the tensor of the tap that is triggered (tap_abi::Leaf), or a staged one.
    let Some(tensor) = (unsafe { tensor_of(handle, staged) }) else { return false };
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
            // SAFETY: the chunk takes `some` elements.
            if unsafe { bridge::copy_out(tensor, dtype, first as u64, some as u64, chunk.as_mut_ptr()) }.is_err() {
                return false;
            }
            crc = crc32c::crc32c_append(crc, chunk.get(..some * item).unwrap_or_default());
        }
    }
    // SAFETY: `out` is the caller's to be written.
    unsafe { out.write(crc) };
    true
}

unsafe extern "C" fn stage(handle: *const c_void, dtype: u8, device: *mut i32) -> *mut c_void {
    // SAFETY: the handle is the tensor of the tap that is triggered (tap_abi::Leaf).
    let Some(tensor) = (unsafe { handle.cast::<Tensor>().as_ref() }) else { return std::ptr::null_mut() };
    match Staged::of(tensor, dtype) {
        Ok(staged) => {
            // SAFETY: the index is the caller's to be written.
            unsafe { device.write(staged.device) };
            Box::into_raw(Box::new(staged)).cast()
        }
        Err(why) => {
            report("tensors are not gathered", &why);
            std::ptr::null_mut()
        }
    }
}

unsafe extern "C" fn come(staged: *const c_void) -> CopyState {
    // SAFETY: the tensor came from `stage` or `transfer` and was not given back (BridgeTable).
    unsafe { staged.cast::<Staged>().as_ref() }.map_or(CopyState::Failed, Staged::state)
}

unsafe extern "C" fn release(staged: *mut c_void) {
    // SAFETY: the tensor came from `stage` or `transfer` and is given back once (BridgeTable).
    drop(unsafe { Box::from_raw(staged.cast::<Staged>()) });
}

/// Says what fails, each text once.
pub fn report(what: &str, why: &str) {
    let text = format!("{what}: {why}");
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    if said.len() < MOST && !said.contains(&text) {
        said.push(text.clone());
        drop(said);
        host::notice(&text);
    }
}

unsafe extern "C" fn pin(ticket: *const c_void, base: *mut u8, len: usize) -> bool {
    // SAFETY: the ticket came from `copy` and was not given back (BridgeTable).
    unsafe { ticket.cast::<Ticket>().as_ref() }.is_some_and(|ticket| ticket.pin(base, len).is_ok())
}

unsafe extern "C" fn wait(ticket: *mut c_void) -> CopyState {
    // SAFETY: the ticket came from `copy` and is given back once (BridgeTable).
    let ticket = unsafe { Box::from_raw(ticket.cast::<Ticket>()) };
    // SAFETY: the interposer keeps the room for it until now (`copy`), and for good where the copy is still pending.
    match unsafe { ticket.wait() } {
        Ok(()) => CopyState::Done,
        Err(devices::Error::Stuck(_)) => CopyState::Pending,
        Err(_) => CopyState::Failed,
    }
}
