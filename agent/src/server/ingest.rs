//! The thread that empties one rank's slab into the store.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use flexmodel_run::{
    format::Origin,
    write::{
        Outcome, PartWriter,
        account::{Account, CUT_OFF, LOST_BY_JOB},
    },
};
use wire::{
    record::RecordMeta,
    slab::{Fetched, Frame, SlabError, SlabReader},
};

use super::{PATIENCE, Server, session::Session};

/// Tensors under way at a time: the threads of a job write their pieces between each other's.
pub const MAX_OPEN: usize = 32;
/// Longest sleep while there is nothing to read.
const NAP: Duration = Duration::from_millis(100);
/// How long a frame may stay half written after its job's connection is gone.
const GRACE: Duration = Duration::from_secs(2);
/// How long an agent that finishes waits to see that a rank is gone.
const PARTING: Duration = Duration::from_millis(250);
/// How often the rank's own counters are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Starts the thread.
pub fn start(server: Arc<Server>, session: Arc<Session>, reader: SlabReader) -> std::io::Result<()> {
    let slab = reader.mapping().header().id;
    let account = server.store.account(slab);
    let mut ingest = Ingest {
        server,
        session,
        slab,
        open: VecDeque::new(),
        account,
        before: account,
        rest: Rest::default(),
        looked: Instant::now(),
    };
    std::thread::Builder::new().name(format!("rank {}", ingest.session.rank)).spawn(move || {
        ingest.run(reader);
        let server = ingest.server.clone();
        drop(ingest);
        server.forget_done();
    })?;
    Ok(())
}

struct Ingest {
    server: Arc<Server>,
    session: Arc<Session>,
    /// The slab's number.
    slab: u64,
    /// Tensors whose last piece has not come, oldest first.
    open: VecDeque<(u64, PartWriter)>,
    /// What the manifest has of this slab.
    account: Account,
    /// What it had when this began. The frame of its last line may not be released yet.
    before: Account,
    /// What is lost at the end and has no line yet.
    rest: Rest,
    looked: Instant,
}

/// What is lost when nothing more is read.
#[derive(Clone, Copy, Debug, Default)]
struct Rest {
    /// Counted by the rank since it was last looked at.
    by_job: u64,
    /// Begun, without a line, and not given up by the rank.
    cut_off: u64,
    /// Tensors begun.
    begun: u64,
}

/// Why nothing more is read from a slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// The rank is gone.
    Left,
    /// The agent finishes, and the rank goes on: what is in the slab is there for the next agent.
    Stopped,
    /// Another slab has followed it, and it is empty (SLAB-7).
    Complete,
}

impl Ingest {
    fn run(&mut self, mut reader: SlabReader) {
        let _end = End(self.session.clone());
        let ended = self.empty(&mut reader);
        self.open.clear();
        match &ended {
            Ok(Ended::Left) => {}
            Ok(Ended::Complete) => self.close(),
            Ok(Ended::Stopped) => self.count_losses(),
            Err(e) => {
                let rank = self.session.rank;
                self.server.board.trouble(&format!("{e}: nothing more is read from rank {rank}, the others go on"));
                // How much is not known: its counters are not to be trusted either.
                self.lose(1, "the slab is damaged", 0);
                self.session.tell_of_damage();
            }
        }
        let Rest { by_job, cut_off, begun } = self.rest;
        self.count_lost(by_job, LOST_BY_JOB, 0);
        self.count_lost(cut_off, CUT_OFF, begun);
        match ended {
            Ok(Ended::Complete) => reader.settle(),
            _ => self.server.board.left(self.session.rank),
        }
    }

    /// Returns when everything is read and nothing more comes, or the agent finishes.
    fn empty(&mut self, reader: &mut SlabReader) -> Result<Ended, SlabError> {
        let mut stuck: Option<Instant> = None;
        loop {
            if self.session.is_drained() {
                return Ok(if self.is_left_soon() { Ended::Left } else { Ended::Stopped });
            }
            // Before the look at the slab: what came before the end of the connection, or of the slab, must be seen.
            let (gone, complete) = (self.session.hung_up(), reader.is_complete());
            let pending = match reader.fetch()? {
                Fetched::Frame(frame) => {
                    self.take(frame);
                    reader.release()?;
                    stuck = None;
                    self.look();
                    continue;
                }
                Fetched::Empty => false,
                Fetched::Pending => true,
            };
            if !pending {
                stuck = None;
                if complete {
                    return Ok(Ended::Complete);
                }
                if self.end_after(gone) {
                    return Ok(Ended::Left);
                }
            } else if gone.is_some() || self.session.is_stopping() {
                let patience = if self.session.is_stopping() { PATIENCE / 2 } else { GRACE };
                if stuck.get_or_insert_with(Instant::now).elapsed() > patience {
                    // Whoever was writing this frame never will again.
                    reader.release()?;
                    stuck = None;
                    continue;
                }
            }
            self.look();
            reader.wait(NAP);
        }
    }

    /// Ends the session if the rank is gone by that connection and has not come back.
    fn end_after(&mut self, gone: Option<u32>) -> bool {
        let session = self.session.clone();
        gone.is_some_and(|connection| session.end_after(connection, || self.close()))
    }

    /// Whether the rank leaves as well as the agent. The end of a process is noticed a moment after it.
    fn is_left_soon(&mut self) -> bool {
        let since = Instant::now();
        while self.session.leaving().is_none() && since.elapsed() < PARTING {
            std::thread::sleep(PARTING / 50);
        }
        let leaving = self.session.leaving();
        self.end_after(leaving)
    }

    /// Nothing more is read: settles what has no line (SLAB-9). The lines are written later, since this may be done while
    /// the rank wants to come back.
    fn close(&mut self) {
        let header = self.session.mapping().header();
        // In this order: what is begun meanwhile is not taken for cut off.
        let begun = header.begun.load(Ordering::Acquire);
        let dropped = header.dropped.load(Ordering::Relaxed);
        let by_job = dropped.saturating_sub(self.account.by_job);
        self.account.by_job = self.account.by_job.max(dropped);
        let cut_off = self.account.missing(begun);
        if cut_off > 0 {
            self.account.settled = self.account.settled.saturating_add(cut_off);
            self.account.cut_off = begun;
        }
        self.rest = Rest { by_job, cut_off, begun };
        self.server.store.keep_account(self.slab, self.account);
    }

    fn take(&mut self, frame: Frame<'_>) {
        let record = frame.record;
        if self.before.knows(record) {
            return;
        }
        if !frame.meta.is_empty() {
            match RecordMeta::decode(&frame.meta) {
                // Other ranks' parts come with its own where they are gathered.
                Ok(meta) if meta.rank != self.session.rank && meta.rank >= self.server.board.world() => {
                    return self.lose(1, "it names a rank that the job does not have", record);
                }
                Ok(meta) if !meta.refused.is_empty() => {
                    self.account.settled += 1;
                    let (what, reason) =
                        self.server.store.refused(self.session.job, meta, Some(Origin(self.slab, record)));
                    return self.server.board.live().refused(&what, &reason);
                }
                Ok(meta) if meta.payload_len() != Some(frame.total_len) || frame.piece_offset != 0 => {
                    return self.lose(1, "its length is not that of its shape", record);
                }
                Ok(meta) => self.begin(record, meta),
                Err(e) => return self.lose(1, &e.to_string(), record),
            }
        }
        // What is not there began with an agent that died, or was no record.
        let Some(at) = self.open.iter().position(|(n, _)| *n == record) else { return };
        let Some((_, part)) = self.open.get_mut(at) else { return };
        part.write(frame.piece_offset, frame.payload);
        let last = frame.piece_offset.checked_add(frame.payload.len() as u64) == Some(part.size());
        if !last && !part.is_complete() {
            return;
        }
        if let Some((_, part)) = self.open.remove(at) {
            self.finish(part);
        }
    }

    fn begin(&mut self, record: u64, meta: RecordMeta) {
        // What is that old was given up by the job, which has counted it.
        while self.open.len() >= MAX_OPEN {
            self.open.pop_front();
        }
        let part = self.server.store.begin(self.session.job, meta).out_of(Origin(self.slab, record));
        self.open.push_back((record, part));
    }

    fn finish(&mut self, part: PartWriter) {
        self.account.settled += 1;
        let live = self.server.board.live();
        match part.finish() {
            Outcome::Stored(told) => told.iter().for_each(|told| live.told(told)),
            Outcome::Lost => live.dropped(self.session.rank, 1),
        }
    }

    /// Counts tensors as lost that have no line of their own, the last of them with this number.
    fn lose(&mut self, count: u64, reason: &str, record: u64) {
        self.account.settled = self.account.settled.saturating_add(count);
        self.count_lost(count, reason, record);
    }

    fn count_lost(&self, count: u64, reason: &str, record: u64) {
        if count == 0 {
            return;
        }
        self.server.store.dropped(self.session.rank, count, reason, Some(Origin(self.slab, record)));
        self.server.board.live().dropped(self.session.rank, count);
    }

    fn look(&mut self) {
        if self.looked.elapsed() > LOOK {
            self.looked = Instant::now();
            self.count_losses();
        }
    }

    fn count_losses(&mut self) {
        let now = self.session.mapping().header().dropped.load(Ordering::Relaxed);
        if now > self.account.by_job {
            self.count_lost(now - self.account.by_job, LOST_BY_JOB, 0);
            self.account.by_job = now;
        }
    }
}

/// Ends the session however its thread ends: its heart must not beat for a slab that nobody reads.
struct End(Arc<Session>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.end();
    }
}
