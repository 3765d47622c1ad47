//! `flexmodel ls`: what a run holds.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    process::ExitCode,
};

use flexmodel_run::{
    Record, Run,
    format::{JobId, JobInfo, Revision},
    read::{LayoutError, Note, display_module, natural},
};
use serde::Serialize;
use wire::{dtype::DType, hooks::Kind};

use crate::text;

/// Most revisions that are printed.
const MAX_REVISIONS: usize = 20;

/// Options of `flexmodel ls`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The run's directory.
    pub run: PathBuf,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// Records that differ only in when they were captured.
#[derive(Serialize)]
struct Row {
    #[serde(flatten)]
    job: JobId,
    model: u32,
    module: String,
    kind: &'static str,
    path: String,
    train: bool,
    dtype: &'static str,
    first_step: u64,
    last_step: u64,
    records: u64,
    incomplete: u64,
    /// Lowest and highest revision of the hooks that they are of; left out where they never changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    revision: Option<(u64, u64)>,
    /// Smallest and largest size of each dimension of the whole, and of rows that each rank padded to its own longest;
    /// `null` where no whole can be made.
    shape: Option<(Vec<u64>, Vec<u64>)>,
    /// Why there is no whole, for the first record that has none.
    reason: Option<String>,
    bytes: u64,
}

#[derive(Serialize)]
struct Listing<'a> {
    run: String,
    finished: bool,
    world: u32,
    /// Folders of its nodes, where there are several.
    nodes: &'a [String],
    /// Its jobs, and the attempts of each.
    jobs: &'a [JobInfo],
    /// Hooks that began while a job ran.
    revisions: &'a [Revision],
    rows: Vec<Row>,
    records: u64,
    bytes: u64,
    incomplete: u64,
    refused: usize,
    dropped: u64,
    divergences: usize,
    problems: Vec<String>,
    notes: &'a [Note],
}

/// Runs the command.
pub fn main(args: Args) -> anyhow::Result<ExitCode> {
    let run = Run::open(&args.run)?;
    let listing = list(&run);
    if args.json {
        text::emit_json(&listing)?;
    } else {
        text::emit(&table(&listing))?;
        notes(&run, &listing);
    }
    Ok(ExitCode::SUCCESS)
}

type Key<'a> = (JobId, u32, &'a str, Kind, &'a str, bool, u8);

fn list(run: &Run) -> Listing<'_> {
    let mut groups: BTreeMap<Key<'_>, Vec<&Record>> = BTreeMap::new();
    for record in &run.records {
        let id = &record.id;
        let key =
            (id.job, id.model, id.module.as_str(), id.kind, id.path.as_str(), !id.train, record.what().dtype as u8);
        groups.entry(key).or_default().push(record);
    }
    let mut rows: Vec<Row> = groups.values().map(|records| row(run, records)).collect();
    rows.sort_by(|a, b| (a.job, a.model, natural(&a.module)).cmp(&(b.job, b.model, natural(&b.module))));
    Listing {
        run: run.path.display().to_string(),
        finished: run.finished(),
        world: run.info.world,
        nodes: &run.nodes,
        jobs: &run.jobs,
        revisions: &run.revisions,
        records: run.records.len() as u64,
        bytes: text::total(rows.iter().map(|r| r.bytes)),
        incomplete: rows.iter().map(|r| r.incomplete).sum(),
        refused: run.lost.refused.len(),
        dropped: text::total(run.lost.dropped.iter().map(|d| d.1)),
        divergences: run.lost.divergences.len(),
        problems: run.problems.iter().map(|p| p.to_string()).collect(),
        notes: &run.notes,
        rows,
    }
}

/// `records` is not empty.
fn row(run: &Run, records: &[&Record]) -> Row {
    let id = &records[0].id;
    let mut shape: Option<(Vec<u64>, Vec<u64>)> = None;
    let (mut incomplete, mut reason, mut uneven) = (0, None, false);
    for record in records {
        let sizes = match record.shape() {
            Ok(s) => (s.clone(), s),
            Err(e) => {
                incomplete += u64::from(matches!(e, LayoutError::Missing(_) | LayoutError::Pending(_)));
                reason.get_or_insert_with(|| run.explain(&e));
                let LayoutError::Ragged { low, high } = e else { continue };
                (low, high)
            }
        };
        match &mut shape {
            None => shape = Some(sizes),
            Some((low, high)) if low.len() == sizes.0.len() => {
                low.iter_mut().zip(sizes.0).for_each(|(low, n)| *low = n.min(*low));
                high.iter_mut().zip(sizes.1).for_each(|(high, n)| *high = n.max(*high));
            }
            Some(_) => uneven = true,
        }
    }
    if uneven {
        shape = None;
        reason.get_or_insert_with(|| "the number of dimensions varies".into());
    }
    let revision = records.iter().map(|record| record.revision());
    let revision = revision.clone().min().zip(revision.max()).filter(|(_, highest)| *highest > 0);
    let dtype: DType = records[0].what().dtype;
    Row {
        job: id.job,
        model: id.model,
        module: id.module.clone(),
        kind: id.kind.name(),
        path: id.path.clone(),
        train: id.train,
        dtype: dtype.name(),
        first_step: records.iter().map(|r| r.id.step).min().unwrap_or(0),
        last_step: records.iter().map(|r| r.id.step).max().unwrap_or(0),
        records: records.len() as u64,
        incomplete,
        revision,
        shape,
        reason,
        bytes: text::total(records.iter().map(|r| r.stored_bytes())),
    }
}

/// Columns that are there where they tell something.
struct Columns {
    jobs: bool,
    models: bool,
    revisions: bool,
    modes: bool,
}

impl Columns {
    fn of(rows: &[Row]) -> Self {
        let vary = |differ: &dyn Fn(&Row, &Row) -> bool| rows.iter().any(|row| differ(row, &rows[0]));
        Self {
            jobs: vary(&|a, b| a.job != b.job),
            models: vary(&|a, b| a.model != b.model),
            revisions: rows.iter().any(|row| row.revision.is_some()),
            modes: rows.iter().any(|row| !row.train),
        }
    }
}

fn table(listing: &Listing<'_>) -> String {
    let mut header = vec!["module", "kind", "path", "steps", "records", "shape", "dtype", "bytes"];
    let columns = Columns::of(&listing.rows);
    if columns.models {
        header.insert(0, "model");
    }
    if columns.jobs {
        header.splice(0..0, ["job", "attempt"]);
    }
    if columns.revisions {
        header.insert(header.len() - 4, "revision");
    }
    if columns.modes {
        header.insert(header.len() - 4, "mode");
    }
    let right = [header.iter().position(|h| *h == "records").unwrap_or(0), header.len() - 1];
    let rows: Vec<Vec<String>> = listing.rows.iter().map(|r| cells(r, &columns)).collect();
    let mut out = match rows.is_empty() {
        true => format!("no records in {}\n", text::safe(&listing.run)),
        false => text::table(&header, &rows, &right),
    };
    out += &revisions(listing);
    let mut totals = vec![text::count(listing.records, "record"), text::bytes(listing.bytes)];
    let more = [
        (listing.incomplete, "incomplete"),
        (listing.refused as u64, "refused"),
        (listing.dropped, "dropped"),
        (listing.divergences as u64, "divergent"),
    ];
    totals.extend(more.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")));
    totals.push(text::count(u64::from(listing.world), "rank"));
    if listing.jobs.len() > 1 {
        let jobs: BTreeSet<u32> = listing.jobs.iter().map(|info| info.id.job).collect();
        totals.push(text::count(jobs.len() as u64, "job"));
        totals.push(text::count(listing.jobs.len() as u64, "attempt"));
    }
    if !listing.nodes.is_empty() {
        totals.push(text::count(listing.nodes.len() as u64, "node"));
    }
    if !listing.finished {
        totals.push("not finished (running, or stopped hard)".into());
    }
    out += &totals.join(", ");
    out.push('\n');
    out
}

/// Hooks that began while a job ran, the newest last, one a line.
fn revisions(listing: &Listing<'_>) -> String {
    let earlier = listing.revisions.len().saturating_sub(MAX_REVISIONS);
    let mut out = match earlier {
        0 => String::new(),
        n => format!("{} before these; --json lists them\n", text::count(n as u64, "revision")),
    };
    for revision in listing.revisions.iter().skip(earlier) {
        if listing.jobs.len() > 1 {
            out += &format!("job {}, attempt {}, ", revision.job.job, revision.job.attempt);
        }
        out += &format!("{}\n", text::safe(&text::clip(&revision.to_string())));
    }
    out
}

/// What the table has no room for, on stderr.
fn notes(run: &Run, listing: &Listing<'_>) {
    let mut reasons: Vec<&String> = listing.rows.iter().filter_map(|r| r.reason.as_ref()).collect();
    reasons.sort();
    reasons.dedup();
    reasons.iter().take(5).for_each(|reason| text::complain("note", reason));
    for (what, reason) in run.lost.refused.iter().take(5) {
        text::complain("note", format_args!("{} was not captured: {reason}", what.id));
    }
    run.notes.iter().for_each(|note| text::complain("note", note));
    text::complain_of("problem", &run.problems, 5, "; `flexmodel verify` lists them");
}

fn cells(row: &Row, columns: &Columns) -> Vec<String> {
    let range = |(first, last)| if first == last { format!("{first}") } else { format!("{first}..{last}") };
    let steps = range((row.first_step, row.last_step));
    let records = match row.incomplete {
        0 => row.records.to_string(),
        n => format!("{} ({n} incomplete)", row.records),
    };
    let shape = row.shape.as_ref().map_or_else(|| "-".into(), |(low, high)| text::range(low, high));
    let mut cells = vec![
        display_module(&row.module).to_owned(),
        row.kind.into(),
        row.path.clone(),
        steps,
        records,
        shape,
        row.dtype.into(),
        text::bytes(row.bytes),
    ];
    if columns.models {
        cells.insert(0, row.model.to_string());
    }
    if columns.jobs {
        cells.splice(0..0, [row.job.job.to_string(), row.job.attempt.to_string()]);
    }
    if columns.revisions {
        cells.insert(cells.len() - 4, row.revision.map_or_else(|| "0".into(), range));
    }
    if columns.modes {
        let mode = if row.train { "train" } else { "eval" };
        cells.insert(cells.len() - 4, mode.into());
    }
    cells
}
