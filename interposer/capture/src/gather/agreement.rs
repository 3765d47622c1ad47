//! What becomes of each tensor, decided in the same way on every rank.
//!
//! All ranks tell each other, in rounds, what they have ([`Report`]). Every rank feeds the same rounds to a machine of its
//! own, so all come to the same verdicts in the same order, and no transfer begins that one of them does not know of.
//!
//! A tensor is gathered once as many ranks have offered a part of it as its layout has members. Each part goes
//! to the agent of the rank that has it where that cannot happen any more: a rank went on to the next step
//! without its part, or gave it up, or describes another layout, or has it on the CPU where others have it on a device.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use wire::{
    hooks::Kind,
    record::{MICRO, RecordMeta},
};

/// Most tensors of which that is remembered, as in a job without steps whose ranks do different things.
const REMEMBERED: usize = 4096;

/// What a rank says in a round.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// The step that it is in. All it offers of earlier ones is in this round or an earlier one.
    pub step: u64,
    /// It ends, and offers nothing any more.
    pub closing: bool,
    /// It takes part in no further round.
    pub leaving: bool,
    /// What it has, in order; over all rounds a rank's offers are numbered from 0.
    pub offers: Vec<Offer>,
    /// Numbers of its offers for which it waits no longer.
    pub withdrawn: Vec<u64>,
}

/// Where a part is that a rank offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Held {
    /// Its agent has it already.
    Not = 0,
    /// On the CPU.
    Host = 1,
    /// On a device.
    Device = 2,
}

/// A part that a rank has.
#[derive(Clone, Debug, PartialEq)]
pub struct Offer {
    /// What it is.
    pub meta: RecordMeta,
    /// Where.
    pub held: Held,
}

/// A rank's part.
#[derive(Clone, Debug, PartialEq)]
pub struct OfferedPart {
    /// Whose: an index into the round.
    pub member: usize,
    /// Which of its offers.
    pub number: u64,
    /// Where it is.
    pub held: Held,
    /// What it is.
    pub meta: RecordMeta,
}

/// What becomes of a tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// Every member has its part: the first of them gets all.
    Gather(Vec<OfferedPart>),
    /// Each part goes to the agent of its rank.
    PerRank(Vec<OfferedPart>, Why),
}

/// Why a tensor is not gathered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Ranks that should have a part went on without one, or are late with it.
    Skipped,
    /// Parts describe different layouts or are of the same place, or are not all on a device.
    Differs,
    /// A rank has brought its part to its agent, which is said by itself.
    Withdrawn,
}

/// What identifies a tensor.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Key {
    step: u64,
    model: u32,
    micro: (u32, u32),
    call: u32,
    module: String,
    kind: Kind,
    path: String,
    repeat: u32,
    train: bool,
}

impl Key {
    fn of(meta: &RecordMeta) -> Self {
        let cut = meta.axes.iter().find(|axis| axis.name == MICRO).map_or(0, |axis| axis.index);
        Self {
            step: meta.step,
            model: meta.model,
            micro: (meta.micro, cut),
            call: meta.call,
            module: meta.module.clone(),
            kind: meta.kind,
            path: meta.path.clone(),
            repeat: meta.repeat,
            train: meta.train,
        }
    }
}

/// Over how many ranks a tensor lies.
pub fn members(meta: &RecordMeta) -> u64 {
    meta.axes.iter().filter(|axis| axis.name != MICRO).map(|axis| u64::from(axis.size)).product()
}

fn coordinates(meta: &RecordMeta) -> Vec<(&str, u32, u32)> {
    meta.axes.iter().map(|axis| (axis.name.as_str(), axis.index, axis.size)).collect()
}

/// The machine.
#[derive(Debug)]
pub struct Agreement {
    steps: Vec<u64>,
    closed: Vec<bool>,
    numbered: Vec<u64>,
    open: BTreeMap<Key, Open>,
    keys: HashMap<(usize, u64), Key>,
    /// Tensors whose ranks did not wait for all parts, with how many there were: those that still come have not to wait.
    given_up: BTreeMap<Key, u64>,
}

#[derive(Debug, Default)]
struct Open {
    parts: Vec<OfferedPart>,
    /// A rank brought its part to its agent.
    given_up: bool,
    /// A rank has waited too long for the others' parts.
    stale: bool,
}

impl Agreement {
    /// Of `size` ranks.
    pub fn new(size: usize) -> Self {
        Self {
            steps: vec![0; size],
            closed: vec![false; size],
            numbered: vec![0; size],
            open: BTreeMap::new(),
            keys: HashMap::new(),
            given_up: BTreeMap::new(),
        }
    }

    /// Takes what all ranks said in a round, in order of the ranks.
    pub fn take(&mut self, round: Vec<Report>) -> Vec<Verdict> {
        for (member, report) in round.into_iter().enumerate() {
            if let (Some(step), Some(closed)) = (self.steps.get_mut(member), self.closed.get_mut(member)) {
                (*step, *closed) = (report.step, report.closing || report.leaving);
            }
            for offer in report.offers {
                let Some(next) = self.numbered.get_mut(member) else { continue };
                let (number, key) = (*next, Key::of(&offer.meta));
                *next += 1;
                self.keys.insert((member, number), key.clone());
                let given_up = offer.held == Held::Not || self.given_up.contains_key(&key);
                let open = self.open.entry(key).or_default();
                open.given_up |= given_up;
                open.parts.push(OfferedPart { member, number, held: offer.held, meta: offer.meta });
            }
            for number in report.withdrawn {
                if let Some(open) = self.keys.get(&(member, number)).and_then(|key| self.open.get_mut(key)) {
                    open.stale = true;
                }
            }
        }
        let settled: Vec<(Key, Option<Why>)> =
            self.open.iter().filter_map(|(key, open)| Some((key.clone(), self.settled(key, open)?))).collect();
        let verdicts = settled.into_iter().map(|(key, why)| self.close(&key, why)).collect();
        let steps = self.steps.iter().zip(&self.closed).filter(|(_, closed)| !**closed).map(|(step, _)| *step);
        let first = steps.min().unwrap_or(u64::MAX);
        self.given_up.retain(|key, _| key.step >= first);
        while self.given_up.len() > REMEMBERED {
            self.given_up.pop_first();
        }
        verdicts
    }

    /// All that is open goes to the agents of its ranks.
    pub fn dissolve(&mut self) -> Vec<Verdict> {
        let keys: Vec<Key> = self.open.keys().cloned().collect();
        keys.iter().map(|key| self.close(key, Some(Why::Withdrawn))).collect()
    }

    /// Whether all have said that they end, and nothing is open.
    pub fn is_over(&self) -> bool {
        self.open.is_empty() && self.closed.iter().all(|&closed| closed)
    }

    /// Which members have no part of a tensor, where it lies over all of them.
    pub fn absent(&self, parts: &[OfferedPart]) -> Option<Vec<usize>> {
        let all = parts.first().is_some_and(|part| members(&part.meta) == self.steps.len() as u64);
        let there: BTreeSet<usize> = parts.iter().map(|part| part.member).collect();
        all.then(|| (0..self.steps.len()).filter(|member| !there.contains(member)).collect())
    }

    /// Whether it is known what becomes of a tensor: `Some(None)` if it is gathered.
    fn settled(&self, key: &Key, open: &Open) -> Option<Option<Why>> {
        if open.given_up {
            return Some(Some(Why::Withdrawn));
        }
        let wanted = open.parts.iter().map(|part| members(&part.meta));
        let held = open.parts.first().map(|part| part.held);
        let uniform = wanted.clone().min() == wanted.clone().max() && open.parts.iter().all(|p| Some(p.held) == held);
        let there: BTreeSet<_> = open.parts.iter().map(|part| coordinates(&part.meta)).collect();
        let distinct = open.parts.len() == there.len();
        if uniform && distinct && wanted.max() == Some(there.len() as u64) {
            return Some(None);
        }
        let over = |member: usize| {
            open.parts.iter().any(|part| part.member == member)
                || self.closed.get(member).copied().unwrap_or(true)
                || self.steps.get(member).is_none_or(|&step| step > key.step)
        };
        let skipped = open.stale || (0..self.steps.len()).all(over);
        skipped.then_some(Some(if uniform && distinct { Why::Skipped } else { Why::Differs }))
    }

    fn close(&mut self, key: &Key, why: Option<Why>) -> Verdict {
        let Open { parts, given_up, stale } = self.open.remove(key).unwrap_or_default();
        if given_up || (stale && why.is_some()) {
            let seen = self.given_up.remove(key).unwrap_or_default() + parts.len() as u64;
            if parts.first().is_some_and(|part| seen < members(&part.meta)) {
                self.given_up.insert(key.clone(), seen);
            }
        }
        for part in &parts {
            self.keys.remove(&(part.member, part.number));
        }
        match why {
            None => Verdict::Gather(parts),
            Some(why) => Verdict::PerRank(parts, why),
        }
    }
}

#[cfg(test)]
mod tests {
    use wire::{
        dtype::DType,
        record::{Axis, Placement},
    };

    use super::*;

    fn part(module: &str, step: u64, index: u32, size: u32) -> Offer {
        let axes =
            vec![Axis { name: "dp".into(), index, size, place: Placement::Shard { dim: 0 }, input_digest: None }];
        let meta = RecordMeta { step, axes, rank: index, ..RecordMeta::output(module, DType::Float32, vec![2]) };
        Offer { meta, held: Held::Host }
    }

    fn says(step: u64, offers: &[Offer]) -> Report {
        Report { step, offers: offers.to_vec(), ..Report::default() }
    }

    fn parts(verdict: &Verdict) -> &[OfferedPart] {
        match verdict {
            Verdict::Gather(parts) | Verdict::PerRank(parts, _) => parts,
        }
    }

    fn of(verdicts: &[Verdict]) -> Vec<(String, Option<Why>)> {
        let one = |verdict: &Verdict| match verdict {
            Verdict::Gather(parts) => (parts[0].meta.module.clone(), None),
            Verdict::PerRank(parts, why) => (parts[0].meta.module.clone(), Some(*why)),
        };
        verdicts.iter().map(one).collect()
    }

    #[test]
    fn a_tensor_is_gathered_when_the_last_part_is_offered_whatever_the_order() {
        let mut agreement = Agreement::new(2);
        assert_eq!(agreement.take(vec![says(0, &[part("a", 0, 0, 2), part("b", 0, 0, 2)]), says(0, &[])]), []);
        let verdicts = agreement.take(vec![says(0, &[]), says(0, &[part("b", 0, 1, 2)])]);
        assert_eq!(of(&verdicts), [("b".into(), None)]);
        assert_eq!(parts(&verdicts[0]).iter().map(|p| (p.member, p.number)).collect::<Vec<_>>(), [(0, 1), (1, 0)]);
        assert_eq!(of(&agreement.take(vec![says(0, &[]), says(0, &[part("a", 0, 1, 2)])])), [("a".into(), None)]);
    }

    #[test]
    fn a_rank_that_goes_on_without_a_part_leaves_the_others_to_their_agents_and_is_named() {
        let mut agreement = Agreement::new(2);
        assert_eq!(agreement.take(vec![says(3, &[part("a", 3, 0, 2)]), says(3, &[])]), []);
        // Its parts of the step are in this round or before it.
        let verdicts = agreement.take(vec![says(3, &[]), says(4, &[])]);
        assert_eq!(of(&verdicts), [("a".into(), Some(Why::Skipped))]);
        assert_eq!(agreement.absent(parts(&verdicts[0])), Some(vec![1]));
    }

    #[test]
    fn a_rank_that_ends_is_waited_for_no_longer() {
        let mut agreement = Agreement::new(2);
        agreement.take(vec![says(0, &[part("a", 0, 0, 2)]), says(0, &[])]);
        let verdicts = agreement.take(vec![says(0, &[]), Report { closing: true, ..Report::default() }]);
        assert_eq!(of(&verdicts), [("a".into(), Some(Why::Skipped))]);
        assert!(!agreement.is_over());
        agreement
            .take(vec![Report { closing: true, ..Report::default() }, Report { closing: true, ..Report::default() }]);
        assert!(agreement.is_over());
    }

    #[test]
    fn what_a_rank_gave_up_no_rank_transfers() {
        let mut agreement = Agreement::new(2);
        let gone = Offer { held: Held::Not, ..part("a", 0, 0, 2) };
        assert_eq!(of(&agreement.take(vec![says(0, &[gone]), says(0, &[])])), [("a".into(), Some(Why::Withdrawn))]);
    }

    #[test]
    fn a_rank_that_is_late_is_waited_for_no_longer() {
        let mut agreement = Agreement::new(2);
        assert_eq!(agreement.take(vec![says(0, &[part("a", 0, 0, 2)]), says(0, &[])]), []);
        let withdrawn = Report { withdrawn: vec![0], ..Report::default() };
        assert_eq!(of(&agreement.take(vec![withdrawn, says(0, &[])])), [("a".into(), Some(Why::Skipped))]);
        // It comes after all, and stays where it is; that is said already.
        let verdicts = agreement.take(vec![says(0, &[]), says(0, &[part("a", 0, 1, 2)])]);
        assert_eq!(of(&verdicts), [("a".into(), Some(Why::Withdrawn))]);
    }

    #[test]
    fn what_comes_of_a_tensor_that_was_given_up_has_not_to_wait_and_no_rank_is_blamed() {
        let mut agreement = Agreement::new(3);
        let gone = Offer { held: Held::Not, ..part("a", 0, 0, 3) };
        assert_eq!(of(&agreement.take(vec![says(0, &[gone]), says(0, &[]), says(0, &[])])).len(), 1);
        for member in [1, 2] {
            let mut round = vec![says(0, &[]), says(0, &[]), says(0, &[])];
            round[member] = says(0, &[part("a", 0, member as u32, 3)]);
            assert_eq!(of(&agreement.take(round)), [("a".into(), Some(Why::Withdrawn))]);
        }
        assert!(agreement.given_up.is_empty(), "all of it came");
        let gone = Offer { held: Held::Not, ..part("a", 0, 0, 3) };
        agreement.take(vec![says(0, &[gone]), says(0, &[]), says(0, &[])]);
        agreement.take(vec![says(1, &[]), says(1, &[]), says(1, &[])]);
        assert!(agreement.given_up.is_empty(), "no more of it can come");
    }

    #[test]
    fn parts_of_different_layouts_are_never_gathered() {
        let mut agreement = Agreement::new(3);
        let round = vec![says(0, &[part("a", 0, 0, 2)]), says(0, &[part("a", 0, 1, 3)]), says(0, &[])];
        assert_eq!(agreement.take(round), []);
        let verdicts = agreement.take(vec![says(1, &[]), says(1, &[]), says(1, &[])]);
        assert_eq!(of(&verdicts), [("a".into(), Some(Why::Differs))]);
    }

    #[test]
    fn stages_of_a_pipeline_that_have_parts_of_one_name_are_never_gathered() {
        let mut agreement = Agreement::new(2);
        let stage = [part("(root)", 0, 0, 1)];
        let verdicts = agreement.take(vec![says(0, &stage), says(0, &stage)]);
        assert_eq!(of(&verdicts), [("(root)".into(), Some(Why::Differs))]);
    }

    #[test]
    fn parts_on_a_device_and_on_the_cpu_are_never_gathered() {
        let mut agreement = Agreement::new(2);
        let on_device = Offer { held: Held::Device, ..part("a", 0, 1, 2) };
        let verdicts = agreement.take(vec![says(0, &[part("a", 0, 0, 2)]), says(0, &[on_device])]);
        assert_eq!(of(&verdicts), [("a".into(), Some(Why::Differs))]);
    }

    #[test]
    fn some_of_the_ranks_are_enough_where_a_tensor_lies_over_some() {
        let mut agreement = Agreement::new(4);
        let round = vec![says(0, &[]), says(0, &[part("a", 0, 0, 2)]), says(0, &[]), says(0, &[part("a", 0, 1, 2)])];
        assert_eq!(of(&agreement.take(round)), [("a".into(), None)]);
    }
}
