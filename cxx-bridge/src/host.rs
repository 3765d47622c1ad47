//! The interposer's table, as far as Rust calls it. C++ calls it itself (`cpp/include/flexmodel/host.h`).

use std::sync::OnceLock;

use wire::tap_abi::{HostTable, Str};

use crate::ffi::bridge;

static HOST: OnceLock<&'static HostTable> = OnceLock::new();

/// Keeps the table, here and for C++; the first one stays. Whether both know such a table.
pub fn set(table: &'static HostTable) -> bool {
    HOST.set(table).is_err() || bridge::set_host(std::ptr::from_ref(table) as usize)
}

pub fn host() -> Option<&'static HostTable> {
    HOST.get().copied()
}

pub fn notice(text: &str) {
    if let Some(host) = host() {
        // SAFETY: the string lives through the call.
        unsafe { (host.notice)(Str::new(text)) };
    }
}

pub fn per_rank(why: &str) {
    if let Some(host) = host() {
        // SAFETY: the string lives through the call.
        unsafe { (host.per_rank)(Str::new(why)) };
    }
}
