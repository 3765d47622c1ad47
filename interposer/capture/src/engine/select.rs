//! Which modules and parameters hooks select, and what is said of those that they do not.

use std::collections::HashMap;

use wire::{
    control::ModuleInfo,
    hooks::nearest,
    tap_abi::{ModelDesc, Order, Rank, Selected},
};

use super::{Engine, Model, OF_PARAMETERS, REMEMBERED, Tap};
use crate::{
    layout,
    passes::{Calls, Passes},
};

impl Engine {
    /// Taps for the modules of a model that selectors match. A model that is seen again keeps its number and taps.
    ///
    /// # Safety
    /// `desc` must point to `count` entries in each of its arrays.
    pub unsafe fn select(&mut self, desc: &ModelDesc<'_>, rank: Rank) -> Vec<Selected> {
        self.rank = rank;
        self.process.set_rank(rank.rank);
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
                self.reports.describe(rank, "");
                self.reports.other_model(modules.iter().map(|m| m.name.clone()).collect());
            }
            self.seen.extend(modules.into_iter().map(|m| (m.name, m.class)));
            return out;
        }
        self.seen.extend(modules.iter().map(|m| (m.name.clone(), m.class.clone())));
        // SAFETY: the string lives through the call (caller).
        let wrapper = unsafe { desc.wrapper.get() };
        self.reports.describe(rank, wrapper);
        if let Some(model) = self.models.get_mut(&desc.serial) {
            // The process may have become a rank since the last time.
            // SAFETY: the array has so many entries, whose names live through the call (caller).
            model.mesh = unsafe { layout::mesh_of(desc) };
            self.reports.model(model.number, modules);
        }
        out
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
                captured_in: HashMap::new(),
            };
            self.taps.insert(*taps - 1, tap);
            *taps - 1
        })
    }

    /// A model was destroyed. What it was is kept for a while: a backward pass through it may still come.
    pub fn forget(&mut self, serial: u64) {
        self.destroyed.push_back(serial);
        if self.destroyed.len() > REMEMBERED
            && let Some(model) = self.destroyed.pop_front().and_then(|serial| self.models.remove(&serial))
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
                self.reports.notice(format!("'{}' selects no rank of this job, which has {world} rank{s}", hook.text));
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
            self.reports.notice(format!("'{}' matches no module{whose}{hint}", hook.selector));
        }
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
                    self.reports.notice(format!(
                        "'{}' and '{}' both tap {name}, with another group or dtype; where both do, the first decides",
                        a.text, b.text
                    ));
                }
            }
        }
    }
}
