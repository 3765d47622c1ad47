//! Which modules and parameters the plan's clauses select, and what is said of those that they do not.

use std::collections::{HashMap, HashSet};

use wire::{
    codes::{Code, Order},
    control::{ModuleInfo, ToAgent},
    hooks::{Kind, nearest},
    tap_abi::{ModelDesc, Rank, Selected},
};

use super::Engine;
use crate::{layout, plan::HookPlan, taps::Target};

/// What was found of a plan's clauses, so that each thing is said once.
pub struct Findings {
    /// Clauses that match some module or parameter, or of which it was said that they do not.
    matched: Vec<bool>,
    /// Clauses of which it was said that no rank of the job is theirs.
    nowhere: Vec<bool>,
    /// Pairs of clauses whose disagreement was said.
    disagree: HashSet<(usize, usize)>,
    /// Names and classes of what there was to match.
    seen: Vec<(String, String)>,
}

impl Findings {
    /// Nothing yet.
    pub fn of(plan: &HookPlan) -> Self {
        let none = vec![false; plan.clauses().len()];
        Self { matched: none.clone(), nowhere: none, disagree: HashSet::new(), seen: Vec::new() }
    }

    /// Clauses with some of `kinds` that match a module or a parameter and are for this rank.
    fn matching(&mut self, plan: &HookPlan, rank: u32, subject: Subject<'_>, kinds: u32) -> Vec<usize> {
        let mut out = Vec::new();
        for (i, (clause, matched)) in plan.clauses().iter().zip(&mut self.matched).enumerate() {
            let Subject { name, class, qualified } = subject;
            if clause.kind_mask() & kinds != 0 && clause.selector.matches(name, class, qualified) {
                *matched = true;
                if clause.options.ranks.as_ref().is_none_or(|r| r.contains(&rank)) {
                    out.push(i);
                }
            }
        }
        out
    }

    /// Clauses that select a parameter, by its own name or by that of a module it is in, in the order written. `modules`
    /// has what was selected of these.
    fn of_parameter(
        &mut self,
        plan: &HookPlan,
        rank: u32,
        name: &str,
        modules: &HashMap<&str, Vec<usize>>,
    ) -> Vec<usize> {
        let subject = Subject { name, class: "", qualified: "" };
        let own = self.matching(plan, rank, subject, Kind::OF_PARAMETERS);
        let holders = name.match_indices('.').map(|(at, _)| name.get(..at).unwrap_or_default()).chain([""]);
        let mut out: Vec<usize> =
            holders.filter_map(|holder| modules.get(holder)).flatten().copied().chain(own).collect();
        out.sort_unstable();
        out.dedup();
        out.retain(|&index| plan.kinds(&[index]) & Kind::OF_PARAMETERS != 0);
        out
    }
}

/// A module or parameter, as selectors see it.
#[derive(Clone, Copy)]
struct Subject<'a> {
    name: &'a str,
    class: &'a str,
    /// The class's full dotted name.
    qualified: &'a str,
}

impl Engine {
    /// Taps for the modules of a model that selectors match. A model that is seen again keeps its number and taps.
    ///
    /// # Safety
    /// The arrays of `desc` are as long as it says.
    pub unsafe fn select(&mut self, desc: &ModelDesc<'_>, rank: Rank) -> Vec<Selected> {
        let plan = self.plans.get();
        self.rank = rank;
        self.process.set_rank(rank.rank);
        let mut modules = Vec::with_capacity(desc.module_count);
        let mut out = Vec::new();
        let (mut selected, mut names) = (HashMap::new(), Vec::new());
        for i in 0..desc.module_count {
            // SAFETY: i < module_count; the strings live through the call (caller).
            let (name, class, qualified, order) = unsafe {
                let module = &*desc.modules.add(i);
                (module.name.get(), module.class_name.get(), module.qualified.get(), module.order)
            };
            let order = Order::from_code(order).unwrap_or_default();
            let clauses = self.findings.matching(&plan, rank.rank, Subject { name, class, qualified }, !0);
            let kinds = plan.kinds(&clauses) & !Kind::OF_PARAMETERS;
            let edited = plan.some(&clauses).filter(|clause| clause.edit.is_some());
            let edits = edited.fold(0, |mask, clause| mask | clause.kind_mask());
            selected.insert(name, clauses.clone());
            modules.push(ModuleInfo { name: name.to_owned(), class: class.to_owned(), kinds });
            if kinds == 0 {
                continue;
            }
            self.say_disagreement(&plan, &clauses, name);
            let target = Target { model: desc.serial, name, class, order };
            let tap = self.taps.add(target, &plan, clauses, kinds);
            let before = kinds & Kind::BEFORE != 0;
            out.push(Selected { index: i as u32, tap, kinds, edits, before });
        }
        for i in 0..desc.parameter_count {
            // SAFETY: i < parameter_count; the string lives through the call (caller).
            let name = unsafe { (*desc.parameters.add(i)).get() };
            let clauses = self.findings.of_parameter(&plan, rank.rank, name, &selected);
            let kinds = plan.kinds(&clauses) & Kind::OF_PARAMETERS;
            if kinds != 0 {
                self.say_disagreement(&plan, &clauses, name);
                let target = Target { model: desc.serial, name, class: "Parameter", order: Order::Unstated };
                let tap = self.taps.add(target, &plan, clauses, kinds);
                let index = (desc.module_count + i) as u32;
                out.push(Selected { index, tap, kinds, ..Selected::default() });
            }
            names.push(name.to_owned());
        }
        let seen = &mut self.findings.seen;
        seen.extend(names.into_iter().map(|name| (name, String::new())));
        seen.extend(modules.iter().map(|m| (m.name.clone(), m.class.clone())));
        // A model in which something was selected once has a number, by which all is told of it.
        if out.is_empty() && self.taps.model(desc.serial).is_none() {
            // Other ranks may have modules that this one lacks: whoever reads the run has to know which. And whoever adds hooks
            // to a job that runs has to know what there is.
            let some_for_all = plan.clauses().iter().any(|clause| clause.options.ranks.is_none());
            let others = if plan.clauses().is_empty() {
                !modules.is_empty()
            } else {
                rank.world > 1 && modules.len() > 1 && some_for_all
            };
            self.reports.describe(rank, "");
            if others && self.others.insert(desc.serial) {
                let modules = modules.into_iter().map(|m| m.name).collect();
                self.reports.say(ToAgent::Others { modules });
            }
            return out;
        }
        // SAFETY: the string lives through the call (caller).
        let wrapper = unsafe { desc.wrapper.get() };
        self.reports.describe(rank, wrapper);
        self.taps.sign(desc.serial, desc.signature);
        if let Some(model) = self.taps.model(desc.serial) {
            // The process may have become a rank since the last time.
            // SAFETY: the array has `axis_count` entries, whose names live through the call (caller).
            model.mesh = unsafe { layout::mesh_of(desc) };
            self.reports.say(ToAgent::Model { model: model.number, modules });
        }
        out
    }

    /// Reports selectors that matched nothing in any model so far, and clauses for ranks that there are not, once each and
    /// on rank 0.
    pub fn resolved(&mut self) {
        let plan = self.plans.get();
        let Findings { matched, nowhere, seen, .. } = &mut self.findings;
        let seen = std::mem::take(seen);
        if seen.is_empty() {
            return;
        }
        let Rank { rank, world, .. } = self.rank;
        for (clause, said) in plan.clauses().iter().zip(nowhere) {
            let nowhere = clause.options.ranks.as_ref().is_some_and(|ranks| ranks.iter().all(|&r| r >= world));
            if nowhere && rank == 0 && !std::mem::replace(said, true) {
                let s = if world == 1 { "" } else { "s" };
                let text = format!("'{}' selects no rank of this job, which has {world} rank{s}", clause.text);
                self.reports.notice(text);
            }
        }
        for (clause, matched) in plan.clauses().iter().zip(matched) {
            if std::mem::replace(matched, true) || rank != 0 {
                continue;
            }
            let names = seen.iter().map(|(name, class)| (name.as_str(), class.as_str()));
            let near = nearest(&clause.selector, names, 3);
            let hint = if near.is_empty() { String::new() } else { format!("; nearest: {}", near.join(", ")) };
            // Others may have it, as stages of a pipeline do.
            let whose = if world == 1 { "" } else { " of this rank" };
            self.reports.notice(format!("'{}' matches no module{whose}{hint}", clause.selector));
        }
    }

    /// Says once which of two clauses decides what becomes of the same tensors.
    fn say_disagreement(&mut self, plan: &HookPlan, clauses: &[usize], name: &str) {
        for (n, &later) in clauses.iter().enumerate() {
            for &first in clauses.get(..n).unwrap_or_default() {
                let (Some(a), Some(b)) = (plan.clauses().get(first), plan.clauses().get(later)) else { continue };
                let meet = a.kind_mask() & b.kind_mask() != 0
                    && (a.options.path.is_none() || a.options.path == b.options.path);
                let (x, y) = (&a.options, &b.options);
                let differ = x.group != y.group || x.dtype != y.dtype || x.slice != y.slice;
                if meet && differ && self.rank.rank == 0 && self.findings.disagree.insert((first, later)) {
                    self.reports.notice(format!(
                        "'{}' and '{}' both tap {name}, with another group, dtype or slice; where both do, the first decides",
                        a.text, b.text
                    ));
                }
            }
        }
    }
}
