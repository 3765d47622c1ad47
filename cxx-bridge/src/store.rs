//! The job's store as the interposer sees it.

use std::ffi::c_void;

use cxx::UniquePtr;
use wire::tap_abi::{self, HearStore, Str};

use crate::{
    ffi::bridge::{Message, Store},
    gather::first_line,
    host,
};

/// C++ has opened the job's store: hands it to the host.
pub fn opened(store: UniquePtr<Store>) {
    let Some(host) = host::host() else { return };
    // SAFETY: the host leaves the store once, through the bridge's table.
    unsafe { (host.store)(store.into_raw().cast(), Str::new("")) };
}

/// # Safety
/// `store` must be one that was not left yet, and `key` live through the call.
unsafe fn borrow<'a>(store: *mut c_void, key: &Str<'a>) -> (&'a Store, &'a str) {
    // SAFETY: the caller vouches for it.
    unsafe { (&*store.cast(), key.get()) }
}

fn tell(found: Result<Option<Message>, cxx::Exception>, context: *mut c_void, hear: HearStore) {
    let (failed, bytes) = match &found {
        Ok(Some(value)) => (false, value.bytes.as_slice()),
        Ok(None) => return,
        Err(why) => (true, first_line(why).as_bytes()),
    };
    // SAFETY: `hear` takes bytes that live through its call, and the context that came with it.
    unsafe { hear(context, failed, bytes.as_ptr(), bytes.len()) };
}

pub unsafe extern "C" fn settle(
    store: *mut c_void,
    key: Str<'_>,
    value: *const u8,
    len: usize,
    context: *mut c_void,
    hear: HearStore,
) {
    // SAFETY: the store is the interposer's until it leaves it; key and value live through the call (BridgeTable).
    let ((store, key), value) = unsafe { (borrow(store, &key), tap_abi::array(value, len)) };
    tell(store.settle(key, value).map(Some), context, hear);
}

pub unsafe extern "C" fn look(store: *mut c_void, key: Str<'_>, context: *mut c_void, hear: HearStore) {
    // SAFETY: as in `settle`.
    let (store, key) = unsafe { borrow(store, &key) };
    tell(store.look(key).map(|found| found.into_iter().next()), context, hear);
}

pub unsafe extern "C" fn leave(store: *mut c_void) {
    // SAFETY: the store came from `host::store` and is given back once (BridgeTable).
    drop(unsafe { UniquePtr::from_raw(store.cast::<Store>()) });
}
