//! Which ranks have which modules: a pipeline's stages and a layer's experts are not on all of them.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashMap},
    rc::Rc,
};

use wire::{
    control::ModuleInfo,
    record::{Axis, MICRO, Place},
};

use super::{
    format::{ModelInfo, Owners, Part},
    limits::{DEPTH, OWNED},
};
use crate::read::natural;

/// A rank has these modules too; whether that is news.
pub fn add(all: &mut Vec<Owners>, rank: u32, model: Option<u32>, modules: Vec<String>) -> bool {
    let old = all.iter().position(|group| group.model == model && group.ranks.contains(&rank));
    let known = old.and_then(|at| all.get(at)).map(|group| group.modules.iter().cloned());
    let wanted: BTreeSet<String> = modules.into_iter().chain(known.into_iter().flatten()).collect();
    let wanted: Vec<String> = wanted.into_iter().collect();
    if let Some(group) = old.and_then(|at| all.get_mut(at)) {
        if group.modules == wanted {
            return false;
        }
        group.ranks.retain(|&r| r != rank);
    }
    match all.iter_mut().find(|group| group.model == model && group.modules == wanted) {
        Some(group) => {
            group.ranks.push(rank);
            group.ranks.sort_unstable();
        }
        None => all.push(Owners { model, ranks: vec![rank], modules: wanted }),
    }
    all.retain(|group| !group.ranks.is_empty());
    true
}

impl ModelInfo {
    /// Modules that a rank has of it. News goes between what it is between there and, where others already are, to the side
    /// that the names say.
    pub fn add(&mut self, modules: Vec<ModuleInfo>) {
        let places: HashMap<String, usize> =
            self.modules.iter().enumerate().map(|(at, m)| (m.name.clone(), at)).collect();
        // What goes before the known module with this index.
        let mut before: BTreeMap<usize, Vec<ModuleInfo>> = BTreeMap::new();
        let (mut news, mut next) = (Vec::new(), 0);
        for module in modules {
            let Some(&at) = places.get(&module.name) else {
                news.push(module);
                continue;
            };
            self.insert(&mut before, std::mem::take(&mut news), next, at);
            self.modules[at] = module;
            next = at + 1;
        }
        self.insert(&mut before, news, next, self.modules.len());
        if before.is_empty() {
            return;
        }
        let mut out = Vec::with_capacity(self.modules.len());
        for (at, module) in self.modules.drain(..).enumerate() {
            out.extend(before.remove(&at).unwrap_or_default());
            out.push(module);
        }
        out.extend(before.into_values().flatten());
        self.modules = out;
    }

    fn insert(&self, before: &mut BTreeMap<usize, Vec<ModuleInfo>>, news: Vec<ModuleInfo>, from: usize, to: usize) {
        let (Some(first), there) = (news.first(), self.modules.get(from)) else { return };
        let is_first = there.is_none_or(|there| natural(&first.name) < natural(&there.name));
        before.entry(if is_first { from.min(to) } else { to.max(from) }).or_default().extend(news);
    }
}

/// The modules that some ranks of a job lack, by model and name, and who has them.
#[derive(Debug, Default)]
pub struct Scattered {
    /// By model (`None`: of all of which the ranks capture nothing) and module: the groups that have it.
    having: HashMap<Option<u32>, HashMap<String, Vec<usize>>>,
    groups: Vec<BTreeSet<u32>>,
    /// Ranks in all.
    told: usize,
    unions: RefCell<Unions>,
}

/// The ranks of sets of groups, as far as they were asked for.
#[derive(Debug, Default)]
struct Unions {
    known: HashMap<Vec<usize>, Option<Rc<BTreeSet<u32>>>>,
    /// Ranks gone through.
    spent: usize,
}

impl Scattered {
    /// Nothing, unless every rank of `world` has said what it has.
    pub fn new(owners: &[Owners], world: u32) -> Self {
        let told: BTreeSet<u32> = owners.iter().flat_map(|group| &group.ranks).copied().collect();
        if owners.len() < 2 || world < 2 || !(0..world).all(|rank| told.contains(&rank)) {
            return Self::default();
        }
        let mut all = Self { told: told.len(), ..Self::default() };
        for (number, group) in owners.iter().enumerate() {
            all.groups.push(group.ranks.iter().copied().collect());
            let having = all.having.entry(group.model).or_default();
            for module in &group.modules {
                having.entry(module.clone()).or_default().push(number);
            }
        }
        all
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// The ranks that have a module, or the one that a parameter is in; `None`: all.
    fn owners(&self, model: u32, mut name: &str) -> Option<Rc<BTreeSet<u32>>> {
        let own = self.having.get(&Some(model))?;
        for _ in 0..DEPTH {
            // A model that has no number on a rank may be any.
            let others = self.having.get(&None).and_then(|having| having.get(name));
            let groups: Vec<usize> = own.get(name).into_iter().chain(others).flatten().copied().collect();
            if let Some(ranks) = self.union(groups) {
                return Some(ranks);
            }
            name = name.rsplit_once('.')?.0;
        }
        None
    }

    /// The ranks in any of these groups; `None` where there are none, or all, or too many to be told.
    fn union(&self, groups: Vec<usize>) -> Option<Rc<BTreeSet<u32>>> {
        if groups.is_empty() {
            return None;
        }
        let Unions { known, spent } = &mut *self.unions.borrow_mut();
        if let Some(ranks) = known.get(&groups) {
            return ranks.clone();
        }
        *spent =
            groups.iter().filter_map(|&n| self.groups.get(n)).fold(*spent, |n, ranks| n.saturating_add(ranks.len()));
        let ranks = (*spent < OWNED)
            .then(|| groups.iter().filter_map(|&n| self.groups.get(n)).flatten().copied().collect::<BTreeSet<u32>>());
        let ranks = ranks.filter(|ranks| ranks.len() < self.told).map(Rc::new);
        known.insert(groups, ranks.clone());
        ranks
    }

    /// Makes the parts of a record lie among those ranks alone that have its module, once all of these are there: along an
    /// axis on which they are one member they are no pieces, and along one whose other members lack the module it is not
    /// known what they are.
    pub fn settle(&self, parts: &mut [Part]) {
        let Some(id) = parts.first().map(|part| part.what.id.clone()) else { return };
        let Some(owners) = self.owners(id.model, &id.module) else { return };
        let ranks: BTreeSet<u32> = parts.iter().map(|part| part.what.rank).collect();
        let depth = parts.iter().map(|part| part.what.axes.len()).min().unwrap_or_default();
        if ranks != *owners || parts.iter().any(|part| part.what.axes.len() != depth) {
            return;
        }
        for at in (0..depth).rev() {
            let members: BTreeSet<u32> = parts.iter().map(|part| part.what.axes[at].index).collect();
            let fits = |axis: &Axis| {
                axis.name == MICRO
                    || members.len() == axis.size as usize
                    || matches!(axis.place, Place::Replicate | Place::Flat { .. } | Place::Partial)
            };
            if parts.iter().any(|part| fits(&part.what.axes[at])) {
                continue;
            }
            for part in parts.iter_mut() {
                if members.len() == 1 {
                    part.what.axes.remove(at);
                    continue;
                }
                let axis = &mut part.what.axes[at];
                axis.index = members.range(..axis.index).count() as u32;
                (axis.size, axis.place, axis.given) = (members.len() as u32, Place::Unknown, None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{format::What, testing};

    fn names(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn group(ranks: &[u32], modules: &str) -> Owners {
        Owners { model: Some(0), ranks: ranks.to_vec(), modules: names(modules) }
    }

    #[test]
    fn ranks_with_the_same_modules_are_one_group() {
        let mut all = Vec::new();
        assert!(add(&mut all, 1, Some(0), names("b a")));
        assert!(add(&mut all, 0, Some(0), names("a b")));
        assert_eq!(all, [group(&[0, 1], "a b")]);
        assert!(!add(&mut all, 0, Some(0), names("b")));
        assert!(add(&mut all, 1, Some(0), names("c")));
        assert_eq!(all, [group(&[0], "a b"), group(&[1], "a b c")]);
        assert!(add(&mut all, 0, None, names("d")));
        assert_eq!(all.last(), Some(&Owners { model: None, ..group(&[0], "d") }));
    }

    #[test]
    fn modules_of_another_rank_come_between_those_they_are_between_there() {
        let info = |text: &str| {
            names(text).into_iter().map(|name| ModuleInfo { name, class: "C".into(), kinds: 1 }).collect::<Vec<_>>()
        };
        for (one, other) in [("a e e.2 e.10 z", "0 a e e.11 e.12 z zz"), ("0 a e e.11 e.12 z zz", "a e e.2 e.10 z")] {
            let mut model = ModelInfo { model: 0, modules: info(one) };
            model.add(info(other));
            assert_eq!(model.modules, info("0 a e e.2 e.10 e.11 e.12 z zz"));
        }
    }

    #[test]
    fn nothing_is_known_before_all_ranks_have_spoken() {
        let all = [group(&[0], "a b"), group(&[1], "a")];
        assert!(Scattered::new(&all, 3).is_empty());
        let known = Scattered::new(&all, 2);
        assert_eq!(known.owners(0, "b.weight").as_deref(), Some(&BTreeSet::from([0])));
        assert_eq!(known.owners(0, "a.weight"), None);
        assert_eq!(known.owners(1, "b.weight"), None);
        let unnumbered = Owners { model: None, ..group(&[1], "b") };
        let known = Scattered::new(&[group(&[0], "a b"), group(&[1], "a"), unnumbered], 2);
        assert_eq!(known.owners(0, "b.weight"), None);
    }

    fn parts(ranks: &[u32], size: u32) -> Vec<Part> {
        let place = || Place::Shard { dim: 0, offset: None };
        let meta = |rank| testing::on_rank(testing::meta("b", 0, 4), rank, size, place());
        ranks
            .iter()
            .map(|&rank| Part { what: What::from_meta(meta(rank)), at: None, stats: None, same: None })
            .collect()
    }

    #[test]
    fn what_one_rank_alone_has_is_no_piece() {
        let known = Scattered::new(&[group(&[1], "b"), group(&[0, 2, 3], "a")], 4);
        let mut alone = parts(&[1], 4);
        known.settle(&mut alone);
        assert!(alone[0].what.axes.is_empty());
    }

    #[test]
    fn what_some_ranks_have_is_not_known_and_waits_for_all_of_them() {
        let known = Scattered::new(&[group(&[1, 3], "b"), group(&[0, 2], "a")], 4);
        let mut early = parts(&[1], 4);
        known.settle(&mut early);
        assert_eq!(early, parts(&[1], 4));
        let mut both = parts(&[1, 3], 4);
        known.settle(&mut both);
        let axes: Vec<&Axis> = both.iter().map(|part| &part.what.axes[0]).collect();
        assert_eq!(axes.iter().map(|a| (a.index, a.size)).collect::<Vec<_>>(), [(0, 2), (1, 2)]);
        assert!(axes.iter().all(|a| a.place == Place::Unknown));
        // As on a pipeline's stage that several ranks share the batch of.
        let mut stage = parts(&[1, 3], 2);
        for (index, part) in stage.iter_mut().enumerate() {
            part.what.axes[0].index = index as u32;
        }
        let before = stage.clone();
        known.settle(&mut stage);
        assert_eq!(stage, before);
    }
}
