//! Decides what taps do. One [`Engine`] per process behind one lock; tensor bytes are copied outside of it.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

use wire::{
    control::ModuleInfo,
    env,
    hooks::{Assemble, Hook, Kind, Reduce, nearest},
    loss_scale::LossScale,
    record::{MICRO, RecordMeta},
    tap_abi::{Call, Firing, LeafEdit, ModelDesc, Order, Rank, Refusal, Role, Selected, Str, TensorDesc},
};
use wire::{dtype::DType, hooks::Edit};

use crate::{
    layout::{self, Known, Leaf, MeshAxis},
    log,
    passes::{Caller, Calls, Clock, Passes, Place},
    shipping::{self, Cargo},
};

static ENGINE: Mutex<Option<Engine>> = Mutex::new(None);

/// Kinds for which a tap fires before the forward.
const BEFORE: u32 = 1 << Kind::ForwardPre as u32 | 1 << Kind::Backward as u32;
/// Kinds of parameters; the others are of modules.
const OF_PARAMETERS: u32 = 1 << Kind::Param as u32 | 1 << Kind::Grad as u32;
/// Kinds that are captured by gradient hooks.
const GRADIENTS: u32 = 1 << Kind::Backward as u32 | 1 << Kind::BackwardPre as u32;

/// Models that are remembered when they are no more.
const REMEMBERED: usize = 64;

/// Everything decided so far.
pub struct Engine {
    hooks: Vec<Hook>,
    matched: Vec<bool>,
    /// Hooks of which it was told that no rank of the job is theirs.
    nowhere: Vec<bool>,
    torch: String,
    python: String,
    rank: Rank,
    clock: Clock,
    /// What gradients of activations are multiplied by in the job.
    loss_scale: f64,
    /// By the shim's serial.
    models: HashMap<u64, Model>,
    taps: HashMap<u32, Tap>,
    /// Models and taps there ever were: the numbers of the next ones.
    counted: (u32, u32),
    /// Models that are no more, oldest first. Their gradients may still come.
    gone: VecDeque<u64>,
    seen: Vec<(String, String)>,
    /// Pairs of hooks whose disagreement was told.
    disagree: HashSet<(usize, usize)>,
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
    taken: HashMap<Kind, u64>,
}

fn lock() -> MutexGuard<'static, Option<Engine>> {
    ENGINE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `f` on the engine, if there is one.
pub fn with<T: Default>(f: impl FnOnce(&mut Engine) -> T) -> T {
    lock().as_mut().map(f).unwrap_or_default()
}

/// Parses the hooks. An error leaves the process untapped.
pub fn configure() -> Result<(), String> {
    let text = std::env::var(env::HOOKS).map_err(|_| format!("{} is not UTF-8", env::HOOKS))?;
    let hooks = wire::hooks::parse(&text).map_err(|e| e.to_string())?;
    if let Some((hook, why)) = hooks.iter().find_map(|h| h.unsupported().map(|why| (h, why))) {
        return Err(format!("{}: '{}': {why}", env::HOOKS, hook.text));
    }
    // Where some ranks alone capture, the one that would send a replica may not be among them.
    let by_all = hooks.iter().all(|hook| hook.options.ranks.is_none());
    shipping::configure(&text, by_all)?;
    *lock() = Some(Engine {
        matched: vec![false; hooks.len()],
        nowhere: vec![false; hooks.len()],
        hooks,
        torch: String::new(),
        python: String::new(),
        rank: Rank { rank: 0, world: 1 },
        clock: Clock::default(),
        loss_scale: 1.0,
        models: HashMap::new(),
        taps: HashMap::new(),
        counted: (0, 0),
        gone: VecDeque::new(),
        seen: Vec::new(),
        disagree: HashSet::new(),
    });
    Ok(())
}

/// What the process runs, for the run's description.
pub fn set_torch(torch: &str, (major, minor): (u32, u32)) {
    with(|e| {
        e.torch = torch.to_owned();
        e.python = format!("{major}.{minor}");
    });
}

/// The step under way.
pub fn step() -> u64 {
    with(|e| e.clock.now())
}

impl Engine {
    /// What all ranks must agree on to gather tensors: their hooks. Empty where none wants that.
    pub fn plan(&self) -> String {
        let wanted = self.hooks.iter().any(|hook| hook.options.assemble == Assemble::Collective);
        if wanted {
            self.hooks.iter().map(|hook| hook.text.as_str()).collect::<Vec<_>>().join(";")
        } else {
            String::new()
        }
    }

    /// Taps for the modules of a model that selectors match. A model that is seen again keeps its number and taps.
    ///
    /// # Safety
    /// `desc` must point to `count` entries in each of its arrays.
    pub unsafe fn select(&mut self, desc: &ModelDesc<'_>, rank: Rank) -> Vec<Selected> {
        self.rank = rank;
        log::set_rank(rank.rank);
        let mut modules = Vec::with_capacity(desc.count);
        let mut out = Vec::new();
        let (mut selected, mut names) = (HashMap::new(), Vec::new());
        for i in 0..desc.count {
            // SAFETY: i < count; the strings live through the call (caller).
            let (name, class, qualified, order) = unsafe {
                (
                    (*desc.names.add(i)).get(),
                    (*desc.classes.add(i)).get(),
                    (*desc.qualified.add(i)).get(),
                    Order::from_code(*desc.orders.add(i)),
                )
            };
            let hooks = self.matching(name, class, qualified, !0);
            let kinds = self.kinds(&hooks) & !OF_PARAMETERS;
            let edited = hooks.iter().filter_map(|&h| self.hooks.get(h)).filter(|h| h.edit.is_some());
            let edits = edited.fold(0, |mask, h| mask | h.kind_mask());
            selected.insert(name, hooks.clone());
            modules.push(ModuleInfo { name: name.to_owned(), class: class.to_owned(), kinds });
            if kinds == 0 {
                continue;
            }
            self.tell_disagreement(&hooks, name);
            let tap = self.tap(desc, name, class, hooks, kinds, order);
            out.push(Selected { index: i as u32, tap, kinds, edits });
        }
        for i in 0..desc.parameter_count {
            // SAFETY: i < parameter_count; the string lives through the call (caller).
            let name = unsafe { (*desc.parameters.add(i)).get() };
            let hooks = self.of_parameter(name, &selected);
            let kinds = self.kinds(&hooks) & OF_PARAMETERS;
            if kinds != 0 {
                self.tell_disagreement(&hooks, name);
                let tap = self.tap(desc, name, "Parameter", hooks, kinds, Order::Unstated);
                out.push(Selected { index: (desc.count + i) as u32, tap, kinds, edits: 0 });
            }
            names.push(name.to_owned());
        }
        self.seen.extend(names.into_iter().map(|name| (name, String::new())));
        if out.is_empty() {
            // Other ranks may have modules that this one lacks: whoever reads the run has to know which.
            if rank.world > 1 && modules.len() > 1 && self.hooks.iter().any(|h| h.options.ranks.is_none()) {
                shipping::describe(rank, &self.torch, &self.python, "");
                shipping::other_model(modules.iter().map(|m| m.name.clone()).collect());
            }
            self.seen.extend(modules.into_iter().map(|m| (m.name, m.class)));
            return out;
        }
        self.seen.extend(modules.iter().map(|m| (m.name.clone(), m.class.clone())));
        // SAFETY: the string lives through the call (caller).
        let wrapper = unsafe { desc.wrapper.get() };
        shipping::describe(rank, &self.torch, &self.python, wrapper);
        if let Some(model) = self.models.get_mut(&desc.serial) {
            // The process may have become a rank since the last time.
            // SAFETY: the array has so many entries, whose names live through the call (caller).
            model.mesh = unsafe { layout::mesh_of(desc) };
            shipping::model(model.number, modules);
        }
        out
    }

    /// Whether any hook taps one of these kinds.
    pub fn wants(&self, kinds: u32) -> bool {
        self.hooks.iter().any(|h| h.kind_mask() & kinds != 0)
    }

    /// Number of the tap on a module or a parameter, made if there is none.
    fn tap(
        &mut self,
        desc: &ModelDesc<'_>,
        name: &str,
        class: &str,
        hooks: Vec<usize>,
        kinds: u32,
        order: Order,
    ) -> u32 {
        let (models, taps) = &mut self.counted;
        let model = self.models.entry(desc.serial).or_insert_with(|| {
            *models += 1;
            Model {
                number: *models - 1,
                mesh: Vec::new(),
                microbatches: 1,
                microbatch: [-1; 2],
                passes: Passes::default(),
                taps: HashMap::new(),
            }
        });
        *model.taps.entry(name.to_owned()).or_insert_with(|| {
            *taps += 1;
            let (name, class) = (name.to_owned(), class.to_owned());
            let tap = Tap {
                model: desc.serial,
                name,
                class,
                hooks,
                kinds,
                order,
                calls: Calls::default(),
                taken: HashMap::new(),
            };
            self.taps.insert(*taps - 1, tap);
            *taps - 1
        })
    }

    /// A model is no more. What it was is kept for a while: a backward pass through it may still come.
    pub fn forget(&mut self, serial: u64) {
        self.gone.push_back(serial);
        if self.gone.len() > REMEMBERED
            && let Some(model) = self.gone.pop_front().and_then(|serial| self.models.remove(&serial))
        {
            for tap in model.taps.into_values() {
                self.taps.remove(&tap);
            }
        }
    }

    /// Hooks with some of `kinds` that match a module or a parameter and run on this rank.
    fn matching(&mut self, name: &str, class: &str, qualified: &str, kinds: u32) -> Vec<usize> {
        let rank = self.rank.rank;
        let mut out = Vec::new();
        for (i, (hook, matched)) in self.hooks.iter().zip(&mut self.matched).enumerate() {
            if hook.kind_mask() & kinds != 0 && hook.selector.matches(name, class, qualified) {
                *matched = true;
                if hook.options.ranks.as_ref().is_none_or(|r| r.contains(&rank)) {
                    out.push(i);
                }
            }
        }
        out
    }

    /// All kinds that some hooks tap.
    fn kinds(&self, hooks: &[usize]) -> u32 {
        hooks.iter().filter_map(|&h| self.hooks.get(h)).fold(0, |mask, h| mask | h.kind_mask())
    }

    /// Hooks that select a parameter, by its own name or by that of a module it is in, in the order written. `modules`
    /// has what was selected of these.
    fn of_parameter(&mut self, name: &str, modules: &HashMap<&str, Vec<usize>>) -> Vec<usize> {
        let own = self.matching(name, "", "", OF_PARAMETERS);
        let holders = name.match_indices('.').map(|(at, _)| name.get(..at).unwrap_or_default()).chain([""]);
        let mut out: Vec<usize> =
            holders.filter_map(|holder| modules.get(holder)).flatten().copied().chain(own).collect();
        out.sort_unstable();
        out.dedup();
        out.retain(|&h| self.hooks.get(h).is_some_and(|h| h.kind_mask() & OF_PARAMETERS != 0));
        out
    }

    /// Whether this kind of a parameter is wanted in this step and was not captured in it.
    pub fn due(&self, number: u32, kind: Kind) -> bool {
        let Some(tap) = self.taps.get(&number) else { return false };
        let step = self.clock.now();
        let hooks = || tap.hooks.iter().filter_map(|&h| self.hooks.get(h));
        tap.taken.get(&kind) != Some(&step) && hooks().any(|h| h.kinds.contains(&kind) && h.wants_step(step))
    }

    /// What a parameter is captured under; then it is not due any more.
    pub fn taken(&mut self, number: u32, kind: Kind) -> Option<Call> {
        if !self.due(number, kind) {
            return None;
        }
        let step = self.clock.now();
        self.taps.get_mut(&number)?.taken.insert(kind, step);
        Some(Call { tap: number, step, train: true, capture: kind.bit(), ..Call::default() })
    }

    /// Reports selectors that matched nothing in any model so far, and hooks for ranks that there are not, once each and
    /// on rank 0.
    pub fn resolved(&mut self) {
        let seen = std::mem::take(&mut self.seen);
        if seen.is_empty() {
            return;
        }
        let Rank { rank, world } = self.rank;
        for (hook, told) in self.hooks.iter().zip(&mut self.nowhere) {
            let nowhere = hook.options.ranks.as_ref().is_some_and(|ranks| ranks.iter().all(|&r| r >= world));
            if nowhere && rank == 0 && !std::mem::replace(told, true) {
                let s = if world == 1 { "" } else { "s" };
                shipping::notice(format!("'{}' selects no rank of this job, which has {world} rank{s}", hook.text));
            }
        }
        for (hook, matched) in self.hooks.iter().zip(&mut self.matched) {
            if std::mem::replace(matched, true) || rank != 0 {
                continue;
            }
            let names = seen.iter().map(|(name, class)| (name.as_str(), class.as_str()));
            let near = nearest(&hook.selector, names, 3);
            let hint = if near.is_empty() { String::new() } else { format!("; nearest: {}", near.join(", ")) };
            // Others may have it, as stages of a pipeline do.
            let whose = if world == 1 { "" } else { " of this rank" };
            shipping::notice(format!("'{}' matches no module{whose}{hint}", hook.selector));
        }
    }

    /// Gradients of activations are so many times those of the loss that the script computes.
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
    pub fn scope(&mut self, serial: u64, part: u64, enter: bool, firing: &Firing) {
        let Some(model) = self.models.get_mut(&serial) else { return };
        let caller = match part {
            0 => Caller::Model,
            part => Caller::Part(part),
        };
        let place = Place::here(&caller);
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
    pub fn fire(&mut self, number: u32, firing: &Firing) -> Option<Call> {
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

    /// The hook that captures this leaf: the first one that keeps its bytes, or else the first.
    fn hook_for(&self, tap: &Tap, call: &Call, kind: Kind, path: &str) -> Option<&Hook> {
        let hooks = tap.hooks.iter().filter_map(|&h| self.hooks.get(h));
        let wants = |h: &&Hook| {
            h.kinds.contains(&kind) && h.wants_step(call.step) && h.options.path.as_deref().is_none_or(|p| p == path)
        };
        hooks.filter(wants).min_by_key(|h| h.options.reduce == Reduce::Stats)
    }

    /// Says once which of two hooks decides what becomes of the same tensors.
    fn tell_disagreement(&mut self, hooks: &[usize], name: &str) {
        for (n, &later) in hooks.iter().enumerate() {
            for &first in hooks.get(..n).unwrap_or_default() {
                let (Some(a), Some(b)) = (self.hooks.get(first), self.hooks.get(later)) else { continue };
                let meet = a.kind_mask() & b.kind_mask() != 0
                    && (a.options.path.is_none() || a.options.path == b.options.path);
                let differ = a.options.group != b.options.group || a.options.dtype != b.options.dtype;
                if meet && differ && self.rank.rank == 0 && self.disagree.insert((first, later)) {
                    shipping::notice(format!(
                        "'{}' and '{}' both tap {name}, with another group or dtype; where both do, the first decides",
                        a.text, b.text
                    ));
                }
            }
        }
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

    /// Describes a leaf for its way to the agent; `None` if nobody asked for it.
    ///
    /// # Safety
    /// `tensor.sizes` must point to `ndim` sizes, and `tensor.axes` to `axis_count` axes.
    pub unsafe fn cargo(
        &self,
        call: &Call,
        kind: Kind,
        path: Str<'_>,
        repeat: u32,
        tensor: &TensorDesc<'_>,
    ) -> Option<Cargo> {
        let tap = self.taps.get(&call.tap)?;
        let model = self.models.get(&tap.model)?;
        // SAFETY: the caller's string lives through the call.
        let path = unsafe { path.get() };
        let hook = self.hook_for(tap, call, kind, path)?;
        // SAFETY: the caller vouches for sizes and ndim.
        let sizes = unsafe { std::slice::from_raw_parts(tensor.sizes, tensor.ndim as usize) };
        let shape: Vec<u64> = sizes.iter().map(|&n| n.max(0) as u64).collect();
        let own = DType::from_code(tensor.dtype);
        let refusal = if own.is_none() && tensor.refusal == Refusal::None { Refusal::Dtype } else { tensor.refusal };
        let own = own.unwrap_or(DType::UInt8);
        let dtype = hook.options.dtype.unwrap_or(own);
        let known = Known {
            batch: match model.microbatch {
                [batch, length] if batch >= 0 => [batch, length, -1],
                _ => model.passes.batch(call.pass),
            },
            given: model.passes.given(call.pass),
            own: call.first,
            order: tap.order,
            kind,
            micro: (call.micro % model.microbatches, model.microbatches),
        };
        // SAFETY: the caller vouches for the axes.
        let told = unsafe { layout::told(tensor) };
        let leaf = Leaf { shape: &shape, module: &tap.name, path };
        let axes = match &hook.options.ranks {
            // Torch says all of a parameter; nothing about it is inferred from a batch.
            _ if kind.bit() & OF_PARAMETERS != 0 => told,
            None => layout::infer(leaf, known, hook.options.shard.as_ref(), &model.mesh, told),
            Some(ranks) => {
                layout::of_some(leaf, known, hook.options.shard.as_ref(), (&model.mesh, told), self.rank, ranks)
            }
        };
        // What a pipeline cuts comes out as one.
        let is_cut = axes.iter().any(|axis| axis.name == MICRO);
        let meta = RecordMeta {
            module: tap.name.clone(),
            class: tap.class.clone(),
            kind,
            path: path.to_owned(),
            group: hook.options.group.clone().unwrap_or_default(),
            model: model.number,
            step: call.step,
            micro: if is_cut { call.micro / model.microbatches } else { call.micro },
            call: call.call,
            repeat,
            train: call.train,
            stats_only: hook.options.reduce == Reduce::Stats,
            dtype,
            shape,
            rank: self.rank.rank,
            axes,
            dp_size: layout::data_size(&model.mesh),
            loss_scale: LossScale(if kind.bit() & GRADIENTS != 0 { self.loss_scale } else { 1.0 }),
            same: None,
            time_ns: shipping::now_ns(),
            refused: refusal.reason().to_owned(),
        };
        let collective = hook.options.assemble == Assemble::Collective;
        Some(Cargo { meta, handle: tensor.handle, on_device: tensor.on_device, kept: false, collective })
    }
}
