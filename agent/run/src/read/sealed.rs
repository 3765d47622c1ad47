//! Sealed shards, checked as any safetensors reader sees them, and against the manifest.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    io::{Read, Seek},
    path::Path,
};

use serde::Deserialize;

use super::{Problem, Run};
use crate::{
    files::open_to_read,
    format::{FILLER, HEADER_SPACE, Location},
    limits::PROBLEMS,
    text::clip,
};

/// One entry of a safetensors header.
#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// Checks every sealed shard of a run.
pub fn check(run: &Run, problems: &mut Vec<Problem>) {
    let sealed: HashMap<&str, u64> = run.sealed.iter().map(|(stem, len)| (stem.as_str(), *len)).collect();
    let mut stems: BTreeSet<&str> = sealed.keys().copied().collect();
    let files = file_stems(&run.path);
    stems.extend(files.iter().map(String::as_str));
    let mut parts: BTreeMap<&str, Vec<&Location>> = BTreeMap::new();
    let all = run.records.iter().flat_map(|r| &r.parts);
    for at in all.filter_map(|p| p.at.as_ref()) {
        parts.entry(&at.shard).or_default().push(at);
    }
    let mut bad = 0;
    for stem in stems {
        let said = sealed.get(stem).copied();
        let here = parts.get(stem).map_or(&[][..], Vec::as_slice);
        if let Err(what) = check_one(&run.path, stem, said, here) {
            problems.push(Problem::new(format!("{}.safetensors", clip(stem)), clip(&what)));
            bad += 1;
        }
        if bad == PROBLEMS {
            problems.push(Problem::new("shards", "others were not looked at"));
            return;
        }
    }
}

fn file_stems(path: &Path) -> BTreeSet<String> {
    let stem = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        Some(name.strip_suffix(".safetensors")?.to_owned())
    };
    fs::read_dir(path).into_iter().flatten().flatten().filter_map(stem).collect()
}

fn check_one(path: &Path, stem: &str, said: Option<u64>, parts: &[&Location]) -> Result<(), String> {
    if stem.is_empty() || stem.contains(['/', '\0']) {
        return Err("the manifest seals a shard with a name that cannot be one".into());
    }
    let file = path.join(format!("{stem}.safetensors"));
    let mut open = open_to_read(&file).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => "missing, though the manifest says that it was sealed".into(),
        _ => e.to_string(),
    })?;
    let len = open.metadata().map_err(|e| e.to_string())?.len();
    if let Some(said) = said.filter(|&said| said != len) {
        return Err(format!("{len} bytes long, and not {said} as when it was sealed"));
    }
    let (start, header) = header(&mut open, len)?;
    let mut at = 0u64;
    let mut starts = BTreeMap::new();
    for (name, entry) in in_order(&header) {
        let (from, to) = entry.data_offsets;
        if to > len - start {
            return Err(format!("its header speaks of byte {to}, and it has {} of tensors", len - start));
        }
        if from != at || to < from {
            return Err(format!("its header leaves a hole or an overlap before {name} (byte {from} after {at})"));
        }
        let elements = entry.shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
        let size = dtype_bits(&entry.dtype).and_then(|bits| elements?.checked_mul(bits)).map(|bits| bits / 8);
        if size != Some(to - from) {
            return Err(format!("its header gives {name} {} bytes for {} {:?}", to - from, entry.dtype, entry.shape));
        }
        if !name.starts_with(FILLER) && to > from {
            starts.insert(start + from, start + to);
        }
        at = to;
    }
    if start + at != len {
        return Err(format!("its header speaks of {} bytes and it has {len}", start + at));
    }
    // Where the names did not fit, one filler covers all: our readers go by the manifest.
    let nameless = header.len() == 1 && header.keys().all(|name| name.starts_with(FILLER));
    for part in parts.iter().filter(|p| p.len > 0 && !nameless) {
        // Parts of one whole lie side by side within one entry.
        let holder =
            starts.range(..=part.offset).next_back().filter(|(_, end)| **end >= part.offset.saturating_add(part.len));
        if holder.is_none() {
            return Err(format!("no tensor of its header holds bytes {}+{} of the manifest", part.offset, part.len));
        }
    }
    Ok(())
}

/// Where the data starts, and the entries.
fn header(open: &mut fs::File, len: u64) -> Result<(u64, BTreeMap<String, Entry>), String> {
    let mut prefix = [0u8; 8];
    open.rewind().and_then(|()| open.read_exact(&mut prefix)).map_err(|_| "shorter than a header".to_owned())?;
    let header_len = u64::from_le_bytes(prefix);
    if header_len > len.saturating_sub(8) {
        return Err(format!("its header claims {header_len} bytes of the file's {len}"));
    }
    // Ours are all of one length: no other is read.
    if header_len + 8 != HEADER_SPACE {
        return Err(format!("its data starts at byte {}, not at {HEADER_SPACE}", header_len + 8));
    }
    let mut bytes = vec![0u8; header_len as usize];
    open.read_exact(&mut bytes).map_err(|e| e.to_string())?;
    let values: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(&bytes).map_err(|e| format!("its header is not JSON ({e})"))?;
    let mut entries = BTreeMap::new();
    for (name, value) in values.into_iter().filter(|(name, _)| name != "__metadata__") {
        let entry =
            serde_json::from_value(value).map_err(|e| format!("its header's entry {name} does not read ({e})"))?;
        entries.insert(name, entry);
    }
    Ok((header_len + 8, entries))
}

fn in_order(header: &BTreeMap<String, Entry>) -> Vec<(&String, &Entry)> {
    let mut entries: Vec<_> = header.iter().collect();
    entries.sort_by_key(|(_, e)| e.data_offsets);
    entries
}

/// Bits of a safetensors element.
fn dtype_bits(name: &str) -> Option<u64> {
    Some(match name {
        "C64" | "F64" | "I64" | "U64" => 64,
        "F32" | "I32" | "U32" => 32,
        "F16" | "BF16" | "I16" | "U16" => 16,
        "F8_E4M3" | "F8_E5M2" | "F8_E8M0" | "I8" | "U8" | "BOOL" => 8,
        _ => return None,
    })
}
