//! The calls of one tap: which of a pass, and which forward a replay repeats.

use std::collections::VecDeque;

use wire::tap_abi::{Call, Trigger};

use super::{
    Steps, Triggered,
    passes::{Caller, Passes, StackPosition},
};

/// Most calls of one tap that wait for a replay.
const MAX_AWAITING: usize = 1024;
/// Most calls of one tap under way: a module that calls itself, or forwards that raised.
const MAX_OPEN: usize = 64;

/// What one tap remembers of its calls.
#[derive(Debug, Default)]
pub struct Calls {
    pass: u64,
    next: u32,
    /// Calls under way, and the threads that they are on.
    open: Vec<(usize, Option<Call>)>,
    awaiting: VecDeque<Call>,
}

impl Calls {
    /// The tap is triggered: its place in the pass, or `None` for a replay whose identity is not needed or not known.
    pub(super) fn place(&mut self, passes: &mut Passes, steps: &mut Steps, triggered: Triggered<'_>) -> Option<Call> {
        let Triggered { tap, paired, wants_gradients, optimizers, trigger } = triggered;
        let thread = StackPosition::here(&paired).thread;
        if paired
            && !trigger.pre
            && let Some(last) = self.open.iter().rposition(|(t, _)| *t == thread)
        {
            let (_, call) = self.open.remove(last);
            if let Some(call) = call {
                self.await_replay(passes, wants_gradients, trigger, call);
            }
            return call;
        }
        let call = if trigger.replay {
            self.replayed(trigger)
        } else {
            Some(self.fresh(passes, steps, (tap, optimizers), trigger))
        };
        if paired && trigger.pre {
            if self.open.len() >= MAX_OPEN {
                self.open.remove(0);
            }
            self.open.push((thread, call));
        } else if let Some(call) = call {
            self.await_replay(passes, wants_gradients, trigger, call);
        }
        call
    }

    fn fresh(
        &mut self,
        passes: &mut Passes,
        steps: &mut Steps,
        (tap, optimizers): (u32, &[u32]),
        trigger: &Trigger,
    ) -> Call {
        if passes.forwards.is_empty() {
            // Called from outside: what is open is left of a forward that raised.
            self.open.clear();
            passes.begin(steps, Caller::Tap(tap), trigger);
        }
        if self.pass != passes.number {
            self.pass = passes.number;
            self.next = 0;
            // What is left of a pass that raised.
            self.open.clear();
        }
        let call = self.next;
        self.next += 1;
        Call {
            tap,
            step: passes.step,
            turn: if passes.inference { passes.step } else { steps.turn(optimizers) },
            micro: passes.micro,
            call,
            pass: passes.number,
            train: passes.train,
            capture: 0,
            edit: 0,
            first: trigger.first,
            repeat: 0,
            ask: false,
        }
    }

    /// Reentrant checkpointing: without gradients now, though the model's forward has them.
    fn await_replay(&mut self, passes: &Passes, wants_gradients: bool, trigger: &Trigger, call: Call) {
        let replays = trigger.recomputes || !trigger.grad_enabled;
        if wants_gradients && !trigger.replay && replays && passes.grad_enabled {
            if self.awaiting.front().is_some_and(|c| c.step != call.step) || self.awaiting.len() >= MAX_AWAITING {
                self.awaiting.clear();
            }
            self.awaiting.push_back(call);
        }
    }

    fn replayed(&mut self, trigger: &Trigger) -> Option<Call> {
        if !trigger.grad_enabled {
            return None;
        }
        let oldest = self.awaiting.front()?.pass;
        let last = self.awaiting.iter().rposition(|c| c.pass == oldest)?;
        self.awaiting.remove(last)
    }
}
