//! A folder as a JSON text describes it. What is tedious to hit by chance is right (checksums, the length of a shard's
//! header), so that what is changed in the text reaches the depths of a reader.
//!
//! ```text
//! {"run.json": {"json": {"format": 1, "world": 2}},
//!  "manifest.jsonl": [{"t": "sealed", "shard": "shard-00000", "len": 1048600}, "a line as it stands"],
//!  "shard-00000.safetensors": {"header": {"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}, "data": 24},
//!  "node-a/run.json": {"link": "../run.json"}}
//! ```
//!
//! | entry | file |
//! |---|---|
//! | a text | holds it |
//! | an array | a manifest: a text is a line as it stands, anything else a record under its right checksum |
//! | `json` | holds that value |
//! | `header`, `data`, `claim` | a shard with that header (`null`: zeros) and that many bytes of [`byte_at`]; `claim` is what it says of its header's length, by default the truth |
//! | `sparse` | so many zeros |
//! | `link`, `fifo`, `folder` | a symbolic link, a named pipe, a folder |
//!
//! Within values `{"$long": n}` is a text of n characters, `{"$deep": n}` so many arrays in one another, and
//! `{"$times": n, "of": value}` stands for n values in an array. A `crc` that a part's `at` lacks is filled in.

use std::{
    ffi::CString,
    fs::{self, File},
    io::{self, Write},
    os::unix::{ffi::OsStrExt, fs::symlink},
    path::{Component, Path},
};

use flexmodel_run::format::HEADER_SPACE;
use serde_json::Value;

/// The byte of a shard's data at an offset of its file: neighbours differ, so that it shows what lies where.
pub fn byte_at(offset: u64) -> u8 {
    (offset ^ offset >> 8) as u8
}

fn bytes_at(offset: u64, len: usize) -> Vec<u8> {
    (0..len.min(MAX_TEXT) as u64).map(|n| byte_at(offset.wrapping_add(n))).collect()
}

/// Most bytes that a text, or a shard's data, grows to.
const MAX_TEXT: usize = 2 << 20;
/// Most bytes of a file with a hole.
const MAX_SPARSE: u64 = 256 << 20;
/// Most entries of a tree.
const MAX_ENTRIES: usize = 64;

/// Makes the folder that `tree` describes in `root`. What cannot be made is left out.
pub fn lay_out(tree: &Value, root: &Path) -> io::Result<()> {
    for (name, entry) in tree.as_object().into_iter().flatten().take(MAX_ENTRIES) {
        let path = Path::new(name);
        let inside = path.components().all(|c| matches!(c, Component::Normal(_))) && path.components().count() <= 4;
        if !inside || name.is_empty() || name.contains('\0') {
            continue;
        }
        let path = root.join(path);
        let folders = path.ancestors().skip(1).take_while(|folder| *folder != root);
        // A link may lead out of here.
        if folders.into_iter().any(Path::is_symlink) || path.parent().is_none_or(|p| fs::create_dir_all(p).is_err()) {
            continue;
        }
        // Two names may be one, or a link be there.
        let _ = fs::remove_file(&path);
        let made = make(entry, &path);
        if made.is_err_and(|e| e.kind() == io::ErrorKind::StorageFull) {
            return Err(io::ErrorKind::StorageFull.into());
        }
    }
    Ok(())
}

fn make(entry: &Value, path: &Path) -> io::Result<()> {
    match entry {
        Value::String(text) => fs::write(path, text),
        Value::Array(lines) => fs::write(path, manifest(lines)),
        Value::Object(said) => {
            if let Some(value) = said.get("json") {
                return fs::write(path, json(value));
            }
            if let Some(to) = said.get("link").and_then(Value::as_str) {
                return symlink(to.replace('\0', ""), path);
            }
            if said.contains_key("fifo") {
                let path = CString::new(path.as_os_str().as_bytes())?;
                // SAFETY: a path that ends with a zero.
                return match unsafe { libc::mkfifo(path.as_ptr(), 0o600) } {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                };
            }
            if said.contains_key("folder") {
                return fs::create_dir_all(path);
            }
            if let Some(bytes) = said.get("sparse").and_then(Value::as_u64) {
                return File::create(path)?.set_len(bytes.min(MAX_SPARSE));
            }
            shard(entry, path)
        }
        _ => Ok(()),
    }
}

fn shard(said: &Value, path: &Path) -> io::Result<()> {
    let mut file = File::create(path)?;
    let space = HEADER_SPACE as usize - 8;
    if !said["header"].is_null() {
        let mut header = match &said["header"] {
            Value::String(text) => text.clone(),
            value => json(value),
        };
        while header.len() < space {
            header.push(' ');
        }
        let claim = said["claim"].as_u64().unwrap_or(header.len() as u64);
        file.write_all(&claim.to_le_bytes())?;
        file.write_all(header.as_bytes())?;
    } else {
        file.set_len(HEADER_SPACE)?;
        io::Seek::seek(&mut file, io::SeekFrom::End(0))?;
    }
    file.write_all(&bytes_at(HEADER_SPACE, said["data"].as_u64().unwrap_or(0) as usize))
}

fn manifest(lines: &[Value]) -> String {
    let mut out = String::new();
    each(lines, &mut |line| {
        if out.len() > MAX_TEXT {
            return false;
        }
        match line {
            Value::String(text) => out += text,
            _ => {
                let rec = json(&with_checksum(line));
                out += &format!("{{\"crc\":\"{:08x}\",\"rec\":{rec}}}\n", crc32c::crc32c(rec.as_bytes()));
            }
        }
        true
    });
    out
}

/// A part with the checksum of its bytes, where it does not say another.
fn with_checksum(line: &Value) -> Value {
    let mut line = line.clone();
    if let Some(at) = line.get_mut("at").and_then(Value::as_object_mut)
        && !at.contains_key("crc")
    {
        let number = |name: &str| at.get(name).and_then(Value::as_u64).unwrap_or(0);
        let crc = crc32c::crc32c(&bytes_at(number("offset"), number("len") as usize));
        at.insert("crc".into(), crc.into());
    }
    line
}

/// Calls `f` with each value, and with one so often as it says, as long as `f` wants more.
fn each(values: &[Value], f: &mut dyn FnMut(&Value) -> bool) {
    for value in values {
        let times = value.get("$times").and_then(Value::as_u64).unwrap_or(1).min(1 << 20);
        let value = if value.get("$times").is_some() { &value["of"] } else { value };
        for _ in 0..times {
            if !f(value) {
                return;
            }
        }
    }
}

/// The text of a value.
pub fn json(value: &Value) -> String {
    let mut out = String::new();
    write(value, &mut out);
    out
}

fn write(value: &Value, out: &mut String) {
    if out.len() > MAX_TEXT {
        out.push_str("null");
        return;
    }
    let count = |name: &str| value.get(name).and_then(Value::as_u64).map(|n| (n as usize).min(MAX_TEXT));
    if let Some(n) = count("$long") {
        out.push('"');
        out.extend(std::iter::repeat_n('x', n));
        out.push('"');
    } else if let Some(n) = count("$deep") {
        out.extend(std::iter::repeat_n('[', n).chain(std::iter::repeat_n(']', n)));
    } else if let Value::Array(values) = value {
        out.push('[');
        let mut first = true;
        each(values, &mut |value| {
            if !std::mem::take(&mut first) {
                out.push(',');
            }
            write(value, out);
            out.len() <= MAX_TEXT
        });
        out.push(']');
    } else if let Value::Object(map) = value {
        out.push('{');
        for (n, (name, value)) in map.iter().enumerate() {
            out.push_str(if n > 0 { "," } else { "" });
            out.push_str(&Value::String(name.clone()).to_string());
            out.push(':');
            write(value, out);
        }
        out.push('}');
    } else {
        out.push_str(&value.to_string());
    }
}
