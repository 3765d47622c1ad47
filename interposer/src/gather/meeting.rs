//! The thread of a rank that meets those of the others: rounds, and the transfers that come of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use wire::record::RecordMeta;

use super::{
    Gather, NEWS, Outgoing, PATIENCE, STALE, Way,
    agreement::{Agreement, Held, Offer, Part, Told, Verdict, Why},
    kept::{Communicator, Kept, Move},
    lock, message,
};
use crate::{engine, shipping, state};

/// How long a rank that has nothing to say lets the others wait, and how long where none has had for a while.
const TICK: Duration = Duration::from_millis(10);
const IDLE: Duration = Duration::from_millis(200);
/// Most bytes that a rank receives at once, unless a single part has more.
const BATCH: u64 = 64 << 20;
/// Divergences that are named one by one.
const NAMED: u32 = 8;

/// A part, and the member that its tensor goes to: the first that has a part of it.
struct Bound {
    to: usize,
    part: Part,
}

/// What this rank knows of it.
pub struct Meeting {
    comm: Communicator,
    agreement: Agreement,
    /// By number.
    mine: BTreeMap<u64, Outgoing>,
    /// How many there were.
    offered: u64,
    /// Divergences so far.
    told: u32,
    /// How long to wait for something to say.
    tick: Duration,
}

impl Meeting {
    /// Of so many ranks.
    pub fn new(comm: Communicator, size: usize) -> Self {
        Self { comm, agreement: Agreement::new(size), mine: BTreeMap::new(), offered: 0, told: 0, tick: TICK }
    }

    /// Goes on until the ranks part, and brings to the agent what is left then.
    pub fn run(&mut self) {
        let why = loop {
            let told = self.news();
            let leaving = told.leaving;
            let round = self.comm.exchange(&message::encode(&told));
            let Some(round) =
                round.and_then(|words| words.iter().map(|w| message::decode(w)).collect::<Option<Vec<_>>>())
            else {
                break "a rank is gone or stands still";
            };
            let others = round.iter().any(|told| told.leaving);
            let busy = round.iter().any(|told| !told.offers.is_empty() || told.closing);
            self.tick = if busy { TICK } else { (2 * self.tick).min(IDLE) };
            let verdicts = self.agreement.take(round);
            if !self.carry_out(verdicts) {
                break "a transfer failed";
            }
            if leaving || others || self.agreement.is_over() {
                break "";
            }
        };
        // What the others do with these does not depend on us any more.
        for verdict in self.agreement.dissolve() {
            self.carry_out(vec![verdict]);
        }
        std::mem::take(&mut self.mine).into_values().for_each(Outgoing::ship);
        let mut gather = lock();
        let quiet = why.is_empty() || gather.way == Way::Apart || gather.closing.is_some();
        gather.way = Way::Apart;
        let left = std::mem::take(&mut gather.queue);
        drop(gather);
        left.into_iter().for_each(Outgoing::ship);
        if !quiet {
            shipping::notice(format!("assemble=collective: {why}; from now on the agents assemble"));
        }
        if self.told > NAMED {
            shipping::notice(format!("assemble=collective: {} tensors more were not gathered", self.told - NAMED));
        }
    }

    /// What there is to tell, once there is something, or a tick later.
    fn news(&mut self) -> Told {
        let gather = lock();
        let quiet = |gather: &mut Gather| gather.queue.is_empty() && gather.closing.is_none() && !gather.stop;
        drop(NEWS.wait_timeout_while(gather, self.tick, quiet));
        // Before the queue: what is offered of earlier steps is in it.
        let step = engine::step();
        let mut gather = lock();
        let queue = std::mem::take(&mut gather.queue);
        let (closing, stop) = (gather.closing, gather.stop);
        drop(gather);
        let mut offers = Vec::with_capacity(queue.len());
        for mut outgoing in queue {
            if let Some(kept) = outgoing.kept.take_if(|kept| !self.comm.takes(kept)) {
                Outgoing { kept: Some(kept), meta: outgoing.meta.clone(), ..outgoing }.ship();
            }
            let held = outgoing.kept.as_ref().map_or(Held::Not, Kept::held);
            offers.push(Offer { meta: outgoing.meta.clone(), held });
            self.mine.insert(self.offered, outgoing);
            self.offered += 1;
        }
        let waited = closing.is_some_and(|since| self.mine.is_empty() || since.elapsed() > PATIENCE);
        let leaving = stop || waited || !state::is_on();
        let stale = self.mine.iter().filter(|(_, mine)| mine.since.elapsed() > STALE);
        Told { step, closing: closing.is_some(), leaving, offers, withdrawn: stale.map(|(&n, _)| n).collect() }
    }

    /// Whether all transfers went well. What they were of is kept where not.
    fn carry_out(&mut self, verdicts: Vec<Verdict>) -> bool {
        let mut batch: Vec<Bound> = Vec::new();
        let mut bytes = 0;
        for verdict in verdicts {
            match verdict {
                Verdict::Gather(parts) => {
                    let Some(to) = parts.iter().map(|part| part.member).min() else { continue };
                    for part in parts {
                        let size = part.meta.payload_len().filter(|_| part.member != to).unwrap_or_default();
                        if bytes + size > BATCH && !batch.is_empty() {
                            if !self.transfer(&std::mem::take(&mut batch)) {
                                return false;
                            }
                            bytes = 0;
                        }
                        bytes += size;
                        batch.push(Bound { to, part });
                    }
                }
                Verdict::Apart(parts, why) => self.leave_apart(&parts, why),
            }
        }
        batch.is_empty() || self.transfer(&batch)
    }

    /// Brings parts where they are bound, and from there on their way.
    fn transfer(&mut self, batch: &[Bound]) -> bool {
        let me = self.comm.index();
        let mut moves = Vec::new();
        for Bound { to, part } in batch.iter().filter(|bound| bound.part.member != bound.to) {
            if part.member == me {
                let Some(kept) = self.mine.get(&part.number).and_then(|mine| mine.kept.as_ref()) else { return false };
                moves.push(Move::send(*to, kept));
            } else if *to == me {
                moves.push(Move::receive(part));
            }
        }
        let Some(received) = self.comm.transfer(moves) else { return false };
        let mut received = received.into_iter();
        for Bound { to, part } in batch {
            if part.member == me {
                let mine = self.mine.remove(&part.number);
                if let Some(mine) = mine.filter(|_| *to == me) {
                    mine.ship();
                }
            } else if *to == me
                && let Some(kept) = received.next()
            {
                shipping::ship(kept.cargo(part.meta.clone()));
            }
        }
        true
    }

    /// Each rank's part goes to its agent; the first rank that has one says so.
    fn leave_apart(&mut self, parts: &[Part], why: Why) {
        let me = self.comm.index();
        if parts.iter().map(|part| part.member).min() == Some(me) && why != Why::Withdrawn {
            self.told += 1;
            if let Some(part) = parts.first().filter(|_| self.told <= NAMED) {
                shipping::notice(self.divergence(&part.meta, parts, why));
            }
        }
        for part in parts.iter().filter(|part| part.member == me) {
            if let Some(mine) = self.mine.remove(&part.number) {
                mine.ship();
            }
        }
    }

    fn divergence(&self, meta: &RecordMeta, parts: &[Part], why: Why) -> String {
        let list = |ranks: &[usize]| {
            let s = if ranks.len() == 1 { "" } else { "s" };
            format!("rank{s} {}", ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", "))
        };
        let there: BTreeSet<usize> = parts.iter().map(|part| part.member).collect();
        let there: Vec<usize> = there.into_iter().collect();
        let what = match (why, self.agreement.absent(parts)) {
            (Why::Differs, _) => format!("{} have no common layout", list(&there)),
            (_, Some(absent)) => format!("{} did not give its part", list(&absent)),
            (_, None) => format!("only {} gave a part", list(&there)),
        };
        let module = if meta.module.is_empty() { "(root)" } else { &meta.module };
        let (kind, path) = (meta.kind.name(), &meta.path);
        format!(
            "assemble=collective: {what} of {module} {kind} {path} at step {}, call {}.{}; it is not gathered",
            meta.step, meta.micro, meta.call
        )
    }
}
