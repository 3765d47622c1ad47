//! The newest records and where their parts lie, in a bounded ring.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
};

use flexmodel_run::format::{Identity, Location, Part, What, memory_of};
use wire::record::Axis;

use super::{
    MAX_PART_BYTES, MAX_PARTS, MAX_RECORDS,
    series::{Coord, Series},
};

/// Layouts and shard names repeat from part to part: this many are remembered to share them.
const SHARED: usize = 64;

/// A record among the newest.
pub(super) struct Recent {
    pub series: u32,
    pub coord: Coord,
    /// The ranks that made its pass, where not all did.
    pub only: Option<BTreeSet<u32>>,
    parts: Vec<Kept>,
}

/// A part. Names that its series has, and what many parts share, are not in it.
struct Kept {
    part: Part,
    axes: Arc<[Axis]>,
    shard: Option<Arc<str>>,
}

/// The ring. Records are numbered in the order they began.
#[derive(Default)]
pub(super) struct Ring {
    records: VecDeque<Recent>,
    /// Number of the record at the front.
    first: u64,
    parts: usize,
    /// Memory of the parts, as if nothing of it were shared.
    bytes: usize,
    axes: Vec<Arc<[Axis]>>,
    shard: Option<Arc<str>>,
}

impl Ring {
    /// The number that the next record will have.
    pub fn next(&self) -> u64 {
        self.first + self.records.len() as u64
    }

    /// A record begins.
    pub fn begin(&mut self, series: u32, part: &Part, only: Option<&BTreeSet<u32>>) {
        let parts = vec![self.keep(part)];
        self.bytes += parts[0].bytes();
        self.records.push_back(Recent { series, coord: Coord::of(&part.what.id), only: only.cloned(), parts });
        self.parts += 1;
        self.trim();
    }

    /// Another part of the record of this number; nothing if it has left the ring.
    pub fn join(&mut self, number: u64, part: &Part) {
        let kept = self.keep(part);
        let place = number.checked_sub(self.first).and_then(|n| usize::try_from(n).ok());
        let Some(recent) = place.and_then(|n| self.records.get_mut(n)) else { return };
        self.bytes += kept.bytes();
        recent.parts.push(kept);
        self.parts += 1;
        self.trim();
    }

    /// The record of this number, if it is still here.
    pub fn get(&self, number: u64) -> Option<&Recent> {
        self.records.get(usize::try_from(number.checked_sub(self.first)?).ok()?)
    }

    /// Newest first.
    pub fn newest(&self) -> impl Iterator<Item = &Recent> {
        self.records.iter().rev()
    }

    fn trim(&mut self) {
        let many = |ring: &Self| ring.parts > MAX_PARTS || ring.bytes > MAX_PART_BYTES;
        while self.records.len() > MAX_RECORDS || (many(self) && self.records.len() > 1) {
            let gone = self.records.pop_front().map_or_else(Vec::new, |r| r.parts);
            self.parts -= gone.len();
            self.bytes -= gone.iter().map(Kept::bytes).sum::<usize>();
            self.first += 1;
        }
    }

    fn keep(&mut self, part: &Part) -> Kept {
        let what = &part.what;
        let none = String::new;
        let id = Identity { module: none(), path: none(), ..what.id };
        Kept {
            axes: self.axes(what.rank as usize % SHARED, &what.axes),
            shard: part.at.as_ref().map(|at| self.shard(&at.shard)),
            part: Part {
                what: What {
                    id,
                    class: none(),
                    group: none(),
                    shape: what.shape.clone(),
                    axes: Vec::new(),
                    slice: what.slice.clone(),
                    ..*what
                },
                at: part.at.as_ref().map(|at| Location { shard: none(), ..*at }),
                ..*part
            },
        }
    }

    /// Parts of one rank mostly lie alike.
    fn axes(&mut self, slot: usize, axes: &[Axis]) -> Arc<[Axis]> {
        if self.axes.len() <= slot {
            self.axes.resize_with(slot + 1, || Arc::new([]));
        }
        let last = &mut self.axes[slot];
        if **last != *axes {
            *last = axes.into();
        }
        last.clone()
    }

    fn shard(&mut self, name: &str) -> Arc<str> {
        match &self.shard {
            Some(last) if **last == *name => last.clone(),
            _ => self.shard.insert(name.into()).clone(),
        }
    }
}

impl Kept {
    fn bytes(&self) -> usize {
        size_of::<Self>() + size_of_val(&self.part.what.shape[..]) + memory_of(&self.axes)
    }
}

impl Recent {
    /// What the record is.
    pub fn identity(&self, series: &Series) -> Identity {
        let Coord { step, micro, call, repeat, apart } = self.coord;
        let key = &series.key;
        let (module, path) = (key.module.to_string(), key.path.to_string());
        Identity {
            job: key.job,
            module,
            kind: key.kind,
            path,
            model: key.model,
            step,
            micro,
            call,
            repeat,
            train: key.train,
            again: 0,
            apart,
            own: false,
            pending: false,
        }
    }

    /// Its parts, as they were journalled.
    pub fn parts(&self, series: &Series) -> Vec<Part> {
        let part = |kept: &Kept| {
            let mut part = kept.part.clone();
            part.what.id = self.identity(series);
            (part.what.class, part.what.group) = (series.key.class.to_string(), series.key.group.to_string());
            part.what.axes = kept.axes.to_vec();
            part.at.iter_mut().zip(&kept.shard).for_each(|(at, shard)| at.shard = shard.to_string());
            part
        };
        self.parts.iter().map(part).collect()
    }
}
