//! What an agent that died left behind: a torn last line and open shards. Everything journalled is kept.

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File},
    io::{self, BufReader, Seek, Write},
    path::Path,
};

use super::{
    account::{Account, Accounts},
    dir::cannot_write,
    place::Seen,
    seal,
    shard::{Entry, Lie, ShardFile, number_of, open_path, sealed_path, stem},
};
use crate::{
    files::{ToWrite, open_to_write},
    format::{HEADER_SPACE, JobId, JobInfo, Line, Location, MANIFEST_FILE, Part, Revision, Totals},
    joining::{Joining, Told},
    manifest::{LineError, Reader, Source, encode_line},
    passes::Place,
};

/// What a manifest says.
#[derive(Debug)]
pub struct Found {
    /// Number of the next shard.
    pub next_shard: u32,
    /// Counters so far.
    pub totals: Totals,
    /// What there is of each slab.
    pub accounts: Accounts,
    /// Records there are.
    pub seen: Seen,
    /// Jobs there are.
    pub jobs: BTreeMap<JobId, JobInfo>,
    /// The last revision of each job that has had another than the environment's.
    pub revisions: BTreeMap<JobId, Revision>,
    /// What is known of their passes.
    pub joining: Joining,
    /// Some lines do not read.
    pub damaged: bool,
}

impl Found {
    fn count(&mut self, told: &[Told]) {
        for one in told {
            if let Told::Part { part, .. } = one {
                self.totals.records += u64::from(self.seen.is_new(&part.what.id));
            }
        }
    }
}

/// Mends the directory: truncates the torn line, seals open shards, and tells what is there. Errors call it `shown`.
/// `finished`: its agent has closed the run.
pub fn recover(dir: &Path, shown: &Path, finished: bool) -> anyhow::Result<Found> {
    let io = |e: io::Error| cannot_write(shown, &e);
    let path = dir.join(MANIFEST_FILE);
    let mut found = Found {
        next_shard: 0,
        totals: Totals::default(),
        accounts: Accounts::new(),
        seen: Seen::new(),
        jobs: BTreeMap::new(),
        revisions: BTreeMap::new(),
        joining: Joining::default(),
        damaged: false,
    };
    let mut unsealed = BTreeMap::new();
    if path.symlink_metadata().is_ok() {
        let mut file = open_to_write(&path, ToWrite::Append).map_err(io)?;
        file.rewind().map_err(io)?;
        let lines = file.try_clone().map_err(io)?;
        let keep = scan(&mut Reader::new(BufReader::new(lines)), &mut found, &mut unsealed).map_err(io)?;
        file.set_len(keep).map_err(io)?;
        let told = if finished { found.joining.end(true) } else { found.joining.look() };
        found.count(&told);
        seal_left_over(dir, file, &unsealed, &found.joining).map_err(io)?;
    }
    found.next_shard = found.next_shard.max(clean_up(dir, found.damaged).map_err(io)?);
    Ok(found)
}

/// Entries of shards without a `Sealed` line.
type Unsealed = BTreeMap<u32, Shares>;

#[derive(Default)]
struct Shares {
    entries: Vec<Entry>,
    seen: HashSet<(u64, u64, u32)>,
}

impl Shares {
    /// Adds a part's range; replicas that share one count once.
    fn add(&mut self, part: &Part, at: &Location) {
        let by = if at.len == 0 { part.what.rank } else { 0 };
        if self.seen.insert((at.offset, at.len, by)) {
            self.entries.push(Entry {
                name: part.what.id.to_string().into(),
                rank: part.what.rank,
                dtype: part.what.dtype,
                shape: part.what.shape.clone(),
                offset: at.offset,
                len: at.len,
                crc: at.crc,
                lie: Lie::of(&part.what),
                place: Place::of(&part.what),
            });
        }
    }
}

/// Reads every line; returns how long the manifest is without its torn end.
fn scan<R: Source>(lines: &mut Reader<R>, found: &mut Found, unsealed: &mut Unsealed) -> io::Result<u64> {
    while let Some(entry) = lines.next_line()? {
        let line = match entry.line {
            Ok(line) => line,
            Err(LineError::Torn) => return Ok(entry.offset),
            // Damage: verify names it, and the rest is still good.
            Err(_) => {
                found.damaged = true;
                continue;
            }
        };
        let totals = &mut found.totals;
        Account::note(&mut found.accounts, &line);
        match line {
            Line::Part(part) => {
                totals.parts += 1;
                if let Some(at) = &part.at
                    && let Some(number) = number_of(&at.shard)
                {
                    found.next_shard = found.next_shard.max(number.saturating_add(1));
                    let shares = unsealed.entry(number).or_default();
                    let before = shares.entries.len();
                    shares.add(&part, at);
                    if shares.entries.len() > before {
                        totals.bytes = totals.bytes.saturating_add(at.len);
                    }
                }
                let told = found.joining.line(Line::Part(part));
                found.count(&told);
            }
            Line::Refused { .. } => totals.refused += 1,
            Line::Divergence { .. } => totals.divergences += 1,
            Line::Dropped { count, .. } => totals.dropped = totals.dropped.saturating_add(count),
            line @ (Line::Left { .. } | Line::Pass { .. }) => {
                let told = found.joining.line(line);
                found.count(&told);
            }
            Line::Job(info) => {
                found.joining.job(&info);
                found.jobs.insert(info.id, info);
            }
            Line::Revision(revision) => latest(&mut found.revisions, revision),
            Line::Sealed { shard, .. } => {
                if let Some(number) = number_of(&shard) {
                    found.next_shard = found.next_shard.max(number.saturating_add(1));
                    unsealed.remove(&number);
                }
            }
        }
    }
    Ok(lines.reached().offset)
}

/// Keeps the last revision of each job.
pub fn latest(of: &mut BTreeMap<JobId, Revision>, revision: Revision) {
    if of.get(&revision.job).is_none_or(|known| known.revision <= revision.revision) {
        of.insert(revision.job, revision);
    }
}

/// Seals what the manifest knows of. A shard that is gone stays gone: verify names it.
fn seal_left_over(dir: &Path, mut manifest: File, unsealed: &Unsealed, joining: &Joining) -> io::Result<()> {
    let are_one = |parts: &[&Entry]| joining.are_one(parts.iter().map(|part| part.place));
    for (&number, shares) in unsealed {
        let len = match ShardFile::open(dir, number) {
            Ok(file) => {
                let len = file.file().metadata()?.len();
                seal::seal(dir, &file, &usable(&shares.entries, len), are_one)?
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => match fs::metadata(sealed_path(dir, number)) {
                // Renamed, but the line did not make it.
                Ok(sealed) => sealed.len(),
                Err(_) => continue,
            },
            Err(e) => return Err(e),
        };
        manifest.write_all(&encode_line(&Line::Sealed { shard: stem(number), len }))?;
    }
    manifest.sync_data()
}

/// Entries that lie in a file of `len` bytes and do not overlap. After a power loss, or with a manifest that somebody
/// changed, there may be others; the sealed file must be readable all the same.
fn usable(entries: &[Entry], len: u64) -> Vec<Entry> {
    let mut sorted: Vec<&Entry> = entries.iter().collect();
    sorted.sort_by_key(|e| (e.offset, e.len));
    let mut at = HEADER_SPACE;
    let mut out = Vec::with_capacity(sorted.len());
    for entry in sorted {
        let size = entry.shape.iter().try_fold(entry.dtype.size() as u64, |n, &d| n.checked_mul(d));
        if let Some(end) = entry.offset.checked_add(entry.len)
            && entry.offset >= at
            && end <= len
            && size == Some(entry.len)
        {
            at = end;
            out.push(entry.clone());
        }
    }
    out
}

/// Removes open shards that no line speaks of, unless that may be because of damage; returns the number behind the last shard there is.
fn clean_up(dir: &Path, keep: bool) -> io::Result<u32> {
    let mut next = 0;
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let Some(number) = path.file_stem().and_then(|s| s.to_str()).and_then(number_of) else { continue };
        if path == open_path(dir, number) && !keep {
            fs::remove_file(&path)?;
        }
        next = next.max(number.saturating_add(1));
    }
    Ok(next)
}
