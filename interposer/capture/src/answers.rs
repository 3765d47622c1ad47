//! What this rank answers an agent that asks.

use std::sync::Arc;

use wire::control::{Answer, Question};

use crate::plan::PlanInForce;

/// What there is to know. It is asked under the transport's lock, so nothing here may wait for a tap.
pub struct Answers {
    plans: Arc<PlanInForce>,
}

impl Answers {
    /// Of a process with these plans.
    pub fn new(plans: Arc<PlanInForce>) -> Self {
        Self { plans }
    }

    /// The answer to a question.
    pub fn to(&self, question: Question) -> Answer {
        match question {
            Question::Plan => {
                let plan = self.plans.get();
                Answer::Plan { revision: plan.revision(), clauses: plan.texts().map(str::to_owned).collect() }
            }
        }
    }
}
