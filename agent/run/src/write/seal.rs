//! Turning a written shard into a safetensors file: header, fsync, rename.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt::Write as _,
    fs, io,
    path::Path,
    sync::Arc,
};

use super::shard::{Entry, Lie, ShardFile, open_path, sealed_path};
use crate::{
    format::{FILLER, FORMAT, HEADER_SPACE},
    unique::Unique,
};

/// Bytes that an entry's dtype, shape and offsets take at least.
const SHORTEST: usize = 50;

/// A named range of the sealed file.
#[derive(Debug)]
struct Named {
    name: String,
    dtype: wire::dtype::DType,
    shape: Vec<u64>,
    offset: u64,
    len: u64,
}

/// Seals a shard and returns its length. `are_one` tells whether parts are known to be of one pass: only then pieces side by
/// side become one. After an error the `.open` file still holds every byte.
pub fn seal(dir: &Path, file: &ShardFile, entries: &[Entry], are_one: impl Fn(&[&Entry]) -> bool) -> io::Result<u64> {
    let end = entries.iter().map(|e| e.offset + e.len).max().unwrap_or(HEADER_SPACE);
    file.file().set_len(end)?;
    file.write_at(&header(entries, end, are_one), 0)?;
    file.file().sync_all()?;
    fs::rename(open_path(dir, file.number), sealed_path(dir, file.number))?;
    sync_dir(dir)?;
    Ok(end)
}

/// Makes renames in `dir` last.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    fs::File::open(dir)?.sync_all()
}

/// Exactly [`HEADER_SPACE`] bytes. If the names do not fit, one filler entry covers everything: our own readers go by
/// the manifest.
fn header(entries: &[Entry], end: u64, are_one: impl Fn(&[&Entry]) -> bool) -> Vec<u8> {
    let space = HEADER_SPACE as usize - 8;
    // The shortest entry alone is longer than this: a file of so many is not spelled out in vain.
    let few = entries.len() <= space / SHORTEST;
    let mut json = if few { render(&named(entries, are_one), end) } else { String::new() };
    if !few || json.len() > space {
        json = render(&[], end);
    }
    let mut out = Vec::with_capacity(HEADER_SPACE as usize);
    out.extend_from_slice(&(space as u64).to_le_bytes());
    out.extend_from_slice(json.as_bytes());
    out.resize(HEADER_SPACE as usize, b' ');
    out
}

/// The ranges in file order. Pieces side by side in rank order become one.
fn named(entries: &[Entry], are_one: impl Fn(&[&Entry]) -> bool) -> Vec<Named> {
    let mut groups: Vec<(&Arc<str>, Vec<&Entry>)> = Vec::new();
    let mut by_name: HashMap<&str, usize> = HashMap::new();
    for entry in entries {
        let at = *by_name.entry(&entry.name).or_insert_with(|| {
            groups.push((&entry.name, Vec::new()));
            groups.len() - 1
        });
        groups[at].1.push(entry);
    }
    let mut names = Unique::default();
    let mut out = Vec::with_capacity(groups.len());
    let mut push = |name: String, entry: &Entry, shape: Vec<u64>, len: u64| {
        // The same part twice (a job that was started again): names must differ.
        out.push(Named { name: names.name(name), dtype: entry.dtype, shape, offset: entry.offset, len });
    };
    for (name, mut parts) in groups {
        parts.sort_by_key(|e| (e.offset, e.len, piece_index(e)));
        if let Some((first, shape, len)) = joined(&parts).filter(|_| are_one(&parts)) {
            push(name.to_string(), first, shape, len);
            continue;
        }
        let whole = whole_of(&parts).filter(|_| are_one(&parts));
        for (n, part) in parts.iter().enumerate() {
            let name = if whole == Some(n) { name.to_string() } else { format!("{name}#rank{}", part.rank) };
            push(name, part, part.shape.clone(), part.len);
        }
    }
    out.sort_by_key(|n| (n.offset, n.offset + n.len));
    out
}

/// The one range that all pieces of a record make, if they do: its first part, shape and length.
fn joined<'a>(parts: &[&'a Entry]) -> Option<(&'a Entry, Vec<u64>, u64)> {
    let first = *parts.first()?;
    let mut rows = 0u64;
    let mut end = first.offset;
    let mut equal = true;
    let mut told_apart = HashSet::new();
    for (n, part) in parts.iter().enumerate() {
        let Lie::Piece { index, size, ambiguous, given } = part.lie else { return None };
        let fits = part.dtype == first.dtype && part.shape.get(1..) == first.shape.get(1..);
        if index as usize != n || size as usize != parts.len() || part.offset != end || !fits {
            return None;
        }
        if given.is_some_and(|digest| !told_apart.insert(digest)) {
            return None;
        }
        equal &= ambiguous && part.crc == first.crc && part.shape == first.shape;
        end += part.len;
        rows += part.shape.first()?;
    }
    if equal {
        return None;
    }
    let mut shape = first.shape.clone();
    *shape.first_mut()? = rows;
    Some((first, shape, end - first.offset))
}

/// Which part may bear the record's own name.
fn whole_of(parts: &[&Entry]) -> Option<usize> {
    let first = parts.first()?;
    match first.lie {
        Lie::Whole => (parts.len() == 1).then_some(0),
        Lie::Piece { size, ambiguous: true, .. } => (size as usize == parts.len()
            && parts.iter().all(|p| p.crc == first.crc && p.shape == first.shape))
        .then_some(0),
        _ => None,
    }
}

fn render(named: &[Named], end: u64) -> String {
    let mut metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    metadata.insert("flexmodel.format".to_owned(), FORMAT.to_string());
    let mut body = String::new();
    let mut at = HEADER_SPACE;
    let mut fillers = 0;
    for entry in named {
        fill(&mut body, &mut fillers, at, entry.offset);
        let mut shape = entry.shape.clone();
        let dtype = entry.dtype.safetensors().unwrap_or_else(|| {
            metadata.insert(format!("flexmodel.dtype.{}", entry.name), entry.dtype.name().to_owned());
            shape.push(entry.dtype.size() as u64);
            "U8"
        });
        push(&mut body, &entry.name, dtype, &shape, entry.offset, entry.offset + entry.len);
        at = entry.offset + entry.len;
    }
    fill(&mut body, &mut fillers, at, end);
    // Strings to strings: serde_json has no way to fail on it.
    let metadata = serde_json::to_string(&metadata).unwrap_or_default();
    format!("{{\"__metadata__\":{metadata}{body}}}")
}

/// Covers a gap, of which safetensors allows none.
fn fill(body: &mut String, fillers: &mut u32, from: u64, to: u64) {
    if from < to {
        push(body, &format!("{FILLER}{fillers}"), "U8", &[to - from], from, to);
        *fillers += 1;
    }
}

fn push(body: &mut String, name: &str, dtype: &str, shape: &[u64], from: u64, to: u64) {
    let name = serde_json::Value::from(name);
    let (from, to) = (from - HEADER_SPACE, to - HEADER_SPACE);
    let shape = shape.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
    // Writing to a String cannot fail.
    let _ = write!(body, ",{name}:{{\"dtype\":\"{dtype}\",\"shape\":[{shape}],\"data_offsets\":[{from},{to}]}}");
}

/// Orders pieces without bytes, which all start at the same place.
fn piece_index(entry: &Entry) -> u32 {
    match entry.lie {
        Lie::Piece { index, .. } => index,
        _ => entry.rank,
    }
}
