//! One folder with the files of a run, read as far as they have been written: of a manifest that has grown, only what is
//! new.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufReader, Seek, SeekFrom},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};

use wire::{passes::Pass, record::Placement};

use super::{
    Found, Lost, Note, OpenError, Problem, Said,
    jobs::Table,
    layout::{self, Coordinates},
    nodes,
};
use crate::{
    files::{open_to_read, read_whole},
    format::{FORMAT, JobId, LOCK_FILE, Line, MANIFEST_FILE, Part, RUN_FILE, Revision, RunInfo},
    limits::{self, PROBLEMS, RUN_FILE_BYTES},
    lock::is_locked,
    manifest::{self, LineError, Position},
    text,
};

/// Bytes before the place where reading goes on that must be as they were.
const ANCHOR: u64 = 4096;

/// What tells that a file has changed: its device, inode, length and time.
type Look = (u64, u64, u64, i64, i64);

fn look(meta: &fs::Metadata) -> Look {
    (meta.dev(), meta.ino(), meta.len(), meta.mtime(), meta.mtime_nsec())
}

/// What the files of a folder said when they were last looked at.
#[derive(Default)]
pub struct Folder {
    /// Its node's; empty for a run of one folder.
    pub name: String,
    path: PathBuf,
    /// What `run.json` says; `None` where there is none.
    pub info: Option<RunInfo>,
    damaged_info: Option<String>,
    /// What `run.json` was like when it was read; `None`: it was not.
    info_seen: Option<Option<Look>>,
    journal: Option<Journal>,
    /// What was not captured.
    pub lost: Lost,
    /// The jobs that it tells of.
    pub jobs: Table,
    /// The revisions of their hooks, by its numbers of jobs.
    pub revisions: BTreeMap<(JobId, u64), Revision>,
    /// Seals: shard and length.
    pub sealed: Vec<(String, u64)>,
    /// What ranks said of passes since this was last taken; `None`: that they say no more.
    pub passes: Vec<(JobId, u32, Option<Pass>)>,
    lines: Vec<Problem>,
    unread: u64,
    /// The ranks that sit at coordinates.
    pub ranks: BTreeMap<Coordinates, u32>,
    /// Bytes that each shard must have.
    pub ends: BTreeMap<String, u64>,
    /// Bytes of the manifest that were read, again and again where that was so.
    pub read: u64,
}

/// A manifest as far as it was read.
struct Journal {
    /// Behind the last whole line.
    next: Position,
    /// Behind what was read, be it half a line.
    end: u64,
    /// Device and inode of the file.
    file: (u64, u64),
    /// What the file was like then, if nothing was behind that.
    seen: Option<Look>,
    /// crc32c of the bytes before `next`.
    anchor: u32,
}

/// Whether a folder's files are those that were read before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// They are as they were.
    None,
    /// They have grown, or `run.json` is another.
    More,
    /// What was read of the manifest is not to be relied upon: the run is to be read anew.
    Other,
}

impl Folder {
    /// A folder that nothing is read of yet; `name` is its node's.
    pub fn new(path: PathBuf, name: &str) -> Self {
        Self { name: name.to_owned(), path, ..Self::default() }
    }

    /// Whether none of its files has changed.
    pub fn is_as_it_was(&self) -> bool {
        let manifest = self.look_at(MANIFEST_FILE);
        let same = match &self.journal {
            Some(journal) => manifest.is_some() && manifest == journal.seen,
            None => manifest.is_none(),
        };
        same && self.info_seen == Some(self.look_at(RUN_FILE))
    }

    fn look_at(&self, file: &str) -> Option<Look> {
        fs::metadata(self.path.join(file)).ok().map(|meta| look(&meta))
    }

    /// Reads `run.json` if it has changed.
    pub fn look_at_info(&mut self) -> Change {
        let seen = self.look_at(RUN_FILE);
        if self.info_seen == Some(seen) {
            return Change::None;
        }
        self.info_seen = Some(seen);
        (self.info, self.damaged_info) = read_info(&self.path);
        Change::More
    }

    /// Reads what has come to the manifest; `take` gets each part.
    pub fn read_on(&mut self, take: &mut dyn FnMut(Part)) -> Result<Change, OpenError> {
        let path = self.path.join(MANIFEST_FILE);
        let failed = |source| OpenError::Io { path: path.display().to_string(), source };
        let file = match open_to_read(&path) {
            Ok(file) => file,
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(e)),
            Err(_) => return Ok(if self.journal.is_none() { Change::None } else { Change::Other }),
        };
        let from = match &self.journal {
            None => Position::default(),
            Some(known) => match known.change(&file).map_err(failed)? {
                Change::More => known.next,
                change => return Ok(change),
            },
        };
        self.take_lines(file, from, take).map_err(failed)?;
        Ok(Change::More)
    }

    fn take_lines(&mut self, file: File, from: Position, take: &mut dyn FnMut(Part)) -> io::Result<()> {
        let mut file = BufReader::with_capacity(manifest::BUFFER, file);
        file.seek(SeekFrom::Start(from.offset))?;
        let mut lines = manifest::Reader::at(file, from);
        let mut next = from;
        while let Some(entry) = lines.next_line()? {
            if matches!(entry.line, Err(LineError::Torn)) {
                break;
            }
            next = lines.reached();
            match entry.line {
                Ok(line) => self.take(line, take),
                Err(_) if self.unread >= PROBLEMS as u64 => self.unread += 1,
                Err(e) => {
                    self.unread += 1;
                    let found = Found::Line { number: entry.number, why: e.to_string() };
                    self.lines.push(Problem::from(found).within(&self.name));
                }
            }
        }
        let end = lines.reached().offset;
        self.read = self.read.saturating_add(end - from.offset);
        let file = lines.into_inner().into_inner();
        let seen = look(&file.metadata()?);
        self.journal = Some(Journal {
            next,
            end,
            file: (seen.0, seen.1),
            seen: Some(seen).filter(|seen| seen.2 == end),
            anchor: anchor(&file, next.offset)?,
        });
        Ok(())
    }

    fn take(&mut self, line: Line, take: &mut dyn FnMut(Part)) {
        match line {
            Line::Part(mut part) => {
                if let Some(at) = &mut part.at {
                    at.shard = within(&self.name, std::mem::take(&mut at.shard));
                    needs(&mut self.ends, &at.shard, at.offset.saturating_add(at.len));
                }
                // Missing parts are named without their place among replicas.
                let own: Vec<_> =
                    part.what.axes.iter().filter(|axis| axis.place != Placement::Replicate).cloned().collect();
                if !own.is_empty() {
                    self.ranks.entry(layout::coordinates(&own)).or_insert(part.what.rank);
                }
                take(part);
            }
            Line::Refused { what, reason } => self.lost.refused.push((what, reason)),
            Line::Divergence { what, against } => self.lost.divergences.push((what, against)),
            Line::Dropped { rank, count, reason, .. } => self.lost.dropped.push((rank, count, reason)),
            Line::Job(info) if self.jobs.len() < limits::JOBS => _ = self.jobs.insert(info.id, info),
            Line::Revision(revision) if self.revisions.len() < limits::REVISIONS => {
                self.revisions.insert((revision.job, revision.revision), revision);
            }
            Line::Job(_) | Line::Revision(_) => {}
            Line::Sealed { shard, len } => {
                let shard = within(&self.name, shard);
                needs(&mut self.ends, &shard, len);
                self.sealed.push((shard, len));
            }
            Line::Pass { job, rank, pass } => self.passes.push((job, rank, Some(pass))),
            Line::Left { job, rank } => self.passes.push((job, rank, None)),
        }
    }

    /// Whether its agent has closed it.
    pub fn is_closed(&self) -> bool {
        self.info.as_ref().is_some_and(|info| info.finished_ns.is_some())
    }

    /// Whether nobody writes in it: its agent has closed it, or is gone.
    pub fn is_over(&self) -> bool {
        self.is_closed() || !open_to_read(&self.path.join(LOCK_FILE)).is_ok_and(|lock| is_locked(&lock))
    }

    /// What the folder says of itself, and what is wrong with it; an error if it is no run. `again` of its parts were
    /// captured again.
    pub fn opened(&self, again: u64) -> Result<(RunInfo, Vec<Problem>, Vec<Note>), OpenError> {
        let refuse = |reason: String| Err(OpenError::NotARun { path: self.path.display().to_string(), reason });
        let (mut problems, mut notes) = (Vec::new(), Vec::new());
        problems.extend(self.damaged_info.clone().map(Found::Info));
        let info = match (&self.info, &self.journal) {
            (None, None) => return refuse(foreign(&self.path)),
            (None, Some(journal)) if journal.end == 0 && !has_shards(&self.path) => {
                notes.push(Said::NothingCaptured);
                RunInfo::default()
            }
            (None, Some(_)) => {
                problems.push(Found::NoInfo);
                RunInfo::default()
            }
            (Some(info), _) => info.clone(),
        };
        if info.format > FORMAT {
            return refuse(format!(
                "written by flexmodel {} in format {}, and this one reads up to {FORMAT}; use a newer flexmodel",
                text::clip(&info.flexmodel),
                info.format
            ));
        }
        match &self.journal {
            None if has_shards(&self.path) => {
                return refuse(format!("has shards but no {MANIFEST_FILE}; it was copied in part, copy it again"));
            }
            None => problems.push(Found::NoManifest),
            Some(journal) if journal.end > journal.next.offset => notes.push(Said::HalfALine),
            Some(_) => {}
        }
        if again > 0 {
            notes.push(Said::CapturedAgain(again));
        }
        let mut problems: Vec<Problem> =
            problems.into_iter().map(|found| Problem::from(found).within(&self.name)).collect();
        problems.extend(self.lines.iter().cloned());
        if let Some(more @ 1..) = self.unread.checked_sub(PROBLEMS as u64) {
            problems.push(Problem::from(Found::MoreLines(more)).within(&self.name));
        }
        let notes = notes.into_iter().map(|said| Note { node: self.name.clone(), said }).collect();
        Ok((info, problems, notes))
    }
}

impl Journal {
    fn change(&self, file: &File) -> io::Result<Change> {
        let now = look(&file.metadata()?);
        if self.seen == Some(now) {
            return Ok(Change::None);
        }
        // A manifest grows, and what is in it stays. One that is not longer was cut, or written to where it was read.
        let grown = now.2 > self.end && self.file == (now.0, now.1);
        Ok(if grown && anchor(file, self.next.offset)? == self.anchor { Change::More } else { Change::Other })
    }
}

/// crc32c of the bytes before `end`.
fn anchor(file: &File, end: u64) -> io::Result<u32> {
    let from = end.saturating_sub(ANCHOR);
    let mut bytes = vec![0; (end - from) as usize];
    file.read_exact_at(&mut bytes, from)?;
    Ok(crc32c::crc32c(&bytes))
}

/// A shard's name, with its node's folder.
fn within(node: &str, shard: String) -> String {
    if node.is_empty() { shard } else { format!("{node}/{shard}") }
}

fn needs(ends: &mut BTreeMap<String, u64>, shard: &str, end: u64) {
    match ends.get_mut(shard) {
        Some(so_far) => *so_far = end.max(*so_far),
        None => _ = ends.insert(shard.to_owned(), end),
    }
}

/// What a run's `run.json` says, `None` if there is none; and why it does not read, where it says nothing.
pub(super) fn read_info(run: &Path) -> (Option<RunInfo>, Option<String>) {
    let damaged = |why: String| {
        let info = RunInfo { format: FORMAT, flexmodel: "?".into(), ..RunInfo::default() };
        (Some(info), Some(text::clip(&why)))
    };
    let bytes = match read_whole(&run.join(RUN_FILE), RUN_FILE_BYTES) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return (None, None),
        Err(e) => return damaged(e.to_string()),
    };
    // What serde derives would take an array of the fields as well.
    if !bytes.trim_ascii_start().starts_with(b"{") {
        return damaged("it is no object".to_owned());
    }
    let read = serde_json::from_slice::<RunInfo>(&bytes).map_err(|e| e.to_string());
    match read.and_then(|info| info.check().map(|()| info)) {
        Ok(info) => (Some(info), None),
        Err(why) => {
            // The format alone may still be readable, and decides whether the rest can be.
            let format = serde_json::from_slice::<Version>(&bytes).map_or(FORMAT, |version| version.format);
            let (info, why) = damaged(why);
            (info.map(|info| RunInfo { format, ..info }), why)
        }
    }
}

/// The one field of `run.json` that later formats have too.
#[derive(serde::Deserialize)]
struct Version {
    format: u32,
}

/// Why a directory is no run, naming the one that is in it.
pub(super) fn foreign(path: &Path) -> String {
    let lead = format!("not a FlexModel run: it has neither {RUN_FILE} nor {MANIFEST_FILE}");
    match nodes::inside(path).first() {
        Some(name) => format!("{lead}; there is one in it, {}", path.join(name).display()),
        None => lead,
    }
}

fn has_shards(path: &Path) -> bool {
    let name = |entry: fs::DirEntry| entry.file_name().to_string_lossy().starts_with("shard-");
    fs::read_dir(path).into_iter().flatten().flatten().any(name)
}
