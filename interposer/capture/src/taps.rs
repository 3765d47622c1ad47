//! Which taps there are: of which module and kinds, for which clauses of which plan.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use wire::{
    codes::Order,
    hooks::{Hook, Kind, Reduce},
    tap_abi::Call,
};

use crate::{clock::Calls, layout::MeshAxis, plan::HookPlan};

/// Destroyed models kept for late backward passes.
const REMEMBERED: usize = 64;

/// A model that has taps, or had some.
#[derive(Debug)]
pub struct TappedModel {
    /// Its number in the run.
    pub number: u32,
    /// The axes over which it is distributed.
    pub mesh: Vec<MeshAxis>,
    /// See [`wire::passes::Pass::signature`].
    pub signature: Option<u32>,
    /// How many of this signature there were before it.
    pub nth: u32,
    /// Into how many microbatches a pipeline cuts the batch of a step; 1 for a model that is no stage.
    pub microbatches: u32,
    /// Batch and length of one, as the pipeline says; negative where it does not.
    pub microbatch: [i64; 2],
    /// Its taps of the plan in force, by module name.
    by_name: HashMap<String, u32>,
    /// All of its taps that there are.
    taps: Vec<u32>,
}

/// A tap, on a module or a parameter.
#[derive(Debug)]
pub struct Tap {
    /// Serial of its model.
    pub model: u64,
    /// Name of the module or parameter.
    pub name: String,
    /// Its class.
    pub class: String,
    /// The plan that it was made from, and indices into its clauses, in the order written.
    pub plan: Arc<HookPlan>,
    /// See `plan`.
    pub clauses: Vec<usize>,
    /// Mask of the kinds tapped.
    pub kinds: u32,
    /// What the module says about where the batch is.
    pub order: Order,
    /// Numbers of the optimizers that hold its module's parameters, ascending; none where that is not known.
    pub optimizers: Vec<u32>,
    /// Its calls.
    pub calls: Calls,
    /// Kinds of a parameter, with what each was captured in last.
    captured_in: HashMap<Kind, CapturedIn>,
}

/// What a kind of a parameter was captured in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct CapturedIn {
    /// The model's pass.
    pass: u64,
    train: bool,
    step: u64,
    micro: u32,
    /// How many of the same microbatch came before it.
    repeat: u32,
    /// Tells its value from others; 0: nothing does.
    version: u64,
}

impl Tap {
    /// Its clauses that are active in a step.
    fn in_step(&self, step: u64, turn: u64) -> impl Iterator<Item = &Hook> {
        self.plan.some(&self.clauses).filter(move |clause| clause.wants_step(step, turn))
    }

    /// Its clauses that are active in a call of its module, or for a parameter: what a step has once has no passes.
    pub fn active(&self, call: &Call) -> impl Iterator<Item = &Hook> {
        let of_step = call.capture & Kind::ONCE_A_STEP != 0;
        let Call { micro, train, .. } = *call;
        self.in_step(call.step, call.turn).filter(move |clause| of_step || clause.wants_pass(micro, train))
    }

    /// Its clauses that mean this leaf of a call, by any of these kinds.
    pub fn for_leaf(&self, call: &Call, kinds: u32, path: &str) -> impl Iterator<Item = &Hook> {
        let means = move |clause: &&Hook| {
            clause.kind_mask() & kinds != 0 && clause.options.path.as_deref().is_none_or(|only| only == path)
        };
        self.active(call).filter(means)
    }

    /// The clause that captures a leaf: the first one that keeps its bytes, or else the first.
    pub fn captures(&self, call: &Call, kind: Kind, path: &str) -> Option<&Hook> {
        self.for_leaf(call, kind.bit(), path).min_by_key(|clause| clause.options.reduce == Reduce::Stats)
    }

    /// Whether what a call is to capture of a parameter is wanted, and was not captured where a step has it once.
    pub fn is_due(&self, now: &Call) -> bool {
        let in_this = |last: &CapturedIn| (last.train, last.step) == (now.train, now.step);
        let there =
            Kind::in_mask(now.capture & Kind::ONCE_A_STEP).any(|kind| self.captured_in.get(&kind).is_some_and(in_this));
        !there && self.active(now).any(|clause| clause.kind_mask() & now.capture != 0)
    }

    /// It is captured now: how many of the same microbatch came before it. `None` for what is there already.
    pub fn begin(&mut self, kind: Kind, now: &Call, version: u64) -> Option<u32> {
        let Call { pass, train, step, micro, .. } = *now;
        let last = self.captured_in.get(&kind);
        if last.is_some_and(|last| (last.pass, last.version) == (pass, version)) && version != 0 {
            return None;
        }
        let same = last.filter(|last| (last.train, last.step, last.micro) == (train, step, micro));
        let repeat = same.map_or(0, |last| last.repeat + 1);
        self.captured_in.insert(kind, CapturedIn { pass, train, step, micro, repeat, version });
        Some(repeat)
    }
}

/// What a tap is put on.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// Serial of the model.
    pub model: u64,
    /// Name of the module or parameter.
    pub name: &'a str,
    /// Its class.
    pub class: &'a str,
    /// What the module says about where the batch is.
    pub order: Order,
}

/// The taps and their models.
#[derive(Debug, Default)]
pub struct TapRegistry {
    /// Of the plan in force.
    revision: u64,
    /// By the shim's serial.
    models: HashMap<u64, TappedModel>,
    taps: HashMap<u32, Tap>,
    /// Models of each signature that there ever were.
    alike: HashMap<u32, u32>,
    /// Models and taps there ever were: the numbers of the next ones.
    next_model: u32,
    next_tap: u32,
    /// Destroyed models, oldest first. Their gradients may still come.
    destroyed: VecDeque<u64>,
}

impl TapRegistry {
    /// Number of the tap on a module or a parameter. Where there is one of the plan in force it stays as it is.
    pub fn add(&mut self, target: Target<'_>, plan: &Arc<HookPlan>, clauses: Vec<usize>, kinds: u32) -> u32 {
        let Self { models, taps, next_model, next_tap, .. } = self;
        let model = models.entry(target.model).or_insert_with(|| {
            *next_model += 1;
            TappedModel {
                number: *next_model - 1,
                mesh: Vec::new(),
                signature: None,
                nth: 0,
                microbatches: 1,
                microbatch: [-1; 2],
                by_name: HashMap::new(),
                taps: Vec::new(),
            }
        });
        let TappedModel { by_name, taps: all, .. } = model;
        *by_name.entry(target.name.to_owned()).or_insert_with(|| {
            let number = *next_tap;
            *next_tap += 1;
            let tap = Tap {
                model: target.model,
                name: target.name.to_owned(),
                class: target.class.to_owned(),
                plan: plan.clone(),
                clauses,
                kinds,
                order: target.order,
                optimizers: Vec::new(),
                calls: Calls::default(),
                captured_in: HashMap::new(),
            };
            taps.insert(number, tap);
            all.push(number);
            number
        })
    }

    /// A tap of whatever revision, with its model: for what its calls have begun.
    pub fn get(&self, tap: u32) -> Option<(&Tap, &TappedModel)> {
        let tap = self.taps.get(&tap)?;
        Some((tap, self.models.get(&tap.model)?))
    }

    /// A tap of the plan in force, with its model: for what begins now.
    pub fn in_force(&mut self, tap: u32) -> Option<(&mut Tap, &TappedModel)> {
        let tap = self.taps.get_mut(&tap).filter(|tap| tap.plan.revision() == self.revision)?;
        let model = self.models.get(&tap.model)?;
        Some((tap, model))
    }

    /// Whether these optimizers hold the parameters of some tap.
    pub fn are_held_by(&self, optimizers: &[u32]) -> bool {
        self.taps.values().any(|tap| tap.optimizers == optimizers)
    }

    /// A model is made of modules and distributed as its signature says.
    pub fn sign(&mut self, serial: u64, signature: u32) {
        let Some(model) = self.models.get_mut(&serial) else { return };
        if model.signature != Some(signature) {
            let count = self.alike.entry(signature).or_default();
            (model.signature, model.nth) = (Some(signature), *count);
            *count += 1;
        }
    }

    /// Models of a signature that there ever were.
    pub fn alike(&self, signature: Option<u32>) -> u32 {
        signature.and_then(|signature| self.alike.get(&signature)).copied().unwrap_or_default()
    }

    /// A model that has taps.
    pub fn model(&mut self, serial: u64) -> Option<&mut TappedModel> {
        self.models.get_mut(&serial)
    }

    /// Another plan is in force: the taps there are begin nothing any more. They stay for the gradients of what they began,
    /// until the plan after the next.
    pub fn begin_revision(&mut self, revision: u64) {
        let before = std::mem::replace(&mut self.revision, revision);
        self.taps.retain(|_, tap| tap.plan.revision() == before);
        for model in self.models.values_mut() {
            model.by_name.clear();
            model.taps.retain(|tap| self.taps.contains_key(tap));
        }
    }

    /// A model was destroyed. What it was is kept for a while: a backward pass through it may still come. The serial of a
    /// model that is not kept any more.
    pub fn destroy(&mut self, serial: u64) -> Option<u64> {
        self.destroyed.push_back(serial);
        if self.destroyed.len() <= REMEMBERED {
            return None;
        }
        let oldest = self.destroyed.pop_front()?;
        for tap in self.models.remove(&oldest).into_iter().flat_map(|model| model.taps) {
            self.taps.remove(&tap);
        }
        Some(oldest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(revision: u64, text: &str) -> Arc<HookPlan> {
        Arc::new(HookPlan::parse(revision, text).unwrap())
    }

    fn on(model: u64, name: &str) -> Target<'_> {
        Target { model, name, class: "Linear", order: Order::Unstated }
    }

    fn kinds(hooks: &HookPlan) -> u32 {
        hooks.kinds(&[0])
    }

    #[test]
    fn a_module_has_one_tap_of_a_plan_and_a_model_one_number() {
        let (mut taps, plan) = (TapRegistry::default(), plan(0, "**"));
        let add = |taps: &mut TapRegistry, target| taps.add(target, &plan, vec![0], kinds(&plan));
        let numbers = [on(5, "a"), on(5, "b"), on(6, "a"), on(5, "a")].map(|target| add(&mut taps, target));
        assert_eq!(numbers, [0, 1, 2, 0]);
        let model = |tap: &u32| taps.get(*tap).unwrap().1.number;
        assert_eq!(numbers.iter().map(model).collect::<Vec<_>>(), [0, 0, 1, 0]);
    }

    #[test]
    fn an_old_tap_never_reads_a_new_plan() {
        let mut taps = TapRegistry::default();
        let old = taps.add(on(5, "a"), &plan(0, "a:forward,backward"), vec![0], 0b101);
        taps.begin_revision(1);
        assert!(taps.in_force(old).is_none(), "it begins nothing any more");
        let new = taps.add(on(5, "a"), &plan(1, "a:grad@every=3"), vec![0], 0b100000);
        assert!(new != old && taps.in_force(new).is_some());
        let (tap, model) = taps.get(old).unwrap();
        let call = Call { step: 1, turn: 1, ..Call::default() };
        assert!(tap.captures(&call, Kind::Backward, "in[0]").is_some_and(|clause| clause.text == "a:forward,backward"));
        assert_eq!(model.number, taps.get(new).unwrap().1.number);
    }

    #[test]
    fn a_thousand_plans_leave_the_taps_of_two() {
        let mut taps = TapRegistry::default();
        for revision in 0..1000 {
            taps.begin_revision(revision);
            taps.add(on(5, "a"), &plan(revision, "a"), vec![0], 1);
        }
        assert_eq!((taps.taps.len(), taps.models.len()), (2, 1));
    }

    #[test]
    fn destroyed_models_are_remembered_in_a_bounded_number() {
        let (mut taps, plan) = (TapRegistry::default(), plan(0, "a"));
        for serial in 0..100 {
            let tap = taps.add(on(serial, "a"), &plan, vec![0], 1);
            let gone = taps.destroy(serial);
            assert_eq!(gone, serial.checked_sub(REMEMBERED as u64));
            assert!(taps.get(tap).is_some(), "its gradients may still come");
        }
        assert_eq!((taps.taps.len(), taps.models.len()), (REMEMBERED, REMEMBERED));
    }
}
