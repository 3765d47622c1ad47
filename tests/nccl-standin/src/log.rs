//! What was wrong: lines in a file, and NCCL's last warning.

use std::{
    ffi::{CString, c_char, c_int},
    fs::OpenOptions,
    io::Write,
    sync::Mutex,
};

static LAST: Mutex<&'static std::ffi::CStr> = Mutex::new(c"");

/// Writes down what should not have been done. The rank is the communicator's, or else the process's.
pub fn violation(rank: Option<usize>, text: &str) {
    line(rank, "violation", text);
    set_last(text);
}

/// A violation that makes the call return `code`.
pub fn refuse(rank: Option<usize>, code: c_int, text: &str) -> c_int {
    violation(rank, text);
    code
}

/// Writes down what is no fault.
pub fn note(rank: usize, text: &str) {
    line(Some(rank), "note", text);
}

/// Writes down a transfer.
pub fn trace(rank: usize, text: &str) {
    line(Some(rank), "trace", text);
}

fn line(rank: Option<usize>, kind: &str, text: &str) {
    let rank = rank.map(|r| r.to_string()).or_else(|| std::env::var("RANK").ok());
    let line = format!("rank {}: {kind}: {text}\n", rank.as_deref().unwrap_or("?"));
    let Some(path) = std::env::var_os(crate::LOG) else {
        if kind == "violation" {
            eprint!("nccl-standin: {line}");
        }
        return;
    };
    // One write at the end of the file: lines of several processes do not mix.
    let written =
        OpenOptions::new().append(true).create(true).open(&path).and_then(|mut f| f.write_all(line.as_bytes()));
    if let Err(e) = written {
        eprint!("nccl-standin: {}: {e}; it was {line}", path.display());
    }
}

/// Becomes what `ncclGetLastError` says. Texts are few, and kept for ever, because that function gives them out.
pub fn set_last(text: &str) {
    if let (Ok(text), Ok(mut last)) = (CString::new(text), LAST.lock()) {
        *last = Box::leak(text.into_boxed_c_str());
    }
}

/// For `ncclGetLastError`.
pub fn last() -> *const c_char {
    LAST.lock().map_or(c"".as_ptr(), |last| last.as_ptr())
}
