//! A shard that is being written.

use std::{
    fs::File,
    io,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use wire::{dtype::DType, record::Placement};

use crate::{
    files::{ToWrite, open_to_write},
    format::{HEADER_SPACE, What},
    limits::SHARDS,
    passes::Place,
};

/// Bytes of an entry in the header beside its name and its shape: field names, dtype and offsets.
const ENTRY_JSON: usize = 110;
/// Bytes of a filler entry.
const FILLER_JSON: usize = 110;
/// What a header may take, less a margin for `__metadata__`.
const HEADER_BUDGET: usize = HEADER_SPACE as usize - 4096;

/// Stem of shard `number`.
pub fn stem(number: u32) -> String {
    format!("shard-{number:05}")
}

/// Number of the shard with this stem; `None` where that is no stem of ours.
pub fn number_of(name: &str) -> Option<u32> {
    let number = name.strip_prefix("shard-")?.parse().ok()?;
    (number <= SHARDS && stem(number) == name).then_some(number)
}

/// Path of a shard before it is sealed.
pub fn open_path(dir: &Path, number: u32) -> PathBuf {
    dir.join(stem(number) + ".open")
}

/// Path of a sealed shard.
pub fn sealed_path(dir: &Path, number: u32) -> PathBuf {
    dir.join(stem(number) + ".safetensors")
}

/// Its file, shared by the threads that write parts into it.
#[derive(Debug)]
pub struct ShardFile {
    /// Its number.
    pub number: u32,
    file: File,
}

impl ShardFile {
    /// Makes the file, with room on disk for its header: sealing must work when the disk is full.
    pub fn create(dir: &Path, number: u32) -> io::Result<Self> {
        let path = open_path(dir, number);
        let file = open_to_write(&path, ToWrite::New)?;
        // SAFETY: the descriptor is open for writing.
        let reserved = unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, HEADER_SPACE as libc::off_t) };
        let outcome = match reserved {
            0 => Ok(()),
            _ => match io::Error::last_os_error() {
                e if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    file.write_all_at(&vec![0; HEADER_SPACE as usize], 0)
                }
                e => Err(e),
            },
        };
        match outcome {
            Ok(()) => Ok(Self { number, file }),
            Err(e) => {
                // Nothing is in it yet, and its number is given out again.
                let _ = std::fs::remove_file(&path);
                Err(e)
            }
        }
    }

    /// Opens a file that another agent left.
    pub fn open(dir: &Path, number: u32) -> io::Result<Self> {
        let file = open_to_write(&open_path(dir, number), ToWrite::Old)?;
        Ok(Self { number, file })
    }

    /// Writes all of `bytes` at `offset`.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    /// Gives bytes back to the file system; they read as zeros. Best effort.
    pub fn forget(&self, offset: u64, len: u64) {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: the descriptor is open for writing; a file system without holes answers with an error.
        unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset as libc::off_t, len as libc::off_t) };
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }
}

/// What sealing needs to know of a part.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The record's name, shared by its parts.
    pub name: Arc<str>,
    /// Global rank.
    pub rank: u32,
    /// Element type.
    pub dtype: DType,
    /// Shape of the part.
    pub shape: Vec<u64>,
    /// Start in the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Of the bytes.
    pub crc: u32,
    /// How it lies in the whole.
    pub lie: Lie,
    /// Of which pass it is.
    pub place: Place,
}

/// How a part lies in its whole, as far as laying it side by side with others goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// It is the whole.
    Whole,
    /// Piece `index` of `size` consecutive pieces of dimension 0.
    Piece {
        /// Which.
        index: u32,
        /// Of how many.
        size: u32,
        /// Or, if all are equal bytes, the whole.
        ambiguous: bool,
        /// What [`Axis::given`](wire::record::Axis::given) says: where two have the same, they are no pieces.
        given: Option<u32>,
    },
    /// Anything else.
    Apart,
}

impl Lie {
    /// From a part's axes. Axes along which parts are replicas do not matter.
    pub fn of(what: &What) -> Self {
        let mut axes = what.axes.iter().filter(|a| a.size > 1 && a.place != Placement::Replicate);
        match (axes.next(), axes.next()) {
            (None, _) => Self::Whole,
            (Some(axis), None) if !what.shape.is_empty() => match &axis.place {
                Placement::Shard { dim: 0 } | Placement::ReplicateOrShard { dim: 0 } => Self::Piece {
                    index: axis.index,
                    size: axis.size,
                    ambiguous: matches!(axis.place, Placement::ReplicateOrShard { .. }),
                    given: axis.input_digest,
                },
                _ => Self::Apart,
            },
            _ => Self::Apart,
        }
    }
}

/// A shard that takes parts, or waits for the last of them.
#[derive(Debug)]
pub struct Shard {
    /// Its file.
    pub file: Arc<ShardFile>,
    /// Where free bytes begin.
    pub cursor: u64,
    /// Stored parts.
    pub entries: Vec<Entry>,
    /// Bytes of header that the parts placed so far may take.
    header: usize,
    /// Parts that are being written.
    pub writing: u32,
    /// Wholes with pieces still to come.
    pub reservations: u32,
    /// It takes no new places.
    pub retired: bool,
}

impl Shard {
    /// An empty one.
    pub fn new(file: ShardFile) -> Self {
        Self {
            file: Arc::new(file),
            cursor: HEADER_SPACE,
            entries: Vec::new(),
            header: 0,
            writing: 0,
            reservations: 0,
            retired: false,
        }
    }

    /// Whether the header would still fit with another part.
    pub fn has_header_room(&self, cost: usize) -> bool {
        self.header + cost <= HEADER_BUDGET
    }

    /// Counts a part's header bytes in.
    pub fn charge(&mut self, cost: usize) {
        self.header += cost;
    }

    /// Whether nothing was placed in it yet.
    pub fn is_fresh(&self) -> bool {
        self.cursor == HEADER_SPACE && self.entries.is_empty() && self.writing == 0
    }
}

/// Most bytes of header that a part can take, with the filler behind it.
pub fn header_cost(name: &str, what: &What) -> usize {
    // Control characters take six bytes in JSON; a type of its own is named a second time in the metadata.
    let escaped: usize =
        name.bytes().map(|b| if b < 0x20 { 6 } else { 1 + usize::from(b == b'"' || b == b'\\') }).sum();
    let names = if what.dtype.safetensors().is_none() { 2 } else { 1 };
    names * (escaped + 48) + ENTRY_JSON + what.shape.len() * 21 + FILLER_JSON
}
