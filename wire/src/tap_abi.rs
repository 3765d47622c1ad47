//! The C tables between interposer and bridge, inside one process.
//!
//! The bridge is built against one torch and knows tensors; the interposer knows hooks, steps and the slab, and
//! decides. They are separate shared objects, so they meet in two tables of C functions:
//!
//! - [`HostTable`], the interposer's, which taps call when they are triggered;
//! - [`BridgeTable`], the bridge's, which the interposer calls to read tensors.
//!
//! Both halves have these structs from here: Rust as they are, C++ by the header that `cxx-bridge/build.rs` generates. C++
//! calls the host's table itself.
//!
//! Every function may be called from any thread. None unwinds. [`TAP_ABI`] changes with anything in this module.
//!
//! A field that says *code of* an enum may hold any number, as C++ and compiled graphs can have any: whoever reads it asks
//! [`crate::codes::Code::from_code`].

use std::{borrow::Cow, ffi::c_void, marker::PhantomData};

use crate::codes::{CopyState, MoveState};

/// Version of this module, part of every bridge's marker (`abi=` in [`MARKER_PREFIX`]).
pub const TAP_ABI: u32 = 17;

/// What a bridge's marker starts with, see [`crate::bridge_marker`]. Found by scanning the file, so that a
/// bridge for another torch is refused without being loaded.
pub const MARKER_PREFIX: &str = "FLEXMODEL-BRIDGE";

/// The bridge's one exported function: [`OpenBridge`].
pub const OPEN_SYMBOL: &str = "flexmodel_bridge_open";

/// Type of [`OPEN_SYMBOL`]: takes the host's table for good, returns the bridge's or null if `abi` differs.
pub type OpenBridge = unsafe extern "C" fn(*const HostTable) -> *const BridgeTable;

/// A borrowed UTF-8 string.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Str<'a> {
    ptr: *const u8,
    len: usize,
    owner: PhantomData<&'a str>,
}

impl<'a> Str<'a> {
    /// Borrows `s`.
    pub fn new(s: &'a str) -> Self {
        Self { ptr: s.as_ptr(), len: s.len(), owner: PhantomData }
    }

    /// The string; empty if it is null or not UTF-8.
    ///
    /// # Safety
    /// The memory must be what [`Str::new`] (or C++ with the same meaning) borrowed, and still alive.
    pub unsafe fn get(&self) -> &'a str {
        if self.ptr.is_null() {
            return "";
        }
        // SAFETY: the caller vouches for pointer and length.
        let bytes = unsafe { std::slice::from_raw_parts(self.ptr, self.len) };
        std::str::from_utf8(bytes).unwrap_or("")
    }

    /// The string for people, whatever its bytes are: what is no UTF-8 is replaced.
    ///
    /// # Safety
    /// As for [`Str::get`].
    pub unsafe fn shown(&self) -> Cow<'a, str> {
        // SAFETY: the caller vouches for pointer and length.
        String::from_utf8_lossy(unsafe { array(self.ptr, self.len) })
    }
}

/// A borrowed array. C++ may have null for one that is empty.
///
/// # Safety
/// Where `len` is not 0, `first` must point to `len` values that live for `'a`.
pub unsafe fn array<'a, T>(first: *const T, len: usize) -> &'a [T] {
    if first.is_null() {
        return &[];
    }
    // SAFETY: the caller vouches for pointer and length.
    unsafe { std::slice::from_raw_parts(first, len) }
}

/// One tensor of a module or of a parameter, on its way from the bridge to the engine: all that the bridge says of a record.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Leaf<'a> {
    /// Mask of the kinds under which it is to be captured.
    pub kinds: u32,
    /// Code of [`crate::dtype::DType`]; 0: not a type we know.
    pub dtype: u8,
    /// Code of [`crate::codes::Refusal`]: why it cannot be read.
    pub refusal: u8,
    /// On a device, not the CPU.
    pub on_device: bool,
    /// A gradient that the optimizer does not use.
    pub skipped: bool,
    /// For gradients: how many of the same call came before it.
    pub repeat: u32,
    /// Where it is in what the module takes or returns: `out`, `in[0]`, ...
    pub path: Str<'a>,
    /// The `at::Tensor`, valid during the call.
    pub handle: *const c_void,
    /// Sizes, `ndim` of them.
    pub sizes: *const i64,
    /// Dimensions.
    pub ndim: usize,
    /// What torch says of how it lies over the ranks, outermost first, `axis_count` of them.
    pub axes: *const LeafAxis<'a>,
    /// None where torch says nothing.
    pub axis_count: usize,
}

/// An axis along which the job distributes a model.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct MeshAxis<'a> {
    /// `dp`, `tp`, ..., unique in the mesh.
    pub name: Str<'a>,
    /// This rank's coordinate.
    pub index: u32,
    /// Number of members.
    pub size: u32,
    /// Code of [`crate::codes::Role`].
    pub role: u8,
    /// Global ranks of the members that share this rank's other coordinates, `rank_count` of them.
    pub ranks: *const u32,
    /// How many.
    pub rank_count: usize,
}

/// How a leaf lies along one axis, as torch says it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct LeafAxis<'a> {
    /// The axis; see [`MeshAxis::name`].
    pub name: Str<'a>,
    /// This rank's coordinate.
    pub index: u32,
    /// Number of members.
    pub size: u32,
    /// Code of [`crate::placement::PlacementCode`].
    pub placement: u8,
    /// The dimension of which there are pieces.
    pub dim: u32,
    /// Of the whole tensor, for flat runs of its elements.
    pub sizes: *const u64,
    /// How many sizes.
    pub ndim: usize,
}

/// What a tap has to do in one call of its module. It stays with the gradient hooks that the call attaches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Call {
    /// The tap.
    pub tap: u32,
    /// Step, as in [`crate::record::RecordMeta`].
    pub step: u64,
    /// In how many steps the optimizers that hold the module's parameters have stepped: for `every=`.
    pub turn: u64,
    /// Microbatch.
    pub micro: u32,
    /// Call.
    pub call: u32,
    /// Counts the model's forward passes; ties a gradient to what was known of its forward.
    pub pass: u64,
    /// The pass trains.
    pub train: bool,
    /// Kinds to capture: at once (forward kinds), or by gradient hooks (backward kinds).
    pub capture: u32,
    /// Kinds with an edit that is active now.
    pub edit: u32,
    /// Sizes of the module's own first input, as in [`Trigger::first`].
    pub first: [i64; 3],
    /// Of a parameter's gradient: how many of the same microbatch came before it.
    pub repeat: u32,
    /// Say of every tensor how it lies over the ranks, not of DTensors alone: members of an axis hold pieces of tensors.
    pub ask: bool,
}

/// When a tap is triggered, seen from the bridge.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Trigger {
    /// Before the module's forward; otherwise after.
    pub pre: bool,
    /// A backward pass is running on this thread: the forward is a replay.
    pub replay: bool,
    /// Gradients are recorded.
    pub grad_enabled: bool,
    /// `module.training`.
    pub train: bool,
    /// In a compiled graph: what it saves for its backward is packed by somebody, such as activation checkpointing, which
    /// then computes it anew in a replay.
    pub recomputes: bool,
    /// After the forward, in a compiled graph that is not the one in which it began.
    pub split: bool,
    /// The first tensor among the module's arguments: its first three sizes, -1 where there is none.
    pub first: [i64; 3],
    /// A digest of some of its elements, where a model begins whose ranks are only assumed to share the batch. 0: not taken.
    pub input_digest: u32,
    /// Where a model begins or ends: it was called through a wrapper that reduces gradients in the backward pass.
    pub reduces: bool,
    /// Likewise: for each axis of its mesh the collectives that the axis's members have called together; -1: not known.
    pub collectives: [i64; 8],
}

/// What is done to a leaf. Several edits of one leaf are one, see [`LeafEdit::then`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct LeafEdit {
    /// Floating and complex leaves are multiplied with it; 1: they stay as they are.
    pub factor: f64,
    /// Zeros take its place.
    pub zero: bool,
}

impl LeafEdit {
    /// Nothing is done to it.
    pub const NONE: Self = Self { factor: 1.0, zero: false };

    /// This, and then another.
    #[must_use]
    pub fn then(self, next: Self) -> Self {
        Self { factor: self.factor * next.factor, zero: self.zero || next.zero }
    }
}

/// One module or parameter that a selector matched.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Selected {
    /// Index into the modules; those of parameters follow those of modules.
    pub index: u32,
    /// The tap's number.
    pub tap: u32,
    /// Mask of the kinds tapped.
    pub kinds: u32,
    /// Mask of those with an edit, in whatever step.
    pub edits: u32,
    /// The tap needs the hook before the module's forward.
    pub before: bool,
}

/// A module as the shim found it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct ModuleDesc<'a> {
    /// Canonical name.
    pub name: Str<'a>,
    /// Class name.
    pub class_name: Str<'a>,
    /// Full dotted class name.
    pub qualified: Str<'a>,
    /// Code of [`crate::codes::Order`].
    pub order: u8,
}

/// A model as the shim found it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct ModelDesc<'a> {
    /// Number of the shim's own for this model object, stable while it lives.
    pub serial: u64,
    /// Modules.
    pub modules: *const ModuleDesc<'a>,
    /// How many.
    pub module_count: usize,
    /// Names of its parameters.
    pub parameters: *const Str<'a>,
    /// How many.
    pub parameter_count: usize,
    /// How the job wraps it.
    pub wrapper: Str<'a>,
    /// The axes over which it is distributed, outermost first.
    pub mesh: *const MeshAxis<'a>,
    /// How many; none for a process alone.
    pub axis_count: usize,
    /// See [`crate::passes::Pass::signature`].
    pub signature: u32,
}

/// Who this process is in the job.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Rank {
    /// Global rank.
    pub rank: u32,
    /// Number of ranks.
    pub world: u32,
    /// The number that the ranks of its process group have drawn ([`crate::control::JobSigns::group`]); 0 where they have none.
    pub group: u64,
}

/// The interposer's functions. Unless said otherwise, `false` or 0 means: do nothing.
#[repr(C)]
pub struct HostTable {
    /// [`TAP_ABI`].
    pub abi: u32,
    /// Size of this struct.
    pub size: u32,
    /// Taps of a model and its parameters: at most `cap` entries into `out`, the number there are returned. Known ones keep
    /// their taps.
    pub select: unsafe extern "C" fn(model: *const ModelDesc<'_>, rank: Rank, out: *mut Selected, cap: usize) -> usize,
    /// Whether any hook taps one of these kinds, a mask.
    pub wants: unsafe extern "C" fn(kinds: u32) -> bool,
    /// The shim looked at every model it knows: report selectors without a match.
    pub resolved: unsafe extern "C" fn(),
    /// The forward of the model with this serial, or of a part of it that holds tapped modules, begins (`true`) or ends.
    /// `part` tells the parts of a model apart; 0 is the model itself. Whether this is a pass of which the parameters are.
    pub pass: unsafe extern "C" fn(serial: u64, part: u64, enter: bool, trigger: *const Trigger) -> bool,
    /// The model with this serial was destroyed.
    pub forget: unsafe extern "C" fn(serial: u64),
    /// The first part of the model with this serial that the job called by itself.
    pub first_part: unsafe extern "C" fn(serial: u64, part: u64),
    /// The model with this serial is a stage of a pipeline, `of_all` of all ranks, whose steps go into `count` microbatches: each
    /// `batch` sequences of `length`, whatever the stage is called with; negative where that is not known.
    pub microbatches: unsafe extern "C" fn(serial: u64, of_all: bool, count: u32, batch: i64, length: i64),
    /// A pipeline begins a batch, with all stages of this rank.
    pub batch: unsafe extern "C" fn(),
    /// From now on gradients are `scale` times those of the loss that the script computes.
    pub loss_scale: unsafe extern "C" fn(scale: f64),
    /// The process made an optimizer.
    pub optimizer_made: unsafe extern "C" fn(),
    /// The optimizers with these numbers hold the parameters of a tap's module, or the tap's parameter.
    pub optimizers_of: unsafe extern "C" fn(tap: u32, optimizers: *const u32, count: usize),
    /// The optimizer with this number stepped, or was skipped.
    pub stepped: unsafe extern "C" fn(optimizer: u32),
    /// A backward pass ended.
    pub backward_ended: unsafe extern "C" fn(),
    /// A tap is triggered; fills `Call` and returns whether there is anything to do.
    pub triggered: unsafe extern "C" fn(tap: u32, trigger: *const Trigger, out: *mut Call) -> bool,
    /// Whether this kind of a parameter (a code) is wanted now: in this step, if it was not captured in it yet, or in
    /// this microbatch.
    pub parameter_due: unsafe extern "C" fn(tap: u32, kind: u8) -> bool,
    /// The call to capture it under; from now on it is not due in this step. After one pass of the model the same
    /// `version` is not due twice; 0 is none.
    pub begin_parameter: unsafe extern "C" fn(tap: u32, kind: u8, version: u64, out: *mut Call) -> bool,
    /// Whether the next pass may be one that another plan of hooks begins with: `turn` is to be called before it.
    pub due: unsafe extern "C" fn() -> bool,
    /// Whether a call of a module goes on with a pass that has begun, so that no other plan begins with it: as a part, by this
    /// number, or a tap of a model of this serial; negative: it is neither, or of no model.
    pub goes_on: unsafe extern "C" fn(serial: i64, part: i64, tap: i64) -> bool,
    /// A model may be about to be called, in a process that is this rank. Whether another plan is in force from now on, so that
    /// all models are to be selected from again.
    pub turn: unsafe extern "C" fn(rank: Rank) -> bool,
    /// The revision of the plan in force.
    pub revision: unsafe extern "C" fn() -> u64,
    /// Why modules that the job has compiled may not be compiled again from now on; empty: they may. No hook is added then.
    pub forbid_compiling: unsafe extern "C" fn(why: Str<'_>),
    /// Captures a leaf, once for each of its kinds.
    pub capture: unsafe extern "C" fn(call: *const Call, leaf: *const Leaf<'_>),
    /// How a leaf is edited by what edits any of these kinds, a mask. `in_graph`: the job captures its operations into a CUDA
    /// graph, so it is not.
    pub edit: unsafe extern "C" fn(call: *const Call, kinds: u32, path: Str<'_>, in_graph: bool) -> LeafEdit,
    /// One line for the user, on stderr and in the run.
    pub notice: unsafe extern "C" fn(text: Str<'_>),
    /// An inner error: taps go off in this process for good, with this line.
    pub fault: unsafe extern "C" fn(text: Str<'_>),
    /// What all ranks must agree on to gather tensors by collective, in `out`, of `cap` bytes; its length. 0: no hook wants
    /// it.
    pub plan: unsafe extern "C" fn(out: *mut u8, cap: usize) -> usize,
    /// The ranks have a communicator of ours, for the host to leave: member `index` of `size`. Whose tensors it takes beside
    /// those of the CPU: the index of a device, or -1.
    pub joined: unsafe extern "C" fn(comm: *mut c_void, index: u32, size: u32, device: i32),
    /// The ranks have no communicator, or none any more, for this reason: each sends its own parts.
    pub per_rank: unsafe extern "C" fn(why: Str<'_>),
    /// The store of the job's process group, over a connection of ours and for the host to leave; or null, and why there is
    /// none that ranks can decide in.
    pub store: unsafe extern "C" fn(store: *mut c_void, why: Str<'_>),
    /// The process ends in good order: finish what is under way, within a bound.
    pub finish: unsafe extern "C" fn(),
    /// Whether taps are on.
    pub active: unsafe extern "C" fn() -> bool,
}

/// What a slice takes of one dimension. No position is outside of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Cut {
    /// The first position.
    pub start: u64,
    /// How many.
    pub len: u64,
    /// How far it is from one to the next; at least 1.
    pub step: u64,
    /// The dimension stays; otherwise it is one position, and goes.
    pub keeps: bool,
    /// It is taken whole, whatever its size: nothing is cut.
    pub all: bool,
}

/// Outcome of [`BridgeTable::copy`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Copied {
    /// How far it has come.
    pub state: CopyState,
    /// Of a pending copy: to be given to [`BridgeTable::wait`] exactly once.
    pub ticket: *mut c_void,
}

/// One tensor's way over a communicator.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Move {
    /// The other member.
    pub peer: u32,
    /// To it; otherwise from it.
    pub send: bool,
    /// From device to device; otherwise both have it on the CPU.
    pub on_device: bool,
    /// A staged tensor: the caller's, or null, and then what was received, for the caller to release.
    pub tensor: *mut c_void,
    /// Of what is received.
    pub dtype: u8,
    /// Of what is received, `ndim` of them.
    pub sizes: *const u64,
    /// Dimensions.
    pub ndim: u32,
}

/// What is told of a key of a store: whether it failed, and then the reason or else the value, of `len` bytes.
pub type HearStore = unsafe extern "C" fn(context: *mut c_void, failed: bool, bytes: *const u8, len: usize);

/// The bridge's functions.
#[repr(C)]
pub struct BridgeTable {
    /// [`TAP_ABI`].
    pub abi: u32,
    /// Size of this struct.
    pub size: u32,
    /// New reference to the Python module with which the shim makes taps; null with a Python error set. Needs the GIL.
    pub python_module: unsafe extern "C" fn() -> *mut c_void,
    /// Whether a tap's tensor can be read now: not while its stream is captured into a CUDA graph, when a slab must not be
    /// made for it either.
    pub readable: unsafe extern "C" fn(handle: *const c_void) -> bool,
    /// Copies elements `first .. first + count`, row-major and converted to `dtype`, to `dst`; from a device, when the ticket
    /// is waited for. `staged`: the handle is what `stage` or `transfer` gave, not the job's.
    pub copy: unsafe extern "C" fn(
        handle: *const c_void,
        staged: bool,
        dtype: u8,
        first: u64,
        count: u64,
        dst: *mut u8,
    ) -> Copied,
    /// A view of what a slice takes of the tensor of a tap, `cuts` for each of its dimensions: a handle that is given back
    /// by `release_view`; null if there is none.
    pub view: unsafe extern "C" fn(handle: *const c_void, cuts: *const Cut, count: usize) -> *mut c_void,
    /// Gives a view back.
    pub release_view: unsafe extern "C" fn(view: *mut c_void),
    /// Pins the memory that a ticket's copy goes to, for fast copies. Whether it did. No thread of the job's does this: it
    /// takes long.
    pub pin: unsafe extern "C" fn(ticket: *const c_void, base: *mut u8, len: usize) -> bool,
    /// Makes a copy from a device that is pending, once its tensor is there, and waits for it; how far it is then. Pending: it
    /// could not be waited for, and the device may write where it goes as long as the process lives. Does not need the GIL.
    pub wait: unsafe extern "C" fn(ticket: *mut c_void) -> CopyState,
    /// crc32c of a tensor's elements, row-major and converted to `dtype`, in `out`; false where they are on a device, or
    /// cannot be read. `staged` as for `copy`.
    pub checksum: unsafe extern "C" fn(handle: *const c_void, staged: bool, dtype: u8, out: *mut u32) -> bool,
    /// Stages a tensor: a row-major copy of it as `dtype`, on its device, as the job's stream has it now; null if it cannot
    /// be. It may be used from any thread, also where a `handle` is asked for. Says which device it is on, -1 for the CPU.
    pub stage: unsafe extern "C" fn(handle: *const c_void, dtype: u8, device: *mut i32) -> *mut c_void,
    /// Whether what is staged is there, or yet to come on its device. Only what is there may be given to `transfer`.
    pub come: unsafe extern "C" fn(staged: *const c_void) -> CopyState,
    /// Gives a staged tensor back.
    pub release: unsafe extern "C" fn(staged: *mut c_void),
    /// Sends some bytes to all members of a communicator, and then passes those of each to `hear`, in order. False: the
    /// communicator is of no use any more, and [`HostTable::per_rank`] was called with the reason. Does not need the GIL.
    pub exchange: unsafe extern "C" fn(
        comm: *mut c_void,
        bytes: *const u8,
        len: usize,
        context: *mut c_void,
        hear: unsafe extern "C" fn(*mut c_void, *const u8, usize),
    ) -> bool,
    /// Carries out moves, all of them or none; after a failure as for `exchange`. Between two members they are in the same
    /// order on both. All members call it, also where they have none. Does not need the GIL.
    pub transfer: unsafe extern "C" fn(comm: *mut c_void, moves: *mut Move, count: usize) -> MoveState,
    /// Makes what is under way on a communicator fail.
    pub cut: unsafe extern "C" fn(comm: *mut c_void),
    /// Gives a communicator back.
    pub leave: unsafe extern "C" fn(comm: *mut c_void),
    /// Gives a key of a store this value if it has none, and passes the value that it has to `hear`. Where nobody can say,
    /// `hear` is told so first, with the reason. It may take as long as the store does. Does not need the GIL.
    pub store_settle: unsafe extern "C" fn(
        store: *mut c_void,
        key: Str<'_>,
        value: *const u8,
        len: usize,
        context: *mut c_void,
        hear: HearStore,
    ),
    /// Passes the value of a key to `hear`, if it has one, as `store_settle` does.
    pub store_look: unsafe extern "C" fn(store: *mut c_void, key: Str<'_>, context: *mut c_void, hear: HearStore),
    /// Gives a store back.
    pub store_leave: unsafe extern "C" fn(store: *mut c_void),
}

/// A struct that crosses, as Rust lays it out. The generated header asserts that C++ does so too.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Its name.
    pub name: &'static str,
    /// Bytes of it.
    pub size: usize,
    /// What its address is a multiple of.
    pub align: usize,
    /// Its fields, with their offsets.
    pub fields: Vec<(&'static str, usize)>,
}

/// [`layouts`] for structs that name all of their fields; a list that lacks one does not compile.
macro_rules! layouts {
    ($($name:ident { $($field:ident),* $(; $rest:tt)? })*) => {
        /// Every struct that crosses.
        pub fn layouts() -> Vec<Layout> {
            vec![$(Layout {
                name: stringify!($name),
                size: size_of::<$name>(),
                align: align_of::<$name>(),
                fields: vec![$((stringify!($field), std::mem::offset_of!($name, $field))),*],
            }),*]
        }

        $(const _: fn($name) = |$name { $($field: _,)* $($rest)? }| ();)*
    };
}

layouts! {
    Str { ptr, len; .. }
    Leaf { kinds, dtype, refusal, on_device, skipped, repeat, path, handle, sizes, ndim, axes, axis_count }
    MeshAxis { name, index, size, role, ranks, rank_count }
    LeafAxis { name, index, size, placement, dim, sizes, ndim }
    Call { tap, step, turn, micro, call, pass, train, capture, edit, first, repeat, ask }
    Trigger { pre, replay, grad_enabled, train, recomputes, split, first, input_digest, reduces, collectives }
    LeafEdit { factor, zero }
    Selected { index, tap, kinds, edits, before }
    ModuleDesc { name, class_name, qualified, order }
    ModelDesc { serial, modules, module_count, parameters, parameter_count, wrapper, mesh, axis_count, signature }
    Rank { rank, world, group }
    HostTable { abi, size, select, wants, resolved, pass, forget, first_part, microbatches, batch, loss_scale, optimizer_made, optimizers_of,
        stepped, backward_ended, triggered, parameter_due, begin_parameter, due, goes_on, turn, revision, forbid_compiling, capture, edit, notice, fault, plan, joined, per_rank, store, finish, active }
}

// SAFETY: plain function pointers.
unsafe impl Sync for HostTable {}
// SAFETY: plain function pointers.
unsafe impl Sync for BridgeTable {}
