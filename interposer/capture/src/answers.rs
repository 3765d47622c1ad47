//! What this rank answers an agent that asks.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use wire::{
    control::{Answer, Question},
    register::SharedRegister,
    revision::{Plan, Register},
    store::Place,
};

use crate::{
    engine::Engine,
    store::{Found, JobStore},
};

/// Who knows the answers. It is asked under no lock of the transport's.
pub struct Answers {
    engine: Weak<Mutex<Engine>>,
    store: Arc<JobStore>,
}

impl Answers {
    /// Of a process with this engine, in a job with this store.
    pub fn new(engine: Weak<Mutex<Engine>>, store: Arc<JobStore>) -> Self {
        Self { engine, store }
    }

    fn with<T>(&self, ask: impl FnOnce(&mut Engine) -> T) -> Option<T> {
        let engine = self.engine.upgrade()?;
        let mut engine = engine.lock().unwrap_or_else(PoisonError::into_inner);
        Some(ask(&mut engine))
    }

    /// Gives `answer` the answer to a question, with which a descriptor may have come: at once, or when it is known.
    pub fn to(&self, question: Question, fd: Option<OwnedFd>, answer: impl FnOnce(Answer) + Send + 'static) {
        if let Question::Store(op) = question {
            return self.store.ask(op, move |found: Found| answer(Answer::Store(found)));
        }
        let known = self.with(|engine| match question {
            Question::Plan => {
                let plan = engine.plan();
                let (heard, open) = engine.heard();
                Some(Answer::Plan {
                    revision: plan.revision(),
                    since: engine.since(),
                    heard,
                    open,
                    clauses: plan.texts().map(str::to_owned).collect(),
                    ids: plan.ids().to_vec(),
                })
            }
            Question::Moment => Some(Answer::Moment(engine.moment())),
            Question::Prepare(proposal, place) => {
                let register = self.register(place, fd);
                Some(Answer::Prepare(register.and_then(|register| engine.prepare(&proposal, register))))
            }
            Question::Store(_) => None,
        });
        if let Some(known) = known.flatten() {
            answer(known);
        }
    }

    fn register(&self, place: Place, fd: Option<OwnedFd>) -> Result<Box<dyn Register>, String> {
        Ok(match place {
            Place::Shared => {
                let fd = fd.ok_or("was sent no register")?;
                Box::new(SharedRegister::attach(fd).map_err(|e| format!("cannot have the register: {e}"))?)
            }
            Place::Store { key, commit } => {
                Box::new(self.store.register(key, commit).map_err(|why| format!("cannot have the register: {why}"))?)
            }
        })
    }

    /// A plan is in force that this process has not been told of.
    pub fn in_force(&self, plan: &Plan) {
        self.with(|engine| engine.continue_with(plan));
    }
}
