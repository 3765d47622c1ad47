//! The thread that empties one rank's slab into the store.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use wire::{
    record::RecordMeta,
    slab::{Fetched, Frame, SlabError, SlabReader},
};

use super::{PATIENCE, Server, session::Session};
use crate::store::{Outcome, PartWriter, recover::LOST_BY_JOB};

/// Tensors under way at a time: the threads of a job write their pieces between each other's.
pub const MAX_OPEN: usize = 32;
/// Longest sleep while there is nothing to read.
const NAP: Duration = Duration::from_millis(100);
/// How long a frame may stay half written after its job's connection is gone.
const GRACE: Duration = Duration::from_secs(2);
/// How often the rank's own counters are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Starts the thread.
pub fn start(server: Arc<Server>, session: Arc<Session>, reader: SlabReader) -> std::io::Result<()> {
    let baseline = server.store.take_lost_by_job(session.rank);
    let dropped = reader.mapping().header().dropped.load(Ordering::Relaxed);
    let mut ingest = Ingest {
        server,
        session,
        open: VecDeque::new(),
        newest: 0,
        orphan: None,
        counted: if baseline <= dropped { baseline } else { 0 },
        looked: Instant::now(),
    };
    std::thread::Builder::new().name(format!("rank {}", ingest.session.rank)).spawn(move || ingest.run(reader))?;
    Ok(())
}

struct Ingest {
    server: Arc<Server>,
    session: Arc<Session>,
    /// Tensors whose last piece has not come, oldest first.
    open: VecDeque<(u64, PartWriter)>,
    /// Largest number of a tensor so far.
    newest: u64,
    /// The last tensor of which only later pieces were seen.
    orphan: Option<u64>,
    /// Of the rank's own losses, those that are journalled.
    counted: u64,
    looked: Instant,
}

impl Ingest {
    fn run(&mut self, mut reader: SlabReader) {
        let _end = End(self.session.clone());
        if let Err(e) = self.empty(&mut reader) {
            let rank = self.session.rank;
            self.server.board.trouble(&format!("{e}: nothing more is read from rank {rank}, the others go on"));
            self.lose(1, "the slab is damaged");
            self.session.damaged.notify_one();
        }
        self.count_losses();
        self.server.board.left(self.session.rank);
    }

    /// Returns when the rank is gone and everything it left is read, or the agent finishes.
    fn empty(&mut self, reader: &mut SlabReader) -> Result<(), SlabError> {
        let mut stuck: Option<Instant> = None;
        loop {
            if self.session.is_drained() {
                self.forsake(!self.session.hung_up().is_some_and(|(_, in_good_order)| in_good_order));
                return Ok(());
            }
            // Before the look at the slab: what came before the end of the connection must be seen.
            let gone = self.session.hung_up();
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
                if let Some((connection, in_good_order)) = gone
                    && self.session.end_after(connection)
                {
                    self.forsake(!in_good_order);
                    return Ok(());
                }
            } else if gone.is_some() || self.session.is_stopping() {
                let patience = if self.session.is_stopping() { PATIENCE / 2 } else { GRACE };
                if stuck.get_or_insert_with(Instant::now).elapsed() > patience {
                    // Whoever was writing this frame never will again.
                    self.lose(1, "the job ended in the middle of it");
                    reader.release()?;
                    stuck = None;
                    continue;
                }
            }
            self.look();
            reader.wait(NAP);
        }
    }

    /// Nothing more is read. What the rank gave up before it went on to other tensors it has counted itself; what it
    /// was at when it was cut off it has not.
    fn forsake(&mut self, cut_off: bool) {
        if cut_off && self.open.back().is_some_and(|(record, _)| *record == self.newest) {
            self.lose(1, "the job ended in the middle of it");
        }
        self.open.clear();
    }

    fn take(&mut self, frame: Frame<'_>) {
        self.newest = self.newest.max(frame.record);
        if !frame.meta.is_empty() {
            match RecordMeta::decode(&frame.meta) {
                // Other ranks' parts come with its own where they are gathered.
                Ok(meta) if meta.rank != self.session.rank && meta.rank >= self.server.board.world() => {
                    return self.lose(1, "it names a rank that the job does not have");
                }
                Ok(meta) if !meta.refused.is_empty() => {
                    let (what, reason) = self.server.store.refused(meta);
                    return self.server.board.live().refused(&what, &reason);
                }
                Ok(meta) if meta.payload_len() != Some(frame.total_len) || frame.piece_offset != 0 => {
                    return self.lose(1, "its length is not that of its shape");
                }
                Ok(meta) => self.begin(frame.record, meta),
                Err(e) => return self.lose(1, &e.to_string()),
            }
        }
        let Some(at) = self.open.iter().position(|(n, _)| *n == frame.record) else {
            // The start went to an agent that died, or was no record; the latter is counted already.
            if frame.meta.is_empty() && self.orphan != Some(frame.record) && frame.piece_offset > 0 {
                self.orphan = Some(frame.record);
                self.lose(1, "the agent was killed in the middle of it");
            }
            return;
        };
        let Some((_, part)) = self.open.get_mut(at) else { return };
        part.write(frame.piece_offset, frame.payload);
        let last = frame.piece_offset.checked_add(frame.payload.len() as u64) == Some(part.len());
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
        self.open.push_back((record, self.server.store.begin(meta)));
    }

    fn finish(&mut self, part: PartWriter) {
        let live = self.server.board.live();
        match part.finish() {
            Outcome::Stored { part, apart } => {
                live.part(&part);
                if let Some(apart) = apart {
                    live.diverged(&apart.0, apart.1);
                }
            }
            Outcome::Repeated => {}
            Outcome::Lost => live.dropped(self.session.rank, 1),
        }
    }

    fn lose(&self, count: u64, reason: &str) {
        self.server.store.dropped(self.session.rank, count, reason);
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
        if now > self.counted {
            self.lose(now - self.counted, LOST_BY_JOB);
            self.counted = now;
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
