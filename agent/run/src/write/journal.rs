//! The manifest as it grows, on a disk that may fill up.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Write},
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::{
    files::{ToWrite, open_to_write},
    format::{Line, MANIFEST_FILE, Origin},
    manifest::encode_line,
};

/// Most kinds of losses kept apart (rank, slab and reason) while they cannot be written.
const MAX_PENDING: usize = 4096;
/// Ends a line that could neither be completed nor taken back.
const TORN: &[u8] = b"torn\n";

/// Appends lines.
#[derive(Debug)]
pub struct Journal {
    inner: Mutex<Inner>,
}

/// Rank, slab and reason of losses.
type Kind = (u32, Option<u64>, String);

/// How many, and the last of them that is known by number.
#[derive(Clone, Copy, Debug, Default)]
struct Lost {
    count: u64,
    last: u64,
}

#[derive(Debug)]
struct Inner {
    file: File,
    len: u64,
    /// A failed write left bytes that could not be taken back: the next line starts a new one.
    torn: bool,
    /// Losses without a line yet.
    pending: BTreeMap<Kind, Lost>,
}

impl Journal {
    /// Opens the manifest of `dir`, or makes it.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let file = open_to_write(&dir.join(MANIFEST_FILE), ToWrite::Append)?;
        let len = file.metadata()?.len();
        Ok(Self { inner: Mutex::new(Inner { file, len, torn: false, pending: BTreeMap::new() }) })
    }

    /// Appends a line, whole or not at all.
    pub fn append(&self, line: &Line) -> io::Result<()> {
        self.lock().append(&encode_line(line))
    }

    /// Remembers a loss for the next [`flush`](Self::flush).
    pub fn lose(&self, rank: u32, count: u64, reason: &str, from: Option<Origin>) {
        let mut inner = self.lock();
        let kind = |reason: &str| (rank, from.map(|Origin(slab, _)| slab), reason.to_owned());
        let mut key = kind(reason);
        if inner.pending.len() >= MAX_PENDING && !inner.pending.contains_key(&key) {
            key = kind("several reasons");
        }
        let lost = inner.pending.entry(key).or_default();
        *lost = Lost { count: lost.count.saturating_add(count), last: from.map_or(0, |Origin(_, record)| record) };
    }

    /// Writes a line for every loss that has none yet.
    pub fn flush(&self) -> io::Result<()> {
        let mut inner = self.lock();
        while let Some((key, lost)) = inner.pending.pop_first() {
            let from = key.1.map(|slab| Origin(slab, lost.last));
            let line = Line::Dropped { rank: key.0, count: lost.count, reason: key.2.clone(), from };
            if let Err(e) = inner.append(&encode_line(&line)) {
                inner.pending.insert(key, lost);
                return Err(e);
            }
        }
        Ok(())
    }

    /// Makes what was appended last a power loss.
    pub fn sync(&self) -> io::Result<()> {
        // Not under the lock: an fsync may take long, and lines go on meanwhile.
        let file = self.lock().file.try_clone()?;
        file.sync_data()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let outcome = if self.torn {
            // Never the missing end of a line that was given up.
            let mut line = TORN.to_vec();
            line.extend_from_slice(bytes);
            self.file.write_all(&line)
        } else {
            self.file.write_all(bytes)
        };
        match outcome {
            Ok(()) => {
                self.len += (bytes.len() + if self.torn { TORN.len() } else { 0 }) as u64;
                self.torn = false;
                Ok(())
            }
            Err(e) => {
                if self.file.set_len(self.len).is_err() {
                    self.torn = true;
                    self.len = self.file.metadata().map_or(self.len, |m| m.len());
                }
                Err(e)
            }
        }
    }
}
