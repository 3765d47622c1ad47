//! Bridges that are there, and what they say they are.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use memmap2::Mmap;
pub use wire::bridge_marker::{LIBRARY, Marker};
use wire::{
    bridge_marker::{cache_folder, folder_name},
    env as names, trust,
};

/// The folder of all bridges.
pub fn folder() -> anyhow::Result<PathBuf> {
    cache_folder(|name| env::var_os(name))
        .with_context(|| format!("no place for bridges: HOME is not set; set {}", names::BRIDGE_CACHE))
}

/// Where the bridge with this key, of the sources with this digest, lies, whether there is one or not.
pub fn place(key: &str, digest: &str) -> anyhow::Result<PathBuf> {
    Ok(folder()?.join(folder_name(key, digest)).join(LIBRARY))
}

/// What to do where the cache is not trusted.
pub fn not_used() -> String {
    format!("no bridge is used or built where others could put one (set {} to a folder of yours)", names::BRIDGE_CACHE)
}

/// The marker in the bytes of a library that may be run as code.
pub fn marker(path: &Path) -> anyhow::Result<Marker> {
    trust::check(path)?;
    let file = fs::File::open(path).with_context(|| path.display().to_string())?;
    // SAFETY: a bridge appears by rename and is never written to again; one cut short by hand meanwhile is SIGBUS here as
    // it would be in the dynamic loader.
    let bytes = unsafe { Mmap::map(&file) }.with_context(|| path.display().to_string())?;
    match Marker::find(&bytes) {
        Some(marker) => Ok(marker),
        None => bail!("{}: does not say what it was built for; it is not a bridge of ours", path.display()),
    }
}

/// All bridges of the cache, by key and sources.
pub fn all() -> anyhow::Result<Vec<(PathBuf, anyhow::Result<Marker>)>> {
    let folder = folder()?;
    let Ok(entries) = fs::read_dir(&folder) else { return Ok(Vec::new()) };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|e| e.path().join(LIBRARY)).filter(|p| p.is_file()).collect();
    paths.sort();
    Ok(paths.into_iter().map(|path| (path.clone(), marker(&path))).collect())
}
