//! The C library, as far as it is called.
//!
//! A reference without more would take the newest version of a function that the machine of the build has, and an
//! object that names a version which a process's C library lacks keeps that process from starting. So whatever was
//! ever versioned anew is named with the version that glibc on x86-64 began with. musl knows no versions.

use core::{
    ffi::{CStr, c_char, c_int, c_long, c_void},
    mem::{MaybeUninit, transmute},
    ptr::{null, null_mut},
};

/// `RTLD_NOW`.
pub const RTLD_NOW: c_int = 2;
/// `RTLD_NEXT`.
pub const RTLD_NEXT: *mut c_void = -1isize as *mut c_void;
/// Longest path, with its NUL.
pub const PATH_MAX: usize = 4096;
/// `SYS_fstat`: the function of that name has a version that is too new.
const SYS_FSTAT: c_long = 5;

/// `Dl_info`.
#[repr(C)]
struct DlInfo {
    file: *const c_char,
    rest: [*const c_void; 3],
}

/// `struct stat`.
#[repr(C)]
pub struct Stat {
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
    rest: [u64; 16],
}

#[link(name = "c")]
unsafe extern "C" {
    #[cfg(not(panic = "unwind"))]
    pub fn abort() -> !;
    pub fn getenv(name: *const c_char) -> *const c_char;
    pub fn getpid() -> c_int;
    pub fn strcmp(a: *const c_char, b: *const c_char) -> c_int;
    pub fn strstr(text: *const c_char, part: *const c_char) -> *const c_char;
    pub fn strrchr(text: *const c_char, byte: c_int) -> *const c_char;
    pub fn snprintf(to: *mut c_char, len: usize, format: *const c_char, ...) -> c_int;
    pub fn write(fd: c_int, bytes: *const c_void, len: usize) -> isize;
    #[link_name = "realpath@GLIBC_2.2.5"]
    pub fn realpath(path: *const c_char, to: *mut c_char) -> *mut c_char;
    pub fn __errno_location() -> *mut c_int;
    fn syscall(number: c_long, ...) -> c_long;
}

/// Type of `dlsym`.
type Dlsym = unsafe extern "C" fn(*mut c_void, *const c_char) -> *mut c_void;

/// The address of `dlsym`, or null.
#[unsafe(naked)]
extern "C" fn dlsym_address() -> *const c_void {
    // Weak: before glibc 2.34 it is in libdl, which a process that never calls dlopen need not have.
    core::arch::naked_asm!(
        ".symver flexmodel_dlsym, dlsym@GLIBC_2.2.5",
        ".weak flexmodel_dlsym",
        "mov rax, qword ptr [rip + flexmodel_dlsym@GOTPCREL]",
        "ret",
    )
}

/// What `dlsym(3)` finds; null also where the process has no `dlsym`.
pub fn dlsym(handle: *mut c_void, name: &CStr) -> *mut c_void {
    // SAFETY: a function pointer that may be null is an Option; the type is that of dlsym(3).
    let dlsym: Option<Dlsym> = unsafe { transmute(dlsym_address()) };
    // SAFETY: a handle of dlopen's or a constant, and a NUL-terminated name.
    dlsym.map_or(null_mut(), |dlsym| unsafe { dlsym(handle, name.as_ptr()) })
}

/// Path of the object that `address` lies in, as the loader was given it.
pub fn object_of(address: *const c_void) -> Option<&'static CStr> {
    type Dladdr = unsafe extern "C" fn(*const c_void, *mut DlInfo) -> c_int;
    // SAFETY: a function pointer that may be null is an Option; the type is that of dladdr(3).
    let dladdr: Dladdr = unsafe { transmute::<*mut c_void, Option<Dladdr>>(dlsym(null_mut(), c"dladdr")) }?;
    let mut info = DlInfo { file: null(), rest: [null(); 3] };
    // SAFETY: the struct is valid for the call.
    if unsafe { dladdr(address, &mut info) } == 0 || info.file.is_null() {
        return None;
    }
    // SAFETY: a NUL-terminated string that lives as long as the object.
    Some(unsafe { CStr::from_ptr(info.file) })
}

/// The device and inode of the file that a descriptor is, if it is open.
pub fn identity(fd: c_int) -> Option<(u64, u64)> {
    let mut stat = MaybeUninit::<Stat>::uninit();
    // SAFETY: the buffer has the size of the kernel's struct stat on x86-64, 144 bytes.
    if unsafe { syscall(SYS_FSTAT, c_long::from(fd), stat.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: fstat filled it.
    let stat = unsafe { stat.assume_init_ref() };
    Some((stat.device, stat.inode))
}

const _: () = assert!(size_of::<Stat>() == 144);
