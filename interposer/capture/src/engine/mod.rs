//! Decides what taps do. One [`Engine`] behind one lock; tensor bytes are copied outside of it.

mod graphs;
mod pace;
mod record;
mod select;
pub mod slice;

#[cfg(test)]
mod tests;

use std::{collections::HashSet, sync::Arc};

use wire::{
    codes::{Role, Subject},
    control::{StepRule, ToAgent},
    hooks::{Edit, Hook, Kind, Mode},
    passes::{Group, Pass},
    revision::{Ballot, Decided, Moment, Plan, Proposal, Register, Since},
    tap_abi::{Call, LeafEdit, Rank, Trigger},
};

use crate::{
    clock::{Caller, Clock, Ended, Made, StackPosition, Triggered},
    layout::MeshAxis,
    plan::{HookPlan, PlanInForce},
    process::Process,
    taps::{Tap, TapRegistry},
};
use graphs::InGraphs;
use pace::Pace;
use select::Findings;

/// Who hears what the engine has found out: the user, and the agent.
pub trait Reports: Send + Sync {
    /// Who this process is, and how the job wraps its model, if that is known.
    fn describe(&self, rank: Rank, wrapper: &str);

    /// A message for the agent.
    fn say(&self, message: ToAgent);

    /// One line for the user.
    fn notice(&self, text: String);
}

/// Everything decided so far.
pub struct Engine {
    plans: Arc<PlanInForce>,
    taps: TapRegistry,
    clock: Clock,
    /// When the plan in force began.
    since: Since,
    /// What was found of it.
    findings: Findings,
    /// Models of which nothing was ever selected, whose modules were told of: by serial.
    others: HashSet<u64>,
    /// The plan that may take its place.
    ballot: Ballot<HookPlan>,
    /// Why compiled modules may not be compiled again; empty: they may, or there are none.
    no_compiling: String,
    /// How long steps take.
    pace: Pace,
    /// What was said of CUDA graphs.
    in_graphs: InGraphs,
    /// The plan in force has no taps yet.
    reselect: bool,
    rank: Rank,
    /// Rules of steps that the agent knows.
    rules: Vec<StepRule>,
    /// What gradients of activations are multiplied by in the job.
    loss_scale: f64,
    process: Arc<dyn Process>,
    reports: Arc<dyn Reports>,
}

impl Engine {
    /// No model is known yet.
    pub fn new(plans: Arc<PlanInForce>, process: Arc<dyn Process>, reports: Arc<dyn Reports>) -> Self {
        Self {
            since: Since::default(),
            findings: Findings::of(&plans.get()),
            others: HashSet::new(),
            ballot: Ballot::default(),
            no_compiling: String::new(),
            pace: Pace::default(),
            in_graphs: InGraphs::default(),
            reselect: false,
            plans,
            taps: TapRegistry::default(),
            clock: Clock::default(),
            rank: Rank { rank: 0, world: 1, group: 0 },
            rules: Vec::new(),
            loss_scale: 1.0,
            process,
            reports,
        }
    }

    /// Puts another plan in force. Taps of the one before begin nothing any more, and the models are to be selected from
    /// again. What calls have begun is captured as the plan says that they were begun under.
    pub fn replace_plan(&mut self, plan: HookPlan) {
        self.taps.begin_revision(plan.revision());
        self.findings = Findings::of(&plan);
        self.plans.replace(plan);
    }

    /// Where this rank is.
    pub fn moment(&self) -> Moment {
        let rule = self.clock.rule();
        Moment { rule, next: self.clock.next(), pace_ns: self.pace.fastest(), together: self.clock.is_together() }
    }

    /// When the plan in force began.
    pub fn since(&self) -> Since {
        self.since
    }

    /// The highest revision that was heard of, and the one that is proposed or has not begun yet.
    pub fn heard(&self) -> (u64, Option<u64>) {
        (self.ballot.heard(), self.ballot.open())
    }

    /// Confirms a proposal, or says why not: [`Ballot::prepare`].
    ///
    /// # Errors
    /// As there; or a clause does not parse, or is not supported; or one is added, and the job has compiled modules that must
    /// not be compiled again.
    pub fn prepare(&mut self, proposal: &Proposal, register: Box<dyn Register>) -> Result<(), String> {
        let plan = HookPlan::of(&proposal.plan)?;
        let (in_force, now) = (self.plans.get(), self.moment());
        if !self.no_compiling.is_empty() && plan.adds_to(&in_force) {
            return Err(format!("cannot compile its modules again: {}", self.no_compiling));
        }
        self.ballot.prepare(in_force.revision(), now, proposal, plan, register)
    }

    /// From now on compiled modules may not be compiled again for this reason, and so get no hooks; empty: they may.
    pub fn forbid_compiling(&mut self, why: String) {
        self.no_compiling = why;
    }

    /// A plan that was in force before this process began is in force here too, if nothing else is.
    pub fn continue_with(&mut self, plan: &Plan) {
        if plan.revision > self.plans.get().revision() && !self.has_proposal() && !self.clock.has_begun() {
            match HookPlan::of(plan) {
                Ok(plan) => {
                    self.ballot.begins_with(plan.revision());
                    // However steps will be counted, the first is 0.
                    self.since = Since { rule: StepRule::Optimizer, begins: Some(0) };
                    self.replace_plan(plan);
                    self.reselect = true;
                }
                Err(why) => self.reports.notice(format!("revision {} of the hooks is not taken: {why}", plan.revision)),
            }
        }
    }

    /// Whether a proposal is open.
    pub fn has_proposal(&self) -> bool {
        self.ballot.open().is_some()
    }

    /// Whether the next pass may be one that another plan begins with, or that has no taps of the plan in force.
    pub fn is_due(&self) -> bool {
        self.clock.is_between() && (self.reselect || (self.has_proposal() && self.ballot.is_due(self.moment())))
    }

    /// Whether a call of a part of a model, or of no model that is known, goes on with a pass that has begun: no other plan may
    /// begin with it.
    pub fn goes_on(&self, model: Option<u64>, callers: &[Option<Caller>]) -> bool {
        self.clock.goes_on(model, callers)
    }

    /// A pass is about to begin: decides which plan it begins with. Whether that is another one, so that the models are to
    /// be selected from again.
    pub fn turn(&mut self) -> bool {
        if self.is_due() {
            self.decide();
            return std::mem::take(&mut self.reselect);
        }
        false
    }

    /// Decides which plan the next pass begins with, if that is open.
    fn decide(&mut self) {
        match self.ballot.decide(self.moment()) {
            Decided::Stays => {}
            Decided::Replaced(plan, since) => {
                self.since = since;
                self.clock.end_passes();
                self.replace_plan(plan);
                self.reselect = true;
            }
            Decided::Unreachable(revision) => self.reports.notice(format!(
                "rank {}: nobody could say whether revision {revision} of the hooks begins; it does not here",
                self.rank.rank
            )),
        }
    }

    fn keep_pace(&mut self) {
        self.pace.reach(self.clock.next(), || self.process.now_ns());
    }

    /// The plan in force.
    pub fn plan(&self) -> Arc<HookPlan> {
        self.plans.get()
    }

    /// The last step that any model is in.
    pub fn last_step(&self) -> u64 {
        self.clock.last_step()
    }

    /// Whether this kind of a parameter is wanted now: in this step, if it was not captured in it, or in this microbatch.
    pub fn parameter_due(&mut self, tap: u32, kind: Kind) -> bool {
        let Self { taps, clock, .. } = self;
        taps.in_force(tap).is_some_and(|(tap, _)| tap.is_due(&now_of(clock, tap, kind)))
    }

    /// What a parameter is captured under, if it is due; then it is not due in this step any more. What there is after each
    /// backward pass is not due twice under one `version` unless that is 0, or the model had another pass since.
    pub fn begin_parameter(&mut self, number: u32, kind: Kind, version: u64) -> Option<Call> {
        let Self { taps, clock, .. } = self;
        let (tap, _) = taps.in_force(number)?;
        let now = now_of(clock, tap, kind);
        tap.is_due(&now).then(|| tap.begin(kind, &now, version)).flatten().map(|repeat| Call {
            tap: number,
            repeat,
            ..now
        })
    }

    /// From now on gradients of activations are `scale` times those of the loss that the script computes.
    pub fn loss_scale(&mut self, scale: f64) {
        self.loss_scale = scale;
    }

    /// The first part of a model that the job called by itself.
    pub fn first_part(&mut self, serial: u64, part: u64) {
        self.clock.first_part(serial, part);
    }

    /// A pipeline begins a batch.
    pub fn batch(&mut self) {
        self.clock.batch();
    }

    /// The model is a stage of a pipeline, perhaps of all ranks. `microbatch` is [batch, length], negative where not known.
    pub fn microbatches(&mut self, serial: u64, of_all: bool, count: u32, microbatch: [i64; 2]) {
        self.clock.microbatches(serial, of_all, count);
        if let Some(model) = self.taps.model(serial) {
            model.microbatches = count.max(1);
            model.microbatch = microbatch;
        }
    }

    /// The forward of a model, or of a part of it that holds tapped modules, begins or ends. Part 0 is the model itself.
    /// Whether the parameters of the step are those of this pass: in a model that trains, not those of an evaluation,
    /// which may have others for a while.
    pub fn pass(&mut self, serial: u64, part: u64, enter: bool, trigger: &Trigger) -> bool {
        let caller = match part {
            0 => Caller::Model,
            part => Caller::Part(part),
        };
        let position = StackPosition::here(&caller);
        if enter {
            // Nobody came before it, as after a forward that raised: nothing of it is captured, rather than by the wrong hooks.
            let missed = self.clock.is_between() && self.ballot.must_decide(self.moment());
            let begins = self.clock.enter(serial, caller, position, trigger);
            if missed && begins && self.clock.is_outermost() {
                self.decide();
            }
            if self.taps.model(serial).is_some() {
                self.say_rule();
                self.keep_pass(serial);
            }
        } else {
            self.clock.exit(serial, caller, position, trigger);
        }
        self.keep_pace();
        self.say_passes();
        enter && self.clock.has_parameters(serial)
    }

    /// The process made an optimizer: these end steps from now on.
    pub fn optimizer_made(&mut self) {
        self.clock.steps().optimizer_made();
    }

    /// These optimizers, ascending, hold the parameters of a tap's module.
    pub fn optimizers_of(&mut self, tap: u32, optimizers: &[u32]) {
        let Self { taps, clock, .. } = self;
        if let Some((tap, _)) = taps.in_force(tap) {
            tap.optimizers = optimizers.to_vec();
            if clock.steps().count_turns(optimizers) {
                clock.steps().forget_turns(|optimizers| taps.are_held_by(optimizers));
            }
        }
    }

    /// An optimizer stepped, or was skipped.
    pub fn stepped(&mut self, optimizer: u32) {
        self.clock.stepped(optimizer);
        self.keep_pace();
        self.say_passes();
    }

    /// The process ends.
    pub fn finish(&mut self) {
        self.clock.finish();
        self.say_passes();
    }

    /// A backward pass ended.
    pub fn backward_ended(&mut self) {
        self.clock.backward_ended();
        self.keep_pace();
    }

    /// A model was destroyed.
    pub fn forget(&mut self, serial: u64) {
        self.others.remove(&serial);
        self.clock.none_open(serial);
        if let Some(gone) = self.taps.destroy(serial) {
            self.clock.forget(gone);
        }
    }

    /// What a tap that is triggered has to do; `None`: nothing.
    pub fn triggered(&mut self, number: u32, trigger: &Trigger) -> Option<Call> {
        let (tap, model) = self.taps.in_force(number)?;
        let triggered = Triggered {
            tap: number,
            paired: tap.kinds & Kind::BEFORE != 0,
            wants_gradients: tap.kinds & Kind::GRADIENTS != 0,
            optimizers: &tap.optimizers,
            trigger,
        };
        let placed = self.clock.place(tap.model, &mut tap.calls, triggered);
        let call = placed.unwrap_or_else(|| {
            // A replay nobody waits for repeats the edits of its forward, which ran in this step.
            Call { tap: number, ..self.clock.now(tap.model, &tap.optimizers) }
        });
        let (mut capture, mut edit) = (0, 0);
        for clause in tap.active(&call) {
            capture |= clause.kind_mask();
            edit |= if clause.edit.is_some() { clause.kind_mask() } else { 0 };
        }
        let possible = possible(trigger);
        edit &= possible;
        capture &= possible;
        if trigger.replay {
            capture &= if placed.is_some() { Kind::GRADIENTS } else { 0 };
            edit &= if placed.is_some() { !0 } else { !Kind::GRADIENTS };
        }
        let ask = model.mesh.iter().any(|axis| !matches!(axis.role, Role::Data | Role::Assumed));
        let wanted = (capture | edit != 0).then_some(Call { capture, edit, ask, ..call });
        if wanted.is_some() {
            // A module that the job calls by itself is in no pass that begins.
            self.say_rule();
        }
        wanted
    }

    /// Other ranks have to know of the pass that begins, if something may be captured in its step.
    fn keep_pass(&mut self, serial: u64) {
        let Some(made) = self.clock.under_way(serial) else { return };
        let turns: Vec<u64> = if made.inference { vec![made.step] } else { self.clock.steps().all_turns().collect() };
        let wanted = |clause: &Hook| {
            clause.options.mode.is_none_or(|mode| (mode == Mode::Train) == made.train)
                && turns.iter().any(|&turn| clause.wants_step(made.step, turn))
        };
        if self.plans.get().clauses().iter().any(wanted) {
            self.clock.keep(serial);
        }
    }

    /// Says what other ranks have to know of passes that have ended: for models that are distributed.
    fn say_passes(&mut self) {
        let plan = self.plans.get();
        for (serial, ended) in self.clock.ended() {
            let Some(model) = self.taps.model(serial) else { continue };
            let (number, signature, nth) = (model.number, model.signature, model.nth);
            let group = |axis: &MeshAxis| {
                Some(Group {
                    ranks: plan.of_those_that_capture(&axis.ranks),
                    begin: u64::try_from(*ended.begin.get(axis.position)?).ok(),
                    since: *ended.since.get(axis.position)?,
                    together: *ended.together.get(axis.position)?,
                })
            };
            let groups: Vec<Group> = model.mesh.iter().filter_map(group).collect();
            let among = (nth, self.taps.alike(signature));
            let signature = signature.unwrap_or_default();
            let Ended { made: Made { step, micro, train, inference }, reduces, .. } = ended;
            if !groups.is_empty() {
                let model = number;
                let pass = Pass { model, step, micro, train, inference, signature, among, reduces, groups };
                self.reports.say(ToAgent::Passed(pass));
            }
        }
    }

    /// Says once by which rule the step under way is counted.
    fn say_rule(&mut self) {
        let rule = self.clock.steps().rule();
        if !self.rules.contains(&rule) {
            self.rules.push(rule);
            self.reports.say(ToAgent::Steps(rule));
        }
    }

    /// How a leaf is edited by what edits any of these kinds: all edits on it are one. None is, where the job captures its
    /// operations into a CUDA graph: what is done there once is done in all steps in which the graph is replayed.
    pub fn edit(&mut self, call: &Call, kinds: u32, path: &str, in_graph: bool) -> LeafEdit {
        let Self { taps, in_graphs, reports, .. } = self;
        let Some((tap, _)) = taps.get(call.tap) else { return LeafEdit::NONE };
        tap.for_leaf(call, kinds, path).fold(LeafEdit::NONE, |edit, clause| match &clause.edit {
            Some(_) if in_graph => {
                in_graphs.leave(clause, &tap.name, &**reports);
                edit
            }
            Some(Edit::BuiltIn(next)) => edit.then(*next),
            Some(Edit::Python { .. }) | None => edit,
        })
    }
}

/// The call that a kind of a parameter is captured under now.
fn now_of(clock: &Clock, tap: &Tap, kind: Kind) -> Call {
    let now = clock.now(tap.model, &tap.optimizers);
    let (pass, micro, train) =
        if kind.is_in(Kind::ONCE_A_STEP) { (0, 0, now.train) } else { clock.went_backward(tap.model) };
    Call { capture: kind.bit(), pass, micro, train, ..now }
}

/// Kinds that can be captured where a tap is triggered.
fn possible(trigger: &Trigger) -> u32 {
    let phase = if trigger.pre { Kind::BEFORE } else { !Kind::BEFORE };
    // What was begun elsewhere is said to be missing.
    let phase = if trigger.split { phase | Kind::of(Subject::InputGradients) } else { phase };
    if trigger.grad_enabled { phase } else { phase & !Kind::GRADIENTS }
}
