//! What an agent has to hear, and how much of it this one has heard. Knows no socket.

use std::{io, mem::discriminant};

use wire::control::{self, MAX_QUESTIONS, ToAgent};

use super::socket::is_later;

/// Messages in order. An agent that reads slowly, or not at all, holds up what is in here and nobody else; it is bounded
/// by what is worth telling: the last word on each of some models, and some notices.
#[derive(Default)]
pub struct Outbox {
    /// Everything that a new agent has to hear.
    messages: Vec<ToAgent>,
    /// How many of them were sent to this agent, or are being sent.
    sent: usize,
    /// The message that is being sent, how far it is, and the slab whose descriptor rides on its first byte.
    bytes: Vec<u8>,
    at: usize,
    slab: Option<u64>,
}

impl Outbox {
    /// One more message. What was said before is not said again; what replaces an earlier message comes in its place at the
    /// end.
    pub fn push(&mut self, message: ToAgent) {
        if self.messages.contains(&message) {
            return;
        }
        let keeping = message.keeping();
        let like = |other: &ToAgent| discriminant(other) == discriminant(&message);
        let same = |other: &ToAgent| like(other) && other.keeping().subject == keeping.subject;
        let old = keeping.subject.and_then(|_| self.messages.iter().position(same));
        match old {
            Some(old) => self.forget(old),
            None if keeping.last && self.messages.iter().filter(|other| like(other)).count() >= keeping.most => {
                let oldest = self.messages.iter().position(like);
                oldest.into_iter().for_each(|oldest| self.forget(oldest));
            }
            None if self.messages.iter().filter(|other| like(other)).count() >= keeping.most => {
                if matches!(message, ToAgent::Model { .. }) {
                    self.push(ToAgent::Notice(control::too_many_models()));
                }
                return;
            }
            None => {}
        }
        self.messages.push(message);
    }

    fn forget(&mut self, at: usize) {
        self.messages.remove(at);
        self.sent -= usize::from(at < self.sent);
    }

    /// The process is of another job: nobody has to hear any more what it did in the one before.
    pub fn forget_passes(&mut self) {
        while let Some(at) = self.messages.iter().position(|message| matches!(message, ToAgent::Passed(_))) {
            self.forget(at);
        }
    }

    /// Whether as many answers wait to be sent as an agent may have questions.
    pub fn is_full_of_answers(&self) -> bool {
        let waiting = self.messages.iter().filter(|m| matches!(m, ToAgent::Answer { .. })).count();
        waiting >= MAX_QUESTIONS
    }

    /// Whether it says which modules this rank has.
    pub fn tells_modules(&self) -> bool {
        self.messages.iter().any(|m| matches!(m, ToAgent::Model { .. } | ToAgent::Others { .. }))
    }

    /// There is a new agent: it gets the rest of a message that was begun outside of here, the slabs with these numbers,
    /// then everything else.
    pub fn restart(&mut self, rest: Vec<u8>, slabs: impl Iterator<Item = u64>) {
        // Its own hello comes first, and says what a later one said.
        self.messages.retain(|message| message.keeping().for_next_agent);
        self.messages.splice(0..0, slabs.map(|id| ToAgent::Slab { id }));
        (self.bytes, self.at, self.slab, self.sent) = (rest, 0, None, 0);
    }

    /// Whether everything was sent to this agent.
    pub fn is_empty(&self) -> bool {
        self.at >= self.bytes.len() && self.sent >= self.messages.len()
    }

    /// Sends what goes now, by bytes and the number of the slab whose descriptor goes with the first of them. An error other
    /// than "not now" is the end of this agent.
    pub fn send(&mut self, mut send: impl FnMut(&[u8], Option<u64>) -> io::Result<usize>) -> io::Result<()> {
        loop {
            while let Some(rest) = self.bytes.get(self.at..).filter(|rest| !rest.is_empty()) {
                match send(rest, self.slab) {
                    Ok(n) => (self.at, self.slab) = (self.at + n, self.slab.filter(|_| n == 0)),
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) if is_later(&e) => return Ok(()),
                    Err(e) => return Err(e),
                }
            }
            (self.bytes, self.at) = (Vec::new(), 0);
            let Some(message) = self.messages.get(self.sent) else { return Ok(()) };
            // A message too long for the protocol is left out.
            self.bytes = control::encode(message).unwrap_or_default();
            self.slab = if let ToAgent::Slab { id } = message { Some(*id) } else { None };
            if message.keeping().for_next_agent {
                self.sent += 1;
            } else {
                self.messages.remove(self.sent);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use wire::control::{MAX_MODELS, MAX_NOTICES, ModuleInfo, decode_next};

    use super::*;
    use crate::testing::plan_of;

    fn model(number: u32, class: &str) -> ToAgent {
        let module = ModuleInfo { name: "a".into(), class: class.into(), kinds: 1 };
        ToAgent::Model { model: number, modules: vec![module] }
    }

    fn notice(text: &str) -> ToAgent {
        ToAgent::Notice(text.into())
    }

    /// What an agent reads that takes `step` bytes at a time, `times` times.
    fn read(outbox: &mut Outbox, step: usize, times: usize) -> Vec<u8> {
        let (mut wire, mut left) = (Vec::new(), times);
        let sent = outbox.send(|bytes, _| {
            let Some(fewer) = left.checked_sub(1) else { return Err(io::ErrorKind::WouldBlock.into()) };
            left = fewer;
            wire.extend_from_slice(&bytes[..bytes.len().min(step)]);
            Ok(bytes.len().min(step))
        });
        sent.unwrap();
        wire
    }

    fn messages(mut wire: Vec<u8>) -> Vec<ToAgent> {
        let mut out = Vec::new();
        while let Some(message) = decode_next(&mut wire).unwrap() {
            out.push(message);
        }
        assert!(wire.is_empty());
        out
    }

    #[test]
    fn what_was_said_is_not_said_again() {
        let mut outbox = Outbox::default();
        outbox.push(model(0, "A"));
        assert_eq!(messages(read(&mut outbox, 1000, 100)), [model(0, "A")]);
        outbox.push(model(0, "A"));
        assert!(outbox.is_empty());
        outbox.push(notice("n"));
        outbox.push(model(0, "B"));
        assert_eq!(messages(read(&mut outbox, 1000, 100)), [notice("n"), model(0, "B")]);
        assert!(outbox.is_empty());
    }

    #[test]
    fn a_new_agent_hears_everything_once_and_the_newest_of_each_model() {
        let mut outbox = Outbox::default();
        for message in [model(0, "A"), notice("n"), model(1, "C"), model(0, "B"), ToAgent::Bye] {
            outbox.push(message);
        }
        read(&mut outbox, 7, 3);
        outbox.restart(vec![0; 3], std::iter::empty());
        let wire = read(&mut outbox, 1, 1000);
        assert_eq!(messages(wire[3..].to_vec()), [notice("n"), model(1, "C"), model(0, "B")]);
    }

    #[test]
    fn a_descriptor_rides_on_the_first_byte_of_its_message_alone() {
        let mut outbox = Outbox::default();
        for message in [notice("n"), ToAgent::Slab { id: 7 }, model(0, "A")] {
            outbox.push(message);
        }
        let mut ridden = Vec::new();
        let mut wire = Vec::new();
        let mut send = |outbox: &mut Outbox| {
            let sent = outbox.send(|bytes, slab| {
                ridden.extend(slab.map(|id| (wire.len(), id)));
                wire.push(bytes[0]);
                Ok(1)
            });
            sent.unwrap();
        };
        send(&mut outbox);
        let start = control::encode(&notice("n")).unwrap().len();
        outbox.restart(Vec::new(), [8, 9].into_iter());
        send(&mut outbox);
        let again = control::encode(&ToAgent::Slab { id: 8 }).unwrap().len();
        let second = messages(wire.clone()).iter().take(3).map(|m| control::encode(m).unwrap().len()).sum::<usize>();
        assert_eq!(ridden, [(start, 7), (second, 8), (second + again, 9)]);
        let [slab_8, slab_9] = [8, 9].map(|id| ToAgent::Slab { id });
        assert_eq!(messages(wire)[3..], [slab_8, slab_9, notice("n"), model(0, "A")]);
    }

    #[test]
    fn an_agent_that_takes_a_byte_at_a_time_gets_whole_messages() {
        let mut outbox = Outbox::default();
        let mut wire = Vec::new();
        for n in 0..20 {
            outbox.push(notice(&format!("notice {n}")));
            // News of a model that is half sent waits behind it.
            outbox.push(model(0, &format!("M{n}")));
            wire.extend(read(&mut outbox, 1, 5));
        }
        while !outbox.is_empty() {
            wire.extend(read(&mut outbox, 1, 5));
        }
        let said = messages(wire);
        assert_eq!(said.iter().filter(|m| matches!(m, ToAgent::Notice(_))).count(), 20);
        assert_eq!(said.iter().rfind(|m| matches!(m, ToAgent::Model { .. })), Some(&model(0, "M19")));
    }

    fn answer(id: u64) -> ToAgent {
        ToAgent::Answer { id, answer: plan_of(0, &[]) }
    }

    #[test]
    fn an_answer_is_for_the_agent_that_asked_and_is_forgotten_once_it_is_sent() {
        let mut outbox = Outbox::default();
        for message in [answer(1), notice("n"), answer(2)] {
            outbox.push(message);
        }
        assert_eq!(messages(read(&mut outbox, 1000, 2)), [answer(1), notice("n")]);
        outbox.restart(Vec::new(), std::iter::empty());
        assert_eq!(messages(read(&mut outbox, 1000, 100)), [notice("n")], "the other one asked nothing");
        for id in 0..1000 {
            outbox.push(answer(id));
            assert_eq!(messages(read(&mut outbox, 1000, 100)), [answer(id)]);
        }
        assert_eq!(outbox.messages.len(), 1);
    }

    #[test]
    fn more_models_than_are_described_are_said_once() {
        let mut outbox = Outbox::default();
        for n in 0..MAX_MODELS as u32 {
            outbox.push(model(n, "A"));
        }
        assert_eq!(outbox.messages.len(), MAX_MODELS);
        outbox.push(model(MAX_MODELS as u32, "A"));
        outbox.push(model(MAX_MODELS as u32 + 1, "A"));
        assert_eq!(outbox.messages.split_off(MAX_MODELS), [notice(&control::too_many_models())]);
    }

    #[test]
    fn an_agent_that_reads_nothing_holds_a_bounded_number_of_messages() {
        let mut outbox = Outbox::default();
        for id in 0..1000 {
            assert_eq!(outbox.is_full_of_answers(), id >= MAX_QUESTIONS as u64);
            outbox.push(answer(id));
        }
        outbox.restart(Vec::new(), std::iter::empty());
        for n in 0..2000 {
            outbox.push(notice(&n.to_string()));
            outbox.push(model(n, "A"));
            outbox.push(model(0, &n.to_string()));
        }
        assert_eq!(outbox.messages.len(), MAX_NOTICES + MAX_MODELS);
    }
}
