//! The driver's functions, looked up in the library that torch has loaded.
//!
//! cudarc declares CUDA's types; its loader is not used. That one loads a driver where there is none yet, into jobs of the
//! CPU too, and looks for `libcuda.so` first, so that with CUDA's stubs on the way it finds another library than torch has.
//! A result is a number here: a newer driver has codes that no enum of today's has.

use std::{
    ffi::{c_int, c_uint, c_void},
    sync::OnceLock,
};

use cudarc::driver::sys::{CUcontext, CUdevice, CUdeviceptr, CUevent, CUstream};
use libloading::os::unix::Library;

use crate::Error;

/// The driver's file name, which torch loads it by.
const NAME: &str = "libcuda.so.1";
/// `CUDA_SUCCESS`.
pub(crate) const SUCCESS: c_int = 0;
/// `CUDA_ERROR_NOT_READY`: what an event waits for is not done.
pub(crate) const NOT_READY: c_int = 600;

/// The functions that are called, one pointer each, in the driver's own words.
pub(crate) struct Driver {
    pub(crate) device_get: unsafe extern "C" fn(*mut CUdevice, c_int) -> c_int,
    pub(crate) primary_state: unsafe extern "C" fn(CUdevice, *mut c_uint, *mut c_int) -> c_int,
    pub(crate) primary_retain: unsafe extern "C" fn(*mut CUcontext, CUdevice) -> c_int,
    pub(crate) context_push: unsafe extern "C" fn(CUcontext) -> c_int,
    pub(crate) context_pop: unsafe extern "C" fn(*mut CUcontext) -> c_int,
    pub(crate) context_set: unsafe extern "C" fn(CUcontext) -> c_int,
    pub(crate) priorities: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    pub(crate) exchange_mode: unsafe extern "C" fn(*mut c_int) -> c_int,
    pub(crate) is_capturing: unsafe extern "C" fn(CUstream, *mut c_int) -> c_int,
    pub(crate) stream_create: unsafe extern "C" fn(*mut CUstream, c_uint, c_int) -> c_int,
    pub(crate) stream_synchronize: unsafe extern "C" fn(CUstream) -> c_int,
    pub(crate) stream_wait: unsafe extern "C" fn(CUstream, CUevent, c_uint) -> c_int,
    pub(crate) event_create: unsafe extern "C" fn(*mut CUevent, c_uint) -> c_int,
    pub(crate) event_record: unsafe extern "C" fn(CUevent, CUstream) -> c_int,
    pub(crate) event_query: unsafe extern "C" fn(CUevent) -> c_int,
    pub(crate) event_destroy: unsafe extern "C" fn(CUevent) -> c_int,
    pub(crate) to_host: unsafe extern "C" fn(*mut c_void, CUdeviceptr, usize, CUstream) -> c_int,
    pub(crate) register: unsafe extern "C" fn(*mut c_void, usize, c_uint) -> c_int,
    _library: Library,
}

impl Driver {
    /// The one of this process. It never loads one: whoever has a tensor on a device has a driver.
    pub(crate) fn loaded() -> Result<&'static Self, Error> {
        static FOUND: OnceLock<Driver> = OnceLock::new();
        match FOUND.get() {
            Some(driver) => Ok(driver),
            None => {
                let driver = Self::find()?;
                Ok(FOUND.get_or_init(|| driver))
            }
        }
    }

    fn find() -> Result<Self, Error> {
        // SAFETY: RTLD_NOLOAD loads nothing, so no initialiser of a library is run.
        let library = unsafe { Library::open(Some(NAME), libc::RTLD_NOLOAD | libc::RTLD_LAZY) };
        let library = library.map_err(|_| Error::NoDriver)?;
        /// # Safety
        /// `T` is the type of the function of that name.
        unsafe fn get<T: Copy>(library: &Library, symbol: &'static str) -> Result<T, Error> {
            // SAFETY: the caller's.
            unsafe { library.get::<T>(symbol) }.map(|f| *f).map_err(|_| Error::Symbol(symbol))
        }
        // SAFETY: each field has its function's type in cuda.h, where enums are ints; all are in every driver since CUDA
        // 10.1, and the library stays open as long as the pointers do.
        unsafe {
            Ok(Self {
                device_get: get(&library, "cuDeviceGet")?,
                primary_state: get(&library, "cuDevicePrimaryCtxGetState")?,
                primary_retain: get(&library, "cuDevicePrimaryCtxRetain")?,
                context_push: get(&library, "cuCtxPushCurrent_v2")?,
                context_pop: get(&library, "cuCtxPopCurrent_v2")?,
                context_set: get(&library, "cuCtxSetCurrent")?,
                priorities: get(&library, "cuCtxGetStreamPriorityRange")?,
                exchange_mode: get(&library, "cuThreadExchangeStreamCaptureMode")?,
                is_capturing: get(&library, "cuStreamIsCapturing")?,
                stream_create: get(&library, "cuStreamCreateWithPriority")?,
                stream_synchronize: get(&library, "cuStreamSynchronize")?,
                stream_wait: get(&library, "cuStreamWaitEvent")?,
                event_create: get(&library, "cuEventCreate")?,
                event_record: get(&library, "cuEventRecord")?,
                event_query: get(&library, "cuEventQuery")?,
                event_destroy: get(&library, "cuEventDestroy_v2")?,
                to_host: get(&library, "cuMemcpyDtoHAsync_v2")?,
                register: get(&library, "cuMemHostRegister_v2")?,
                _library: library,
            })
        }
    }
}

/// An error unless the code is success.
pub(crate) fn outcome(call: &'static str, code: c_int) -> Result<(), Error> {
    if code == SUCCESS { Ok(()) } else { Err(Error::Call { call, code }) }
}
