//! What the records of a run have in common.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{Shards, layout::Coordinates};

/// What reads the bytes of records, and names those that are missing. A record together with this is all that is needed to
/// read it: who keeps one keeps no other, and no manifest. It is as large as the job has ranks.
pub struct Source {
    shards: Arc<Shards>,
    /// The ranks that sit at coordinates; the first that was seen there.
    ranks: BTreeMap<Coordinates, u32>,
    /// Why parts of a rank were dropped.
    dropped: BTreeMap<u32, BTreeSet<String>>,
}

impl Source {
    /// Of these shards, when nothing else is known.
    pub fn new(shards: Shards) -> Self {
        Self { shards: Arc::new(shards), ranks: BTreeMap::new(), dropped: BTreeMap::new() }
    }

    /// The same, once it is known where ranks sit (by folder, the first counts) and what was dropped.
    pub fn with<'a>(
        self: &Arc<Self>,
        ranks: impl Iterator<Item = &'a BTreeMap<Coordinates, u32>>,
        lost: &[(u32, u64, String)],
    ) -> Arc<Self> {
        let mut all: BTreeMap<Coordinates, u32> = BTreeMap::new();
        for (place, rank) in ranks.flatten() {
            if !all.contains_key(place) {
                all.insert(place.clone(), *rank);
            }
        }
        let mut dropped: BTreeMap<u32, BTreeSet<String>> = BTreeMap::new();
        for (rank, _, why) in lost {
            let reasons = dropped.entry(*rank).or_default();
            if !reasons.contains(why) {
                reasons.insert(why.clone());
            }
        }
        if (&self.ranks, &self.dropped) == (&all, &dropped) {
            return self.clone();
        }
        Arc::new(Self { shards: self.shards.clone(), ranks: all, dropped })
    }

    /// The shards' files.
    pub fn shards(&self) -> &Shards {
        &self.shards
    }

    /// The rank whose parts have these coordinates, or begin with them.
    pub fn rank_at(&self, place: &Coordinates) -> Option<u32> {
        // What begins with it comes right behind it.
        self.ranks.range(place.clone()..).next().filter(|(full, _)| full.starts_with(place)).map(|(_, &rank)| rank)
    }

    /// Why parts of these ranks were dropped, each reason once.
    pub fn why_dropped(&self, ranks: &[u32]) -> BTreeSet<&str> {
        ranks.iter().filter_map(|rank| self.dropped.get(rank)).flatten().map(String::as_str).collect()
    }
}
