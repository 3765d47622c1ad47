//! The hooks of a job: a plan with a revision, which is never changed but replaced as a whole.

use std::sync::{Arc, PoisonError, RwLock};

use wire::{
    env,
    hooks::{self, Assemble, Hook},
    passes::{self, Run},
    revision::{Clause, Plan},
};

/// What the clauses of one revision say.
#[derive(Debug)]
pub struct HookPlan {
    revision: u64,
    clauses: Vec<Hook>,
    /// The number of each clause in its job.
    ids: Vec<u32>,
}

impl HookPlan {
    /// The plan that the environment says: a text of clauses, or the path of a TOML file. Nothing is *armed*: a plan without
    /// clauses, that may be replaced by one that has some.
    ///
    /// # Errors
    /// A clause does not parse, or is not supported.
    pub fn parse(revision: u64, text: &str) -> Result<Self, String> {
        let clauses =
            if text.trim().is_empty() { Vec::new() } else { hooks::parse(text).map_err(|e| e.to_string())? };
        match clauses.iter().find_map(|clause| clause.unsupported().map(|why| (clause, why))) {
            Some((clause, why)) => Err(format!("{}: '{}': {why}", env::HOOKS, clause.text)),
            None => Ok(Self { revision, ids: (1..).take(clauses.len()).collect(), clauses }),
        }
    }

    /// The plan that an agent sends, which has refused what is not supported.
    ///
    /// # Errors
    /// A clause does not parse.
    pub fn of(plan: &Plan) -> Result<Self, String> {
        let clauses = plan.clauses.iter().map(|Clause { text, .. }| hooks::parse_one(text).map_err(|e| e.to_string()));
        let clauses = clauses.collect::<Result<Vec<Hook>, String>>()?;
        Ok(Self { revision: plan.revision, ids: plan.clauses.iter().map(|clause| clause.id).collect(), clauses })
    }

    /// Nothing is tapped.
    pub fn none() -> Self {
        Self { revision: 0, clauses: Vec::new(), ids: Vec::new() }
    }

    /// The number of each clause, by which an agent removes it.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Whether it has clauses that another plan of the job has not.
    pub fn adds_to(&self, other: &Self) -> bool {
        self.ids.iter().any(|id| !other.ids.contains(id))
    }

    /// Which of a job's plans it is; the environment's is 0.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// In the order written.
    pub fn clauses(&self) -> &[Hook] {
        &self.clauses
    }

    /// Those with these indices. An index of another plan is none of this one's.
    pub fn some(&self, indices: &[usize]) -> impl Iterator<Item = &Hook> {
        indices.iter().filter_map(|&index| self.clauses.get(index))
    }

    /// All kinds that some clauses tap.
    pub fn kinds(&self, indices: &[usize]) -> u32 {
        self.some(indices).fold(0, |mask, clause| mask | clause.kind_mask())
    }

    /// Whether any clause taps one of these kinds.
    pub fn wants(&self, kinds: u32) -> bool {
        self.clauses.iter().any(|clause| clause.kind_mask() & kinds != 0)
    }

    /// Whether every clause is for every rank.
    pub fn is_for_all_ranks(&self) -> bool {
        self.clauses.iter().all(|clause| clause.options.ranks.is_none())
    }

    /// Of some ranks those for which there is a clause.
    pub fn of_those_that_capture(&self, ranks: &[Run]) -> Vec<Run> {
        if self.clauses.iter().any(|clause| clause.options.ranks.is_none()) {
            return ranks.to_vec();
        }
        let captures = |rank: &u32| self.clauses.iter().any(|c| c.options.ranks.iter().flatten().any(|r| r == rank));
        passes::runs(&ranks.iter().flat_map(|run| run.ranks()).filter(captures).collect::<Vec<_>>())
    }

    /// What all ranks must agree on to gather tensors: their clauses. Empty where none wants that.
    pub fn agreed_by_ranks(&self) -> String {
        if self.clauses.iter().any(|clause| clause.options.assemble == Assemble::Collective) {
            self.texts().collect::<Vec<_>>().join(";")
        } else {
            String::new()
        }
    }

    /// The clauses as they were written.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        self.clauses.iter().map(|clause| clause.text.as_str())
    }
}

/// The plan in force, behind one pointer. Whoever holds an older one reads that to its end.
#[derive(Debug)]
pub struct PlanInForce(RwLock<Arc<HookPlan>>);

impl PlanInForce {
    /// The first plan.
    pub fn new(plan: HookPlan) -> Self {
        Self(RwLock::new(Arc::new(plan)))
    }

    /// The plan that is in force now.
    pub fn get(&self) -> Arc<HookPlan> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// From now on this plan is in force. The one that was before is given back.
    pub fn replace(&self, plan: HookPlan) -> Arc<HookPlan> {
        std::mem::replace(&mut *self.0.write().unwrap_or_else(PoisonError::into_inner), Arc::new(plan))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_holds_a_plan_reads_it_to_its_end() {
        let plans = PlanInForce::new(HookPlan::parse(0, "a; b:grad").unwrap());
        let old = plans.get();
        let given_back = plans.replace(HookPlan::parse(1, "c").unwrap());
        assert!(Arc::ptr_eq(&old, &given_back));
        assert_eq!(old.texts().collect::<Vec<_>>(), ["a", "b:grad"]);
        assert_eq!((plans.get().revision(), plans.get().texts().count()), (1, 1));
        assert_eq!(plans.get().some(&[0, 1]).count(), 1, "an index of another plan is none of this one's");
    }

    #[test]
    fn what_is_not_supported_is_refused_by_its_clause() {
        let why = HookPlan::parse(0, "a; b|edit.py:f").unwrap_err();
        assert!(why.starts_with("FLEXMODEL_HOOKS: 'b|edit.py:f': Python edits"), "{why}");
        assert!(HookPlan::parse(0, "a:nothing").is_err());
    }

    #[test]
    fn a_plan_that_is_sent_is_the_one_that_was_written() {
        let armed = HookPlan::parse(0, " ").unwrap();
        assert_eq!((armed.clauses().len(), armed.wants(!0), armed.is_for_all_ranks()), (0, false, true));
        let clause = |id, text: &str| Clause { id, text: text.into() };
        let sent = Plan { revision: 3, clauses: vec![clause(2, "/a;b/:grad"), clause(7, "c@every=2")], last_id: 7 };
        let plan = HookPlan::of(&sent).unwrap();
        assert_eq!(
            (plan.revision(), plan.ids(), plan.texts().collect::<Vec<_>>()),
            (3, &[2, 7][..], vec!["/a;b/:grad", "c@every=2"])
        );
        assert_eq!(HookPlan::parse(0, "a; b").unwrap().ids(), [1, 2]);
        assert!(HookPlan::of(&Plan { clauses: vec![clause(1, "a; b")], ..Plan::default() }).is_err());
    }

    #[test]
    fn ranks_agree_on_clauses_only_where_one_is_gathered() {
        let text = |hooks| HookPlan::parse(0, hooks).unwrap().agreed_by_ranks();
        assert_eq!(text("a; b@every=2"), "");
        assert_eq!(text("a; b@assemble=collective"), "a;b@assemble=collective");
    }
}
