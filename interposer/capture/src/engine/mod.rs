//! Decides what taps do. One [`Engine`] behind one lock; tensor bytes are copied outside of it.

mod record;
mod select;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use wire::{
    codes::{Role, Subject},
    control::ToAgent,
    hooks::{Edit, Kind},
    tap_abi::{Call, Firing, LeafEdit, Rank},
};

use crate::{
    clock::{Caller, Clock, Fired, StackPosition},
    plan::{HookPlan, PlanInForce},
    process::Process,
    taps::TapRegistry,
};
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
    /// What was found of the plan in force.
    findings: Findings,
    rank: Rank,
    /// What gradients of activations are multiplied by in the job.
    loss_scale: f64,
    process: Arc<dyn Process>,
    reports: Arc<dyn Reports>,
}

impl Engine {
    /// No model is known yet.
    pub fn new(plans: Arc<PlanInForce>, process: Arc<dyn Process>, reports: Arc<dyn Reports>) -> Self {
        Self {
            findings: Findings::of(&plans.get()),
            plans,
            taps: TapRegistry::default(),
            clock: Clock::default(),
            rank: Rank { rank: 0, world: 1 },
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

    /// The plan in force.
    pub fn plan(&self) -> Arc<HookPlan> {
        self.plans.get()
    }

    /// The step under way.
    pub fn step(&self) -> u64 {
        self.clock.step()
    }

    /// Whether this kind of a parameter is wanted in this step and was not captured in it.
    pub fn parameter_due(&mut self, tap: u32, kind: Kind) -> bool {
        let step = self.clock.step();
        self.taps.in_force(tap).is_some_and(|(tap, _)| tap.is_due(step, kind))
    }

    /// What a parameter is captured under, if it is due; then it is not due in this step any more.
    pub fn begin_parameter(&mut self, number: u32, kind: Kind) -> Option<Call> {
        let step = self.clock.step();
        let (tap, _) = self.taps.in_force(number).filter(|(tap, _)| tap.is_due(step, kind))?;
        tap.captured_in.insert(kind, step);
        Some(Call { tap: number, step, train: true, capture: kind.bit(), ..Call::default() })
    }

    /// From now on gradients of activations are `scale` times those of the loss that the script computes.
    pub fn loss_scale(&mut self, scale: f64) {
        self.loss_scale = scale;
    }

    /// The model is a stage of a pipeline. `microbatch` is [batch, length], negative where not known.
    pub fn microbatches(&mut self, serial: u64, count: u32, microbatch: [i64; 2]) {
        if let Some(model) = self.taps.model(serial) {
            model.microbatches = count.max(1);
            model.microbatch = microbatch;
        }
    }

    /// The forward of a model, or of a part of it that holds tapped modules, begins or ends. Part 0 is the model itself.
    pub fn pass(&mut self, serial: u64, part: u64, enter: bool, firing: &Firing) {
        if self.taps.model(serial).is_none() {
            return;
        }
        let caller = match part {
            0 => Caller::Model,
            part => Caller::Part(part),
        };
        let position = StackPosition::here(&caller);
        if enter {
            self.clock.enter(serial, caller, position, firing);
        } else {
            self.clock.exit(serial, caller, position, firing);
        }
    }

    /// An optimizer stepped.
    pub fn stepped(&mut self) {
        self.clock.stepped();
    }

    /// A model was destroyed.
    pub fn forget(&mut self, serial: u64) {
        if let Some(gone) = self.taps.destroy(serial) {
            self.clock.forget(gone);
        }
    }

    /// What a tap that fires has to do; `None`: nothing.
    pub fn triggered(&mut self, number: u32, firing: &Firing) -> Option<Call> {
        let (tap, model) = self.taps.in_force(number)?;
        let fired = Fired {
            tap: number,
            paired: tap.kinds & Kind::BEFORE != 0,
            wants_gradients: tap.kinds & Kind::GRADIENTS != 0,
            firing,
        };
        let placed = self.clock.place(tap.model, &mut tap.calls, fired);
        // A replay nobody waits for repeats the edits of its forward, which ran in this step.
        let step = placed.map_or(self.clock.step(), |call| call.step);
        let (mut capture, mut edit) = (0, 0);
        for clause in tap.active(step) {
            capture |= clause.kind_mask();
            edit |= if clause.edit.is_some() { clause.kind_mask() } else { 0 };
        }
        let possible = possible(firing);
        edit &= possible;
        capture &= possible;
        if firing.replay {
            capture &= if placed.is_some() { Kind::GRADIENTS } else { 0 };
            edit &= if placed.is_some() { !0 } else { !Kind::GRADIENTS };
        }
        let call = placed.unwrap_or(Call { tap: number, step, ..Call::default() });
        let ask = model.mesh.iter().any(|axis| !matches!(axis.role, Role::Data | Role::Assumed));
        (capture | edit != 0).then_some(Call { capture, edit, ask, ..call })
    }

    /// How a leaf is edited by what edits any of these kinds: all edits on it are one.
    pub fn edit(&self, call: &Call, kinds: u32, path: &str) -> LeafEdit {
        let Some((tap, _)) = self.taps.get(call.tap) else { return LeafEdit::NONE };
        tap.for_leaf(call.step, kinds, path).fold(LeafEdit::NONE, |edit, clause| match &clause.edit {
            Some(Edit::BuiltIn(next)) => edit.then(*next),
            Some(Edit::Python { .. }) | None => edit,
        })
    }
}

/// Kinds that can be captured where a tap fires.
fn possible(firing: &Firing) -> u32 {
    let phase = if firing.pre { Kind::BEFORE } else { !Kind::BEFORE };
    // What was begun elsewhere is said to be missing.
    let phase = if firing.split { phase | Kind::of(Subject::InputGradients) } else { phase };
    if firing.grad_enabled { phase } else { phase & !Kind::GRADIENTS }
}
