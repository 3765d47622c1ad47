//! Reads run directories: finished, live, killed or damaged ones.
//!
//! [`Run::open`] refuses only what is not a run at all. Damage inside becomes [`Problem`]s, and everything else is
//! served: a damaged manifest line costs its part, a damaged shard its bytes. A folder that holds the runs of a job's
//! nodes is a run too: see [`nodes`].

mod ask;
pub mod assemble;
pub mod fill;
pub mod growing;
pub mod layout;
pub mod nodes;
pub mod number;
mod plan;
pub mod sealed;
mod select;
mod shards;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fs::{self, File},
    io::{self, BufReader},
    path::{Path, PathBuf},
};

pub use ask::{Wanted, shown};
pub use assemble::Whole;
pub use growing::Growing;
pub use layout::LayoutError;
pub use plan::{AssemblyPlan, PlanError};
pub use select::{Filter, display_module, in_order, natural, nearest};
use serde::Serialize;
use wire::record::Place;

use crate::{
    files::read_whole,
    format::{FORMAT, Identity, Line, MANIFEST_FILE, Part, RUN_FILE, RunInfo, Stats, What},
    limits::{PROBLEMS, RUN_FILE_BYTES},
    manifest::{self, LineError},
    owners::Scattered,
    text,
};
pub use shards::{ReadError, Shards};

/// Something that is wrong with a run directory, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The file, and the line, bytes or record in it.
    pub place: String,
    /// What is wrong there.
    pub what: String,
}

impl Problem {
    /// A problem at a place.
    pub fn new(place: impl Into<String>, what: impl Into<String>) -> Self {
        Self { place: place.into(), what: what.into() }
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.place, self.what)
    }
}

/// One record: the parts that share an identity, one a rank; of a pipeline, one a rank and microbatch.
#[derive(Clone, Debug)]
pub struct Record {
    /// Which.
    pub id: Identity,
    /// In rank order; at least one.
    pub parts: Vec<Part>,
}

impl Record {
    /// The record of parts that came in this order; `None` of none. Where one was captured again, its last counts, and
    /// otherwise they are settled as those of [`Run::open`] are.
    pub fn new(mut parts: Vec<Part>, scattered: &Scattered) -> Option<Self> {
        let id = parts.first()?.what.id.clone();
        in_seats(&mut parts, &mut Vec::new());
        layout::lend(&mut parts);
        scattered.settle(&mut parts);
        Some(Self { id, parts })
    }

    /// What one rank captured of it; `None` if nothing. Several parts of one rank, the microbatches of a pipeline, lie side
    /// by side.
    pub fn of_rank(&self, rank: u32) -> Option<Self> {
        let own: Vec<Part> = self.parts.iter().filter(|p| p.what.rank == rank).cloned().collect();
        (!own.is_empty()).then(|| Self { id: self.id.clone(), parts: layout::of_one_rank(own) })
    }

    /// The ranks that have parts of it.
    pub fn ranks(&self) -> BTreeSet<u32> {
        self.parts.iter().map(|part| part.what.rank).collect()
    }

    /// What the first part says.
    pub fn what(&self) -> &What {
        // A record is made with its first part.
        &self.parts[0].what
    }

    /// Shape of the whole, or why there is none.
    pub fn shape(&self) -> Result<Vec<u64>, LayoutError> {
        layout::plan(&self.parts).map(|node| node.shape().to_vec())
    }

    /// Statistics of the whole, as far as those of the parts tell them.
    pub fn stats(&self) -> Option<Stats> {
        layout::plan(&self.parts).ok().and_then(|node| layout::stats(&node, &self.parts))
    }

    /// Over how many ranks the batch lies: a gradient of a mean loss is that many times one process's.
    pub fn data_size(&self) -> u32 {
        layout::data_size(&self.parts)
    }

    /// Whether only statistics were kept.
    pub fn stats_only(&self) -> bool {
        self.parts.iter().any(|p| p.at.is_none() && p.same.is_none())
    }

    /// Tensor bytes that its parts take in the store.
    pub fn stored_bytes(&self) -> u64 {
        let mut seen = HashSet::new();
        let mut places = self.parts.iter().filter_map(|p| p.at.as_ref());
        if let [Part { at: Some(only), .. }] = self.parts.as_slice() {
            return only.len;
        }
        text::total(places.by_ref().filter(|at| seen.insert((at.shard.as_str(), at.offset))).map(|at| at.len))
    }
}

/// What the manifest says was not captured.
#[derive(Clone, Debug, Default)]
pub struct Lost {
    /// Tensors refused, with the reason.
    pub refused: Vec<(What, String)>,
    /// Replicas that differ from the one of the rank beside them.
    pub divergences: Vec<(What, u32)>,
    /// Parts dropped: rank, count, reason.
    pub dropped: Vec<(u32, u64, String)>,
}

/// An open run directory.
pub struct Run {
    /// Where it is.
    pub path: PathBuf,
    /// Where it is several nodes' runs, their folders in `path`; empty for a run of one folder.
    pub nodes: Vec<String>,
    /// `run.json`; default where it is damaged.
    pub info: RunInfo,
    /// In the order of their first part in the manifest.
    pub records: Vec<Record>,
    /// Parts that a later one of the same rank took the place of; nothing is served from them.
    pub replaced: Vec<Part>,
    /// What is not there, and why.
    pub lost: Lost,
    /// Seals the manifest tells of: shard and length.
    pub sealed: Vec<(String, u64)>,
    /// Damage found while opening.
    pub problems: Vec<Problem>,
    /// Worth saying, not damage.
    pub notes: Vec<String>,
    shards: Shards,
    ranks: BTreeMap<layout::Coordinates, u32>,
}

/// Why a path is no run.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Nothing there, or not a run.
    #[error("{path}: {reason}")]
    NotARun {
        /// As given.
        path: String,
        /// Why, and the way out.
        reason: String,
    },
    /// The system said no.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
}

impl Run {
    /// Opens a run directory, or a folder with the runs of one job's nodes.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        if path.is_dir() && !nodes::is_run(path) {
            let names = nodes::inside(path);
            if names.len() > 1 {
                return nodes::open(path, names);
            }
        }
        Self::open_one(path)
    }

    /// Opens a run directory.
    pub fn open_one(path: &Path) -> Result<Self, OpenError> {
        let shown = path.display().to_string();
        let refuse = |reason: String| OpenError::NotARun { path: shown.clone(), reason };
        if !path.is_dir() {
            let reason = if path.exists() { "not a directory; give the run's folder" } else { "no such run directory" };
            return Err(refuse(reason.into()));
        }
        let (mut problems, mut notes) = (Vec::new(), Vec::new());
        let info = read_info(path, &mut problems);
        let journal = open_optional(&path.join(MANIFEST_FILE))?;
        let info = match (info, &journal) {
            (None, None) => return Err(refuse(foreign(path))),
            (None, Some(journal)) if journal.is_empty()? && !has_shards(path) => {
                notes.push("nothing was captured: the agent was stopped before the first record".to_owned());
                RunInfo::default()
            }
            (None, Some(_)) => {
                problems.push(Problem::new(RUN_FILE, "missing; what the command and the world were is not known"));
                RunInfo::default()
            }
            (Some(info), _) => info,
        };
        if info.format > FORMAT {
            return Err(refuse(format!(
                "written by flexmodel {} in format {}, and this one reads up to {FORMAT}; use a newer flexmodel",
                text::clip(&info.flexmodel),
                info.format
            )));
        }
        if journal.is_none() {
            if has_shards(path) {
                return Err(refuse(format!("has shards but no {MANIFEST_FILE}; it was copied in part, copy it again")));
            }
            problems.push(Problem::new(MANIFEST_FILE, "missing; nothing was captured, or it was copied in part"));
        }
        let mut run = Self {
            path: path.to_owned(),
            nodes: Vec::new(),
            info,
            records: Vec::new(),
            replaced: Vec::new(),
            lost: Lost::default(),
            sealed: Vec::new(),
            problems,
            notes,
            shards: Shards::new(path),
            ranks: BTreeMap::new(),
        };
        if let Some(journal) = journal {
            run.take_journal(journal.lines).map_err(|source| io_error(&path.join(MANIFEST_FILE), source))?;
        }
        run.settle();
        Ok(run)
    }

    /// Gives parts their bytes that another rank sent, and makes those of modules that some ranks lack lie among those that
    /// have them.
    fn settle(&mut self) {
        self.records.iter_mut().for_each(|record| layout::lend(&mut record.parts));
        let scattered = Scattered::new(&self.info.owners, self.info.world);
        if !scattered.is_empty() {
            self.records.iter_mut().for_each(|record| scattered.settle(&mut record.parts));
        }
    }

    fn take_journal(&mut self, mut lines: Lines) -> io::Result<()> {
        let mut by_id: HashMap<Identity, usize> = HashMap::new();
        let mut unread = 0u64;
        while let Some(entry) = lines.next_line()? {
            if matches!(entry.line, Err(LineError::Torn)) {
                self.notes.push(format!("the last line of {MANIFEST_FILE} is half a line; its part is not served"));
                break;
            }
            match entry.line {
                Ok(Line::Part(part)) => self.take_part(part, &mut by_id),
                Ok(Line::Refused { what, reason }) => self.lost.refused.push((what, reason)),
                Ok(Line::Divergence { what, against }) => self.lost.divergences.push((what, against)),
                Ok(Line::Dropped { rank, count, reason, .. }) => self.lost.dropped.push((rank, count, reason)),
                Ok(Line::Sealed { shard, len }) => self.sealed.push((shard, len)),
                Err(_) if unread >= PROBLEMS as u64 => unread += 1,
                Err(e) => {
                    unread += 1;
                    self.problems.push(Problem::new(format!("{MANIFEST_FILE} line {}", entry.number), e.to_string()));
                }
            }
        }
        if let Some(more @ 1..) = unread.checked_sub(PROBLEMS as u64) {
            self.problems.push(Problem::new(MANIFEST_FILE, format!("and {more} more lines do not read")));
        }
        for record in &mut self.records {
            in_seats(&mut record.parts, &mut self.replaced);
        }
        if !self.replaced.is_empty() {
            self.notes.push(format!(
                "{} captured again later (the job was started again?); the last is served",
                text::count(self.replaced.len() as u64, "part")
            ));
        }
        Ok(())
    }

    fn take_part(&mut self, part: Part, by_id: &mut HashMap<Identity, usize>) {
        // Missing parts are named without their place among replicas.
        let own: Vec<_> = part.what.axes.iter().filter(|axis| axis.place != Place::Replicate).cloned().collect();
        if !own.is_empty() {
            self.ranks.entry(layout::coordinates(&own)).or_insert(part.what.rank);
        }
        let at = *by_id.entry(part.what.id.clone()).or_insert_with(|| {
            self.records.push(Record { id: part.what.id.clone(), parts: Vec::new() });
            self.records.len() - 1
        });
        self.records[at].parts.push(part);
    }

    /// Whether its agent closed it.
    pub fn finished(&self) -> bool {
        self.info.finished_ns.is_some()
    }

    /// The shards' files.
    pub fn shards(&self) -> &Shards {
        &self.shards
    }

    /// The whole tensor of a record, checksums compared; one range of the mapped shard where it lies there in one piece.
    pub fn whole(&self, record: &Record) -> Result<Whole, ReadError> {
        let name = record.id.to_string();
        let plan = AssemblyPlan::new(&record.parts).map_err(|e| match e {
            PlanError::Layout(e) => self.layout_error(record, e),
            e => self.shards.refusal(&e).about(&name),
        })?;
        let bytes = assemble::assemble(&plan.tree, plan.dtype, &mut |i: usize| self.shards.part(&record.parts[i]))
            .map_err(|e: ReadError| e.about(&name))?;
        Ok(Whole { dtype: plan.dtype, shape: plan.shape().to_vec(), bytes })
    }

    /// What one rank captured of a record: where it has several parts, the microbatches of a pipeline, these laid side by
    /// side.
    pub fn part(&self, record: &Record, rank: u32) -> Result<Whole, ReadError> {
        match record.of_rank(rank) {
            Some(own) => self.whole(&own),
            None => Err(ReadError::Layout(format!(
                "{}: no part from rank {rank}; there is {}",
                record.id,
                text::few(record.ranks())
            ))),
        }
    }

    fn layout_error(&self, record: &Record, e: LayoutError) -> ReadError {
        match e {
            LayoutError::Missing(_) => ReadError::Incomplete(format!("{}: {}", record.id, self.explain(&e))),
            _ => ReadError::Layout(format!("{}: {e}", record.id)),
        }
    }

    /// A layout error in words; missing parts by rank where other records tell which ranks these are.
    pub fn explain(&self, e: &LayoutError) -> String {
        let LayoutError::Missing(missing) = e else { return e.to_string() };
        let known: Option<Vec<String>> = missing.iter().map(|c| self.rank_at(c).map(|r| r.to_string())).collect();
        match known.as_deref() {
            Some([one]) => format!("{e} (rank {one})"),
            Some(many) => format!("{e} (ranks {})", many.join(", ")),
            None => e.to_string(),
        }
    }

    /// The rank whose parts have these coordinates, or begin with them.
    pub fn rank_at(&self, place: &layout::Coordinates) -> Option<u32> {
        // What begins with it comes right behind it.
        self.ranks.range(place.clone()..).next().filter(|(full, _)| full.starts_with(place)).map(|(_, &rank)| rank)
    }

    /// Modules that have records, in natural order.
    pub fn modules(&self) -> Vec<&str> {
        let unique: HashSet<&str> = self.records.iter().map(|r| r.id.module.as_str()).collect();
        let mut names: Vec<&str> = unique.into_iter().collect();
        names.sort_by_cached_key(|name| (natural(name), *name));
        names
    }
}

/// Puts parts in order of their seats; one that a later one of the same seat takes the place of goes to `replaced`.
fn in_seats(parts: &mut Vec<Part>, replaced: &mut Vec<Part>) {
    if parts.is_sorted_by(|a, b| a.what.seat() < b.what.seat()) {
        return;
    }
    // Stable: of one seat the last that came is the last.
    parts.sort_by_key(|part| part.what.seat());
    let mut kept: Vec<Part> = Vec::with_capacity(parts.len());
    for part in parts.drain(..) {
        match kept.last_mut().filter(|last| last.what.seat() == part.what.seat()) {
            Some(last) => replaced.push(std::mem::replace(last, part)),
            None => kept.push(part),
        }
    }
    *parts = kept;
}

type Lines = manifest::Reader<BufReader<File>>;

/// A manifest that is there.
struct Journal {
    path: PathBuf,
    lines: Lines,
}

impl Journal {
    fn is_empty(&self) -> Result<bool, OpenError> {
        fs::metadata(&self.path).map(|meta| meta.len() == 0).map_err(|source| io_error(&self.path, source))
    }
}

fn open_optional(path: &Path) -> Result<Option<Journal>, OpenError> {
    match manifest::open(path) {
        Ok(lines) => Ok(Some(Journal { path: path.to_owned(), lines })),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(io_error(path, source)),
    }
}

fn io_error(path: &Path, source: io::Error) -> OpenError {
    OpenError::Io { path: path.display().to_string(), source }
}

/// What a run's `run.json` says; `None` if there is none. One that does not read is a problem, and says nothing.
fn read_info(run: &Path, problems: &mut Vec<Problem>) -> Option<RunInfo> {
    let mut damaged = |why: String| {
        problems.push(Problem::new(RUN_FILE, format!("damaged ({})", text::clip(&why))));
        RunInfo { format: FORMAT, flexmodel: "?".into(), ..RunInfo::default() }
    };
    let bytes = match read_whole(&run.join(RUN_FILE), RUN_FILE_BYTES) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return None,
        Err(e) => return Some(damaged(e.to_string())),
    };
    // What serde derives would take an array of the fields as well.
    if !bytes.trim_ascii_start().starts_with(b"{") {
        return Some(damaged("it is no object".to_owned()));
    }
    let read = serde_json::from_slice::<RunInfo>(&bytes).map_err(|e| e.to_string());
    Some(read.and_then(|info| info.check().map(|()| info)).unwrap_or_else(|why| {
        // The format alone may still be readable, and decides whether the rest can be.
        let format = serde_json::from_slice::<Version>(&bytes).map_or(FORMAT, |version| version.format);
        RunInfo { format, ..damaged(why) }
    }))
}

/// The one field of `run.json` that later formats have too.
#[derive(serde::Deserialize)]
struct Version {
    format: u32,
}

/// Why a directory is no run, naming the one that is in it.
fn foreign(path: &Path) -> String {
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

#[cfg(test)]
mod tests;
