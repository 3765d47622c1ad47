//! The shard files of a run, mapped when first asked for.

use std::{
    collections::HashMap,
    fs::File,
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use memmap2::{Mmap, MmapOptions};
use wire::dtype::DType;

use super::{
    assemble::Bytes,
    layout::LayoutError,
    plan::{self, PlanError},
};
use crate::{
    files::open_to_read,
    format::{HEADER_SPACE, Location, Part},
    text::clip,
};

/// Why a tensor cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// Ranks are missing: the run is going on, or it was killed.
    #[error("{0}")]
    Incomplete(String),
    /// The layout does not make a whole.
    #[error("{0}")]
    Layout(String),
    /// It is the sum of addends of a type that has none.
    #[error("{} addends have no sum", .0.name())]
    NoSum(DType),
    /// A shard is damaged, short or gone.
    #[error("{0}")]
    Damage(String),
}

impl ReadError {
    /// The same error, with the record it is about.
    pub fn about(self, record: &str) -> Self {
        match self {
            Self::Incomplete(text) => Self::Incomplete(format!("{record}: {text}")),
            Self::Layout(text) => Self::Layout(format!("{record}: {text}")),
            Self::NoSum(_) => Self::Layout(format!("{record}: {self}")),
            Self::Damage(text) => Self::Damage(format!("{record}: {text}")),
        }
    }
}

/// Why there is no file of a shard.
#[derive(Debug, thiserror::Error)]
pub enum NoFile {
    /// A manifest may say anything.
    #[error("'{}' is not the name of a shard", clip(.0))]
    NoName(String),
    /// It is not there.
    #[error("the file is missing")]
    Missing,
    /// It is there.
    #[error("the file does not open ({0})")]
    NotOpened(io::Error),
}

impl From<NoFile> for ReadError {
    fn from(why: NoFile) -> Self {
        Self::Damage(why.to_string())
    }
}

/// Bytes of the longest stem.
const LONGEST_STEM: usize = 200;

/// Shards by stem.
pub struct Shards {
    path: PathBuf,
    /// Folders of `path` that shards may be in, as `NODE/STEM`; empty: they are in `path`.
    nodes: Vec<String>,
    open: Mutex<HashMap<String, Arc<Map>>>,
}

impl Shards {
    /// Shards of a run of one folder.
    pub fn new(path: &Path) -> Self {
        Self::of_nodes(path, &[])
    }

    /// Shards of several nodes' runs.
    pub fn of_nodes(path: &Path, nodes: &[String]) -> Self {
        Self { path: path.to_owned(), nodes: nodes.to_vec(), open: Mutex::default() }
    }

    /// The file of a shard: sealed, or still open.
    pub fn file(&self, stem: &str) -> Result<(PathBuf, File), NoFile> {
        // A shard is a file of this directory, or of a node's.
        let (node, name) = match stem.split_once('/') {
            Some((node, name)) if self.nodes.iter().any(|known| known == node) => (node, name),
            _ => ("", stem),
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || name.len() > LONGEST_STEM || !name.chars().all(plain) {
            return Err(NoFile::NoName(stem.to_owned()));
        }
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        // Sealed once more at the end: it may have been sealed between the first two looks.
        for ext in ["safetensors", "open", "safetensors"] {
            let path = self.path.join(node).join(format!("{name}.{ext}"));
            match open_to_read(&path) {
                Ok(file) => return Ok((path, file)),
                Err(e) => last = e,
            }
        }
        Err(match last.kind() {
            io::ErrorKind::NotFound => NoFile::Missing,
            _ => NoFile::NotOpened(last),
        })
    }

    /// The same, with the shard's name in what is wrong.
    pub fn found(&self, stem: &str) -> Result<File, ReadError> {
        self.file(stem).map(|(_, file)| file).map_err(|e| {
            let stem = clip(stem);
            ReadError::Damage(match e {
                NoFile::Missing => format!(
                    "{stem}.safetensors is missing, and {stem}.open too; copy the run again from where it was written"
                ),
                NoFile::NoName(_) => format!("the manifest names the shard '{stem}', which is no name of a shard"),
                NoFile::NotOpened(_) => format!("{stem}: {e}"),
            })
        })
    }

    /// Bytes of a shard's file; 0 where it does not open.
    pub fn len(&self, stem: &str) -> u64 {
        self.file(stem).ok().and_then(|(_, file)| file.metadata().ok()).map_or(0, |meta| meta.len())
    }

    /// The name of a shard's file, for messages.
    pub fn name(&self, stem: &str) -> String {
        let ext = self.file(stem).ok().and_then(|(path, _)| Some(path.extension()?.to_str()?.to_owned()));
        format!("{}.{}", clip(stem), ext.as_deref().unwrap_or("safetensors"))
    }

    /// A map of a shard that has the bytes from `start` to `end`.
    fn map(&self, stem: &str, start: u64, end: u64) -> Result<Arc<Map>, ReadError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(map) = open.get(stem)
            && map.has(start, end)
        {
            return Ok(map.clone());
        }
        let (_, file) = self.file(stem)?;
        let len = file.metadata().map_err(|e| ReadError::Damage(e.to_string()))?.len();
        if len < end {
            return Err(ReadError::Damage(format!(
                "the file ends at byte {len}, before byte {end}; it was cut short or copied in part"
            )));
        }
        // All of it, so that neighbours lie side by side; what is too large for that, because somebody made a hole of it or
        // memory is short, piece by piece.
        let map = Map::new(&file, 0, len).or_else(|_| {
            open.clear();
            Map::new(&file, start, end)
        });
        let map = map.map_err(|e| ReadError::Damage(format!("bytes {start}..{end} cannot be mapped ({e})")))?;
        let map = Arc::new(map);
        open.insert(stem.to_owned(), map.clone());
        Ok(map)
    }

    /// The bytes of a range, in a map of the shard.
    pub fn mapped(&self, at: &Location) -> Result<Bytes, ReadError> {
        if at.len == 0 {
            return Ok(Bytes::Owned(Vec::new()));
        }
        let end = at.offset.checked_add(at.len).filter(|_| at.offset >= HEADER_SPACE);
        let end =
            end.ok_or_else(|| ReadError::Damage(format!("bytes {}+{} are outside of every shard", at.offset, at.len)))?;
        let map = self.map(&at.shard, at.offset, end)?;
        // The map has these bytes, so both fit into usize.
        let from = (at.offset - map.start) as usize;
        Ok(Bytes::Mapped(map, from..from + at.len as usize))
    }

    /// A part's bytes, length and checksum compared; damage with its place and the way out.
    pub fn part(&self, part: &Part) -> Result<Bytes, ReadError> {
        self.check(part).map_err(|e| match (e, &part.at) {
            (ReadError::Damage(what), Some(at)) => self.damage(at, part.what.rank, &what),
            (other, _) => other,
        })
    }

    fn damage(&self, at: &Location, rank: u32, what: &str) -> ReadError {
        let name = self.name(&at.shard);
        ReadError::Damage(format!("{name}, rank {rank}: {what}; `flexmodel verify` lists all damage"))
    }

    /// Why there is no plan, in words, with the name of the file where that is damage.
    pub fn refusal(&self, e: &PlanError) -> ReadError {
        match e {
            PlanError::Layout(LayoutError::Missing(_) | LayoutError::Pending(_)) => {
                ReadError::Incomplete(e.to_string())
            }
            PlanError::Layout(_) | PlanError::NoBytes { .. } => ReadError::Layout(e.to_string()),
            PlanError::Length { rank, at, .. } => self.damage(at, *rank, &e.to_string()),
            PlanError::Overlap { .. } => ReadError::Damage(e.to_string()),
        }
    }

    /// As [`Shards::part`], where who asks says the place.
    pub fn check(&self, part: &Part) -> Result<Bytes, ReadError> {
        let at = plan::source(part).map_err(|e| match e {
            PlanError::Length { .. } => ReadError::Damage(e.to_string()),
            _ => ReadError::Layout(e.to_string()),
        })?;
        let bytes = self.mapped(at)?;
        let crc = crc32c::crc32c(&bytes);
        if crc != at.crc {
            return Err(ReadError::Damage(format!(
                "bytes {}..{} have checksum {crc:08x} and not {:08x}",
                at.offset,
                at.offset + at.len,
                at.crc
            )));
        }
        Ok(bytes)
    }
}

/// Bytes of a shard in memory, from `start` on.
pub struct Map {
    start: u64,
    bytes: Mmap,
}

impl Map {
    fn new(file: &File, start: u64, end: u64) -> io::Result<Self> {
        let length = usize::try_from(end - start).map_err(io::Error::other)?;
        let mut options = MmapOptions::new();
        // SAFETY: shards are written once: bytes that a manifest line speaks of never change and the file never shrinks
        // (STORE's rule). Who truncates a shard by hand meanwhile gets SIGBUS, as with every mmap reader.
        let bytes = unsafe { options.offset(start).len(length).map(file) }?;
        Ok(Self { start, bytes })
    }

    fn has(&self, start: u64, end: u64) -> bool {
        self.start <= start && end <= self.start.saturating_add(self.bytes.len() as u64)
    }

    /// The bytes in a range that counts from the start of the map.
    pub fn get(&self, range: Range<usize>) -> &[u8] {
        self.bytes.get(range).unwrap_or_default()
    }
}
