//! The store of one run: what the ingest threads write through.

use std::{
    collections::BTreeMap,
    io, mem,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread::JoinHandle,
};

use wire::{passes::Pass, record::RecordMeta};

use super::{
    account::{Account, Accounts},
    dir::{self, RunDir},
    journal::Journal,
    part::PartWriter,
    place::Allocator,
    recover::{self, Found},
    seal,
    shard::{Lie, Shard, stem},
};
use crate::{
    format::{JobId, JobInfo, Line, Origin, Revision, RunInfo, Totals, What},
    joining::{Joining, Told},
};

/// Bytes of tensors in a shard before the next one is begun.
pub const DEFAULT_SHARD_BYTES: u64 = 512 << 20;

/// Shards that wait to be sealed; who ends one more waits for the disk.
pub const MAX_UNSEALED: usize = 8;
/// Shards that wait until it is known which of their pieces are one.
pub const MAX_RIPE: usize = 4;

/// Bytes that a disk which was full must have again to be said to work: what lost parts give back is soon full once more.
const ROOM: u64 = 64 << 20;

/// How a store writes.
pub struct Options {
    /// Bytes of tensors in a shard before the next one is begun.
    pub shard_bytes: u64,
    /// Told what the user should read.
    pub notify: Box<dyn Fn(&str) + Send + Sync>,
}

/// Writes one run directory. Shared by all threads; no thread ever waits for another rank.
pub struct Store {
    dir: RunDir,
    alloc: Mutex<Allocator>,
    journal: Arc<Journal>,
    totals: Mutex<Totals>,
    /// Of the slabs that nobody reads now.
    accounts: Mutex<Accounts>,
    joining: Arc<Mutex<Joining>>,
    /// The last of each job.
    revisions: Mutex<BTreeMap<JobId, Revision>>,
    /// A write failed, and not enough went well since.
    broken: AtomicBool,
    notify: Arc<dyn Fn(&str) + Send + Sync>,
    sealer: Mutex<Option<(mpsc::SyncSender<Shard>, JoinHandle<()>)>>,
    /// Shards that the sealer was given and has not sealed.
    unsealed: Arc<AtomicUsize>,
    /// Full ones, of whose last pieces it is not known yet of which pass they are.
    ripe: Mutex<Vec<Shard>>,
}

impl Store {
    /// Makes the run directory, or takes over one whose agent is gone: then everything journalled is recovered first.
    /// Also returns what its `run.json` says, and the jobs in it, each as it was last journalled.
    pub fn open(path: &Path, options: Options) -> anyhow::Result<(Arc<Self>, RunInfo, Vec<JobInfo>)> {
        let dir = RunDir::claim(path)?;
        let info = dir.read_info();
        let Found { next_shard, totals, accounts, seen, jobs, revisions, joining, damaged: _ } =
            recover::recover(dir.folder().place(), dir.path(), info.finished_ns.is_some())?;
        let joining = Arc::new(Mutex::new(joining));
        let journal = Arc::new(Journal::open(dir.folder().place()).map_err(|e| dir::cannot_write(dir.path(), &e))?);
        let notify: Arc<dyn Fn(&str) + Send + Sync> = options.notify.into();
        let unsealed = Arc::default();
        let sealer = sealer(&dir, journal.clone(), joining.clone(), notify.clone(), Arc::clone(&unsealed))?;
        let store = Arc::new(Self {
            alloc: Mutex::new(Allocator::new(dir.folder().place().to_owned(), options.shard_bytes, next_shard, seen)),
            journal,
            totals: Mutex::new(totals),
            accounts: Mutex::new(accounts),
            joining,
            revisions: Mutex::new(revisions),
            broken: AtomicBool::new(false),
            notify,
            sealer: Mutex::new(Some(sealer)),
            unsealed,
            ripe: Mutex::default(),
            dir,
        });
        Ok((store, info, jobs.into_values().collect()))
    }

    /// The run directory.
    pub fn dir(&self) -> &RunDir {
        &self.dir
    }

    /// Begins a part that a rank of `job` captured.
    pub fn begin(self: &Arc<Self>, job: JobId, meta: RecordMeta) -> PartWriter {
        PartWriter::new(self.clone(), job, meta)
    }

    /// Journals what is known of a job.
    pub fn job(&self, info: &JobInfo) {
        lock(&self.joining).job(info);
        if let Err(e) = self.journal.append(&Line::Job(info.clone())) {
            self.trouble(&e);
        }
    }

    /// Journals that other hooks began in a job. They must be within what is read ([`Line::check`]).
    pub fn revision(&self, revision: &Revision) {
        if let Err(e) = self.journal.append(&Line::Revision(revision.clone())) {
            self.trouble(&e);
        }
        recover::latest(&mut lock(&self.revisions), revision.clone());
    }

    /// The last revision of each job in which other hooks began than those of the environment, also where an agent before this
    /// one journalled it.
    pub fn revisions(&self) -> Vec<Revision> {
        lock(&self.revisions).values().cloned().collect()
    }

    /// Journals that a tensor of a job was refused, for the reason in `meta`.
    pub fn refused(&self, job: JobId, meta: RecordMeta, from: Option<Origin>) -> (What, String) {
        let reason = meta.refused.clone();
        let mut what = What { from, ..What::from_meta(meta) };
        what.id.job = job;
        if let Err(e) = self.journal.append(&Line::Refused { what: what.clone(), reason: reason.clone() }) {
            self.trouble(&e);
        }
        self.count(|totals| totals.refused += 1);
        (what, reason)
    }

    /// Journals what a rank says of a forward pass. One that cannot be is left out, and so are ranks that are not there.
    pub fn passed(&self, job: JobId, rank: u32, pass: Pass) {
        let line = Line::Pass { job, rank, pass };
        if line.check().is_err() {
            return;
        }
        if let Err(e) = self.journal.append(&line) {
            self.trouble(&e);
        }
        if let Line::Pass { pass, .. } = &line {
            lock(&self.joining).passed(job, rank, pass);
        }
    }

    /// Journals that a rank is gone.
    pub fn left(&self, job: JobId, rank: u32) {
        lock(&self.joining).left(job, rank);
        if let Err(e) = self.journal.append(&Line::Left { job, rank }) {
            self.trouble(&e);
        }
    }

    /// What is stored and known by now to be of one pass of its ranks, or of some of them. To be asked now and then: it also
    /// seals shards that have waited for that.
    #[must_use]
    pub fn look(&self) -> Vec<Told> {
        let told = lock(&self.joining).look();
        self.seal_decided();
        self.told(told)
    }

    /// Something is stored; what is known of it, or of what came before it, is returned.
    pub(super) fn tell(&self, told: Told) -> Vec<Told> {
        let told = lock(&self.joining).tell(told);
        self.told(told)
    }

    /// Counts records, and journals what differs.
    fn told(&self, told: Vec<Told>) -> Vec<Told> {
        for one in &told {
            match one {
                Told::Part { part, .. } => {
                    let new = self.alloc().seen.is_new(&part.what.id);
                    self.count(|totals| totals.records += u64::from(new));
                }
                Told::Differs { what, against } => {
                    self.count(|totals| totals.divergences += 1);
                    // The parts are journalled; without this line verify still finds that they differ.
                    let line = Line::Divergence { what: (**what).clone(), against: *against };
                    if let Err(e) = self.journal.append(&line) {
                        self.trouble(&e);
                    }
                }
            }
        }
        told
    }

    /// Counts parts that are lost.
    pub fn dropped(&self, rank: u32, count: u64, reason: &str, from: Option<Origin>) {
        self.count(|totals| totals.dropped = totals.dropped.saturating_add(count));
        self.journal.lose(rank, count, reason, from);
        // While the disk is full a line each would be a line too many; they are written once it works again.
        if !self.broken.load(Ordering::Relaxed)
            && let Err(e) = self.journal.flush()
        {
            self.trouble(&e);
        }
    }

    /// What the manifest has of a slab that is to be read now.
    pub fn account(&self, slab: u64) -> Account {
        lock(&self.accounts).get(&slab).copied().unwrap_or_default()
    }

    /// That slab is not read any more; it may come back.
    pub fn keep_account(&self, slab: u64, account: Account) {
        lock(&self.accounts).insert(slab, account);
    }

    /// Counters so far.
    pub fn totals(&self) -> Totals {
        *lock(&self.totals)
    }

    /// Shards that wait to be sealed, or are being sealed.
    pub fn unsealed(&self) -> usize {
        self.unsealed.load(Ordering::Relaxed)
    }

    /// Seals everything and makes it last; returns what nobody knew enough of until now. No part may be under way any more;
    /// later ones are lost. `over`: the ranks are gone.
    pub fn finish(&self, over: bool) -> Vec<Told> {
        let told = lock(&self.joining).end(over);
        let told = self.told(told);
        self.alloc().retire_all();
        self.seal_complete();
        self.seal(mem::take(&mut *lock(&self.ripe)));
        let sealer = lock(&self.sealer).take();
        if let Some((send, thread)) = sealer {
            drop(send);
            // A sealer that panicked leaves its shards open; the next agent seals them.
            let _ = thread.join();
        }
        if let Err(e) = self.journal.flush().and_then(|()| self.journal.sync()) {
            self.trouble(&e);
        }
        told
    }

    /// A write failed: says so once, until writing works again.
    pub fn trouble(&self, error: &io::Error) {
        if !self.broken.swap(true, Ordering::Relaxed) {
            (self.notify)(&format!(
                "cannot write to {}: {error}; captures are dropped until that is mended, the job goes on",
                self.dir.path().display()
            ));
        }
    }

    /// A write succeeded.
    pub(super) fn works(&self) {
        let broken = self.broken.load(Ordering::Relaxed) && dir::free(self.dir.path()).is_none_or(|free| free >= ROOM);
        if broken && self.broken.swap(false, Ordering::Relaxed) {
            if let Err(e) = self.journal.flush() {
                return self.trouble(&e);
            }
            (self.notify)(&format!("writing to {} works again", self.dir.path().display()));
        }
    }

    pub(super) fn alloc(&self) -> MutexGuard<'_, Allocator> {
        lock(&self.alloc)
    }

    pub(super) fn journal(&self) -> &Journal {
        &self.journal
    }

    pub(super) fn count(&self, change: impl FnOnce(&mut Totals)) {
        change(&mut lock(&self.totals));
    }

    /// Takes shards that nobody writes to any more. They are sealed once it is known which of their pieces are one, or when more
    /// of them wait than may.
    pub(super) fn seal_complete(&self) {
        let complete = self.alloc().take_complete();
        if !complete.is_empty() {
            lock(&self.ripe).extend(complete);
            self.seal_decided();
        }
    }

    fn seal_decided(&self) {
        let mut ripe = lock(&self.ripe);
        let joining = lock(&self.joining);
        let is_decided = |shard: &Shard| {
            let pieces = shard.entries.iter().filter(|entry| matches!(entry.lie, Lie::Piece { .. }));
            pieces.map(|entry| entry.place).all(|place| joining.is_decided(place))
        };
        let extra = ripe.len().saturating_sub(MAX_RIPE);
        let mut sealed: Vec<Shard> = ripe.drain(..extra).collect();
        sealed.extend(ripe.extract_if(.., |shard| is_decided(shard)));
        drop((ripe, joining));
        self.seal(sealed);
    }

    /// Hands shards to the sealer.
    fn seal(&self, complete: Vec<Shard>) {
        if complete.is_empty() {
            return;
        }
        // Not under the lock: sending waits while the disk is behind.
        let send = lock(&self.sealer).as_ref().map(|(send, _)| send.clone());
        if let Some(send) = send {
            for shard in complete {
                self.unsealed.fetch_add(1, Ordering::Relaxed);
                // It only fails when the sealer is gone; then the next agent seals.
                let _ = send.send(shard);
            }
        }
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("dir", &self.dir.path()).finish_non_exhaustive()
    }
}

/// The thread that seals: its fsync must not hold up a rank.
fn sealer(
    dir: &RunDir,
    journal: Arc<Journal>,
    joining: Arc<Mutex<Joining>>,
    notify: Arc<dyn Fn(&str) + Send + Sync>,
    unsealed: Arc<AtomicUsize>,
) -> io::Result<(mpsc::SyncSender<Shard>, JoinHandle<()>)> {
    let (send, receive) = mpsc::sync_channel::<Shard>(MAX_UNSEALED);
    let (folder, path) = (dir.folder().clone(), dir.path().to_owned());
    let thread = std::thread::Builder::new().name("sealer".into()).spawn(move || {
        for shard in receive {
            if let Err(e) = seal_one(folder.place(), &journal, &joining, &shard) {
                let name = stem(shard.file.number);
                notify(&format!("cannot seal {name} in {}: {e}; flexmodel agent --out does it later", path.display()));
            }
            unsealed.fetch_sub(1, Ordering::Relaxed);
        }
    })?;
    Ok((send, thread))
}

fn seal_one(dir: &Path, journal: &Journal, joining: &Mutex<Joining>, shard: &Shard) -> io::Result<()> {
    if shard.entries.is_empty() {
        // Every part that had a place here failed.
        return std::fs::remove_file(super::shard::open_path(dir, shard.file.number));
    }
    let len = seal::seal(dir, &shard.file, &shard.entries, |parts| {
        lock(joining).are_one(parts.iter().map(|part| part.place))
    })?;
    journal.append(&Line::Sealed { shard: stem(shard.file.number), len })?;
    journal.sync()
}

/// Why a part was lost, in the words of the manifest.
pub(super) fn reason_of(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => "the disk is full".into(),
        _ => format!("writing failed: {error}"),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
