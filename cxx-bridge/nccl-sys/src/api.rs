//! The C functions, looked up in the library that is there.

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    fmt,
    sync::Arc,
};

use libloading::os::unix::Library;

use crate::{Error, Failure, UniqueId};

/// `ncclComm_t`.
pub(crate) type RawComm = *mut c_void;

/// `ncclSuccess`.
pub(crate) const SUCCESS: c_int = 0;
/// `ncclInProgress`: a call of a non-blocking communicator goes on in a thread of NCCL's.
pub(crate) const IN_PROGRESS: c_int = 7;
/// `ncclUint8`.
pub(crate) const UINT8: c_int = 1;

/// `ncclConfig_t` as it was in NCCL 2.14, its first version.
///
/// A later NCCL takes it as it is: it copies `size` bytes over its own defaults, so fields past them keep these; then
/// it resets each field that is newer than `version`, so the padding behind `blocking`, which lies where 2.17 put
/// `cgaClusterSize`, is not read. An older `size` and `version` thus say the same to every NCCL, and a newer layout
/// would say nothing that is needed here.
#[repr(C)]
pub(crate) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
}

impl Config {
    /// Calls return at once, and `ncclCommGetAsyncError` tells how they went.
    pub(crate) fn non_blocking() -> Self {
        // NCCL_VERSION(2, 14, 0)
        Self { size: size_of::<Self>(), magic: 0xcafe_beef, version: 21_400, blocking: 0 }
    }
}

/// One pointer for each function that is called.
pub(crate) struct Api {
    pub(crate) get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    pub(crate) get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    pub(crate) comm_init_rank_config: unsafe extern "C" fn(*mut RawComm, c_int, UniqueId, c_int, *mut Config) -> c_int,
    pub(crate) comm_get_async_error: unsafe extern "C" fn(RawComm, *mut c_int) -> c_int,
    pub(crate) comm_finalize: unsafe extern "C" fn(RawComm) -> c_int,
    pub(crate) comm_destroy: unsafe extern "C" fn(RawComm) -> c_int,
    pub(crate) comm_abort: unsafe extern "C" fn(RawComm) -> c_int,
    pub(crate) group_start: unsafe extern "C" fn() -> c_int,
    pub(crate) group_end: unsafe extern "C" fn() -> c_int,
    pub(crate) send: unsafe extern "C" fn(*const c_void, usize, c_int, c_int, RawComm, *mut c_void) -> c_int,
    pub(crate) recv: unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, RawComm, *mut c_void) -> c_int,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    get_last_error: Option<unsafe extern "C" fn(RawComm) -> *const c_char>,
    _library: Library,
}

impl Api {
    fn find(name: &str) -> Result<Self, Error> {
        // SAFETY: RTLD_NOLOAD loads nothing, so no initialiser of a library is run.
        let library = unsafe { Library::open(Some(name), libc::RTLD_NOLOAD | libc::RTLD_LAZY) }.map_err(|e| {
            // The linker gives no reason where there is nothing to open; libloading says so in many words.
            let reason = match e {
                libloading::Error::DlOpen { source } => source.to_string(),
                _ => "it is not among this process's libraries".into(),
            };
            Error::NotLoaded { name: name.into(), reason }
        })?;
        /// # Safety
        /// `T` is the type of the function of that name.
        unsafe fn get<T: Copy>(library: &Library, name: &str, symbol: &'static str) -> Result<T, Error> {
            // SAFETY: the caller's.
            let found = unsafe { library.get::<T>(symbol) };
            found.map(|f| *f).map_err(|_| Error::Symbol { name: name.into(), symbol })
        }
        // SAFETY: each field has its function's type in nccl.h, where they are the same from 2.14 to 2.30, and the
        // library stays open as long as the pointers do.
        unsafe {
            Ok(Self {
                get_version: get(&library, name, "ncclGetVersion")?,
                get_unique_id: get(&library, name, "ncclGetUniqueId")?,
                comm_init_rank_config: get(&library, name, "ncclCommInitRankConfig")?,
                comm_get_async_error: get(&library, name, "ncclCommGetAsyncError")?,
                comm_finalize: get(&library, name, "ncclCommFinalize")?,
                comm_destroy: get(&library, name, "ncclCommDestroy")?,
                comm_abort: get(&library, name, "ncclCommAbort")?,
                group_start: get(&library, name, "ncclGroupStart")?,
                group_end: get(&library, name, "ncclGroupEnd")?,
                send: get(&library, name, "ncclSend")?,
                recv: get(&library, name, "ncclRecv")?,
                get_error_string: get(&library, name, "ncclGetErrorString")?,
                get_last_error: get(&library, name, "ncclGetLastError").ok(),
                _library: library,
            })
        }
    }

    /// An error unless the code is success, or says that it goes on.
    pub(crate) fn outcome(&self, call: &'static str, code: c_int) -> Result<(), Error> {
        match code {
            SUCCESS | IN_PROGRESS => Ok(()),
            _ => Err(Error::Call { call, failure: self.failure(code) }),
        }
    }

    /// What NCCL says about a code.
    pub(crate) fn failure(&self, code: c_int) -> Failure {
        // SAFETY: takes any code.
        let text = text(unsafe { (self.get_error_string)(code) });
        // SAFETY: the communicator is not looked at, and null is its documented stand-in.
        let last = self.get_last_error.map(|f| unsafe { f(std::ptr::null_mut()) });
        Failure { code, text, last: last.map(self::text).unwrap_or_default() }
    }
}

/// An error where a variable of the job's says that our calls would harm its own.
fn harmless(variable: impl Fn(&str) -> Option<String>) -> Result<(), Error> {
    let refuse = |setting, harm| Err(Error::Environment { setting, harm });
    if variable("NCCL_COMM_ID").is_some() {
        // It gives all communicators one meeting place.
        return refuse("NCCL_COMM_ID is set", "which lets communicators of FlexModel's meet the job's");
    }
    let is = |name: &str, value: fn(&str) -> bool| variable(name).is_some_and(|text| value(text.trim()));
    if is("NCCL_LAUNCH_ORDER_IMPLICIT", |text| !matches!(text, "" | "0")) {
        // Whichever of two threads launches on a device while the other does gets ncclInvalidUsage.
        return refuse("NCCL_LAUNCH_ORDER_IMPLICIT is set", "with which NCCL may fail a call of the job's beside ours");
    }
    if is("CUDA_DEVICE_MAX_CONNECTIONS", |text| text == "1") {
        // All streams share one queue to the device.
        let harm = "with which the job's kernels wait behind transfers of ours, and so for other ranks";
        return refuse("CUDA_DEVICE_MAX_CONNECTIONS is 1", harm);
    }
    Ok(())
}

fn text(from: *const c_char) -> String {
    if from.is_null() {
        return String::new();
    }
    // SAFETY: both functions give texts that are never freed and always end: literals, and a buffer whose last byte
    // stays zero while other threads write it anew.
    unsafe { CStr::from_ptr(from) }.to_string_lossy().into_owned()
}

/// The NCCL of this process.
#[derive(Clone)]
pub struct Nccl {
    api: Arc<Api>,
    version: Version,
}

/// `MAJOR.MINOR.PATCH`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// The first number.
    pub major: u32,
    /// The second.
    pub minor: u32,
    /// The third.
    pub patch: u32,
}

impl Nccl {
    /// The `libnccl.so.2` that is loaded. It never loads one.
    pub fn loaded() -> Result<Self, Error> {
        Self::loaded_as("libnccl.so.2")
    }

    /// A loaded library by another name or path: a stand-in beside the real one, in tests.
    pub fn loaded_as(name: &str) -> Result<Self, Error> {
        harmless(|name| std::env::var(name).ok())?;
        let api = Api::find(name)?;
        let mut code = 0;
        // SAFETY: writes one int.
        api.outcome("ncclGetVersion", unsafe { (api.get_version)(&mut code) })?;
        let code = code.unsigned_abs();
        let version = Version { major: code / 10_000, minor: code / 100 % 100, patch: code % 100 };
        Ok(Self { api: Arc::new(api), version })
    }

    /// Its version.
    pub fn version(&self) -> Version {
        self.version
    }

    pub(crate) fn api(&self) -> &Arc<Api> {
        &self.api
    }
}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nccl({})", self.version)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_harm_the_job_is_refused_by_name() {
        let said = |name: &str, value: &str| {
            harmless(|asked| (asked == name).then(|| value.to_owned())).map_err(|why| why.to_string())
        };
        assert_eq!(said("PATH", "1"), Ok(()));
        for harmless in [("NCCL_LAUNCH_ORDER_IMPLICIT", "0"), ("CUDA_DEVICE_MAX_CONNECTIONS", "8")] {
            assert_eq!(said(harmless.0, harmless.1), Ok(()), "{harmless:?}");
        }
        for (name, value) in
            [("NCCL_COMM_ID", ""), ("NCCL_LAUNCH_ORDER_IMPLICIT", "1"), ("CUDA_DEVICE_MAX_CONNECTIONS", "1")]
        {
            let why = said(name, value).unwrap_err();
            assert!(why.starts_with(name) && why.ends_with(": unset it, or use assemble=agent"), "{why}");
        }
    }
}
