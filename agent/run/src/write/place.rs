//! Which bytes of which shard a part gets.
//!
//! Pieces of dimension 0 belong side by side: when the first of them comes, room for all is reserved, as if they were
//! all as long. A last piece may be shorter. Whatever does not fit its room is placed elsewhere; the reader stitches.
//!
//! Of a job on many nodes only this node's pieces come. Which ones they are is seen in the first wholes, [`FULL_ROOMS`] or
//! [`FULL_BYTES`] of them, which get room for every piece; later ones get room for those that came, so that what a record
//! takes on a node does not grow with the job. Room that is never filled is a hole in the file, and takes no disk.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hash, Hasher},
    io,
    path::PathBuf,
    sync::Arc,
};

use wire::record::Placement;

use super::{
    recent::Recent,
    shard::{Entry, Lie, Shard, ShardFile, header_cost},
};
use crate::format::{HEADER_SPACE, Identity, Location, TENSOR_ALIGN, What};

/// Wholes with pieces still to come.
pub const MAX_RESERVATIONS: usize = 4096;
/// Replicas that later ones are compared with.
pub const MAX_REPLICAS: usize = 4096;
/// Most memory of either.
pub const MAX_TABLE_BYTES: usize = 4 << 20;
/// Identities told from new ones when records are counted.
pub const MAX_RECENT: usize = 65536;
/// Most members of an axis that room is reserved for.
const MAX_PIECES: u32 = 1 << 16;
/// Wholes that get room for pieces that may come from other nodes.
pub const FULL_ROOMS: u32 = 64;
/// Bytes of such room, but for the last of these wholes.
pub const FULL_BYTES: u64 = 1 << 30;
/// Most sizes of axes whose members are remembered.
const MAX_AXIS_SIZES: usize = 64;
/// Most members of an axis that are remembered: those of a node's ranks.
const MAX_MEMBERS: usize = 4096;
/// Largest whole that room is reserved for.
const MAX_WHOLE: u64 = 1 << 40;

/// Where a part's bytes go.
#[derive(Debug)]
pub struct Slot {
    /// The file.
    pub file: Arc<ShardFile>,
    /// From its start.
    pub offset: u64,
    len: u64,
    /// The whole it lies in, and which piece it is.
    piece: Option<(Identity, u32)>,
}

/// Room for a whole.
#[derive(Debug)]
struct Reservation {
    shard: u32,
    start: u64,
    /// Of each piece.
    len: u64,
    /// Pieces of the whole.
    size: u32,
    /// Those that it is for, in order, and whether they came.
    pieces: Vec<(u32, bool)>,
}

impl Reservation {
    fn end(&self) -> u64 {
        self.start + self.len * self.pieces.len() as u64
    }

    fn position(&self, index: u32) -> Option<usize> {
        self.pieces.binary_search_by_key(&index, |piece| piece.0).ok()
    }
}

/// Which pieces of axes of one size come to this node.
#[derive(Debug, Default)]
struct Members {
    seen: BTreeSet<u32>,
    rooms: u32,
    bytes: u64,
}

/// Parts with this key should be equal: a record, and coordinates along the axes that do not replicate.
pub type ReplicaKey = (Identity, Vec<(String, u32)>);

/// The first of several equal parts.
#[derive(Clone, Debug)]
pub struct Replica {
    /// Its bytes; `None` for statistics only, and where it sent a checksum.
    pub at: Option<Location>,
    /// Of its bytes.
    pub crc: u32,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Who captured it.
    pub rank: u32,
}

/// The key of a part that others should be equal to; `None` if there are no others.
pub fn replica_key(what: &What) -> Option<ReplicaKey> {
    let axes = || what.axes.iter().filter(|a| a.size > 1);
    axes().any(|a| a.place == Placement::Replicate).then(|| {
        let rest = axes().filter(|a| a.place != Placement::Replicate).map(|a| (a.name.clone(), a.index)).collect();
        (what.id.clone(), rest)
    })
}

/// Tells records that were not seen lately.
#[derive(Debug)]
pub struct Seen(Recent<u64, ()>);

impl Seen {
    /// Nothing seen.
    pub fn new() -> Self {
        Self(Recent::new(MAX_RECENT, 0))
    }

    /// Whether this record was not seen lately. Now it was.
    pub fn is_new(&mut self, id: &Identity) -> bool {
        let mut hasher = DefaultHasher::new();
        id.hash(&mut hasher);
        let hash = hasher.finish();
        let new = self.0.get(&hash).is_none();
        if new {
            self.0.insert(hash, (), 0);
        }
        new
    }
}

/// Gives out bytes. Behind the store's lock; it touches no tensor's bytes. Once a shard, and only then, it makes a file
/// and reserves the 1 MiB of its header while it is locked: other ranks wait for that if they want a place meanwhile.
#[derive(Debug)]
pub struct Allocator {
    dir: PathBuf,
    shard_bytes: u64,
    next: u32,
    current: Option<Shard>,
    retired: Vec<Shard>,
    reservations: Recent<Identity, Reservation>,
    members: BTreeMap<u32, Members>,
    replicas: Recent<ReplicaKey, Replica>,
    /// Records counted so far.
    pub seen: Seen,
}

impl Allocator {
    /// Starts with shard `next`; `seen` are records that are in the run already.
    pub fn new(dir: PathBuf, shard_bytes: u64, next: u32, seen: Seen) -> Self {
        Self {
            dir,
            shard_bytes,
            next,
            current: None,
            retired: Vec::new(),
            reservations: Recent::new(MAX_RESERVATIONS, MAX_TABLE_BYTES),
            members: BTreeMap::new(),
            replicas: Recent::new(MAX_REPLICAS, MAX_TABLE_BYTES),
            seen,
        }
    }

    /// The part that parts with this key should be equal to.
    pub fn replica(&self, key: &ReplicaKey) -> Option<&Replica> {
        self.replicas.get(key)
    }

    /// Makes later parts with this key be compared with `replica`.
    pub fn set_replica(&mut self, key: ReplicaKey, replica: Replica) {
        let names =
            id_bytes(&key.0) + key.1.iter().map(|(name, _)| size_of::<(String, u32)>() + name.len()).sum::<usize>();
        let bytes = names + size_of::<Replica>() + replica.shape.len() * size_of::<u64>();
        self.replicas.insert(key, replica, bytes);
    }

    /// Gives a part of `len` bytes its place.
    pub fn place(&mut self, what: &What, name: &str, len: u64) -> io::Result<Slot> {
        let cost = header_cost(name, what);
        if let Lie::Piece { index, size, .. } = Lie::of(what) {
            self.meet(index, size);
            if let Some(slot) = self.reserved(&what.id, index, size, len, cost) {
                return Ok(slot);
            }
            if let Some(slot) = self.reserve(&what.id, index, size, len, cost)? {
                return Ok(slot);
            }
        }
        let shard = self.room(len, cost)?;
        let offset = shard.cursor.next_multiple_of(TENSOR_ALIGN);
        shard.cursor = offset + len;
        shard.writing += 1;
        shard.charge(cost);
        Ok(Slot { file: shard.file.clone(), offset, len, piece: None })
    }

    /// The room that is kept for this piece, if there is and it fits.
    fn reserved(&mut self, id: &Identity, index: u32, size: u32, len: u64, cost: usize) -> Option<Slot> {
        let room = self.reservations.get_mut(id)?;
        let fits = len == room.len || (len < room.len && index + 1 == size);
        let at = room.position(index)?;
        if !fits || room.size != size || room.pieces.get(at)?.1 {
            return None;
        }
        let (number, offset) = (room.shard, room.start + at as u64 * room.len);
        let shard = shard_mut(&mut self.current, &mut self.retired, number)?;
        if !shard.has_header_room(cost) {
            return None;
        }
        shard.charge(cost);
        shard.writing += 1;
        let file = shard.file.clone();
        room.pieces.get_mut(at)?.1 = true;
        if room.pieces.iter().all(|&(_, came)| came) {
            shard.reservations = shard.reservations.saturating_sub(1);
            self.reservations.remove(id);
        }
        Some(Slot { file, offset, len, piece: Some((id.clone(), index)) })
    }

    /// Reserves room for a whole whose first piece has come. `None` if that is not worth it.
    fn reserve(&mut self, id: &Identity, index: u32, size: u32, len: u64, cost: usize) -> io::Result<Option<Slot>> {
        if size > MAX_PIECES || self.reservations.get(id).is_some() {
            return Ok(None);
        }
        let pieces = self.expected(index, size, len);
        let total = len.checked_mul(pieces.len() as u64).filter(|&t| t > 0 && t <= MAX_WHOLE);
        let Some(total) = total else { return Ok(None) };
        let shard = self.room(total, cost)?;
        let start = shard.cursor.next_multiple_of(TENSOR_ALIGN);
        shard.cursor = start + total;
        shard.writing += 1;
        shard.reservations += 1;
        shard.charge(cost);
        let file = shard.file.clone();
        let room = Reservation { shard: file.number, start, len, size, pieces };
        let offset = start + room.position(index).unwrap_or_default() as u64 * len;
        let bytes = id_bytes(id) + size_of::<Reservation>() + room.pieces.len() * size_of::<(u32, bool)>();
        for gone in self.reservations.insert(id.clone(), room, bytes) {
            self.close(&gone);
        }
        Ok(Some(Slot { file, offset, len, piece: Some((id.clone(), index)) }))
    }

    /// A piece came.
    fn meet(&mut self, index: u32, size: u32) {
        if size <= MAX_PIECES && (self.members.len() < MAX_AXIS_SIZES || self.members.contains_key(&size)) {
            let seen = &mut self.members.entry(size).or_default().seen;
            if seen.len() < MAX_MEMBERS {
                seen.insert(index);
            }
        }
    }

    /// The pieces of a new whole that room is made for, and which of them came: `index`.
    fn expected(&mut self, index: u32, size: u32, len: u64) -> Vec<(u32, bool)> {
        let piece = |n: u32| (n, n == index);
        match self.members.get_mut(&size).filter(|members| members.seen.contains(&index)) {
            Some(members) if members.rooms >= FULL_ROOMS || members.bytes >= FULL_BYTES => {
                members.seen.iter().map(|&n| piece(n)).collect()
            }
            Some(members) => {
                members.rooms += 1;
                members.bytes = members.bytes.saturating_add(len.saturating_mul(size.into()));
                (0..size).map(piece).collect()
            }
            None => vec![piece(index)],
        }
    }

    /// The current shard if `len` bytes and `cost` bytes of header fit, else the next one.
    fn room(&mut self, len: u64, cost: usize) -> io::Result<&mut Shard> {
        let full = self.current.as_ref().is_some_and(|s| {
            let end = s.cursor.next_multiple_of(TENSOR_ALIGN).saturating_add(len);
            !s.is_fresh() && (end - HEADER_SPACE > self.shard_bytes || !s.has_header_room(cost))
        });
        if full {
            self.retire();
        }
        if self.current.is_none() {
            let file = loop {
                match ShardFile::create(&self.dir, self.next) {
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists => self.next += 1,
                    other => break other?,
                }
            };
            self.next += 1;
            self.current = Some(Shard::new(file));
        }
        self.current.as_mut().ok_or_else(|| io::Error::other("no shard"))
    }

    /// Ends the current shard. It waits for its wholes until the next one ends; then they are given up.
    fn retire(&mut self) {
        for shard in &mut self.retired {
            let number = shard.file.number;
            self.reservations.remove_if(|r| r.shard == number);
            shard.reservations = 0;
        }
        if let Some(mut shard) = self.current.take() {
            shard.retired = true;
            self.retired.push(shard);
        }
    }

    /// Ends everything: no more pieces will come.
    pub fn retire_all(&mut self) {
        self.retire();
        self.retire();
    }

    /// A part is done with: its entry if it is stored, `None` if its bytes are of no use.
    pub fn settle(&mut self, slot: Slot, entry: Option<Entry>) {
        let number = slot.file.number;
        let Some(shard) = shard_mut(&mut self.current, &mut self.retired, number) else { return };
        shard.writing = shard.writing.saturating_sub(1);
        if let Some(entry) = entry {
            shard.entries.push(entry);
            return;
        }
        match &slot.piece {
            None if shard.cursor == slot.offset + slot.len => shard.cursor = slot.offset,
            None => {}
            Some((id, index)) => {
                let Some(room) = self.reservations.get_mut(id).filter(|r| r.shard == number) else { return };
                if let Some(at) = room.position(*index) {
                    room.pieces[at].1 = false;
                }
                if room.pieces.iter().all(|&(_, came)| !came) {
                    if shard.cursor == room.end() {
                        shard.cursor = room.start;
                    }
                    shard.reservations = shard.reservations.saturating_sub(1);
                    self.reservations.remove(id);
                }
            }
        }
    }

    /// Retired shards that nobody writes to any more.
    pub fn take_complete(&mut self) -> Vec<Shard> {
        let done = |s: &mut Shard| s.retired && s.writing == 0 && s.reservations == 0;
        self.retired.extract_if(.., done).collect()
    }

    fn close(&mut self, room: &Reservation) {
        if let Some(shard) = shard_mut(&mut self.current, &mut self.retired, room.shard) {
            shard.reservations = shard.reservations.saturating_sub(1);
        }
    }
}

/// Memory of an identity.
fn id_bytes(id: &Identity) -> usize {
    size_of::<Identity>() + id.module.len() + id.path.len()
}

fn shard_mut<'a>(current: &'a mut Option<Shard>, retired: &'a mut [Shard], number: u32) -> Option<&'a mut Shard> {
    current.iter_mut().chain(retired).find(|s| s.file.number == number)
}
