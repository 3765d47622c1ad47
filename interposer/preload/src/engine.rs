//! Loads the engine. Where that fails, one line on stderr says why, and the job runs untapped.

use core::{
    ffi::{CStr, c_char, c_int, c_void},
    mem::{MaybeUninit, transmute},
    ptr::{null, null_mut},
};

use crate::{
    dlopen, libc, start,
    wire::{ENGINE, Preload, START_SYMBOL, Start},
};

/// A buffer for one path or one line.
type Buffer = MaybeUninit<[c_char; libc::PATH_MAX]>;

/// Called from `dlopen`, possibly often; acts once.
pub fn torch_is_loading() {
    let Some(seen) = start::take() else { return };
    // SAFETY: errno is a thread-local integer. The job's dlopen finds it as it was.
    unsafe {
        let errno = *libc::__errno_location();
        load(seen);
        *libc::__errno_location() = errno;
    }
}

fn load(seen: &Preload) {
    let Some(own) = libc::object_of(torch_is_loading as *const c_void) else {
        return say(seen, c"the loader does not know where libflexmodel.so is", c"");
    };
    let dlerror = libc::dlsym(null_mut(), c"dlerror");
    let mut resolved = Buffer::uninit();
    // SAFETY: a NUL-terminated path, and a buffer of PATH_MAX bytes.
    let resolved = unsafe { libc::realpath(own.as_ptr(), resolved.as_mut_ptr().cast()) };
    // Beside the path that was preloaded, which the loader takes as it is; that may be a link to the file alone.
    let mut engine = open_beside(own.as_ptr());
    if engine.is_null() && !resolved.is_null() {
        engine = open_beside(resolved);
    }
    if engine.is_null() {
        return say(seen, last_error(dlerror), c"; run scripts/setup");
    }
    let start = libc::dlsym(engine, START_SYMBOL);
    // SAFETY: a function pointer that may be null is an Option; the symbol has that type.
    let start: Option<Start> = unsafe { transmute(start) };
    // SAFETY: the engine reads `seen`, which is static, and starts nothing if it is of another version.
    if !start.is_some_and(|start| unsafe { start(seen) }) {
        say(seen, ENGINE, c" is of another version than libflexmodel.so; run scripts/setup");
    }
}

/// Opens the engine in the folder of `file`.
fn open_beside(file: *const c_char) -> *mut c_void {
    let mut path = Buffer::uninit();
    let to: *mut c_char = path.as_mut_ptr().cast();
    // SAFETY: NUL-terminated strings; snprintf writes no more than PATH_MAX bytes with the NUL. `%.*s` is given the
    // length of what it prints.
    unsafe {
        let end = libc::strrchr(file, c_int::from(b'/'));
        let folder = if end.is_null() { 0 } else { end.offset_from(file) + 1 };
        let len = libc::snprintf(to, libc::PATH_MAX, c"%.*s%s".as_ptr(), folder as c_int, file, ENGINE.as_ptr());
        if len < 0 || len as usize >= libc::PATH_MAX {
            return null_mut();
        }
        let real: unsafe extern "C" fn(*const c_char, c_int) -> *mut c_void = transmute(dlopen::real());
        real(to, libc::RTLD_NOW)
    }
}

/// What the loader says about its last failure. `dlerror` was looked up before: a lookup that succeeds clears it.
fn last_error(dlerror: *mut c_void) -> &'static CStr {
    // SAFETY: a function pointer that may be null is an Option; the type is that of dlerror(3).
    let dlerror: Option<unsafe extern "C" fn() -> *const c_char> = unsafe { transmute(dlerror) };
    // SAFETY: dlerror takes nothing.
    let text = dlerror.map_or(null(), |dlerror| unsafe { dlerror() });
    // SAFETY: a NUL-terminated string that stays until this thread's next call of the loader.
    if text.is_null() { ENGINE } else { unsafe { CStr::from_ptr(text) } }
}

/// One line, if descriptor 2 still is what it was when we were loaded.
fn say(seen: &Preload, why: &CStr, more: &CStr) {
    if seen.has_stderr == 0 || libc::identity(2) != Some((seen.stderr_device, seen.stderr_inode)) {
        return;
    }
    let mut line = Buffer::uninit();
    let to: *mut c_char = line.as_mut_ptr().cast();
    let form = c"flexmodel: taps are off in this process: %s%s\n";
    // SAFETY: NUL-terminated strings; snprintf writes no more than PATH_MAX bytes, and says how many it would.
    unsafe {
        let len = libc::snprintf(to, libc::PATH_MAX, form.as_ptr(), why.as_ptr(), more.as_ptr());
        if len > 0 {
            let len = (len as usize).min(libc::PATH_MAX - 1);
            // Also a line that was cut is one.
            to.add(len - 1).write(b'\n' as c_char);
            // A failed write is no concern of the job's.
            libc::write(2, to.cast(), len);
        }
    }
}
