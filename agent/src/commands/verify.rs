//! `flexmodel verify`: whether a run is what its writer wrote.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    path::{Path, PathBuf},
    process::ExitCode,
};

use flexmodel_run::{
    Problem, ReadError, Record, Run,
    format::{Identity, Joined, Location, Part},
    read::{LayoutError, sealed},
};
use serde::Serialize;
use wire::dtype::DType;

use crate::text;

/// Options of `flexmodel verify`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The run's directory.
    pub run: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Default, Serialize)]
struct Report {
    ok: bool,
    records: u64,
    parts: u64,
    bytes: u64,
    problems: Vec<Problem>,
    incomplete: u64,
    notes: Vec<String>,
}

/// Runs the command.
pub fn main(args: Args) -> anyhow::Result<ExitCode> {
    let run = Run::open(&args.run)?;
    let report = verify(&run);
    if args.json {
        text::emit_json(&report)?;
    } else {
        let mut out = String::new();
        for problem in &report.problems {
            out += &format!("{}\n", text::safe(&problem.to_string()));
        }
        let checked = format!(
            "{}, {}, {} bytes checked",
            text::count(report.records, "record"),
            text::count(report.parts, "part"),
            report.bytes
        );
        out += &match report.problems.len() as u64 {
            0 => format!("ok: {checked}\n"),
            n => format!("{} ({checked})\n", text::count(n, "problem")),
        };
        report.notes.iter().for_each(|note| text::complain("note", note));
        text::emit(&out)?;
    }
    Ok(if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn verify(run: &Run) -> Report {
    let mut report = Report {
        problems: run.problems.clone(),
        notes: run.notes.iter().map(ToString::to_string).collect(),
        records: run.records.len() as u64,
        ..Report::default()
    };
    let damaged = check_parts(run, &mut report);
    let diverged: HashSet<&Identity> = run.lost.divergences.iter().map(|(what, _)| &what.id).collect();
    for (number, record) in run.records.iter().enumerate() {
        match record.shape() {
            Err(LayoutError::Missing(_) | LayoutError::Pending(_)) => report.incomplete += 1,
            // Parts that are kept apart are what was asked for.
            Ok(_) | Err(LayoutError::Unknown { .. } | LayoutError::Ragged { .. } | LayoutError::Apart(_)) => {}
            Err(_) if damaged.contains(&number) => {}
            // Differing replicas were recorded as such when they came: a finding about the job, not damage.
            Err(e) if diverged.contains(&record.id) => report.notes.push(format!("{}: {e}", record.id)),
            Err(e) => report.problems.push(Problem::new(record.id.to_string(), e.to_string())),
        }
    }
    for record in &run.records {
        check_revision(record, &mut report);
    }
    match run.nodes.is_empty() {
        true => sealed::check(run, &mut report.problems),
        false => run.folders().iter().for_each(|(node, folder)| check_node(node, folder, &mut report.problems)),
    }
    if report.incomplete > 0 {
        let note = format!("{} incomplete: some ranks delivered no part", text::count(report.incomplete, "record"));
        report.notes.push(note);
    }
    if !run.finished() {
        report.notes.push("the run is not finished: it is going on, or its agent was stopped hard".into());
    }
    report.ok = report.problems.is_empty();
    report
}

/// All ranks change their hooks in one step. Where they change at their next pass each, passes that are only taken for one may
/// be of two revisions.
fn check_revision(record: &Record, report: &mut Report) {
    let revisions: BTreeSet<u64> = record.parts.iter().map(|part| part.what.revision).collect();
    if revisions.len() > 1 {
        let why = format!("its parts are of revisions {} of the hooks", text::few(revisions));
        match record.parts.iter().any(|part| part.what.joined == Joined::Assumed) {
            true => report.notes.push(format!("{}: {why}", record.id)),
            false => report.problems.push(Problem::new(record.id.to_string(), why)),
        }
    }
}

/// Checks the bytes of every part; returns the records that have damaged ones. Bytes that several parts have are read once,
/// and where parts overlap, which is damage, no more than the file has: it takes as long as there is to read.
fn check_parts(run: &Run, report: &mut Report) -> BTreeSet<usize> {
    let mut spans: BTreeMap<&str, BTreeSet<Span>> = BTreeMap::new();
    let mut read: HashMap<(&Location, DType, &[u64]), Result<usize, ReadError>> = HashMap::new();
    let mut damaged = BTreeSet::new();
    let mut left: HashMap<&str, u64> = HashMap::new();
    let parts = run.records.iter().enumerate().flat_map(|(number, r)| r.parts.iter().map(move |p| (number, p)));
    for (number, part) in parts {
        report.parts += 1;
        let Some(at) = part.at.as_ref() else { continue };
        spans.entry(&at.shard).or_default().insert(Span::of(at));
        let key = (at, part.what.dtype, part.what.shape.as_slice());
        let found = read.entry(key).or_insert_with(|| {
            let left = left.entry(&at.shard).or_insert_with(|| run.shards().len(&at.shard));
            match left.checked_sub(at.len) {
                // A part that is longer than its shard is told so, and takes no time.
                None if at.len <= run.shards().len(&at.shard) => {
                    Err(ReadError::Damage("not compared: parts of this shard overlap and are more than it has".into()))
                }
                rest => {
                    *left = rest.unwrap_or(*left);
                    run.shards().check(part).map(|bytes| bytes.len())
                }
            }
        });
        match found {
            Ok(bytes) => report.bytes = report.bytes.saturating_add(*bytes as u64),
            Err(e) => {
                damaged.insert(number);
                report.problems.push(part_problem(run, at, part, e));
            }
        }
    }
    for (shard, spans) in &spans {
        overlaps(&run.shards().name(shard), spans, &mut report.problems);
    }
    damaged
}

/// A node's sealed shards, by its own manifest.
fn check_node(node: &str, folder: &Path, problems: &mut Vec<Problem>) {
    let mut found = Vec::new();
    match Run::open_one(folder) {
        Ok(run) => sealed::check(&run, &mut found),
        // It was opened a moment ago.
        Err(e) => found.push(Problem::new("", e.to_string())),
    }
    problems.extend(found.into_iter().map(|problem| problem.within(node)));
}

fn part_problem(run: &Run, at: &Location, part: &Part, e: &ReadError) -> Problem {
    let place = format!("{}, {} of rank {}", run.shards().name(&at.shard), part.what.id, part.what.rank);
    Problem::new(place, e.to_string())
}

/// Where bytes are, in order of their start.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Span {
    start: u64,
    end: u64,
}

impl Span {
    fn of(at: &Location) -> Self {
        Self { start: at.offset, end: at.offset.saturating_add(at.len) }
    }
}

/// Equal spans are replicas stored once; any other overlap is damage.
fn overlaps(shard: &str, spans: &BTreeSet<Span>, problems: &mut Vec<Problem>) {
    let mut last: Option<&Span> = None;
    for span in spans.iter().filter(|s| s.start < s.end) {
        if let Some(before) = last.filter(|before| before.end > span.start) {
            problems.push(Problem::new(
                shard,
                format!("bytes {}..{} and {}..{} overlap", before.start, before.end, span.start, span.end),
            ));
        }
        if last.is_none_or(|before| before.end < span.end) {
            last = Some(span);
        }
    }
}

#[cfg(test)]
mod tests {
    use flexmodel_run::testing;

    use super::*;

    #[test]
    fn parts_of_several_revisions_are_damage_unless_they_are_only_taken_for_one_pass() {
        for (joined, problems, notes) in [(Joined::ByNumber, 1, 0), (Joined::Known, 1, 0), (Joined::Assumed, 0, 1)] {
            let mut parts = [testing::part("a", 0, 1), testing::part("a", 0, 1)].to_vec();
            parts[1].what.revision = 1;
            parts.iter_mut().for_each(|part| part.what.joined = joined);
            let mut report = Report::default();
            check_revision(&Record { id: parts[0].what.id.clone(), parts }, &mut report);
            assert_eq!((report.problems.len(), report.notes.len()), (problems, notes), "{joined:?}");
        }
    }
}
