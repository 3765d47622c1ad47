//! Which forward passes of several ranks are one, so that no whole is made of parts of two.
//!
//! Each rank counts its steps and passes by itself, and says of each pass, for every axis of its model's mesh, how many
//! collectives the axis's members had called together when it began ([`wire::passes`]): a clock that they share. Axis by axis
//! the passes of its members are one
//!
//! - where more collectives were called in the pass: then all members made it at that time;
//! - else by their order since the last collective, among passes of one kind and of models that are alike, where all members
//!   made equally many of these. That is known of passes whose gradients are reduced, which all members make, and assumed
//!   of others.
//!
//! Until every member is known to be past that time it is not known. What is not one with the passes of all members is kept
//! apart, and is whole for the ranks that made it.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    sync::Arc,
};

use wire::{
    hooks::Kind as Kinds,
    passes::{Pass, Run, runs},
    record::MICRO,
};

use crate::{
    format::{Identity, JobId, What},
    limits,
};

/// Passes of a step among which one is looked for that all ranks made.
const PASSES_OF_STEP: u32 = 64;

/// A forward pass, as its rank counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Local {
    job: JobId,
    rank: u32,
    model: u32,
    step: u64,
    micro: u32,
    train: bool,
}

impl Local {
    /// The job.
    pub fn job(self) -> JobId {
        self.job
    }

    /// Who made it.
    pub fn rank(self) -> u32 {
        self.rank
    }

    /// Number of the model on that rank.
    pub fn model(self) -> u32 {
        self.model
    }

    /// Whether two ranks count the same.
    pub fn is_like(self, other: Self) -> bool {
        self == Self { rank: self.rank, ..other }
    }

    /// The one under whose numbers parameters of its step are.
    pub fn of_parameters(self) -> Self {
        Self { micro: 0, ..self }
    }

    /// The pass that a part is of.
    pub fn of(what: &What) -> Self {
        let Identity { job, model, step, micro, train, .. } = what.id;
        // Of a pipeline, which cuts a batch into several passes, parts of these are parts of one record.
        let cut = what.axes.iter().find(|axis| axis.name == MICRO);
        let micro = cut.map_or(micro, |axis| micro.wrapping_mul(axis.size).wrapping_add(axis.index));
        Self { job, rank: what.rank, model, step, micro, train }
    }
}

/// Where a part is, as its rank counts: of which pass, and what of it.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Which pass.
    pub local: Local,
    /// What is the parameters' may be of a step instead.
    kind: Kinds,
}

impl Place {
    /// That of a part.
    pub fn of(what: &What) -> Self {
        Self { local: Local::of(what), kind: what.id.kind }
    }

    /// That of another rank which counts the same.
    pub fn on(self, rank: u32) -> Self {
        Self { local: Local { rank, ..self.local }, ..self }
    }
}

/// A pass of several ranks.
#[derive(Debug, PartialEq, Eq)]
pub struct Joint {
    /// As its lowest rank counts.
    first: Local,
    /// Who made it.
    pub ranks: BTreeSet<u32>,
    /// All ranks did over which the model is distributed, as far as is known.
    pub by_all: bool,
    /// No other rank has a model like it.
    own: bool,
    /// That it is one pass is assumed of some of them.
    pub assumed: bool,
}

impl Joint {
    /// Whether all ranks made it, and this one counts as the record does.
    pub fn is_named(&self, local: Local) -> bool {
        self.by_all && self.first.is_like(local)
    }

    /// The identity of what is captured in it, which `id` is to one rank.
    pub fn identity(&self, id: &Identity, local: Local) -> Identity {
        let Local { rank, model, step, micro, .. } = self.first;
        // Where a pipeline cuts a batch, its microbatches count within the record.
        let is_of_pass = local.micro == id.micro && !id.kind.is_in(Kinds::ONCE_A_STEP);
        let micro = if is_of_pass { micro } else { id.micro };
        if self.own {
            // What several ranks have of their own under one name is kept together, and read one by one.
            return Identity { own: true, pending: false, ..id.clone() };
        }
        Identity { model, step, micro, apart: (!self.by_all).then_some(rank), pending: false, ..id.clone() }
    }
}

/// What is known of a pass.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// It is one with these.
    Joint(Arc<Joint>),
    /// Not yet whether it is one with passes of other ranks.
    Pending,
    /// Its rank has said nothing of it.
    Unsaid,
}

/// A pass along one group of ranks.
#[derive(Debug)]
struct Along {
    group: usize,
    begin: Option<u64>,
    since: u32,
    together: bool,
}

/// What tells the kind of a pass: passes of two kinds are never one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Kind {
    signature: u32,
    among: (u32, u32),
    train: bool,
    inference: bool,
    reduces: bool,
}

/// Passes of one kind between two collectives of a group; of a step where nothing says that its members make the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Segment {
    group: usize,
    begin: Option<u64>,
    step: Option<u64>,
    kind: Kind,
}

#[derive(Debug)]
struct Node {
    local: Local,
    kind: Kind,
    along: Vec<Along>,
    joint: Option<Arc<Joint>>,
}

/// The passes that the ranks of a run have told of.
#[derive(Debug, Default)]
pub struct Passes {
    /// The newest, by number.
    nodes: VecDeque<Node>,
    /// Number of the first of these.
    first: usize,
    /// The ranks that are heard of here, where others of the job are not.
    here: Option<BTreeSet<u32>>,
    by_local: HashMap<Local, usize>,
    groups: Vec<Arc<[u32]>>,
    /// Of each, those that are heard of here.
    heard: Vec<Arc<[u32]>>,
    by_runs: HashMap<Vec<Run>, usize>,
    /// Those in which collectives were called, by the clock of the group and whether they train: of each rank mostly one, and
    /// more where one model calls another.
    together: HashMap<(usize, u64, bool), BTreeMap<u32, Vec<usize>>>,
    /// Others, with how many came before each.
    segments: HashMap<Segment, BTreeMap<u32, Vec<(u32, usize)>>>,
    /// How far a rank is by the clock of a group.
    clocks: HashMap<(u32, usize), u64>,
    /// How far it is in steps: of training, and of each kind of model in inference.
    steps: HashMap<(u32, Option<(u32, u32)>), u64>,
    /// Ranks that have told of some.
    told: BTreeSet<u32>,
    /// With the models whose passes these are.
    told_of: HashSet<(u32, u32)>,
    /// Ranks that are gone.
    left: BTreeSet<u32>,
    /// Whether all made equally many of a segment that all are past.
    even: RefCell<HashMap<Segment, bool>>,
    /// Ranks and the signatures of models that they have called.
    called: HashSet<(u32, u32)>,
    undecided: Vec<usize>,
    /// The model of a rank, as the lowest of those that have it counts.
    models: HashMap<(u32, u32), Arc<Joint>>,
    /// Ranks in groups.
    spent: usize,
}

/// What other members of a group have of a pass.
enum Others {
    /// These passes are one with it; whether that is assumed.
    Are(Vec<usize>, bool),
    /// Nothing.
    Apart,
    /// That is not known yet.
    Pending,
}

impl Passes {
    /// Only these ranks are heard of here, if that is known: what others make is for a reader of all nodes to join.
    pub fn hear_only(&mut self, ranks: &[Run]) {
        let here = (!ranks.is_empty()).then(|| ranks.iter().flat_map(|run| run.ranks()).collect());
        if self.here != here {
            self.here = here;
            self.heard = self.groups.iter().map(|group| self.heard_of(group)).collect();
        }
    }

    /// Of all ranks only those that have told of passes are heard of here.
    pub fn hear_only_who_told(&mut self) {
        let told: Vec<u32> = self.told.iter().copied().collect();
        self.hear_only(&runs(&told));
    }

    /// Whether anything of a rank is heard of here.
    pub fn hears(&self, rank: u32) -> bool {
        self.here.as_ref().is_none_or(|here| here.contains(&rank))
    }

    fn heard_of(&self, group: &Arc<[u32]>) -> Arc<[u32]> {
        match &self.here {
            None => group.clone(),
            Some(_) => group.iter().copied().filter(|&rank| self.hears(rank)).collect(),
        }
    }

    /// Whether some pass waits for others.
    pub fn are_undecided(&self) -> bool {
        !self.undecided.is_empty()
    }

    /// A rank of the job tells of no more passes, unless it does.
    pub fn left(&mut self, rank: u32) {
        self.left.insert(rank);
    }

    /// How many are known.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether all that have told of passes are gone.
    pub fn are_over(&self) -> bool {
        self.told.is_subset(&self.left)
    }

    /// Models of which a rank has told of any pass, on all ranks together.
    pub fn models_told(&self) -> usize {
        self.told_of.len()
    }

    /// Whether a rank has told of any pass of a model.
    pub fn has_told(&self, rank: u32, model: u32) -> bool {
        self.told_of.contains(&(rank, model))
    }

    /// A rank of the job tells of a pass.
    pub fn add(&mut self, job: JobId, rank: u32, pass: &Pass) {
        let Pass { model, step, micro, train, inference, signature, among, reduces, .. } = *pass;
        let local = Local { job, rank, model, step, micro, train };
        self.left.remove(&rank);
        let known = [self.told_of.len(), self.called.len(), self.steps.len(), self.models.len()];
        if self.by_local.contains_key(&local) || known.into_iter().any(|known| known > limits::MODELS_OF_RANKS) {
            return;
        }
        let kind = Kind { signature, among, train, inference, reduces };
        let at = self.first + self.nodes.len();
        let mut along = Vec::with_capacity(pass.groups.len());
        for said in &pass.groups {
            let Some(group) = self.group(&said.ranks) else { continue };
            if !self.groups[group].contains(&rank) {
                continue;
            }
            if let Some(begin) = said.begin {
                let clock = self.clocks.entry((rank, group)).or_default();
                *clock = begin.max(*clock);
            }
            let together = said.together && said.begin.is_some();
            let one = Along { group, begin: said.begin, since: said.since, together };
            match said.begin.filter(|_| one.together) {
                Some(begin) => {
                    let there = self.together.entry((group, begin, train)).or_default();
                    there.entry(rank).or_default().push(at);
                }
                None => {
                    let made = self.segments.entry(one.segment(kind, step)).or_default().entry(rank).or_default();
                    let place = made.partition_point(|&other| other < (said.since, at));
                    made.insert(place, (said.since, at));
                }
            }
            along.push(one);
        }
        self.told.insert(rank);
        self.told_of.insert((rank, model));
        let of = inference.then_some((signature, among.0));
        let reached = self.steps.entry((rank, of)).or_default();
        *reached = step.max(*reached);
        self.called.insert((rank, signature));
        self.nodes.push_back(Node { local, kind, along, joint: None });
        self.by_local.insert(local, at);
        self.undecided.push(at);
    }

    /// Forgets all but the newest `most` passes. What comes late of an older one is of a pass that was not told of.
    pub fn keep(&mut self, most: usize) {
        let before = self.first + self.nodes.len().saturating_sub(most);
        while self.first < before
            && let Some(Node { local, kind, along, .. }) = self.nodes.pop_front()
        {
            self.first += 1;
            self.by_local.remove(&local);
            for along in along {
                if let Some(begin) = along.begin.filter(|_| along.together) {
                    self.together.remove(&(along.group, begin, kind.train));
                    continue;
                }
                let segment = along.segment(kind, local.step);
                self.segments.remove(&segment);
                self.even.get_mut().remove(&segment);
            }
        }
        let first = self.first;
        self.undecided.retain(|&at| at >= first);
    }

    /// A pass by its number; those that are forgotten are in no list any more.
    fn node(&self, at: usize) -> &Node {
        &self.nodes[at - self.first]
    }

    /// The number of a group; `None` where there are too many.
    fn group(&mut self, runs: &[Run]) -> Option<usize> {
        if let Some(&known) = self.by_runs.get(runs) {
            return Some(known);
        }
        let size = runs.iter().fold(0usize, |sum, run| sum.saturating_add(run.count as usize));
        self.spent = self.spent.saturating_add(size);
        if self.spent > limits::OWNED {
            return None;
        }
        self.by_runs.insert(runs.to_vec(), self.groups.len());
        let ranks: Arc<[u32]> = runs.iter().flat_map(|run| run.ranks()).collect();
        self.heard.push(self.heard_of(&ranks));
        self.groups.push(ranks);
        Some(self.groups.len() - 1)
    }

    /// Decides what can be; `over`: no rank will tell of more. Those that were decided now.
    pub fn decide(&mut self, over: bool) -> Vec<Local> {
        let mut decided = Vec::new();
        for at in std::mem::take(&mut self.undecided) {
            if self.node(at).joint.is_some() {
                continue;
            }
            match self.joint(at, over) {
                Some((members, joint)) => {
                    let joint = Arc::new(joint);
                    for member in members {
                        let node = &mut self.nodes[member - self.first];
                        node.joint = Some(joint.clone());
                        decided.push(node.local);
                        let model =
                            self.models.entry((node.local.rank, node.local.model)).or_insert_with(|| joint.clone());
                        if joint.by_all && !model.by_all {
                            *model = joint.clone();
                        }
                    }
                }
                None => self.undecided.push(at),
            }
        }
        decided
    }

    /// What is known of a pass.
    pub fn verdict(&self, local: Local) -> Verdict {
        match self.by_local.get(&local).map(|&at| &self.node(at).joint) {
            Some(Some(joint)) => Verdict::Joint(joint.clone()),
            Some(None) => Verdict::Pending,
            None => Verdict::Unsaid,
        }
    }

    /// What is known of the pass that a part is of; `over`: no rank will tell of more.
    pub fn of_part(&self, Place { local, kind }: Place, over: bool) -> Verdict {
        match self.verdict(local) {
            // A backward pass may come so late that its pass has other numbers.
            Verdict::Unsaid if kind.is_in(Kinds::OF_PARAMETERS) => self.of_parameter(local, over),
            _ if kind.is_in(Kinds::ONCE_A_STEP) => self.of_parameter(local, over),
            verdict => verdict,
        }
    }

    /// What is known of a parameter, or of what optimizers do with it: it is one where its model is, in a pass of the step if
    /// there is one that all ranks made.
    /// Until no rank tells of more passes there may be one.
    fn of_parameter(&self, local: Local, over: bool) -> Verdict {
        let of_step = |micro| self.verdict(Local { micro, ..local });
        let by_all = (0..PASSES_OF_STEP).map(of_step).take_while(|verdict| !matches!(verdict, Verdict::Unsaid));
        let mut by_all = by_all.filter(|verdict| matches!(verdict, Verdict::Joint(joint) if joint.by_all));
        match by_all.next() {
            Some(verdict) => verdict,
            None => match self.models.get(&(local.rank, local.model)) {
                Some(joint) if joint.by_all || over => {
                    let Joint { first, ranks, by_all, own, assumed } = &**joint;
                    let first = Local { rank: first.rank, model: first.model, ..local };
                    // That ranks count the same steps is all that is known of this one.
                    let (by_all, own, assumed) = (*by_all, *own, *assumed || !own);
                    Verdict::Joint(Arc::new(Joint { first, ranks: ranks.clone(), by_all, own, assumed }))
                }
                Some(_) => Verdict::Pending,
                None => Verdict::Unsaid,
            },
        }
    }

    /// Whether what a rank has and what another has under the same numbers are known to be of two passes, or of two models.
    pub fn are_two(&self, what: &What, other: u32) -> bool {
        let place = Place::of(what);
        match (self.of_part(place, true), self.of_part(place.on(other), true)) {
            (Verdict::Joint(one), Verdict::Joint(other)) => one.first != other.first,
            _ => false,
        }
    }

    /// The passes that are one with this one, and who made them; `None` while that is not known.
    fn joint(&self, at: usize, over: bool) -> Option<(Vec<usize>, Joint)> {
        // With the group along which a pass was found: that says the same of its members again.
        let (mut members, mut seen) = (vec![(at, None)], BTreeSet::from([at]));
        let (mut by_all, mut own, mut assumed, mut next) = (true, true, false, 0);
        while let Some(&(member, from)) = members.get(next) {
            next += 1;
            for along in self.node(member).along.iter().filter(|along| Some(along.group) != from) {
                match self.others(member, along, over) {
                    Others::Pending => return None,
                    Others::Apart => {
                        by_all = false;
                        let Node { local, kind, .. } = self.node(member);
                        let has = |&rank: &u32| rank != local.rank && self.called.contains(&(rank, kind.signature));
                        own &= !self.groups[along.group].iter().any(has);
                    }
                    Others::Are(others, by_order) => {
                        assumed |= by_order;
                        let new = others.into_iter().filter(|&other| seen.insert(other));
                        members.extend(new.map(|other| (other, Some(along.group))));
                    }
                }
            }
        }
        let members: Vec<usize> = members.into_iter().map(|(member, _)| member).collect();
        let ranks: BTreeSet<u32> = members.iter().map(|&member| self.node(member).local.rank).collect();
        let is_decided = |&member: &usize| self.node(member).joint.is_some();
        if ranks.len() < members.len() || members.iter().any(is_decided) {
            // No rank makes a pass twice, and what is decided stays: what its ranks say does not go together.
            let first = self.node(at).local;
            let ranks = BTreeSet::from([first.rank]);
            return Some((vec![at], Joint { first, ranks, by_all: false, own: false, assumed: false }));
        }
        let first = members.iter().map(|&member| self.node(member).local).min()?;
        let own = own && !by_all && members.len() == 1;
        Some((members, Joint { first, ranks, by_all, own, assumed }))
    }

    fn others(&self, at: usize, along: &Along, over: bool) -> Others {
        let Node { local, kind, .. } = self.node(at);
        // Once no rank tells of more, ranks that never told of any have no such model.
        let counts = |rank: &&u32| !over || self.told.contains(rank);
        let ranks = || self.heard[along.group].iter().filter(counts);
        let nobody = BTreeMap::new();
        if let Some(begin) = along.begin.filter(|_| along.together) {
            let there = self.together.get(&(along.group, begin, kind.train)).unwrap_or(&nobody);
            let own = there.get(&local.rank).map_or(&[][..], Vec::as_slice);
            let Some(place) = own.iter().position(|&other| other == at) else { return Others::Apart };
            let even = there.len() == ranks().count() && there.values().all(|of| of.len() == own.len());
            let may_come = |rank: &u32| !there.contains_key(rank) && !self.left.contains(rank);
            if !even && !over && ranks().any(may_come) {
                return Others::Pending;
            }
            // All of them made it. What one has not told of is missing, and is found by its number.
            let those = there.values().filter_map(|of| of.get(place).copied()).collect();
            return Others::Are(those, !even);
        }
        let segment = along.segment(*kind, local.step);
        let Some(made) = self.segments.get(&segment) else { return Others::Apart };
        let known = self.even.borrow().get(&segment).copied();
        let even = match known {
            Some(even) => even,
            None => {
                if !over && !ranks().all(|&rank| self.is_past(rank, &segment, local.step)) {
                    return Others::Pending;
                }
                let count = made.values().next().map_or(0, Vec::len);
                let alike = |of: &Vec<(u32, usize)>| of.len() == count && are_in_order(of);
                let even = made.len() == ranks().count() && made.values().all(alike);
                self.even.borrow_mut().insert(segment, even);
                even
            }
        };
        let own = made.get(&local.rank).and_then(|own| own.binary_search(&(along.since, at)).ok());
        let Some(own) = own.filter(|_| even) else { return Others::Apart };
        let those = made.values().filter_map(|of| of.get(own).map(|(_, other)| *other)).collect();
        Others::Are(those, !(kind.is_reduced() && along.begin.is_some()))
    }

    /// Whether a rank makes no more passes of a segment.
    fn is_past(&self, rank: u32, segment: &Segment, step: u64) -> bool {
        let past = |reached: Option<&u64>, this: u64| reached.is_some_and(|&reached| reached > this);
        let by_clock = segment.begin.is_some_and(|begin| past(self.clocks.get(&(rank, segment.group)), begin));
        let Kind { signature, among, inference, .. } = segment.kind;
        let of = inference.then_some((signature, among.0));
        self.left.contains(&rank) || by_clock || (segment.step.is_some() && past(self.steps.get(&(rank, of)), step))
    }
}

impl Kind {
    /// Gradients are reduced after it, so that all ranks make it.
    fn is_reduced(&self) -> bool {
        self.reduces && self.train
    }
}

impl Along {
    fn segment(&self, kind: Kind, step: u64) -> Segment {
        let by_clock_alone = kind.is_reduced() && self.begin.is_some();
        Segment { group: self.group, begin: self.begin, step: (!by_clock_alone).then_some(step), kind }
    }
}

/// Whether none between the first and the last is missing.
fn are_in_order(passes: &[(u32, usize)]) -> bool {
    passes.windows(2).all(|pair| pair[0].0.checked_add(1) == Some(pair[1].0))
}

#[cfg(test)]
mod tests;
