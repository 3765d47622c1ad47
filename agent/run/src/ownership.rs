//! Which ranks have which modules: a pipeline's stages and a layer's experts are not on all of them.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashMap},
    rc::Rc,
    sync::Arc,
};

use wire::{
    hooks::Kind,
    record::{Axis, DATA, MICRO, Placement},
};

use super::{
    format::{Identity, JobId, ModelInfo, Module, Owners, Part},
    limits::{DEPTH, OWNED},
};
use crate::read::natural;

/// Most modules of all models of a run together.
pub const MAX_MODULES: usize = 1 << 17;
/// Most names of modules, and ranks that have them, in all groups of owners.
pub const MAX_OWNED: usize = 1 << 19;
/// Most bytes of these names.
pub const MAX_OWNED_BYTES: usize = 32 << 20;

/// A rank has these modules too; whether that is news. Lists that get too long are given up as a whole: a rank whose modules
/// are not all listed must not be taken for one that lacks them.
/// Those of an earlier job go first: of it nothing is known then.
pub fn add(
    all: &mut Vec<Owners>,
    job: JobId,
    rank: u32,
    model: Option<u32>,
    modules: &[Arc<str>],
) -> Result<bool, TooMany> {
    let is_its = |group: &Owners| (group.job, group.model) == (job, model);
    let old = all.iter().position(|group| is_its(group) && group.ranks.contains(&rank));
    let known = old.and_then(|at| all.get(at)).map(|group| group.modules.clone()).unwrap_or_default();
    if old.is_some() && modules.iter().all(|name| known.binary_search(name).is_ok()) {
        return Ok(false);
    }
    let wanted: BTreeSet<&Arc<str>> = modules.iter().chain(&*known).collect();
    let same = |group: &Owners| is_its(group) && group.modules.iter().eq(wanted.iter().copied());
    let there = all.iter().position(same);
    let text = |names: &mut dyn Iterator<Item = &Arc<str>>| names.map(|name| name.len()).sum::<usize>();
    let (mut count, mut bytes) =
        if there.is_some() { (1, 0) } else { (1 + wanted.len(), text(&mut wanted.iter().copied())) };
    for (at, group) in all.iter().enumerate() {
        // A group that only this rank was in goes.
        if Some(at) != old || group.ranks.len() > 1 {
            count += group.modules.len() + group.ranks.len();
            bytes += text(&mut group.modules.iter());
        }
    }
    if count > MAX_OWNED || bytes > MAX_OWNED_BYTES {
        let earlier = all.iter().map(|group| group.job).min().filter(|earlier| *earlier != job);
        all.retain(|group| earlier.is_some_and(|earlier| group.job != earlier));
        return if earlier.is_some() { add(all, job, rank, model, modules) } else { Err(TooMany) };
    }
    let new = match there {
        Some(at) => at,
        None => {
            let modules = Arc::new(wanted.into_iter().cloned().collect());
            all.push(Owners { job, model, ranks: Vec::new(), modules });
            all.len() - 1
        }
    };
    if let Some(group) = old.and_then(|at| all.get_mut(at)) {
        group.ranks.retain(|&r| r != rank);
    }
    if let Some(group) = all.get_mut(new) {
        group.ranks.push(rank);
        group.ranks.sort_unstable();
    }
    all.retain(|group| !group.ranks.is_empty());
    Ok(true)
}

/// There are more owners than are listed.
#[derive(Debug, PartialEq, Eq)]
pub struct TooMany;

impl ModelInfo {
    /// Modules that a rank has of it; how many there was no room for, of `room` for new ones. News goes between what it is
    /// between there and, where others already are, to the side that the names say.
    pub fn add(&mut self, modules: impl IntoIterator<Item = Module>, mut room: usize) -> usize {
        let places: HashMap<Arc<str>, usize> =
            self.modules.iter().enumerate().map(|(at, m)| (m.name.clone(), at)).collect();
        // What goes before the known module with this index.
        let mut before: BTreeMap<usize, Vec<Module>> = BTreeMap::new();
        let (mut news, mut next, mut left_out) = (Vec::new(), 0, 0);
        for module in modules {
            match places.get(&module.name) {
                None if room == 0 => left_out += 1,
                None => {
                    room -= 1;
                    news.push(module);
                }
                Some(&at) => {
                    self.insert(&mut before, std::mem::take(&mut news), next, at);
                    if self.modules[at] != module {
                        Arc::make_mut(&mut self.modules)[at] = module;
                    }
                    next = at + 1;
                }
            }
        }
        self.insert(&mut before, news, next, self.modules.len());
        if !before.is_empty() {
            let new: usize = before.values().map(Vec::len).sum();
            let mut out = Vec::with_capacity(self.modules.len() + new);
            for (at, module) in self.modules.iter().enumerate() {
                out.extend(before.remove(&at).unwrap_or_default());
                out.push(module.clone());
            }
            out.extend(before.into_values().flatten());
            self.modules = Arc::new(out);
        }
        left_out
    }

    fn insert(&self, before: &mut BTreeMap<usize, Vec<Module>>, news: Vec<Module>, from: usize, to: usize) {
        let (Some(first), there) = (news.first(), self.modules.get(from)) else { return };
        let is_first = there.is_none_or(|there| natural(&first.name) < natural(&there.name));
        before.entry(if is_first { from.min(to) } else { to.max(from) }).or_default().extend(news);
    }
}

/// The modules that some ranks of a job lack, by model and name, and who has them.
#[derive(Debug, Default)]
pub struct PartialOwnership {
    /// By model (`None`: of all of which the ranks capture nothing) and module: the groups that have it.
    having: HashMap<Option<u32>, HashMap<Arc<str>, Vec<usize>>>,
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

impl PartialOwnership {
    /// Of a job: nothing, unless every rank of its `world` has said what it has.
    pub fn new(job: JobId, owners: &[Owners], world: u32) -> Self {
        Self::of(job, owners, world, |_, _| true)
    }

    /// Only what is to be known for one module.
    pub fn of_module(job: JobId, owners: &[Owners], world: u32, model: u32, name: &str) -> Self {
        let holds =
            |module: &str| name.strip_prefix(module).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
        Self::of(job, owners, world, |other, module| other.is_none_or(|other| other == model) && holds(module))
    }

    fn of(job: JobId, owners: &[Owners], world: u32, wanted: impl Fn(Option<u32>, &str) -> bool) -> Self {
        let owners: Vec<&Owners> = owners.iter().filter(|group| group.job == job).collect();
        let told: BTreeSet<u32> = owners.iter().flat_map(|group| &group.ranks).copied().collect();
        if owners.len() < 2 || world < 2 || !(0..world).all(|rank| told.contains(&rank)) {
            return Self::default();
        }
        let mut all = Self { told: told.len(), ..Self::default() };
        for (number, group) in owners.iter().enumerate() {
            all.groups.push(group.ranks.iter().copied().collect());
            let having = all.having.entry(group.model).or_default();
            for module in group.modules.iter().filter(|module| wanted(group.model, module)) {
                having.entry(module.clone()).or_default().push(number);
            }
        }
        all
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// Whether it is known that some ranks lack the module of a record.
    pub fn knows(&self, id: &Identity) -> bool {
        !self.is_empty() && self.owners(id.model, &id.module).is_some()
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

    /// Makes the parts of a record lie among those ranks alone that have its module, see [`lie_among`].
    pub fn settle(&self, parts: &mut [Part]) {
        let Some(id) = parts.first().map(|part| part.what.id.clone()) else { return };
        let Some(owners) = self.owners(id.model, &id.module) else { return };
        lie_among(parts, &owners);
    }

    /// Whether no other ranks than these have a module.
    pub fn has_no_other(&self, ranks: &BTreeSet<u32>, id: &Identity) -> bool {
        self.owners(id.model, &id.module).is_some_and(|owners| owners.is_subset(ranks))
    }
}

/// Makes parts lie among these ranks alone, once all of these are there: along an axis on which they are one member they are
/// no pieces, and along one whose other members have nothing it is not known what they are. Of what torch has cut, the other
/// members have pieces, whether they came or not: that is a parameter, and what lies along another axis than the batch's.
pub fn lie_among(parts: &mut [Part], only: &BTreeSet<u32>) {
    let ranks: BTreeSet<u32> = parts.iter().map(|part| part.what.rank).collect();
    let depth = parts.iter().map(|part| part.what.axes.len()).min().unwrap_or_default();
    if ranks != *only || parts.iter().any(|part| part.what.axes.len() != depth) {
        return;
    }
    for at in (0..depth).rev() {
        let members: BTreeSet<u32> = parts.iter().map(|part| part.what.axes[at].index).collect();
        let fits = |axis: &Axis, is_parameter: bool| {
            axis.name == MICRO
                || members.len() == axis.size as usize
                || match axis.place {
                    Placement::Replicate | Placement::Flat { .. } | Placement::Partial => true,
                    Placement::Shard { .. } | Placement::HeadTail { .. } => is_parameter || axis.name != DATA,
                    Placement::ReplicateOrShard { .. } | Placement::Unknown => false,
                }
        };
        if parts.iter().any(|part| fits(&part.what.axes[at], part.what.id.kind.is_in(Kind::OF_PARAMETERS))) {
            continue;
        }
        for part in parts.iter_mut() {
            if members.len() == 1 {
                let axis = part.what.axes.remove(at);
                // Its rows are all that there are of the batch.
                if axis.name == DATA {
                    part.what.dp_size = (part.what.dp_size / axis.size.max(1)).max(1);
                }
                continue;
            }
            let axis = &mut part.what.axes[at];
            axis.index = members.range(..axis.index).count() as u32;
            (axis.size, axis.place, axis.input_digest) = (members.len() as u32, Placement::Unknown, None);
        }
    }
}

/// Makes parts of models that ranks have of their own lie on no mesh: one is whole, and several are one thing each.
pub fn lie_alone(parts: &mut [Part]) {
    let several = parts.iter().any(|part| part.what.rank != parts[0].what.rank);
    let axis =
        |rank| Axis { name: "rank".into(), index: rank, size: u32::MAX, place: Placement::Unknown, input_digest: None };
    for part in parts {
        let kept = part.what.axes.drain(..).filter(|axis| axis.name == MICRO);
        part.what.axes = several.then(|| axis(part.what.rank)).into_iter().chain(kept).collect();
        part.what.dp_size = 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{format::What, testing};

    fn names(text: &str) -> Vec<Arc<str>> {
        text.split_whitespace().map(Arc::from).collect()
    }

    fn group(ranks: &[u32], modules: &str) -> Owners {
        Owners { job: JobId::default(), model: Some(0), ranks: ranks.to_vec(), modules: Arc::new(names(modules)) }
    }

    fn add(all: &mut Vec<Owners>, rank: u32, model: Option<u32>, modules: Vec<Arc<str>>) -> bool {
        super::add(all, JobId::default(), rank, model, &modules).unwrap()
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
            names(text).into_iter().map(|name| Module { name, class: "C".into(), kinds: 1 }).collect::<Vec<_>>()
        };
        for (one, other) in [("a e e.2 e.10 z", "0 a e e.11 e.12 z zz"), ("0 a e e.11 e.12 z zz", "a e e.2 e.10 z")] {
            let mut model = ModelInfo { model: 0, modules: Arc::new(info(one)) };
            assert_eq!(model.add(info(other), 5), 0);
            assert_eq!(*model.modules, info("0 a e e.2 e.10 e.11 e.12 z zz"));
        }
        let mut model = ModelInfo { model: 0, modules: Arc::new(info("a c")) };
        assert_eq!((model.add(info("a b c d e"), 1), &*model.modules), (2, &info("a b c")));
    }

    #[test]
    fn lists_that_get_too_long_are_given_up_as_a_whole() {
        let mut all = Vec::new();
        let long = |from: usize| (from..from + MAX_OWNED / 2 + 1).map(|n| n.to_string().into()).collect::<Vec<_>>();
        assert!(add(&mut all, 0, Some(0), long(0)));
        assert!(add(&mut all, 1, Some(0), long(0)), "the same names are there once");
        let next = JobId { job: 1, attempt: 0 };
        assert_eq!(super::add(&mut all, next, 2, Some(0), &long(1)), Ok(true), "those of an earlier job go for it");
        assert_eq!(all.iter().map(|group| group.job).collect::<Vec<_>>(), [next]);
        assert_eq!(super::add(&mut all, next, 3, Some(0), &long(2)), Err(TooMany));
        assert!(all.is_empty());
        let wide: Vec<Arc<str>> = (0..MAX_OWNED_BYTES / 4096 + 1).map(|n| format!("{n:04096}").into()).collect();
        assert_eq!(super::add(&mut all, next, 0, Some(0), &wide), Err(TooMany));
    }

    #[test]
    fn what_is_known_for_one_module_is_as_much_as_it_needs() {
        let all = [group(&[0], "a b b.c"), group(&[1], "a")];
        let known = PartialOwnership::of_module(JobId::default(), &all, 2, 0, "b.c.weight");
        assert_eq!(known.owners(0, "b.c.weight").as_deref(), Some(&BTreeSet::from([0])));
        for (model, name) in [(0, "a.b"), (0, "bc"), (1, "b")] {
            assert_eq!(
                PartialOwnership::of_module(JobId::default(), &all, 2, model, name).owners(model, name),
                None,
                "{name}"
            );
        }
    }

    #[test]
    fn nothing_is_known_before_all_ranks_have_spoken() {
        let all = [group(&[0], "a b"), group(&[1], "a")];
        assert!(PartialOwnership::new(JobId::default(), &all, 3).is_empty());
        assert!(PartialOwnership::new(JobId { job: 0, attempt: 1 }, &all, 2).is_empty(), "of another attempt");
        let known = PartialOwnership::new(JobId::default(), &all, 2);
        assert_eq!(known.owners(0, "b.weight").as_deref(), Some(&BTreeSet::from([0])));
        assert_eq!(known.owners(0, "a.weight"), None);
        assert_eq!(known.owners(1, "b.weight"), None);
        let unnumbered = Owners { model: None, ..group(&[1], "b") };
        let known = PartialOwnership::new(JobId::default(), &[group(&[0], "a b"), group(&[1], "a"), unnumbered], 2);
        assert_eq!(known.owners(0, "b.weight"), None);
    }

    fn parts(ranks: &[u32], size: u32) -> Vec<Part> {
        let place = || Placement::Shard { dim: 0 };
        let meta = |rank| testing::on_rank(testing::meta("b", 0, 4), rank, size, place());
        ranks
            .iter()
            .map(|&rank| Part { what: What::from_meta(meta(rank)), at: None, stats: None, same: None })
            .collect()
    }

    #[test]
    fn what_one_rank_alone_has_is_no_piece() {
        let known = PartialOwnership::new(JobId::default(), &[group(&[1], "b"), group(&[0, 2, 3], "a")], 4);
        let mut alone = parts(&[1], 4);
        known.settle(&mut alone);
        assert!(alone[0].what.axes.is_empty());
    }

    #[test]
    fn what_torch_has_cut_stays_a_piece_also_where_the_others_made_none() {
        let cut = |name: &str, kind: Kind| {
            let mut alone = parts(&[1], 2);
            (alone[0].what.axes[0].name, alone[0].what.id.kind) = (name.into(), kind);
            let before = alone.clone();
            lie_among(&mut alone, &BTreeSet::from([1]));
            alone == before
        };
        assert!(!cut(DATA, Kind::Forward), "rows of the batch");
        assert!(cut("tp", Kind::Forward) && cut(DATA, Kind::Param) && cut(DATA, Kind::GradUnclipped));
    }

    #[test]
    fn what_some_ranks_have_is_not_known_and_waits_for_all_of_them() {
        let known = PartialOwnership::new(JobId::default(), &[group(&[1, 3], "b"), group(&[0, 2], "a")], 4);
        let mut early = parts(&[1], 4);
        known.settle(&mut early);
        assert_eq!(early, parts(&[1], 4));
        let mut both = parts(&[1, 3], 4);
        known.settle(&mut both);
        let axes: Vec<&Axis> = both.iter().map(|part| &part.what.axes[0]).collect();
        assert_eq!(axes.iter().map(|a| (a.index, a.size)).collect::<Vec<_>>(), [(0, 2), (1, 2)]);
        assert!(axes.iter().all(|a| a.place == Placement::Unknown));
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
