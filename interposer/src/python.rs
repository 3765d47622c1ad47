//! The few functions of the Python C API we call. They are found by name in the running interpreter: this library
//! links none, since it is loaded into processes that have no Python.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_long, c_void},
    mem::transmute_copy,
};

/// A `PyObject*`.
pub type Object = *mut c_void;

/// `Py_file_input`.
const FILE_INPUT: c_int = 257;

/// Reads a function out of the interpreter.
fn find<F: Copy>(name: &CStr) -> Result<F, String> {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    // SAFETY: a NUL-terminated name.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    if found.is_null() {
        return Err(format!("this Python has no {}", name.to_string_lossy()));
    }
    // SAFETY: F is a function pointer type of the size of a pointer, checked above; callers name the type that
    // Python's stable documentation gives for `name`.
    Ok(unsafe { transmute_copy(&found) })
}

/// Asks for `callback` to run in the main thread as soon as the interpreter can.
pub fn add_pending_call(callback: extern "C" fn(*mut c_void) -> c_int) -> Result<(), String> {
    type Add = unsafe extern "C" fn(extern "C" fn(*mut c_void) -> c_int, *mut c_void) -> c_int;
    let add: Add = find(c"Py_AddPendingCall")?;
    // SAFETY: the callback is a static function; Py_AddPendingCall needs no GIL.
    match unsafe { add(callback, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err("Python's queue of pending calls is full".into()),
    }
}

/// Runs `source` with these string variables, and `object` as `bridge`. The GIL must be held. On an error the
/// Python exception is cleared and becomes the message.
pub fn run(source: &CStr, strings: &[(&CStr, &str)], objects: &[(&CStr, Object)]) -> Result<(), String> {
    let dict_new: unsafe extern "C" fn() -> Object = find(c"PyDict_New")?;
    let dict_set: unsafe extern "C" fn(Object, *const c_char, Object) -> c_int = find(c"PyDict_SetItemString")?;
    let dict_get: unsafe extern "C" fn(Object, *const c_char) -> Object = find(c"PyDict_GetItemString")?;
    let string: unsafe extern "C" fn(*const c_char) -> Object = find(c"PyUnicode_FromString")?;
    let utf8: unsafe extern "C" fn(Object) -> *const c_char = find(c"PyUnicode_AsUTF8")?;
    let builtins: unsafe extern "C" fn() -> Object = find(c"PyEval_GetBuiltins")?;
    let run: unsafe extern "C" fn(*const c_char, c_int, Object, Object) -> Object = find(c"PyRun_String")?;
    let clear: unsafe extern "C" fn() = find(c"PyErr_Clear")?;
    let decref: unsafe extern "C" fn(Object) = find(c"Py_DecRef")?;
    // SAFETY: the GIL is held (caller); every object is checked before it is used, and released once.
    unsafe {
        let globals = dict_new();
        if globals.is_null() {
            clear();
            return Err("out of memory in Python".into());
        }
        dict_set(globals, c"__builtins__".as_ptr(), builtins());
        for (name, value) in strings {
            let value = CString::new(*value).map_err(|_| "a NUL in a string for Python".to_owned())?;
            let value = string(value.as_ptr());
            if value.is_null() {
                clear();
                continue;
            }
            dict_set(globals, name.as_ptr(), value);
            decref(value);
        }
        for (name, value) in objects {
            dict_set(globals, name.as_ptr(), *value);
        }
        let result = run(source.as_ptr(), FILE_INPUT, globals, globals);
        let outcome = if result.is_null() {
            clear();
            Err("Python refused the bootstrap".to_owned())
        } else {
            decref(result);
            // The bootstrap catches its own exceptions and leaves a sentence.
            let error = dict_get(globals, c"error".as_ptr());
            let text = if error.is_null() { std::ptr::null() } else { utf8(error) };
            if text.is_null() {
                clear();
                Ok(())
            } else {
                Err(CStr::from_ptr(text).to_string_lossy().into_owned())
            }
        };
        decref(globals);
        outcome
    }
}

/// `object`'s reference is given back. The GIL must be held.
pub fn decref(object: Object) {
    if let Ok(decref) = find::<unsafe extern "C" fn(Object)>(c"Py_DecRef") {
        // SAFETY: the GIL is held and the reference is ours (caller).
        unsafe { decref(object) };
    }
}

/// A string attribute along a dotted path that starts at a module which is already imported, such as
/// `torch.version`, `__version__`. `None` where anything is missing or not a string. The GIL must be held.
pub fn imported_string(module: &CStr, attribute: &CStr) -> Option<String> {
    let get_module: unsafe extern "C" fn() -> Object = find(c"PyImport_GetModuleDict").ok()?;
    let dict_get: unsafe extern "C" fn(Object, *const c_char) -> Object = find(c"PyDict_GetItemString").ok()?;
    let getattr: unsafe extern "C" fn(Object, *const c_char) -> Object = find(c"PyObject_GetAttrString").ok()?;
    let utf8: unsafe extern "C" fn(Object) -> *const c_char = find(c"PyUnicode_AsUTF8").ok()?;
    let clear: unsafe extern "C" fn() = find(c"PyErr_Clear").ok()?;
    // SAFETY: the GIL is held (caller); borrowed references are used at once, the new one is released.
    unsafe {
        let module = dict_get(get_module(), module.as_ptr());
        if module.is_null() {
            return None;
        }
        let value = getattr(module, attribute.as_ptr());
        if value.is_null() {
            clear();
            return None;
        }
        let text = utf8(value);
        let out = if text.is_null() {
            clear();
            None
        } else {
            Some(CStr::from_ptr(text).to_string_lossy().into_owned())
        };
        decref(value);
        out
    }
}

/// What the interpreter says it is, such as `3.11.7 (main, ...) [GCC ...]`.
pub fn version() -> Option<&'static str> {
    let get: unsafe extern "C" fn() -> *const c_char = find(c"Py_GetVersion").ok()?;
    // SAFETY: returns a static string.
    unsafe { CStr::from_ptr(get()) }.to_str().ok()
}

const _: () = assert!(size_of::<c_long>() == 8);
