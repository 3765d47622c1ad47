//! What C++ calls: the interposer's table, as cxx functions.

use std::{ffi::c_void, sync::OnceLock};

use cxx::UniquePtr;
use wire::{
    codes::{self, EditOp, Placement, Refusal},
    dtype::DType,
    tap_abi::{self, HostTable, ModelDesc, Rank, Str, TensorDesc},
};

use crate::{
    ffi::bridge::{
        Call, Communicator, Constant, Firing, Leaf, LeafAxis, LeafEdit, MeshAxis, Module, Selected, Tensor,
        is_on_device,
    },
    gather::Ranks,
};

static HOST: OnceLock<&'static HostTable> = OnceLock::new();

/// Keeps the table; the first one stays.
pub fn set(table: &'static HostTable) {
    let _ = HOST.set(table);
}

fn host() -> Option<&'static HostTable> {
    HOST.get().copied()
}

impl From<&Firing> for tap_abi::Firing {
    fn from(f: &Firing) -> Self {
        let &Firing { pre, replay, grad_enabled, train, recomputes, split, first, given } = f;
        Self { pre, replay, grad_enabled, train, recomputes, split, first, given }
    }
}

impl From<&Call> for tap_abi::Call {
    fn from(c: &Call) -> Self {
        let &Call { tap, step, micro, call, pass, train, recompute, capture, edit, first, ask } = c;
        Self { tap, step, micro, call, pass, train, recompute, capture, edit, first, ask }
    }
}

impl From<tap_abi::Call> for Call {
    fn from(c: tap_abi::Call) -> Self {
        let tap_abi::Call { tap, step, micro, call, pass, train, recompute, capture, edit, first, ask } = c;
        Self { tap, step, micro, call, pass, train, recompute, capture, edit, first, ask }
    }
}

impl<'a> From<&'a MeshAxis> for tap_abi::MeshAxis<'a> {
    fn from(a: &'a MeshAxis) -> Self {
        Self { name: Str::new(&a.name), index: a.index, size: a.size, role: a.role }
    }
}

impl<'a> From<&'a LeafAxis> for tap_abi::LeafAxis<'a> {
    fn from(a: &'a LeafAxis) -> Self {
        let dim = if a.placement == Placement::Flat as u8 { a.shape.len() as u32 } else { a.dim };
        Self {
            name: Str::new(&a.name),
            index: a.index,
            size: a.size,
            placement: a.placement,
            dim,
            sizes: a.shape.as_ptr(),
        }
    }
}

// cxx knows `Vec`, not slices of shared structs.
#[allow(clippy::ptr_arg)]
pub fn select(
    serial: u64,
    modules: &Vec<Module>,
    parameters: &Vec<String>,
    wrapper: &str,
    mesh: &Vec<MeshAxis>,
    rank: u32,
    world: u32,
) -> Vec<Selected> {
    let Some(host) = host() else { return Vec::new() };
    let column = |get: fn(&Module) -> &String| modules.iter().map(|m| Str::new(get(m))).collect::<Vec<_>>();
    let (names, classes, qualified) = (column(|m| &m.name), column(|m| &m.class_name), column(|m| &m.qualified));
    let orders: Vec<u8> = modules.iter().map(|m| m.order).collect();
    let parameters: Vec<Str<'_>> = parameters.iter().map(|name| Str::new(name)).collect();
    let mesh: Vec<tap_abi::MeshAxis<'_>> = mesh.iter().map(tap_abi::MeshAxis::from).collect();
    let desc = ModelDesc {
        serial,
        count: modules.len(),
        names: names.as_ptr(),
        classes: classes.as_ptr(),
        qualified: qualified.as_ptr(),
        orders: orders.as_ptr(),
        parameters: parameters.as_ptr(),
        parameter_count: parameters.len(),
        wrapper: Str::new(wrapper),
        mesh: mesh.as_ptr(),
        axis_count: mesh.len(),
    };
    let blank = tap_abi::Selected { index: 0, tap: 0, kinds: 0, edits: 0 };
    let mut out = vec![blank; modules.len() + parameters.len()];
    // SAFETY: every array has `count` entries and lives through the call; `out` takes as many.
    let found = unsafe { (host.select)(&desc, Rank { rank, world }, out.as_mut_ptr(), out.len()) };
    out.iter().take(found).map(|s| Selected { index: s.index, tap: s.tap, kinds: s.kinds, edits: s.edits }).collect()
}

pub fn wants(kinds: u32) -> bool {
    // SAFETY: a function of the table, called with a number.
    host().is_some_and(|host| unsafe { (host.wants)(kinds) })
}

pub fn resolved() {
    if let Some(host) = host() {
        // SAFETY: a function of the table, without arguments.
        unsafe { (host.resolved)() };
    }
}

pub fn scope(serial: u64, part: u64, enter: bool, firing: &Firing) {
    if let Some(host) = host() {
        // SAFETY: the firing lives through the call.
        unsafe { (host.scope)(serial, part, enter, &firing.into()) };
    }
}

pub fn forget(serial: u64) {
    if let Some(host) = host() {
        // SAFETY: a function of the table, called with a number.
        unsafe { (host.forget)(serial) };
    }
}

pub fn microbatches(serial: u64, count: u32, batch: i64, length: i64) {
    if let Some(host) = host() {
        // SAFETY: a function of the table, called with numbers.
        unsafe { (host.microbatches)(serial, count, batch, length) };
    }
}

pub fn loss_scale(scale: f64) {
    if let Some(host) = host() {
        // SAFETY: a function of the table, called with a number.
        unsafe { (host.loss_scale)(scale) };
    }
}

pub fn stepped() {
    if let Some(host) = host() {
        // SAFETY: a function of the table, without arguments.
        unsafe { (host.stepped)() };
    }
}

pub fn fire(tap: u32, firing: &Firing, call: &mut Call) -> bool {
    let Some(host) = host() else { return false };
    let mut out = tap_abi::Call::default();
    // SAFETY: both structs live through the call.
    let wanted = unsafe { (host.fire)(tap, &firing.into(), &mut out) };
    *call = out.into();
    wanted
}

pub fn due(tap: u32, kind: u8) -> bool {
    // SAFETY: a function of the table, called with numbers.
    host().is_some_and(|host| unsafe { (host.due)(tap, kind) })
}

pub fn taken(tap: u32, kind: u8, call: &mut Call) -> bool {
    let Some(host) = host() else { return false };
    let mut out = tap_abi::Call::default();
    // SAFETY: the struct lives through the call.
    let wanted = unsafe { (host.taken)(tap, kind, &mut out) };
    *call = out.into();
    wanted
}

// cxx knows `Vec`, not slices of shared structs.
#[allow(clippy::ptr_arg, clippy::too_many_arguments)]
pub fn capture(
    call: &Call,
    kind: u8,
    path: &str,
    repeat: u32,
    leaf: &Leaf,
    sizes: &[i64],
    axes: &Vec<LeafAxis>,
    tensor: &Tensor,
) {
    let Some(host) = host() else { return };
    let axes: Vec<tap_abi::LeafAxis<'_>> = axes.iter().map(tap_abi::LeafAxis::from).collect();
    let desc = TensorDesc {
        handle: std::ptr::from_ref(tensor).cast::<c_void>(),
        sizes: sizes.as_ptr(),
        ndim: sizes.len() as u32,
        dtype: leaf.dtype,
        // What is refused may be asked nothing.
        on_device: leaf.refusal == Refusal::None as u8 && is_on_device(tensor),
        refusal: leaf.refusal,
        axes: axes.as_ptr(),
        axis_count: axes.len() as u32,
    };
    // SAFETY: everything borrowed lives through the call.
    unsafe { (host.capture)(&call.into(), kind, Str::new(path), repeat, &desc) };
}

pub fn edit(call: &Call, kind: u8, path: &str) -> LeafEdit {
    let Some(host) = host() else { return LeafEdit { op: EditOp::Keep as u8, factor: 1.0 } };
    // SAFETY: everything borrowed lives through the call.
    let edit = unsafe { (host.edit)(&call.into(), kind, Str::new(path)) };
    LeafEdit { op: edit.op as u8, factor: edit.factor }
}

pub fn notice(text: &str) {
    if let Some(host) = host() {
        // SAFETY: the string lives through the call.
        unsafe { (host.notice)(Str::new(text)) };
    }
}

pub fn fault(text: &str) {
    if let Some(host) = host() {
        // SAFETY: the string lives through the call.
        unsafe { (host.fault)(Str::new(text)) };
    }
}

pub fn plan() -> String {
    let Some(host) = host() else { return String::new() };
    let mut out = vec![0; 1 << 16];
    // SAFETY: `out` takes as many bytes as it says.
    let len = unsafe { (host.plan)(out.as_mut_ptr(), out.len()) };
    out.truncate(len);
    String::from_utf8_lossy(&out).into_owned()
}

pub fn joined(words: UniquePtr<Communicator>, index: u32, size: u32, device: i32) {
    let Some(host) = host() else { return };
    let ranks = Ranks::new(words, index, size, device);
    let devices = ranks.takes_devices();
    // SAFETY: the host leaves the communicator once, through the bridge's table.
    unsafe { (host.joined)(Box::into_raw(Box::new(ranks)).cast(), index, size, devices) };
}

pub fn apart(why: &str) {
    if let Some(host) = host() {
        // SAFETY: the string lives through the call.
        unsafe { (host.apart)(Str::new(why)) };
    }
}

pub fn finish() {
    if let Some(host) = host() {
        // SAFETY: a function of the table, without arguments.
        unsafe { (host.finish)() };
    }
}

pub fn active() -> bool {
    // SAFETY: a function of the table, without arguments.
    host().is_some_and(|host| unsafe { (host.active)() })
}

pub fn constants() -> Vec<Constant> {
    codes::constants().into_iter().map(|(name, value)| Constant { name, value }).collect()
}

pub fn dtype_code(name: &str) -> u8 {
    DType::from_name(name).map_or(0, |dtype| dtype as u8)
}
