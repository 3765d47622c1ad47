//! The C table that taps call. Every function is a panic boundary: a panic turns taps off (OPEN-1).

use std::{
    ffi::c_void,
    panic::{AssertUnwindSafe, catch_unwind},
};

use wire::{
    codes::Code,
    env,
    hooks::Kind,
    tap_abi::{self, Call, HostTable, Leaf, LeafEdit, ModelDesc, Rank, Selected, Str, TAP_ABI, Trigger},
};

use capture::{Capture, clock::Caller, engine::Engine};

use crate::{instance, state};

/// The table handed to the bridge.
pub static HOST: HostTable = HostTable {
    abi: TAP_ABI,
    size: size_of::<HostTable>() as u32,
    select,
    wants,
    resolved,
    pass,
    forget,
    first_part,
    microbatches,
    batch,
    loss_scale,
    optimizer_made,
    optimizers_of,
    stepped,
    backward_ended,
    triggered,
    parameter_due,
    begin_parameter,
    due,
    goes_on,
    turn,
    revision,
    forbid_compiling,
    capture,
    edit,
    notice,
    fault,
    plan,
    joined,
    per_rank,
    store,
    finish,
    active,
};

/// Runs `f` while taps are on; a panic turns them off and gives the default.
fn boundary<T: Default>(f: impl FnOnce(&'static Capture) -> T) -> T {
    let Some(capture) = instance::get().and_then(Capture::if_on) else { return T::default() };
    catch_unwind(AssertUnwindSafe(|| f(capture))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
        state::off(&format!("a panic in a tap: {text}"));
        T::default()
    })
}

/// As [`boundary`], with the engine.
fn engine<T: Default>(f: impl FnOnce(&mut Engine) -> T) -> T {
    boundary(|capture| f(&mut capture.engine()))
}

/// Panics if the test fault of this name is set, to prove the boundary.
#[allow(clippy::panic)]
pub fn injected(name: &str) {
    if std::env::var(env::FAULT).is_ok_and(|v| v == name) {
        panic!("injected by {}={name}", env::FAULT);
    }
}

unsafe extern "C" fn select(desc: *const ModelDesc<'_>, rank: Rank, out: *mut Selected, cap: usize) -> usize {
    boundary(|capture| {
        // SAFETY: the bridge passes a description that lives through the call.
        let found = unsafe { capture.engine().select(&*desc, rank) };
        for (i, selected) in found.iter().take(cap).enumerate() {
            // SAFETY: i < cap entries of `out` are the bridge's to be written.
            unsafe { out.add(i).write(*selected) };
        }
        found.len()
    })
}

unsafe extern "C" fn wants(kinds: u32) -> bool {
    engine(|e| e.plan().wants(kinds))
}

unsafe extern "C" fn resolved() {
    engine(Engine::resolved);
}

unsafe extern "C" fn pass(serial: u64, part: u64, enter: bool, trigger: *const Trigger) -> bool {
    // SAFETY: the bridge passes a trigger that lives through the call.
    boundary(|capture| capture.pass(serial, part, enter, unsafe { &*trigger }))
}

unsafe extern "C" fn forget(serial: u64) {
    engine(|e| e.forget(serial));
}

unsafe extern "C" fn first_part(serial: u64, part: u64) {
    engine(|e| e.first_part(serial, part));
}

unsafe extern "C" fn batch() {
    engine(Engine::batch);
}

unsafe extern "C" fn microbatches(serial: u64, of_all: bool, count: u32, batch: i64, length: i64) {
    engine(|e| e.microbatches(serial, of_all, count, [batch, length]));
}

unsafe extern "C" fn loss_scale(scale: f64) {
    engine(|e| e.loss_scale(scale));
}

unsafe extern "C" fn optimizer_made() {
    engine(Engine::optimizer_made);
}

unsafe extern "C" fn optimizers_of(tap: u32, optimizers: *const u32, count: usize) {
    // SAFETY: the bridge passes `count` numbers that live through the call.
    let optimizers = unsafe { tap_abi::array(optimizers, count) };
    engine(|e| e.optimizers_of(tap, optimizers));
}

unsafe extern "C" fn stepped(optimizer: u32) {
    boundary(|capture| capture.stepped(optimizer));
}

unsafe extern "C" fn backward_ended() {
    engine(Engine::backward_ended);
}

unsafe extern "C" fn triggered(tap: u32, trigger: *const Trigger, out: *mut Call) -> bool {
    boundary(|capture| {
        injected_in_tap();
        // SAFETY: the bridge passes a trigger that lives through the call.
        let Some(call) = capture.engine().triggered(tap, unsafe { &*trigger }) else { return false };
        // SAFETY: `out` is the bridge's to be written.
        unsafe { out.write(call) };
        true
    })
}

unsafe extern "C" fn parameter_due(tap: u32, kind: u8) -> bool {
    engine(|e| Kind::from_code(kind).is_some_and(|kind| e.parameter_due(tap, kind)))
}

unsafe extern "C" fn begin_parameter(tap: u32, kind: u8, version: u64, out: *mut Call) -> bool {
    engine(|e| {
        let Some(call) = Kind::from_code(kind).and_then(|kind| e.begin_parameter(tap, kind, version)) else {
            return false;
        };
        // SAFETY: `out` is the bridge's to be written.
        unsafe { out.write(call) };
        true
    })
}

unsafe extern "C" fn due() -> bool {
    boundary(Capture::is_due)
}

unsafe extern "C" fn goes_on(serial: i64, part: i64, tap: i64) -> bool {
    let part = u64::try_from(part).ok().map(Caller::Part);
    let tap = u32::try_from(tap).ok().map(Caller::Tap);
    engine(|e| e.goes_on(u64::try_from(serial).ok(), &[part, tap]))
}

unsafe extern "C" fn turn(rank: Rank) -> bool {
    boundary(|capture| capture.turn(rank))
}

unsafe extern "C" fn revision() -> u64 {
    engine(|e| e.plan().revision())
}

unsafe extern "C" fn forbid_compiling(why: Str<'_>) {
    // SAFETY: the string lives through the call.
    engine(|e| e.forbid_compiling(unsafe { why.shown() }.into_owned()));
}

/// The fault is looked up once: a tap is a hot path.
fn injected_in_tap() {
    static SET: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    if *SET.get_or_init(|| std::env::var_os(env::FAULT).is_some()) {
        injected("panic-in-tap");
    }
}

unsafe extern "C" fn capture(call: *const Call, leaf: *const Leaf<'_>) {
    // SAFETY: the bridge's call and leaf live through this call, and the leaf's arrays are as long as it says.
    boundary(|capture| unsafe { capture.capture(&*call, &*leaf) });
}

unsafe extern "C" fn edit(call: *const Call, kinds: u32, path: Str<'_>, in_graph: bool) -> LeafEdit {
    // SAFETY: as in capture.
    engine(|e| Some(e.edit(unsafe { &*call }, kinds, unsafe { path.get() }, in_graph))).unwrap_or(LeafEdit::NONE)
}

unsafe extern "C" fn notice(text: Str<'_>) {
    // SAFETY: the string lives through the call.
    boundary(|capture| capture.transport().notice(unsafe { text.shown() }.into_owned()));
}

unsafe extern "C" fn fault(text: Str<'_>) {
    // SAFETY: the string lives through the call.
    let _ = catch_unwind(AssertUnwindSafe(|| state::off(&unsafe { text.shown() })));
}

unsafe extern "C" fn plan(out: *mut u8, cap: usize) -> usize {
    engine(|e| {
        let plan = e.plan().agreed_by_ranks().into_bytes();
        // SAFETY: `cap` bytes of `out` are the bridge's to be written.
        unsafe { std::ptr::copy_nonoverlapping(plan.as_ptr(), out, plan.len().min(cap)) };
        plan.len()
    })
}

unsafe extern "C" fn joined(comm: *mut c_void, index: u32, size: u32, device: i32) {
    let Some(capture) = instance::get() else { return };
    let comm = capture.communicator(comm, index as usize, device);
    if state::is_on() {
        boundary(|capture| capture.gather().joined(comm, size as usize));
    } else {
        comm.leave();
    }
}

unsafe extern "C" fn per_rank(why: Str<'_>) {
    // SAFETY: the string lives through the call.
    boundary(|capture| capture.gather().per_rank(&unsafe { why.shown() }));
}

unsafe extern "C" fn store(store: *mut c_void, why: Str<'_>) {
    // SAFETY: the store is the bridge's making, and the string lives through the call.
    boundary(|capture| unsafe { capture.open_store(store, &why.shown()) });
}

unsafe extern "C" fn finish() {
    boundary(Capture::finish);
}

unsafe extern "C" fn active() -> bool {
    state::is_on()
}
