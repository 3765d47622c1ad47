//! Streams, where the stand-in for the driver is loaded too: a group begins when they come to it, and they stand still until
//! it is done.

use std::{
    ffi::{c_int, c_void},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Something that the driver's real library does not have.
const MARK: &std::ffi::CStr = c"cuStandinViolation";
/// Between looks for an abort.
const SHORT: Duration = Duration::from_millis(1);

type Launch = unsafe extern "C" fn(*mut c_void, unsafe extern "C" fn(*mut c_void), *mut c_void) -> c_int;

/// Where the streams of a group stand still, until it is dropped.
pub struct Gate {
    inner: Arc<Inner>,
    streams: usize,
}

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    news: Condvar,
}

#[derive(Default)]
struct State {
    come: usize,
    open: bool,
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Puts a gate on each stream; `None` where there is no stand-in for the driver.
pub fn gate(streams: &[usize]) -> Result<Option<Gate>, String> {
    let Some(launch) = launch() else { return Ok(None) };
    let inner = Arc::<Inner>::default();
    for &stream in streams {
        let data = Arc::into_raw(inner.clone()).cast_mut().cast();
        // SAFETY: `stand` takes what it is given, once.
        let code = unsafe { launch(std::ptr::without_provenance_mut(stream), stand, data) };
        if code != 0 {
            return Err(format!("a stream that this thread may not use: CUDA's error {code}"));
        }
    }
    Ok(Some(Gate { inner, streams: streams.len() }))
}

/// A stream has come to a group.
unsafe extern "C" fn stand(data: *mut c_void) {
    // SAFETY: `gate` gave it one reference.
    let inner = unsafe { Arc::from_raw(data.cast::<Inner>()) };
    let mut state = inner.lock();
    state.come += 1;
    inner.news.notify_all();
    drop(inner.news.wait_while(state, |state| !state.open).unwrap_or_else(PoisonError::into_inner));
}

fn launch() -> Option<Launch> {
    // SAFETY: C strings; nothing is loaded. A stand-in is never unloaded.
    unsafe {
        let driver = libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOLOAD | libc::RTLD_LAZY);
        if driver.is_null() || libc::dlsym(driver, MARK.as_ptr()).is_null() {
            return None;
        }
        let found = libc::dlsym(driver, c"cuLaunchHostFunc".as_ptr());
        (!found.is_null()).then(|| std::mem::transmute::<*mut c_void, Launch>(found))
    }
}

impl Gate {
    /// Waits until all streams have come. False: it was given up before.
    pub fn is_come_to(&self, given_up: impl Fn() -> bool) -> bool {
        let mut state = self.inner.lock();
        while state.come < self.streams {
            if given_up() {
                return false;
            }
            state = self.inner.news.wait_timeout(state, SHORT).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.inner.lock().open = true;
        self.inner.news.notify_all();
    }
}
