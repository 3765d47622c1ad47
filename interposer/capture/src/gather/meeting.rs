//! The thread of a rank that meets those of the others: rounds, and the transfers that come of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use wire::{
    codes::{CopyState, MoveState},
    record::RecordMeta,
};

use super::{
    Gather, Outgoing, PATIENCE, Route, STALE, State,
    agreement::{Agreement, Held, Offer, OfferedPart, Report, Verdict, Why},
    coming::Coming,
    communicator::{Communicator, Transfer},
    message,
    staging::Staged,
};

/// How long a rank that has nothing to say lets the others wait, and how long where none has had for a while.
const TICK: Duration = Duration::from_millis(10);
const IDLE: Duration = Duration::from_millis(200);
/// How often a device is asked what has come.
const LOOK: Duration = Duration::from_millis(1);
/// Most bytes that a rank receives at once, unless a single part has more.
const BATCH: u64 = 64 << 20;
/// Divergences that are named one by one.
const NAMED: u32 = 8;

/// A part, and the member that its tensor goes to: the first that has a part of it.
struct Bound {
    to: usize,
    part: OfferedPart,
}

/// What this rank knows of it.
pub struct Meeting {
    gather: Arc<Gather>,
    comm: Communicator,
    agreement: Agreement,
    /// What is not offered yet.
    coming: Coming,
    /// By number.
    mine: BTreeMap<u64, Outgoing>,
    /// How many there were.
    offered: u64,
    /// Divergences so far.
    named: u32,
    /// How long to wait for something to say.
    tick: Duration,
}

impl Meeting {
    /// Of `size` ranks.
    pub fn new(gather: Arc<Gather>, comm: Communicator, size: usize) -> Self {
        let (agreement, coming, mine) = (Agreement::new(size), Coming::default(), BTreeMap::new());
        Self { gather, comm, agreement, coming, mine, offered: 0, named: 0, tick: TICK }
    }

    /// Goes on until the ranks part, and brings to the agent what is left then.
    pub fn run(&mut self) {
        let why = loop {
            let report = self.news();
            let leaving = report.leaving;
            let round = self.comm.exchange(&message::encode(&report));
            let Some(round) =
                round.and_then(|words| words.iter().map(|w| message::decode(w)).collect::<Option<Vec<_>>>())
            else {
                break "a rank is gone or stands still";
            };
            let others = round.iter().any(|report| report.leaving);
            let busy = round.iter().any(|report| !report.offers.is_empty() || report.closing);
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
        self.gather.send_all(std::mem::take(&mut self.mine).into_values());
        self.gather.send_all(self.coming.give_up());
        let mut gather = self.gather.lock();
        let quiet = why.is_empty() || gather.route == Route::PerRank || gather.closing.is_some();
        gather.route = Route::PerRank;
        let left = std::mem::take(&mut gather.queue);
        drop(gather);
        self.gather.send_all(left);
        if !quiet {
            self.gather.transport.notice(format!("assemble=collective: {why}; from now on the agents assemble"));
        }
        if self.named > NAMED {
            self.gather
                .transport
                .notice(format!("assemble=collective: {} tensors more were not gathered", self.named - NAMED));
        }
    }

    /// What there is to tell, once there is something, or a tick later.
    fn news(&mut self) -> Report {
        let quiet = |gather: &mut State| gather.queue.is_empty() && gather.closing.is_none() && !gather.stop;
        let end = Instant::now() + self.tick;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            // Of what comes on a device nobody tells.
            let wait = if self.coming.is_empty() { left } else { left.min(LOOK) };
            let waited = self.gather.news.wait_timeout_while(self.gather.lock(), wait, quiet);
            let timed_out = waited.unwrap_or_else(PoisonError::into_inner).1.timed_out();
            if !timed_out || wait == left || self.coming.has_news() {
                break;
            }
        }
        // Before the queue: what is offered of earlier steps is in it.
        let step = (self.gather.step)();
        let mut gather = self.gather.lock();
        let queue = std::mem::take(&mut gather.queue);
        let (closing, stop) = (gather.closing, gather.stop);
        drop(gather);
        let come = self.coming.take(queue);
        let step = self.coming.step(step);
        let mut offers = Vec::with_capacity(come.len());
        for mut outgoing in come {
            let cannot = |staged: &mut Staged| !self.comm.takes(staged) || staged.state() == CopyState::Failed;
            if let Some(staged) = outgoing.staged.take_if(cannot) {
                self.gather.transport.send(staged.captured(outgoing.meta.clone()));
            }
            let held = outgoing.staged.as_ref().map_or(Held::Not, Staged::held);
            offers.push(Offer { meta: outgoing.meta.clone(), held });
            self.mine.insert(self.offered, outgoing);
            self.offered += 1;
        }
        let none_left = self.mine.is_empty() && self.coming.is_empty();
        let waited = closing.is_some_and(|since| none_left || since.elapsed() > PATIENCE);
        let leaving = stop || waited || !self.gather.process.is_on();
        let stale = self.mine.iter().filter(|(_, mine)| mine.since.elapsed() > STALE);
        // Who ends offers nothing any more.
        let closing = closing.is_some() && self.coming.is_empty();
        Report { step, closing, leaving, offers, withdrawn: stale.map(|(&n, _)| n).collect() }
    }

    /// Whether all transfers went well. Where not, the tensors are still staged.
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
                Verdict::PerRank(parts, why) => self.send_per_rank(&parts, why),
            }
        }
        batch.is_empty() || self.transfer(&batch)
    }

    /// Brings parts where they are bound, and from there on their way.
    fn transfer(&mut self, batch: &[Bound]) -> bool {
        let me = self.comm.index();
        let mut transfers = Vec::new();
        for Bound { to, part } in batch.iter().filter(|bound| bound.part.member != bound.to) {
            if part.member == me {
                let mine = self.mine.get(&part.number).and_then(|mine| mine.staged.as_ref());
                let Some(staged) = mine else { return false };
                transfers.push(Transfer::send(*to, staged));
            } else if *to == me {
                transfers.push(Transfer::receive(part));
            }
        }
        let (once, budget) = (self.gather.replicas_once.load(Ordering::Relaxed), &self.gather.staged_bytes);
        let (outcome, received) = self.comm.transfer(transfers, once, budget);
        match outcome {
            MoveState::Done => {}
            MoveState::Failed => return false,
            MoveState::NotReady => {
                drop(received);
                batch.iter().for_each(|bound| self.send_per_rank(std::slice::from_ref(&bound.part), Why::Withdrawn));
                return true;
            }
        }
        let mut received = received.into_iter();
        for Bound { to, part } in batch {
            if part.member == me {
                let mine = self.mine.remove(&part.number);
                if let Some(mine) = mine.filter(|_| *to == me) {
                    self.gather.send_one(mine);
                }
            } else if *to == me
                && let Some(staged) = received.next()
            {
                self.gather.transport.send(staged.captured(part.meta.clone()));
            }
        }
        true
    }

    /// Each rank's part goes to its agent; the first rank that has one says so.
    fn send_per_rank(&mut self, parts: &[OfferedPart], why: Why) {
        let me = self.comm.index();
        if parts.iter().map(|part| part.member).min() == Some(me) && why != Why::Withdrawn {
            self.named += 1;
            if let Some(part) = parts.first().filter(|_| self.named <= NAMED) {
                self.gather.transport.notice(self.divergence(&part.meta, parts, why));
            }
        }
        for part in parts.iter().filter(|part| part.member == me) {
            if let Some(mine) = self.mine.remove(&part.number) {
                self.gather.send_one(mine);
            }
        }
    }

    fn divergence(&self, meta: &RecordMeta, parts: &[OfferedPart], why: Why) -> String {
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
