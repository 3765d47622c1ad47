//! A view of what a slice takes of a tap's tensor, for as long as it is on its way.

use std::{ffi::c_void, ptr::NonNull};

use wire::tap_abi::{BridgeTable, Cut};

/// The bridge's view, which is given back when this goes.
pub struct View {
    handle: NonNull<c_void>,
    bridge: &'static BridgeTable,
}

impl View {
    /// `cuts` has one for each dimension of the tensor behind `handle`. `None` where the bridge has none.
    ///
    /// # Safety
    /// `handle` must be the tensor of the tap that is triggered (`tap_abi::Leaf`).
    pub unsafe fn of(handle: *const c_void, cuts: &[Cut], bridge: &'static BridgeTable) -> Option<Self> {
        // SAFETY: the caller vouches for the handle; there are as many cuts as said.
        let view = unsafe { (bridge.view)(handle, cuts.as_ptr(), cuts.len()) };
        Some(Self { handle: NonNull::new(view)?, bridge })
    }

    /// To be read as the tap's own tensor is.
    pub fn handle(&self) -> *const c_void {
        self.handle.as_ptr()
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: `view` made it, and it is given back once.
        unsafe { (self.bridge.release_view)(self.handle.as_ptr()) };
    }
}
