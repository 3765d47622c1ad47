//! Bridges that are there, and what they say they are.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use memmap2::Mmap;
use serde::Serialize;
use wire::{
    env as names,
    tap_abi::{MARKER_PREFIX, TAP_ABI},
};

/// The library's name in its folder.
pub const LIBRARY: &str = "libflexmodel_torch.so";
/// What follows the marker's prefix; the whole is `FLEXMODEL-BRIDGE key=<key> digest=<hex> abi=<n>;`.
const KEY: &[u8] = b" key=";

/// What a bridge says it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Marker {
    /// The torch that it was built for.
    pub key: String,
    /// The sources that it was built from.
    pub digest: String,
    /// Version of the tables between it and the interposer.
    pub abi: String,
}

impl Marker {
    /// Whether it may be loaded by this FlexModel beside the torch that `key` names.
    pub fn fits(&self, key: &str) -> bool {
        self.key == key && self.abi == TAP_ABI.to_string()
    }
}

/// The folder of all bridges.
pub fn folder() -> anyhow::Result<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set(names::BRIDGE_CACHE)
        .or_else(|| set("XDG_CACHE_HOME").map(|c| c.join("flexmodel/bridges")))
        .or_else(|| set("HOME").map(|h| h.join(".cache/flexmodel/bridges")))
        .with_context(|| format!("no place for bridges: HOME is not set; set {}", names::BRIDGE_CACHE))
}

/// Where the bridge with this key lies, whether there is one or not.
pub fn place(key: &str) -> anyhow::Result<PathBuf> {
    Ok(folder()?.join(key).join(LIBRARY))
}

/// The marker in a library's bytes.
pub fn marker(path: &Path) -> anyhow::Result<Marker> {
    let file = fs::File::open(path).with_context(|| path.display().to_string())?;
    // SAFETY: a bridge appears by rename and is never written to again; one cut short by hand meanwhile is SIGBUS here as
    // it would be in the dynamic loader.
    let bytes = unsafe { Mmap::map(&file) }.with_context(|| path.display().to_string())?;
    match parse(&bytes) {
        Some(marker) => Ok(marker),
        None => bail!("{}: does not say what it was built for; it is not a bridge of ours", path.display()),
    }
}

fn parse(bytes: &[u8]) -> Option<Marker> {
    let mark = [MARKER_PREFIX.as_bytes(), KEY].concat();
    let rest = bytes.get(find(bytes, &mark)? + mark.len()..)?;
    let text = std::str::from_utf8(rest.get(..rest.iter().take(512).position(|&b| b == b';')?)?).ok()?;
    let (key, rest) = text.split_once(" digest=")?;
    let (digest, abi) = rest.split_once(" abi=")?;
    Some(Marker { key: key.into(), digest: digest.into(), abi: abi.into() })
}

/// Goes from one first letter to the next: libraries are some megabytes long.
fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    let mut at = 0;
    while let Some(next) = bytes.get(at..)?.iter().position(|b| Some(b) == what.first()) {
        at += next;
        if bytes[at..].starts_with(what) {
            return Some(at);
        }
        at += 1;
    }
    None
}

/// All bridges of the cache, by key.
pub fn all() -> anyhow::Result<Vec<(PathBuf, anyhow::Result<Marker>)>> {
    let folder = folder()?;
    let Ok(entries) = fs::read_dir(&folder) else { return Ok(Vec::new()) };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|e| e.path().join(LIBRARY)).filter(|p| p.is_file()).collect();
    paths.sort();
    Ok(paths.into_iter().map(|path| (path.clone(), marker(&path))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_is_found_among_other_bytes() {
        let mut bytes = b"FLEXMODEL-BRIDG\0FFLEX".to_vec();
        bytes.extend_from_slice(b"FLEXMODEL-BRIDGE key=torch2.11.0+cu130 digest=0a1b2c3d abi=2;rest");
        let marker = parse(&bytes).unwrap();
        assert_eq!(
            (marker.key.as_str(), marker.digest.as_str(), marker.abi.as_str()),
            ("torch2.11.0+cu130", "0a1b2c3d", "2")
        );
    }

    #[test]
    fn no_marker_or_half_of_one_is_none() {
        assert_eq!(parse(b"nothing here"), None);
        assert_eq!(parse(b"FLEXMODEL-BRIDGE key=torch2 digest=0"), None);
        assert_eq!(parse(b"FLEXMODEL-BRIDGE key=torch2;"), None);
    }
}
