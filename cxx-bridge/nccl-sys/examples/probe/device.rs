//! Where the bytes are: memory and a stream of the first GPU, by the CUDA driver, or memory of this process.

use std::{
    cell::UnsafeCell,
    ffi::{c_int, c_uint, c_void},
    ptr,
};

use libloading::os::unix::Library;
use nccl_sys::Stream;

/// Bytes of the word that [`Place::hold`] waits for.
const WORD: usize = 4;
/// `CU_STREAM_NON_BLOCKING`.
const NON_BLOCKING: c_uint = 1;
/// `CU_EVENT_DISABLE_TIMING`.
const NO_TIMING: c_uint = 2;
/// `CUDA_ERROR_NOT_READY`.
const NOT_READY: c_int = 600;

/// The driver's functions, by the names that they have since CUDA 12.
struct Driver {
    library: Library,
}

impl Driver {
    fn load() -> Result<Self, String> {
        // SAFETY: the driver's initialisers have no precondition.
        let library = unsafe { Library::new("libcuda.so.1") }.map_err(|e| format!("no CUDA driver: {e}"))?;
        Ok(Self { library })
    }

    /// # Safety
    /// `F` is the type of the function of that name.
    unsafe fn get<F: Copy>(&self, name: &str) -> Result<F, String> {
        // SAFETY: the caller's.
        unsafe { self.library.get::<F>(name) }.map(|found| *found).map_err(|e| e.to_string())
    }
}

/// Calls `$name` with arguments of these types; an error of the driver's is one here.
macro_rules! cuda {
    ($driver:expr, $name:ident($($value:expr => $kind:ty),*)) => {{
        // SAFETY: these are the types that cuda.h gives; what the pointers point to lives across the call.
        let code = unsafe { $driver.get::<unsafe extern "C" fn($($kind),*) -> c_int>(stringify!($name))?($($value),*) };
        if code == 0 { Ok(()) } else { Err(format!("{}: {code}", stringify!($name))) }
    }};
}

/// Some memory, and a stream. It is given back by the end of the process alone.
pub enum Place {
    /// Of this process, for a stand-in.
    Host(Host),
    /// Of the first GPU.
    Gpu(Gpu),
}

/// Memory, and what stands for an event: how many groups of a stream are not done.
pub struct Host {
    memory: UnsafeCell<Vec<u8>>,
    pending: unsafe extern "C" fn(Stream) -> c_int,
}

/// A context with what it has.
pub struct Gpu {
    driver: Driver,
    context: *mut c_void,
    stream: Stream,
    memory: u64,
    word: u64,
}

impl Place {
    /// `bytes` of this process, for the stand-in that `library` is.
    pub fn host(library: &Library, bytes: usize) -> Result<Self, String> {
        // SAFETY: the stand-in's own function, of this type; the library stays open until the process ends.
        let pending = unsafe { library.get::<unsafe extern "C" fn(Stream) -> c_int>("ncclStandinPending") };
        let pending = *pending.map_err(|e| format!("it is no stand-in: {e}"))?;
        Ok(Self::Host(Host { memory: UnsafeCell::new(vec![0; bytes]), pending }))
    }

    /// `bytes` of the first GPU, in its primary context, as torch's are.
    pub fn first_gpu(bytes: usize) -> Result<Self, String> {
        let driver = Driver::load()?;
        let (mut context, mut stream) = (ptr::null_mut(), ptr::null_mut());
        let (mut memory, mut word) = (0, 0);
        cuda!(driver, cuInit(0 => c_uint))?;
        cuda!(driver, cuDevicePrimaryCtxRetain(&mut context => *mut *mut c_void, 0 => c_int))?;
        cuda!(driver, cuCtxSetCurrent(context => *mut c_void))?;
        cuda!(driver, cuStreamCreate(&mut stream => *mut Stream, NON_BLOCKING => c_uint))?;
        cuda!(driver, cuMemAlloc_v2(&mut memory => *mut u64, bytes => usize))?;
        cuda!(driver, cuMemAlloc_v2(&mut word => *mut u64, WORD => usize))?;
        Ok(Self::Gpu(Gpu { driver, context, stream, memory, word }))
    }

    /// Whether it is of a GPU.
    pub fn is_gpu(&self) -> bool {
        matches!(self, Self::Gpu(_))
    }

    /// What makes its device current on the thread that calls it.
    pub fn on_thread(&self) -> impl FnOnce() -> Result<(), String> + Send + use<> {
        let context = match self {
            Self::Host(_) => None,
            Self::Gpu(gpu) => Some(gpu.context.expose_provenance()),
        };
        move || match context {
            None => Ok(()),
            Some(context) => {
                cuda!(Driver::load()?, cuCtxSetCurrent(ptr::with_exposed_provenance_mut(context) => *mut c_void))
            }
        }
    }

    /// The address `offset` bytes in.
    pub fn at(&self, offset: usize) -> *mut u8 {
        match self {
            // SAFETY: nobody holds a reference into it across a transfer; callers stay within it.
            Self::Host(host) => unsafe { (*host.memory.get()).as_mut_ptr().add(offset) },
            Self::Gpu(gpu) => ptr::without_provenance_mut(gpu.memory as usize + offset),
        }
    }

    /// The stream that transfers go on.
    pub fn stream(&self) -> Stream {
        match self {
            Self::Host(_) => ptr::null_mut(),
            Self::Gpu(gpu) => gpu.stream,
        }
    }

    /// Puts `bytes` there, now.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), String> {
        match self {
            // SAFETY: callers stay within it, and no transfer is under way.
            Self::Host(_) => unsafe { self.at(offset).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) },
            Self::Gpu(gpu) => {
                let (to, from) = (gpu.memory + offset as u64, bytes.as_ptr().cast());
                cuda!(gpu.driver, cuMemcpyHtoD_v2(to => u64, from => *const c_void, bytes.len() => usize))?;
            }
        }
        Ok(())
    }

    /// What is there, once no transfer is under way.
    pub fn read(&self, offset: usize, bytes: usize) -> Result<Vec<u8>, String> {
        let mut found = vec![0; bytes];
        match self {
            // SAFETY: as for `write`.
            Self::Host(_) => unsafe { self.at(offset).copy_to_nonoverlapping(found.as_mut_ptr(), bytes) },
            Self::Gpu(gpu) => {
                let (to, from) = (found.as_mut_ptr().cast(), gpu.memory + offset as u64);
                cuda!(gpu.driver, cuMemcpyDtoH_v2(to => *mut c_void, from => u64, bytes => usize))?;
            }
        }
        Ok(found)
    }

    /// An event behind all that the stream has.
    pub fn record(&self) -> Result<Event<'_>, String> {
        let gpu = match self {
            Self::Host(host) => return Ok(Event::Host(host)),
            Self::Gpu(gpu) => gpu,
        };
        let mut event = ptr::null_mut();
        cuda!(gpu.driver, cuEventCreate(&mut event => *mut *mut c_void, NO_TIMING => c_uint))?;
        cuda!(gpu.driver, cuEventRecord(event => *mut c_void, gpu.stream => Stream))?;
        Ok(Event::Gpu(gpu, event))
    }

    /// Lets the stream stand still until [`Self::release`].
    pub fn hold(&self) -> Result<(), String> {
        let Self::Gpu(gpu) = self else { return Ok(()) };
        self.set_word(0)?;
        // 1: CU_STREAM_WAIT_VALUE_EQ
        cuda!(gpu.driver, cuStreamWaitValue32_v2(gpu.stream => Stream, gpu.word => u64, 1 => c_uint, 1 => c_uint))
    }

    /// Lets it go on.
    pub fn release(&self) -> Result<(), String> {
        self.set_word(1)
    }

    /// By a stream of its own: a plain copy may wait for what an abort has left behind.
    fn set_word(&self, value: c_uint) -> Result<(), String> {
        let Self::Gpu(gpu) = self else { return Ok(()) };
        let mut other: Stream = ptr::null_mut();
        cuda!(gpu.driver, cuStreamCreate(&mut other => *mut Stream, NON_BLOCKING => c_uint))?;
        cuda!(gpu.driver, cuMemsetD32Async(gpu.word => u64, value => c_uint, 1 => usize, other => Stream))?;
        cuda!(gpu.driver, cuStreamSynchronize(other => Stream))
    }
}

/// A mark on the stream. A few of them are made, and left.
pub enum Event<'a> {
    /// Behind all that the stream of a stand-in has.
    Host(&'a Host),
    /// `CUevent`.
    Gpu(&'a Gpu, *mut c_void),
}

impl Event<'_> {
    /// Whether the stream has passed it.
    pub fn has_come(&self) -> Result<bool, String> {
        let (gpu, event) = match self {
            // SAFETY: takes any stream.
            Self::Host(host) => return Ok(unsafe { (host.pending)(ptr::null_mut()) } == 0),
            Self::Gpu(gpu, event) => (gpu, event),
        };
        // SAFETY: the type that cuda.h gives; the event is live.
        match unsafe { gpu.driver.get::<unsafe extern "C" fn(*mut c_void) -> c_int>("cuEventQuery")?(*event) } {
            0 => Ok(true),
            NOT_READY => Ok(false),
            code => Err(format!("cuEventQuery: {code}")),
        }
    }
}
