//! A stand-in for the bridge.

use std::ffi::c_void;

use wire::{
    codes::{CopyState, Refusal},
    dtype::DType,
    hooks::Kind,
    tap_abi::{BridgeTable, Copied, Cut, Leaf, Move, Str, TAP_ABI},
};

/// A tensor of the CPU that the stand-in for the bridge can read.
pub struct Tensor {
    pub floats: Vec<f32>,
    /// It cannot be read after all.
    pub fails: bool,
}

impl Tensor {
    pub fn of(floats: usize) -> Self {
        Self { floats: (0..floats).map(|n| n as f32).collect(), fails: false }
    }

    /// As a tap describes it. It lies in one dimension, of `sizes`.
    pub fn described<'a>(&self, kind: Kind, path: &'a str, sizes: &'a [i64], refusal: Refusal) -> Leaf<'a> {
        Leaf {
            kinds: kind.bit(),
            path: Str::new(path),
            skipped: false,
            repeat: 0,
            handle: std::ptr::from_ref(self).cast(),
            sizes: sizes.as_ptr(),
            ndim: sizes.len(),
            dtype: DType::Float32 as u8,
            on_device: false,
            refusal: refusal as u8,
            axes: std::ptr::null(),
            axis_count: 0,
        }
    }
}

/// A bridge whose tensors are [`Tensor`]s of `f32`, without communicators or devices.
pub static BRIDGE: BridgeTable = BridgeTable {
    abi: TAP_ABI,
    size: size_of::<BridgeTable>() as u32,
    python_module,
    copy,
    view,
    wait,
    checksum,
    stage,
    release,
    exchange,
    transfer,
    cut,
    leave: cut,
    pin,
};

unsafe extern "C" fn python_module() -> *mut c_void {
    std::ptr::null_mut()
}

unsafe extern "C" fn copy(handle: *const c_void, _: bool, _: u8, first: u64, count: u64, dst: *mut u8) -> Copied {
    // SAFETY: tests describe tensors of this type, which live through the call.
    let tensor = unsafe { &*handle.cast::<Tensor>() };
    let (from, to) = (first as usize, (first + count) as usize);
    let floats = &tensor.floats[from..to];
    // SAFETY: the caller has reserved room for them.
    unsafe { std::ptr::copy_nonoverlapping(floats.as_ptr().cast(), dst, size_of_val(floats)) };
    Copied { state: if tensor.fails { CopyState::Failed } else { CopyState::Done }, ticket: std::ptr::null_mut() }
}

/// Of one dimension.
unsafe extern "C" fn view(handle: *const c_void, cuts: *const Cut, count: usize) -> *mut c_void {
    // SAFETY: as in copy; the caller's cuts live through the call.
    let (tensor, cuts) = unsafe { (&*handle.cast::<Tensor>(), wire::tap_abi::array(cuts, count)) };
    let [cut] = cuts else { return std::ptr::null_mut() };
    let floats = (0..cut.len).map(|n| tensor.floats[(cut.start + n * cut.step) as usize]).collect();
    Box::into_raw(Box::new(Tensor { floats, fails: false })).cast()
}

unsafe extern "C" fn wait(_: *mut c_void) -> bool {
    true
}

unsafe extern "C" fn checksum(_: *const c_void, _: u8, _: *mut u32) -> bool {
    false
}

unsafe extern "C" fn stage(handle: *const c_void, _: u8, on_device: *mut bool) -> *mut c_void {
    // SAFETY: as in copy; `on_device` is the caller's to be written.
    let floats = unsafe {
        on_device.write(false);
        (*handle.cast::<Tensor>()).floats.clone()
    };
    Box::into_raw(Box::new(Tensor { floats, fails: false })).cast()
}

unsafe extern "C" fn release(staged: *mut c_void) {
    // SAFETY: `stage` made it, and it is given back once.
    drop(unsafe { Box::from_raw(staged.cast::<Tensor>()) });
}

unsafe extern "C" fn exchange(
    _: *mut c_void,
    _: *const u8,
    _: usize,
    _: *mut c_void,
    _: unsafe extern "C" fn(*mut c_void, *const u8, usize),
) -> bool {
    false
}

unsafe extern "C" fn transfer(_: *mut c_void, _: *mut Move, _: usize) -> bool {
    false
}

unsafe extern "C" fn cut(_: *mut c_void) {}

unsafe extern "C" fn pin(_: *mut u8, _: usize) -> bool {
    false
}
