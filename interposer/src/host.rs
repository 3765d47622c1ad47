//! The C table that taps call. Every function is a panic boundary: a panic turns taps off (OPEN-1).

use std::{
    ffi::c_void,
    panic::{AssertUnwindSafe, catch_unwind},
};

use wire::{
    codes::{Code, EditOp},
    env,
    hooks::Kind,
    tap_abi::{Call, Firing, HostTable, LeafEdit, ModelDesc, Rank, Selected, Str, TAP_ABI, TensorDesc},
};

use crate::{engine, gather, shipping, state};

/// The table handed to the bridge.
pub static HOST: HostTable = HostTable {
    abi: TAP_ABI,
    size: size_of::<HostTable>() as u32,
    select,
    wants,
    resolved,
    scope,
    forget,
    microbatches,
    loss_scale,
    stepped,
    fire,
    due,
    taken,
    capture,
    edit,
    notice,
    fault,
    plan,
    joined,
    apart,
    finish,
    active,
};

/// Runs `f` while taps are on; a panic turns them off and gives the default.
fn boundary<T: Default>(f: impl FnOnce() -> T) -> T {
    if !state::is_on() {
        return T::default();
    }
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
        state::off(&format!("a panic in a tap: {text}"));
        T::default()
    })
}

/// Panics if the test fault of this name is set, to prove the boundary.
#[allow(clippy::panic)]
pub fn injected(name: &str) {
    if std::env::var(env::FAULT).is_ok_and(|v| v == name) {
        panic!("injected by {}={name}", env::FAULT);
    }
}

unsafe extern "C" fn select(desc: *const ModelDesc<'_>, rank: Rank, out: *mut Selected, cap: usize) -> usize {
    boundary(|| {
        // SAFETY: the bridge passes a description that lives through the call.
        let found = engine::with(|e| unsafe { e.select(&*desc, rank) });
        for (i, selected) in found.iter().take(cap).enumerate() {
            // SAFETY: i < cap entries of `out` are the bridge's to be written.
            unsafe { out.add(i).write(*selected) };
        }
        found.len()
    })
}

unsafe extern "C" fn wants(kinds: u32) -> bool {
    boundary(|| engine::with(|e| e.wants(kinds)))
}

unsafe extern "C" fn resolved() {
    boundary(|| engine::with(engine::Engine::resolved));
}

unsafe extern "C" fn scope(serial: u64, part: u64, enter: bool, firing: *const Firing) {
    // SAFETY: the bridge passes a firing that lives through the call.
    boundary(|| engine::with(|e| e.scope(serial, part, enter, unsafe { &*firing })));
}

unsafe extern "C" fn forget(serial: u64) {
    boundary(|| engine::with(|e| e.forget(serial)));
}

unsafe extern "C" fn microbatches(serial: u64, count: u32, batch: i64, length: i64) {
    boundary(|| engine::with(|e| e.microbatches(serial, count, [batch, length])));
}

unsafe extern "C" fn loss_scale(scale: f64) {
    boundary(|| engine::with(|e| e.loss_scale(scale)));
}

unsafe extern "C" fn stepped() {
    boundary(|| engine::with(engine::Engine::stepped));
}

unsafe extern "C" fn fire(tap: u32, firing: *const Firing, out: *mut Call) -> bool {
    boundary(|| {
        injected_in_tap();
        // SAFETY: the bridge passes a firing that lives through the call.
        let Some(call) = engine::with(|e| e.fire(tap, unsafe { &*firing })) else { return false };
        // SAFETY: `out` is the bridge's to be written.
        unsafe { out.write(call) };
        true
    })
}

unsafe extern "C" fn due(tap: u32, kind: u8) -> bool {
    boundary(|| Kind::from_code(kind).is_some_and(|kind| engine::with(|e| e.due(tap, kind))))
}

unsafe extern "C" fn taken(tap: u32, kind: u8, out: *mut Call) -> bool {
    boundary(|| {
        let Some(call) = Kind::from_code(kind).and_then(|kind| engine::with(|e| e.taken(tap, kind))) else {
            return false;
        };
        // SAFETY: `out` is the bridge's to be written.
        unsafe { out.write(call) };
        true
    })
}

/// The fault is looked up once: a tap is a hot path.
fn injected_in_tap() {
    static SET: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    if *SET.get_or_init(|| std::env::var_os(env::FAULT).is_some()) {
        injected("panic-in-tap");
    }
}

unsafe extern "C" fn capture(call: *const Call, kind: u8, path: Str<'_>, repeat: u32, tensor: *const TensorDesc<'_>) {
    boundary(|| {
        let Some(kind) = Kind::from_code(kind) else { return };
        // SAFETY: the bridge's call and tensor live through this call, and its sizes are ndim long.
        let cargo = engine::with(|e| unsafe { e.cargo(&*call, kind, path, repeat, &*tensor) });
        match cargo {
            Some(cargo) if cargo.collective => gather::take(cargo),
            Some(cargo) => shipping::ship(cargo),
            None => {}
        }
    });
}

unsafe extern "C" fn edit(call: *const Call, kind: u8, path: Str<'_>) -> LeafEdit {
    boundary(|| {
        let kind = Kind::from_code(kind)?;
        // SAFETY: as in capture.
        engine::with(|e| Some(e.edit(unsafe { &*call }, kind, unsafe { path.get() })))
    })
    .unwrap_or(LeafEdit { op: EditOp::Keep, factor: 1.0 })
}

unsafe extern "C" fn notice(text: Str<'_>) {
    // SAFETY: the string lives through the call.
    boundary(|| shipping::notice(unsafe { text.get() }.to_owned()));
}

unsafe extern "C" fn fault(text: Str<'_>) {
    // SAFETY: the string lives through the call.
    boundary(|| state::off(unsafe { text.get() }));
}

unsafe extern "C" fn plan(out: *mut u8, cap: usize) -> usize {
    boundary(|| {
        let plan = engine::with(|e| e.plan()).into_bytes();
        // SAFETY: `cap` bytes of `out` are the bridge's to be written.
        unsafe { std::ptr::copy_nonoverlapping(plan.as_ptr(), out, plan.len().min(cap)) };
        plan.len()
    })
}

unsafe extern "C" fn joined(comm: *mut c_void, index: u32, size: u32, devices: bool) {
    let comm = gather::Communicator::new(comm, index as usize, devices);
    if state::is_on() {
        boundary(|| gather::joined(comm, size as usize));
    } else {
        comm.leave();
    }
}

unsafe extern "C" fn apart(why: Str<'_>) {
    // SAFETY: the string lives through the call.
    boundary(|| gather::apart(unsafe { why.get() }));
}

unsafe extern "C" fn finish() {
    boundary(|| {
        gather::finish();
        shipping::finish();
    });
}

unsafe extern "C" fn active() -> bool {
    state::is_on()
}
