//! A series: the statistics of one leaf of one module over steps, in a bounded ring.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
};

use flexmodel_run::{
    format::{Identity, JobId, Part, Stats, What},
    names::Names,
};
use wire::{
    dtype::DType,
    hooks::Kind,
    record::{Axis, Placement},
};

/// What tells one series from another, and what all of its records have in common.
#[derive(Clone, Debug)]
pub(super) struct Key {
    pub job: JobId,
    pub model: u32,
    pub module: Arc<str>,
    pub kind: Kind,
    pub path: Arc<str>,
    pub train: bool,
    pub class: Arc<str>,
    pub group: Arc<str>,
}

impl Key {
    /// That of a part; `None` if there is no room for its names.
    pub fn new(what: &What, names: &mut Names) -> Option<Self> {
        let id = &what.id;
        Some(Self {
            job: id.job,
            model: id.model,
            module: names.keep(&id.module)?,
            kind: id.kind,
            path: names.keep(&id.path)?,
            train: id.train,
            class: names.keep(&what.class)?,
            group: names.keep(&what.group)?,
        })
    }

    /// Whether a record of this identity belongs here.
    pub fn is_of(&self, id: &Identity) -> bool {
        self.kind == id.kind
            && self.train == id.train
            && self.job == id.job
            && self.model == id.model
            && *self.path == *id.path
            && *self.module == *id.module
    }
}

/// Where in its series a record stands; ordered as the job makes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Coord {
    /// Step.
    pub step: u64,
    /// Microbatch.
    pub micro: u32,
    /// Call.
    pub call: u32,
    /// Backward pass over the same forward.
    pub repeat: u32,
    /// The lowest rank of those that made the pass, where not all did.
    pub apart: Option<u32>,
}

impl Coord {
    /// The coordinate of an identity.
    pub fn of(id: &Identity) -> Self {
        Self { step: id.step, micro: id.micro, call: id.call, repeat: id.repeat, apart: id.apart }
    }
}

/// Statistics of a record, small enough to keep many: merged over the parts that came so far. NaN: not known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Moments {
    /// Finite elements.
    pub count: u64,
    /// Not-a-number and infinite elements.
    pub bad: u64,
    mean: f64,
    std: f64,
    min: f64,
    max: f64,
    /// How the part relates to the others of its record.
    role: Role,
}

/// How a part counts towards the statistics of its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// It is a piece of its own.
    Piece,
    /// It repeats another part.
    Copy,
    /// It repeats another part if its statistics are the same to the last bit.
    CopyIfEqual,
}

impl Role {
    /// `only`: the ranks that made its pass, where not all did: the first of them repeats nobody.
    fn of(part: &Part, only: Option<&BTreeSet<u32>>) -> Self {
        let axes = &part.what.axes;
        if only.is_some_and(|only| only.first() == Some(&part.what.rank)) {
            return Role::Piece;
        }
        let checksum = part.at.is_none() && part.same.is_some();
        if checksum || axes.iter().any(|a| a.place == Placement::Replicate && a.index > 0) {
            Role::Copy
        } else if axes.iter().any(|a| may_repeat(a) && a.index > 0) {
            Role::CopyIfEqual
        } else {
            Role::Piece
        }
    }
}

fn may_repeat(axis: &Axis) -> bool {
    matches!(axis.place, Placement::ReplicateOrShard { .. }) || axis.input_digest.is_some()
}

impl Moments {
    fn none(role: Role) -> Self {
        let nan = f64::NAN;
        Self { count: 0, bad: 0, mean: nan, std: nan, min: nan, max: nan, role }
    }

    pub fn of(part: &Part, only: Option<&BTreeSet<u32>>) -> Self {
        let role = Role::of(part, only);
        part.stats.map_or(Self::none(role), |stats| Self::from_stats(&stats, role))
    }

    fn from_stats(s: &Stats, role: Role) -> Self {
        let bad = s.nan.saturating_add(s.inf);
        let [mean, std, min, max] = [s.mean, s.std, s.min, s.max].map(|x| x.unwrap_or(f64::NAN));
        Self { count: s.count.saturating_sub(bad), bad, mean, std, min, max, role }
    }

    fn stats(&self) -> Stats {
        let [mean, std, min, max] = [self.mean, self.std, self.min, self.max].map(|x| x.is_finite().then_some(x));
        let count = self.count.saturating_add(self.bad);
        Stats { count, mean, std, min, max, nan: self.bad, ..Stats::default() }
    }

    /// Mean, standard deviation, l2 norm, largest magnitude.
    pub fn values(&self) -> [Option<f64>; 4] {
        let l2 = (self.count as f64).sqrt() * self.mean.hypot(self.std);
        let absmax = self.min.abs().max(self.max.abs());
        [self.mean, self.std, l2, absmax].map(|x| x.is_finite().then_some(x))
    }

    /// Takes another part of the same record in.
    pub fn merge(&mut self, other: &Self) {
        let bits = |m: &Self| (m.count, m.bad, [m.mean, m.std, m.min, m.max].map(f64::to_bits));
        let maybe = self.role == Role::CopyIfEqual || other.role == Role::CopyIfEqual;
        if other.role == Role::Copy || (maybe && bits(self) == bits(other)) {
            return;
        }
        *self = Self::from_stats(&self.stats().merge(&other.stats()), self.role);
    }
}

/// How many parts make a record of this layout; `only`: the number of ranks that made its pass, where not all did.
fn promised(axes: &[Axis], only: Option<usize>) -> u32 {
    let divided = axes.iter().filter(|a| a.place != Placement::Replicate);
    let all = divided.fold(1u32, |n, a| n.saturating_mul(a.size));
    only.and_then(|only| u32::try_from(only).ok()).map_or(all, |only| all.min(only))
}

/// One record in a series.
#[derive(Clone, Copy, Debug)]
pub(super) struct Point {
    pub at: Coord,
    pub moments: Moments,
    /// Number of the record among the recent ones.
    pub number: u64,
    /// Parts that came, of those that the layout promises; replicas count neither way.
    pub pieces: u32,
    pub promised: u32,
    /// Clock of the last part that was merged in.
    pub changed: u64,
}

/// Where a part went.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Slot {
    /// It began a record.
    New,
    /// It joined the record of this number.
    Known(u64),
    /// Its record has left the ring.
    TooOld,
}

/// The statistics of one leaf over steps.
pub(super) struct Series {
    pub key: Key,
    pub dtype: DType,
    /// Records so far, those that left the ring included.
    pub count: u64,
    pub bytes: u64,
    /// Records with not-a-number or infinite elements.
    pub bad: u64,
    /// In order of their coordinates.
    pub points: VecDeque<Point>,
    pub changed: u64,
}

impl Series {
    pub fn new(key: Key, dtype: DType) -> Self {
        Self { key, dtype, count: 0, bytes: 0, bad: 0, points: VecDeque::new(), changed: 0 }
    }

    /// Takes a part in. Ranks run ahead of each other, so it may belong before the newest record.
    pub fn add(&mut self, part: &Part, only: Option<&BTreeSet<u32>>, number: u64, clock: u64, limit: usize) -> Slot {
        self.changed = clock;
        let (at, moments) = (Coord::of(&part.what.id), Moments::of(part, only));
        let pieces = u32::from(moments.role != Role::Copy);
        let place = match self.points.back() {
            Some(last) if last.at < at => self.points.len(),
            None => 0,
            Some(_) => self.points.partition_point(|p| p.at < at),
        };
        if let Some(point) = self.points.get_mut(place).filter(|p| p.at == at) {
            let clean = point.moments.bad == 0;
            point.moments.merge(&moments);
            point.pieces += pieces;
            point.changed = clock;
            self.bad += u64::from(clean && point.moments.bad > 0);
            return Slot::Known(point.number);
        }
        if place == 0 && self.points.len() >= limit {
            return Slot::TooOld;
        }
        // A copy says nothing that the part it copies will not say.
        let moments = if moments.role == Role::Copy { Moments::none(Role::Piece) } else { moments };
        // Before it grows, so that a ring never holds memory for more than its limit.
        let gone = self.points.len().saturating_sub(limit - 1);
        self.points.drain(..gone);
        let place = place.saturating_sub(gone);
        let promised = promised(&part.what.axes, only.map(BTreeSet::len));
        self.points.insert(place, Point { at, moments, number, pieces, promised, changed: clock });
        self.count += 1;
        self.bad += u64::from(moments.bad > 0);
        Slot::New
    }

    /// Forgets the oldest points over `limit`, and gives their memory back.
    pub fn shrink(&mut self, limit: usize) {
        let extra = self.points.len().saturating_sub(limit);
        if extra > 0 {
            self.points.drain(..extra);
            self.points.shrink_to(limit);
        }
    }
}
