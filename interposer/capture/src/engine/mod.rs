//! Decides what taps do. One [`Engine`] behind one lock; tensor bytes are copied outside of it.

mod record;
mod select;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
};

use wire::{
    control::ModuleInfo,
    env,
    hooks::{Assemble, Edit, Hook, Kind},
    tap_abi::{Call, Firing, LeafEdit, Order, Rank, Role},
};

use crate::{
    layout::MeshAxis,
    passes::{Caller, Calls, Clock, Passes, StackPosition},
    process::Process,
};

/// Who hears what the engine has found out: the user, and the agent.
pub trait Reports: Send + Sync {
    /// Who this process is, and how the job wraps its model, if that is known.
    fn describe(&self, rank: Rank, wrapper: &str);

    /// The modules of a model with this number.
    fn model(&self, model: u32, modules: Vec<ModuleInfo>);

    /// The modules of a model of which nothing is captured here.
    fn other_model(&self, modules: Vec<String>);

    /// One line for the user.
    fn notice(&self, text: String);
}

/// Kinds for which a tap fires before the forward.
const BEFORE: u32 = 1 << Kind::ForwardPre as u32 | 1 << Kind::Backward as u32;
/// Kinds of parameters; the others are of modules.
const OF_PARAMETERS: u32 = 1 << Kind::Param as u32 | 1 << Kind::Grad as u32;
/// Kinds that are captured by gradient hooks.
const GRADIENTS: u32 = 1 << Kind::Backward as u32 | 1 << Kind::BackwardPre as u32;

/// Destroyed models kept for late backward passes.
const REMEMBERED: usize = 64;

/// Everything decided so far.
pub struct Engine {
    hooks: Vec<Hook>,
    matched: Vec<bool>,
    /// Hooks of which it was said that no rank of the job is theirs.
    nowhere: Vec<bool>,
    rank: Rank,
    clock: Clock,
    /// What gradients of activations are multiplied by in the job.
    loss_scale: f64,
    /// By the shim's serial.
    models: HashMap<u64, Model>,
    taps: HashMap<u32, Tap>,
    /// Models and taps there ever were: the numbers of the next ones.
    counted: (u32, u32),
    /// Destroyed models, oldest first. Their gradients may still come.
    destroyed: VecDeque<u64>,
    seen: Vec<(String, String)>,
    /// Pairs of hooks whose disagreement was told.
    disagree: HashSet<(usize, usize)>,
    process: Arc<dyn Process>,
    reports: Arc<dyn Reports>,
}

struct Model {
    number: u32,
    mesh: Vec<MeshAxis>,
    /// Into how many microbatches a pipeline cuts the batch of a step; 1 for a model that is no stage.
    microbatches: u32,
    /// Batch and length of one, as the pipeline says; negative where it does not.
    microbatch: [i64; 2],
    passes: Passes,
    /// Its taps by module name.
    taps: HashMap<String, u32>,
}

struct Tap {
    /// Serial of its model.
    model: u64,
    name: String,
    class: String,
    /// Indices into `hooks`, in the order written.
    hooks: Vec<usize>,
    kinds: u32,
    order: Order,
    calls: Calls,
    /// Kinds of a parameter, with the last step in which each was captured.
    captured_in: HashMap<Kind, u64>,
}

/// The clauses in what the user wrote, or why there can be no taps.
///
/// # Errors
/// A clause does not parse, or is not supported.
pub fn parse(text: &str) -> Result<Vec<Hook>, String> {
    let hooks = wire::hooks::parse(text).map_err(|e| e.to_string())?;
    match hooks.iter().find_map(|h| h.unsupported().map(|why| (h, why))) {
        Some((hook, why)) => Err(format!("{}: '{}': {why}", env::HOOKS, hook.text)),
        None => Ok(hooks),
    }
}

impl Engine {
    /// No model is known yet.
    pub fn new(hooks: Vec<Hook>, process: Arc<dyn Process>, reports: Arc<dyn Reports>) -> Self {
        Self {
            matched: vec![false; hooks.len()],
            nowhere: vec![false; hooks.len()],
            hooks,
            rank: Rank { rank: 0, world: 1 },
            clock: Clock::default(),
            loss_scale: 1.0,
            models: HashMap::new(),
            taps: HashMap::new(),
            counted: (0, 0),
            destroyed: VecDeque::new(),
            seen: Vec::new(),
            disagree: HashSet::new(),
            process,
            reports,
        }
    }

    /// The step under way.
    pub fn step(&self) -> u64 {
        self.clock.now()
    }

    /// What all ranks must agree on to gather tensors: their hooks. Empty where none wants that.
    pub fn plan(&self) -> String {
        let wanted = self.hooks.iter().any(|hook| hook.options.assemble == Assemble::Collective);
        if wanted {
            self.hooks.iter().map(|hook| hook.text.as_str()).collect::<Vec<_>>().join(";")
        } else {
            String::new()
        }
    }

    /// Whether any hook taps one of these kinds.
    pub fn wants(&self, kinds: u32) -> bool {
        self.hooks.iter().any(|h| h.kind_mask() & kinds != 0)
    }

    /// Whether this kind of a parameter is wanted in this step and was not captured in it.
    pub fn parameter_due(&self, number: u32, kind: Kind) -> bool {
        let Some(tap) = self.taps.get(&number) else { return false };
        let step = self.clock.now();
        let hooks = || tap.hooks.iter().filter_map(|&h| self.hooks.get(h));
        tap.captured_in.get(&kind) != Some(&step) && hooks().any(|h| h.kinds.contains(&kind) && h.wants_step(step))
    }

    /// What a parameter is captured under; then it is not due any more.
    pub fn begin_parameter(&mut self, number: u32, kind: Kind) -> Option<Call> {
        if !self.parameter_due(number, kind) {
            return None;
        }
        let step = self.clock.now();
        self.taps.get_mut(&number)?.captured_in.insert(kind, step);
        Some(Call { tap: number, step, train: true, capture: kind.bit(), ..Call::default() })
    }

    /// From now on gradients of activations are `scale` times those of the loss that the script computes.
    pub fn loss_scale(&mut self, scale: f64) {
        self.loss_scale = scale;
    }

    /// The model is a stage of a pipeline. `microbatch` is [batch, length], negative where not known.
    pub fn microbatches(&mut self, serial: u64, count: u32, microbatch: [i64; 2]) {
        if let Some(model) = self.models.get_mut(&serial) {
            model.microbatches = count.max(1);
            model.microbatch = microbatch;
        }
    }

    /// The forward of a model, or of a part of it that holds tapped modules, begins or ends. Part 0 is the model itself.
    pub fn pass(&mut self, serial: u64, part: u64, enter: bool, firing: &Firing) {
        let Some(model) = self.models.get_mut(&serial) else { return };
        let caller = match part {
            0 => Caller::Model,
            part => Caller::Part(part),
        };
        let place = StackPosition::here(&caller);
        if enter {
            model.passes.enter(&mut self.clock, caller, place, firing);
        } else {
            model.passes.exit(caller, place, firing);
        }
    }

    /// An optimizer stepped: a forward that raised before cannot be open any more.
    pub fn stepped(&mut self) {
        self.clock.stepped();
        for model in self.models.values_mut() {
            model.passes.none_open();
        }
    }

    /// What a tap that fires has to do; `None`: nothing.
    pub fn triggered(&mut self, number: u32, firing: &Firing) -> Option<Call> {
        let tap = self.taps.get_mut(&number)?;
        let model = self.models.get_mut(&tap.model)?;
        let paired = tap.kinds & BEFORE != 0;
        let wants_gradients = tap.kinds & GRADIENTS != 0;
        let placed = tap.calls.place(&mut model.passes, &mut self.clock, number, paired, wants_gradients, firing);
        let phase = if firing.pre { BEFORE } else { !BEFORE };
        // What was begun elsewhere is told to be missing.
        let phase = if firing.split { phase | Kind::Backward.bit() } else { phase };
        let hooks = tap.hooks.iter().filter_map(|&h| self.hooks.get(h));
        // A replay nobody waits for repeats the edits of its forward, which ran in this step.
        let step = placed.map_or(self.clock.now(), |c| c.step);
        let (mut capture, mut edit) = (0, 0);
        for hook in hooks.filter(|h| h.wants_step(step)) {
            capture |= hook.kind_mask();
            edit |= if hook.edit.is_some() { hook.kind_mask() } else { 0 };
        }
        let mut possible = phase;
        if !firing.grad_enabled {
            possible &= !GRADIENTS;
        }
        edit &= possible;
        capture &= possible;
        if firing.replay {
            capture &= if placed.is_some() { GRADIENTS } else { 0 };
            edit &= if placed.is_some() { !0 } else { !GRADIENTS };
        }
        let call = placed.unwrap_or(Call { tap: number, step, ..Call::default() });
        let ask = model.mesh.iter().any(|axis| !matches!(axis.role, Role::Data | Role::Supposed));
        (capture | edit != 0).then_some(Call { capture, edit, ask, ..call })
    }

    /// How a leaf is edited: all edits on it multiply.
    pub fn edit(&self, call: &Call, kind: Kind, path: &str) -> LeafEdit {
        let mut out = LeafEdit { op: 0, factor: 1.0 };
        let Some(tap) = self.taps.get(&call.tap) else { return out };
        for hook in tap.hooks.iter().filter_map(|&h| self.hooks.get(h)) {
            let here = hook.kinds.contains(&kind)
                && hook.wants_step(call.step)
                && hook.options.path.as_deref().is_none_or(|p| p == path);
            match &hook.edit {
                Some(Edit::Zero) if here => out.op = 2,
                Some(Edit::Scale(x)) if here => {
                    out.factor *= x;
                    out.op = out.op.max(1);
                }
                _ => {}
            }
        }
        out
    }
}
