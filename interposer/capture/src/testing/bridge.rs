//! A stand-in for the bridge.

use std::{
    collections::HashMap,
    ffi::c_void,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering},
    },
    time::Duration,
};

use crossbeam::channel::{Receiver, Sender, unbounded};
use wire::{
    codes::{Code, CopyState, MoveState, Refusal},
    dtype::DType,
    hooks::Kind,
    tap_abi::{self, BridgeTable, Copied, Cut, HearStore, Leaf, Move, Str, TAP_ABI},
};

/// A tensor of the CPU that the stand-in for the bridge can read.
pub struct Tensor {
    pub floats: Vec<f32>,
    /// It cannot be read after all.
    pub fails: bool,
    /// Where what is staged of it is, or -1.
    pub device: i32,
    /// Its stream is captured into a CUDA graph.
    pub captured: bool,
    /// How far what is staged of it is: code of [`CopyState`].
    pub state: Arc<AtomicU8>,
}

impl Tensor {
    pub fn of(floats: usize) -> Self {
        Self::with((0..floats).map(|n| n as f32).collect())
    }

    fn with(floats: Vec<f32>) -> Self {
        Self { floats, fails: false, device: -1, captured: false, state: Arc::default() }
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

/// A store of one process.
#[derive(Clone, Default)]
pub struct Store(Arc<Kept>);

#[derive(Default)]
struct Kept {
    values: Mutex<HashMap<String, Vec<u8>>>,
    fails: AtomicBool,
}

impl Store {
    /// A connection to it, as the bridge hands one over.
    pub fn handle(&self) -> *mut c_void {
        Box::into_raw(Box::new(self.clone())).cast()
    }

    pub fn put(&self, key: &str, value: &[u8]) {
        self.0.values.lock().unwrap().insert(key.into(), value.to_vec());
    }

    /// From now on nothing comes of what is asked.
    pub fn fail(&self) {
        self.0.fails.store(true, Ordering::Relaxed);
    }
}

/// A member of a communicator of two.
pub struct Member {
    index: usize,
    to: Sender<Vec<u8>>,
    from: Receiver<Vec<u8>>,
    /// What all moves come to.
    outcome: MoveState,
    /// How often moves were to be carried out.
    pub transfers: AtomicU32,
}

impl Member {
    /// Both, by index.
    pub fn pair(outcome: MoveState) -> [Box<Self>; 2] {
        let ((to_second, at_second), (to_first, at_first)) = (unbounded(), unbounded());
        let member = |index, to, from| Box::new(Self { index, to, from, outcome, transfers: AtomicU32::new(0) });
        [member(0, to_second, at_first), member(1, to_first, at_second)]
    }

    /// The communicator, as the bridge hands one over. The member outlives it.
    pub fn handle(&self) -> *mut c_void {
        std::ptr::from_ref(self).cast_mut().cast()
    }
}

/// A bridge whose tensors are [`Tensor`]s of `f32`, whose communicators are [`Member`]s, and whose stores are [`Store`]s.
pub static BRIDGE: BridgeTable = BridgeTable {
    abi: TAP_ABI,
    size: size_of::<BridgeTable>() as u32,
    python_module,
    readable,
    copy,
    view,
    release_view: release,
    pin,
    wait,
    checksum,
    stage,
    come,
    release,
    exchange,
    transfer,
    cut,
    leave: cut,
    store_settle,
    store_look,
    store_leave,
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
    Box::into_raw(Box::new(Tensor::with(floats))).cast()
}

unsafe extern "C" fn wait(_: *mut c_void) -> CopyState {
    CopyState::Done
}

unsafe extern "C" fn checksum(_: *const c_void, _: bool, _: u8, _: *mut u32) -> bool {
    false
}

unsafe extern "C" fn stage(handle: *const c_void, _: u8, device: *mut i32) -> *mut c_void {
    // SAFETY: as in copy; `device` is the caller's to be written.
    let tensor = unsafe {
        let tensor = &*handle.cast::<Tensor>();
        device.write(tensor.device);
        tensor
    };
    let state = tensor.state.clone();
    Box::into_raw(Box::new(Tensor { state, ..Tensor::with(tensor.floats.clone()) })).cast()
}

unsafe extern "C" fn release(staged: *mut c_void) {
    // SAFETY: `stage` made it, and it is given back once.
    drop(unsafe { Box::from_raw(staged.cast::<Tensor>()) });
}

unsafe extern "C" fn exchange(
    comm: *mut c_void,
    bytes: *const u8,
    len: usize,
    context: *mut c_void,
    hear: unsafe extern "C" fn(*mut c_void, *const u8, usize),
) -> bool {
    // SAFETY: tests have communicators of this type, which live through the call; so do the bytes.
    let (member, mine) = unsafe { (&*comm.cast::<Member>(), tap_abi::array(bytes, len).to_vec()) };
    if member.to.send(mine.clone()).is_err() {
        return false;
    }
    let Ok(theirs) = member.from.recv_timeout(Duration::from_secs(30)) else { return false };
    let mut heard = vec![theirs];
    heard.insert(member.index, mine);
    for words in heard {
        // SAFETY: `hear` takes `context`, says the caller.
        unsafe { hear(context, words.as_ptr(), words.len()) };
    }
    true
}

unsafe extern "C" fn transfer(comm: *mut c_void, _: *mut Move, _: usize) -> MoveState {
    // SAFETY: as in exchange.
    let member = unsafe { &*comm.cast::<Member>() };
    member.transfers.fetch_add(1, Ordering::Relaxed);
    member.outcome
}

unsafe extern "C" fn cut(_: *mut c_void) {}

/// # Safety
/// `store` is a [`Store::handle`] that was not given back, and `hear` takes `context`.
unsafe fn in_store(
    store: *mut c_void,
    context: *mut c_void,
    hear: HearStore,
    act: impl FnOnce(&mut HashMap<String, Vec<u8>>) -> Option<Vec<u8>>,
) {
    // SAFETY: the caller vouches for it.
    let Store(kept) = unsafe { &*store.cast::<Store>() };
    let fails = kept.fails.load(Ordering::Relaxed);
    let found = if fails { Some(b"it is gone".to_vec()) } else { act(&mut kept.values.lock().unwrap()) };
    if let Some(value) = found {
        // SAFETY: the caller vouches for it.
        unsafe { hear(context, fails, value.as_ptr(), value.len()) };
    }
}

unsafe extern "C" fn store_settle(
    store: *mut c_void,
    key: Str<'_>,
    value: *const u8,
    len: usize,
    context: *mut c_void,
    hear: HearStore,
) {
    // SAFETY: the caller's key and value live through the call.
    let (key, value) = unsafe { (key.get().to_owned(), tap_abi::array(value, len).to_vec()) };
    // SAFETY: as the table says.
    unsafe { in_store(store, context, hear, |values| Some(values.entry(key).or_insert(value).clone())) };
}

unsafe extern "C" fn store_look(store: *mut c_void, key: Str<'_>, context: *mut c_void, hear: HearStore) {
    // SAFETY: as in store_settle.
    unsafe { in_store(store, context, hear, |values| values.get(key.get()).cloned()) };
}

unsafe extern "C" fn store_leave(store: *mut c_void) {
    // SAFETY: `handle` made it, and it is given back once.
    drop(unsafe { Box::from_raw(store.cast::<Store>()) });
}

unsafe extern "C" fn readable(handle: *const c_void) -> bool {
    // SAFETY: as in copy.
    unsafe { !(*handle.cast::<Tensor>()).captured }
}

unsafe extern "C" fn come(staged: *const c_void) -> CopyState {
    // SAFETY: `stage` made it.
    let code = unsafe { (*staged.cast::<Tensor>()).state.load(Ordering::Relaxed) };
    CopyState::from_code(code).unwrap()
}

unsafe extern "C" fn pin(_: *const c_void, _: *mut u8, _: usize) -> bool {
    false
}
