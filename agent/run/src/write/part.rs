//! One part on its way to disk.

use std::sync::Arc;

use wire::record::RecordMeta;

use super::{
    place::{Replica, ReplicaKey, Slot, replica_key},
    shard::{Entry, Lie, stem},
    writer::{Store, reason_of},
};
use crate::{
    format::{JobId, Line, Location, Origin, Part, What},
    joining::Told,
    passes::Place,
    stats::Accumulator,
};

/// Bytes summed and written at a time: they are still in the cache when they are written.
const CHUNK: usize = 256 << 10;

/// What became of a part.
#[derive(Debug)]
pub enum Outcome {
    /// It is journalled. What is known to be of one pass by now: this part, it and others, or nothing yet.
    Stored(Vec<Told>),
    /// It is counted as dropped.
    Lost,
}

/// Takes a part's bytes in order and writes them where they belong. Dropping it without [`finish`](Self::finish)
/// gives its place back and counts nothing.
#[derive(Debug)]
pub struct PartWriter {
    store: Arc<Store>,
    what: What,
    name: Arc<str>,
    len: u64,
    stats_only: bool,
    same: Option<u32>,
    replicas: Option<ReplicaKey>,
    /// The replica on disk that this part turned out to be equal to.
    same_as: Option<Replica>,
    slot: Option<Slot>,
    received: u64,
    crc: u32,
    stats: Accumulator,
    failed: Option<String>,
}

impl PartWriter {
    pub(super) fn new(store: Arc<Store>, job: JobId, meta: RecordMeta) -> Self {
        let (len, stats_only, same) = (meta.payload_len(), meta.stats_only, meta.same);
        let mut what = What::from_meta(meta);
        what.id.job = job;
        Self {
            name: what.id.to_string().into(),
            replicas: replica_key(&what),
            len: len.unwrap_or(0),
            stats: Accumulator::new(what.dtype),
            failed: len.is_none().then(|| "a shape of more than 2^64 bytes".into()),
            store,
            what,
            stats_only,
            same,
            same_as: None,
            slot: None,
            received: 0,
            crc: same.unwrap_or(0),
        }
    }

    /// It came through a slab.
    pub fn out_of(mut self, from: Origin) -> Self {
        self.what.from = Some(from);
        self
    }

    /// Bytes of the part in all.
    pub fn size(&self) -> u64 {
        self.len
    }

    /// Whether every byte has come.
    pub fn is_complete(&self) -> bool {
        self.received == self.len
    }

    /// Takes the next bytes.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        if offset != self.received || bytes.len() as u64 > self.len - self.received {
            self.failed.get_or_insert_with(|| "its pieces do not follow each other".into());
        }
        if self.failed.is_some() {
            return;
        }
        self.received += bytes.len() as u64;
        let at_once = self.is_complete() && offset == 0 && self.replicas.is_some();
        if at_once {
            self.sum(bytes);
            self.same_as = self.equal_replica();
        }
        if self.same_as.is_some() || !self.place() {
            if !at_once {
                self.sum(bytes);
            }
            return;
        }
        let mut at = offset;
        for chunk in bytes.chunks(CHUNK) {
            if !at_once {
                self.sum(chunk);
            }
            if let Some(slot) = &self.slot
                && let Err(e) = slot.file.write_at(chunk, slot.offset + at)
            {
                return self.fail(&e);
            }
            at += chunk.len() as u64;
        }
    }

    fn sum(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(CHUNK) {
            self.crc = crc32c::crc32c_append(self.crc, chunk);
            self.stats.update(chunk);
        }
    }

    /// Whether bytes are to be written.
    fn place(&mut self) -> bool {
        if self.stats_only || self.same.is_some() {
            return false;
        }
        if self.slot.is_none() {
            let placed = self.store.alloc().place(&self.what, &self.name, self.len);
            match placed {
                Ok(slot) => self.slot = Some(slot),
                Err(e) => {
                    self.fail(&e);
                    return false;
                }
            }
            self.store.seal_complete();
        }
        true
    }

    fn fail(&mut self, error: &std::io::Error) {
        self.store.trouble(error);
        self.failed = Some(reason_of(error));
    }

    fn equal_replica(&self) -> Option<Replica> {
        let key = self.replicas.as_ref().filter(|_| self.same.is_none())?;
        let alloc = self.store.alloc();
        let first = alloc.replica(key)?;
        let equal = first.crc == self.crc && first.shape == self.what.shape && first.rank != self.what.rank;
        // Statistics may be shared by parts with bytes, but not the other way round.
        (equal && (first.at.is_some() || self.stats_only)).then(|| first.clone())
    }

    /// Journals the part. Its bytes and its line are on their way to the disk when this returns.
    pub fn finish(mut self) -> Outcome {
        if self.failed.is_none() && !self.is_complete() {
            self.failed = Some("its last pieces did not come".into());
        }
        if self.failed.is_none() && self.len == 0 {
            self.place();
        }
        if let Some(reason) = self.failed.take() {
            return self.lose(&reason);
        }
        if self.same_as.is_none() {
            self.same_as = self.equal_replica();
        }
        let own = self.slot.as_ref().map(|slot| Location {
            shard: stem(slot.file.number),
            offset: slot.offset,
            len: self.len,
            crc: self.crc,
        });
        let shared = self.same_as.take();
        let at = shared.as_ref().map_or(own, |first| first.at.clone());
        let stats = self.same.is_none().then(|| self.stats.stats());
        let part = Part { what: self.what.clone(), at, stats, same: self.same };
        if let Err(e) = self.store.journal().append(&Line::Part(part.clone())) {
            self.store.trouble(&e);
            return self.lose(&reason_of(&e));
        }
        self.store.works();
        let differs = self.compare(&part);
        self.store.count(|totals| {
            totals.parts += 1;
            totals.bytes += if shared.is_some() || part.at.is_none() { 0 } else { self.len };
        });
        self.settle(&part, shared.is_some());
        let mut told = self.store.tell(Told::part(part));
        told.extend(differs.into_iter().flat_map(|differs| self.store.tell(differs)));
        Outcome::Stored(told)
    }

    /// Compares it with the first of its replicas that had bytes, or else the first. One of two that differ is apart from
    /// the other: the later one, or the one that was a checksum.
    fn compare(&mut self, part: &Part) -> Option<Told> {
        let key = self.replicas.take()?;
        let rank = part.what.rank;
        let mut alloc = self.store.alloc();
        let first = alloc.replica(&key).filter(|first| first.rank != rank).cloned();
        // Later parts may share bytes; a checksum has none.
        let keep = first.as_ref().is_none_or(|first| first.at.is_none() && part.at.is_some());
        if keep {
            let (at, shape) = (part.at.clone(), part.what.shape.clone());
            alloc.set_replica(key, Replica { at, crc: self.crc, shape, rank });
        }
        let first = first.filter(|first| first.crc != self.crc || first.shape != part.what.shape)?;
        let what = What { from: None, ..part.what.clone() };
        let (what, against) = if keep { (What { rank: first.rank, ..what }, rank) } else { (what, first.rank) };
        Some(Told::Differs { what: Box::new(what), against })
    }

    fn settle(&mut self, part: &Part, shared: bool) {
        if let Some(slot) = self.slot.take() {
            if shared {
                // Without the allocator's lock, and while the place is still this part's: no other loses bytes by it.
                slot.file.forget(slot.offset, self.len);
            }
            let entry = (!shared).then(|| Entry {
                name: self.name.clone(),
                rank: part.what.rank,
                dtype: part.what.dtype,
                shape: part.what.shape.clone(),
                offset: slot.offset,
                len: self.len,
                crc: self.crc,
                lie: Lie::of(&part.what),
                place: Place::of(&part.what),
            });
            self.store.alloc().settle(slot, entry);
        }
        self.store.seal_complete();
    }

    fn lose(self, reason: &str) -> Outcome {
        self.store.dropped(self.what.rank, 1, reason, self.what.from);
        Outcome::Lost
    }
}

impl Drop for PartWriter {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            self.store.alloc().settle(slot, None);
            self.store.seal_complete();
        }
    }
}
