//! The stand-in for the driver, as a job uses a driver.

#![allow(dead_code, reason = "each test program uses some of it")]

use std::{
    env,
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    path::PathBuf,
    ptr,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

use libloading::os::unix::{Library, Symbol};

/// A library that cargo builds beside the tests that depend on it.
pub fn beside(name: &str) -> PathBuf {
    let tests = env::current_exe().unwrap();
    let found = tests.parent().map(|deps| deps.join(name)).filter(|path| path.is_file());
    found.unwrap_or_else(|| panic!("{name}, beside this test"))
}

/// Loaded as torch would have loaded it, for as long as the process lives.
#[derive(Clone, Copy)]
pub struct Cuda(&'static Library);

impl Cuda {
    pub fn load() -> Self {
        static LOADED: OnceLock<Library> = OnceLock::new();
        // SAFETY: the stand-in has no initialisers.
        Self(LOADED.get_or_init(|| unsafe { Library::new(beside("libcuda.so")).unwrap() }))
    }

    /// For one test at a time: a capture forbids things to all threads.
    pub fn alone() -> (MutexGuard<'static, ()>, Self) {
        static ALONE: Mutex<()> = Mutex::new(());
        (ALONE.lock().unwrap_or_else(PoisonError::into_inner), Self::load())
    }

    /// # Safety
    /// `T` is the type of the function of that name.
    unsafe fn get<T>(self, name: &str) -> Symbol<T> {
        // SAFETY: the caller's.
        unsafe { self.0.get(name).unwrap() }
    }

    /// The job uses a device: its context.
    pub fn retained(self, device: c_int) -> usize {
        let mut context = ptr::null_mut::<c_void>();
        // SAFETY: the function's type; writes one pointer.
        unsafe {
            let retain = self.get::<unsafe extern "C" fn(*mut *mut c_void, c_int) -> c_int>("cuDevicePrimaryCtxRetain");
            assert_eq!(retain(&mut context, device), 0);
        }
        context.addr()
    }

    pub fn is_active(self, device: c_int) -> bool {
        let (mut flags, mut active) = (0, 0);
        // SAFETY: the function's type; writes two ints.
        unsafe {
            let state =
                self.get::<unsafe extern "C" fn(c_int, *mut c_uint, *mut c_int) -> c_int>("cuDevicePrimaryCtxGetState");
            assert_eq!(state(device, &mut flags, &mut active), 0);
        }
        active == 1
    }

    pub fn push(self, context: usize) {
        // SAFETY: the function's type.
        unsafe {
            let push = self.get::<unsafe extern "C" fn(usize) -> c_int>("cuCtxPushCurrent_v2");
            assert_eq!(push(context), 0);
        }
    }

    pub fn pop(self) {
        let mut popped = 0usize;
        // SAFETY: the function's type; writes one pointer.
        unsafe {
            let pop = self.get::<unsafe extern "C" fn(*mut usize) -> c_int>("cuCtxPopCurrent_v2");
            assert_eq!(pop(&mut popped), 0);
        }
    }

    /// This thread's context; 0 if it has none.
    pub fn current(self) -> usize {
        let mut context = 0usize;
        // SAFETY: the function's type; writes one pointer.
        unsafe {
            let current = self.get::<unsafe extern "C" fn(*mut usize) -> c_int>("cuCtxGetCurrent");
            assert_eq!(current(&mut context), 0);
        }
        context
    }

    /// Another stream of the job's, on a device that it uses.
    pub fn stream_on(self, device: c_int) -> usize {
        let mut stream = 0usize;
        self.push(self.retained(device));
        // SAFETY: the function's type; writes one handle.
        unsafe {
            let make =
                self.get::<unsafe extern "C" fn(*mut usize, c_uint, c_int) -> c_int>("cuStreamCreateWithPriority");
            assert_eq!(make(&mut stream, 1, 0), 0);
        }
        self.pop();
        stream
    }

    /// The job queues a kernel.
    pub fn queue(self, device: c_int, stream: usize, kernel: impl FnOnce() + Send + 'static) {
        unsafe extern "C" fn run(data: *mut c_void) {
            // SAFETY: `queue` made it, and a stream runs it once.
            let kernel = unsafe { Box::from_raw(data.cast::<Box<dyn FnOnce() + Send>>()) };
            kernel();
        }
        let kernel: Box<Box<dyn FnOnce() + Send>> = Box::new(Box::new(kernel));
        self.push(self.retained(device));
        // SAFETY: the function's type, with what `run` takes.
        unsafe {
            type Launch = unsafe extern "C" fn(usize, unsafe extern "C" fn(*mut c_void), *mut c_void) -> c_int;
            let launch = self.get::<Launch>("cuLaunchHostFunc");
            assert_eq!(launch(stream, run, Box::into_raw(kernel).cast()), 0);
        }
        self.pop();
    }

    /// The job waits for a device.
    pub fn synchronize(self, device: c_int) {
        self.push(self.retained(device));
        // SAFETY: the function's type.
        unsafe { assert_eq!(self.get::<unsafe extern "C" fn() -> c_int>("cuCtxSynchronize")(), 0) };
        self.pop();
    }

    /// The `nth` call of this name from now on fails, counted from 1; 0: none does.
    pub fn fail(self, call: &CStr, nth: usize) {
        // SAFETY: the function's type; the string lives through the call.
        unsafe { self.get::<unsafe extern "C" fn(*const c_char, usize)>("cuStandinFail")(call.as_ptr(), nth) };
    }

    /// Of all tests in this process.
    #[track_caller]
    pub fn expect_no_violation(self) {
        // SAFETY: the function's type; lines are never freed.
        let first = unsafe {
            self.get::<unsafe extern "C" fn(usize) -> *const c_char>("cuStandinViolation")(0)
                .as_ref()
                .map(|line| CStr::from_ptr(line).to_str().unwrap())
        };
        assert_eq!(first, None);
    }
}

/// A graph that the job captures, as torch does by default.
pub struct Graph {
    cuda: Cuda,
    stream: usize,
}

impl Graph {
    pub fn begin(cuda: &Cuda, stream: usize) -> Self {
        cuda.push(cuda.retained(1));
        // SAFETY: the function's type.
        unsafe {
            let begin = cuda.get::<unsafe extern "C" fn(usize, c_int) -> c_int>("cuStreamBeginCapture_v2");
            assert_eq!(begin(stream, 0), 0);
        }
        Self { cuda: *cuda, stream }
    }

    /// What the driver says of it.
    pub fn end(self) -> c_int {
        let mut graph = 0usize;
        // SAFETY: the function's type; writes one pointer.
        unsafe {
            let end = self.cuda.get::<unsafe extern "C" fn(usize, *mut usize) -> c_int>("cuStreamEndCapture");
            end(self.stream, &mut graph)
        }
    }
}
