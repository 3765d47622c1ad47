//! `flexmodel certify`: whether a run captured what another did, such as the same model in one process.

mod report;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::PathBuf,
    process::ExitCode,
};

use flexmodel_run::{
    OpenError, ReadError, Record, Run, Whole,
    compare::{Difference, EQUAL, Side, Tolerance, compare, largest},
    format::{Identity, JobId},
    read::{
        assemble::Bytes,
        in_order,
        rows::{self, Pad},
    },
};
use report::{Finding, Report, Row, WorstRecord};
use wire::{dtype::DType, hooks::Kind};

use super::selection::{Selection, parse_side};
use crate::{cli::Usage, text};

/// Options of `flexmodel certify`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The run to be certified.
    pub run: PathBuf,
    /// The run that it is held against.
    pub reference: PathBuf,
    /// Which records.
    #[command(flatten)]
    pub selection: Selection,
    /// Allowed error relative to the reference's element; without it, torch.testing.assert_close's for the dtype.
    #[arg(long, value_parser = parse_tolerance)]
    pub rtol: Option<f64>,
    /// Allowed absolute error; without it, torch.testing.assert_close's for the dtype, times the reference's largest
    /// element where that is below 1.
    #[arg(long, value_parser = parse_tolerance)]
    pub atol: Option<f64>,
    /// Only equal bytes will do.
    #[arg(long, conflicts_with_all = ["rtol", "atol"])]
    pub exact: bool,
    /// Where each rank padded its rows to its own longest: on which side, right or left.
    #[arg(long, default_value = "right", value_parser = parse_side)]
    pub side: rows::Side,
    /// Print JSON, with every record that differs.
    #[arg(long)]
    pub json: bool,
}

fn parse_tolerance(word: &str) -> Result<f64, String> {
    match word.parse::<f64>() {
        Ok(x) if x >= 0.0 && x.is_finite() => Ok(x),
        _ => Err(format!("'{word}' is not a tolerance such as 1e-5")),
    }
}

/// Runs the command.
pub fn main(args: Args) -> anyhow::Result<ExitCode> {
    let open = |path: &PathBuf| Run::open(path).map_err(|e: OpenError| Usage(e.to_string()));
    let (run, reference) = (open(&args.run)?, open(&args.reference)?);
    let report = Certifier::new(&args, &run, &reference).certify();
    if report.is_empty() {
        return Err(Usage(format!(
            "no record of {} or {} fits; `flexmodel ls` shows what is there",
            args.run.display(),
            args.reference.display()
        ))
        .into());
    }
    if args.json {
        text::emit_json(&report)?;
    } else {
        text::emit(&report.text())?;
        for run in [&run, &reference] {
            let place = run.path.display();
            run.notes.iter().for_each(|note| text::complain("note", format_args!("{place}: {note}")));
            for problem in run.problems.iter().take(5) {
                text::complain("problem", format_args!("{place}: {problem}"));
            }
        }
    }
    Ok(if report.same { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The chosen records and refusals of the newest attempt of a run's newest job that has such records, by identity within
/// that.
struct Half<'a> {
    run: &'a Run,
    records: HashMap<Identity, &'a Record>,
    refused: HashMap<Identity, &'a str>,
}

/// What a run has of an identity.
enum Has<'a> {
    Record(&'a Record),
    Refused(&'a str),
    Nothing,
}

impl<'a> Half<'a> {
    fn new(run: &'a Run, selection: &Selection) -> Self {
        let wanted: Vec<&Record> = run.records.iter().map(|r| &**r).filter(|r| selection.wants(r.what())).collect();
        let refused = run.lost.refused.iter().filter(|(what, _)| selection.wants(what));
        let jobs = wanted.iter().map(|r| r.id.job).chain(refused.clone().map(|(what, _)| what.id.job));
        let newest = jobs.max().unwrap_or_default();
        let wanted = wanted.into_iter().filter(|r| r.id.job == newest).map(|r| (within_job(&r.id), r));
        let refused = refused.filter(|(what, _)| what.id.job == newest);
        let refused = refused.map(|(what, reason)| (within_job(&what.id), reason.as_str())).collect();
        Self { run, records: wanted.collect(), refused }
    }

    fn has(&self, id: &Identity) -> Has<'a> {
        match (self.records.get(id), self.refused.get(id)) {
            (Some(record), _) => Has::Record(record),
            (None, Some(reason)) => Has::Refused(reason),
            (None, None) => Has::Nothing,
        }
    }

    /// The whole of a record, with zeros where a row is shorter than others.
    fn whole(&self, record: &Record, pad: &Pad) -> Result<Whole, ReadError> {
        self.run.padded(record, pad)
    }

    /// A reason with what the job itself said of the record, which is nearer to the cause.
    fn reason(&self, id: &Identity, reason: String) -> String {
        self.refused.get(&within_job(id)).map_or(reason, |refused| format!("refused: {refused}"))
    }
}

/// The same, whichever job it is of: runs number these by themselves.
fn within_job(id: &Identity) -> Identity {
    Identity { job: JobId::default(), ..id.clone() }
}

struct Certifier<'a> {
    args: &'a Args,
    run: Half<'a>,
    reference: Half<'a>,
    report: Report,
    rows: BTreeMap<(Kind, &'static str), Row>,
}

impl<'a> Certifier<'a> {
    fn new(args: &'a Args, run: &'a Run, reference: &'a Run) -> Self {
        Self {
            args,
            report: Report::new(run, reference),
            run: Half::new(run, &args.selection),
            reference: Half::new(reference, &args.selection),
            rows: BTreeMap::new(),
        }
    }

    /// One record after the other: no more than two wholes are in memory.
    fn certify(mut self) -> Report {
        let halves = [&self.run, &self.reference];
        let ids: HashSet<Identity> =
            halves.iter().flat_map(|half| half.records.keys().chain(half.refused.keys()).cloned()).collect();
        let mut ids: Vec<Identity> = ids.into_iter().collect();
        ids.sort_by(|a, b| in_order(a).cmp(&in_order(b)));
        for id in &ids {
            match (self.run.has(id), self.reference.has(id)) {
                (Has::Record(a), Has::Record(b)) => self.pair(a, b),
                (Has::Nothing, Has::Record(_)) => self.report.missing.push(id.to_string()),
                (Has::Record(_), Has::Nothing) => self.report.extra.push(id.to_string()),
                (Has::Refused(_), Has::Refused(_)) => self.report.refused_in_both += 1,
                (a, b) => {
                    let why = |has: Has<'_>, place: &str| match has {
                        Has::Refused(reason) => Some(format!("refused {place}: {reason}")),
                        _ => None,
                    };
                    let reason = why(a, "in the run").or_else(|| why(b, "in the reference")).unwrap_or_default();
                    self.report.not_comparable.push(Finding { record: id.to_string(), what: reason });
                }
            }
        }
        self.report.rows = self.rows.into_values().collect();
        self.report.conclude()
    }

    fn pair(&mut self, a: &Record, b: &Record) {
        let (of_run, of_reference) = (a.what(), b.what());
        let row = |rows: &mut BTreeMap<_, Row>, count: fn(&mut Row)| {
            let (kind, dtype) = (b.id.kind, of_reference.dtype.name());
            let row = rows.entry((kind, dtype)).or_insert_with(|| Row::new(kind, dtype));
            row.records += 1;
            count(row);
        };
        let cut =
            |record: &Record| record.what().slice.as_ref().map_or("all of it".into(), |slice| text::safe(&slice.by));
        if cut(a) != cut(b) {
            let what = format!("{} and {} in the reference", cut(a), cut(b));
            self.report.unlike.push(Finding { record: b.id.to_string(), what });
            row(&mut self.rows, |row| row.different += 1);
            return;
        }
        // The plans first: shapes that differ need no bytes.
        let shape = |record: &Record| record.padded_shape().or_else(|| record.shape().ok());
        if let (Some(shape), Some(wanted)) = (shape(a), shape(b))
            && (shape != wanted || of_run.dtype != of_reference.dtype)
        {
            let what = format!(
                "{} {shape:?} and {} {wanted:?} in the reference",
                of_run.dtype.name(),
                of_reference.dtype.name()
            );
            self.report.unlike.push(Finding { record: b.id.to_string(), what });
            row(&mut self.rows, |row| row.different += 1);
            return;
        }
        if let Some(what) = scaled_apart(a, b) {
            self.report.not_comparable.push(Finding { record: b.id.to_string(), what });
            return;
        }
        let pad = Pad::zero(self.args.side);
        let (mut whole, mut wanted) = match (self.run.whole(a, &pad), self.reference.whole(b, &pad)) {
            (Ok(whole), Ok(wanted)) => (whole, wanted),
            (Err(_), Err(_))
                if self.run.refused.contains_key(&within_job(&a.id))
                    && self.reference.refused.contains_key(&within_job(&b.id)) =>
            {
                self.report.refused_in_both += 1;
                return;
            }
            (whole, wanted) => {
                let mut reasons = Vec::new();
                if let Err(e) = whole {
                    reasons.push(format!("in the run, {}", self.run.reason(&a.id, short(&e.to_string(), &a.id))));
                }
                if let Err(e) = wanted {
                    let reason = self.reference.reason(&b.id, short(&e.to_string(), &b.id));
                    reasons.push(format!("in the reference, {reason}"));
                }
                self.report.not_comparable.push(Finding { record: b.id.to_string(), what: reasons.join("; ") });
                return;
            }
        };
        if a.padded_shape().is_some() || b.padded_shape().is_some() {
            // What one run padded to another length is no value of the module's on both sides.
            self.report.rows_of_their_own += 1;
            for record in [a, b] {
                if let Ok(filled) = rows::filled(&record.parts, &pad) {
                    blank(&mut whole, &filled);
                    blank(&mut wanted, &filled);
                }
            }
        }
        let divisors = self.divisors(a, b);
        let sides =
            (Side { bytes: &whole.bytes, divisor: divisors.0 }, Side { bytes: &wanted.bytes, divisor: divisors.1 });
        let equal = divisors.0 == divisors.1 && *whole.bytes == *wanted.bytes;
        let (found, tolerance) = if equal {
            (Difference::default(), EQUAL)
        } else {
            let tolerance = self.tolerance(whole.dtype, sides.1);
            (compare(whole.dtype, sides.0, sides.1, tolerance), tolerance)
        };
        // What had to be divided has no bytes of its own to be equal; its values can be.
        let divided = divisors.0 != divisors.1;
        let same_values = divided && found.max_abs == 0.0;
        let close = !self.args.exact && found.outside == 0;
        match (equal || same_values, close) {
            (true, _) => row(&mut self.rows, |row| row.equal += 1),
            (false, true) => row(&mut self.rows, |row| row.close += 1),
            (false, false) => {
                row(&mut self.rows, |row| row.different += 1);
                self.report.different.push(b.id.to_string());
            }
        }
        if let Some(row) = self.rows.get_mut(&(b.id.kind, of_reference.dtype.name())) {
            row.max_abs_error = row.max_abs_error.max(found.max_abs);
            row.max_rel_error = row.max_rel_error.max(found.max_rel);
        }
        let worse = self.report.worst.as_ref().is_none_or(|worst| found.worst > worst.place);
        if !equal && !same_values && worse {
            self.report.worst = Some(WorstRecord::new(&b.id, &whole, sides, found, tolerance));
        }
    }

    /// What each side is divided by: of a loss that is a mean over a rank's batch, gradients in the job are the
    /// data-parallel size times those of one process (and a pipeline's microbatches times), and the loss scale times those of the script's own loss.
    /// Parameters' gradients are averaged and unscaled by the job itself.
    fn divisors(&mut self, a: &Record, b: &Record) -> (f64, f64) {
        let sizes = (a.data_size(), b.data_size());
        let scales = (a.what().loss_scale, b.what().loss_scale);
        if !is_divided(b) || (sizes.0 == sizes.1 && scales.0 == scales.1) {
            return (1.0, 1.0);
        }
        if sizes.0 != sizes.1 {
            *self.report.divided.entry(sizes).or_default() += 1;
        }
        if scales.0 != scales.1 {
            self.report.unscaled += 1;
        }
        // Both have one that nothing can be divided by: then it tells them apart in nothing.
        let (scale, reference_scale) = scales.0.divisor().zip(scales.1.divisor()).unwrap_or((1.0, 1.0));
        (f64::from(sizes.0) * scale, f64::from(sizes.1) * reference_scale)
    }

    fn tolerance(&self, dtype: DType, reference: Side<'_>) -> Tolerance {
        if self.args.exact {
            return EQUAL;
        }
        let default = Tolerance::of(dtype);
        let rtol = self.args.rtol.unwrap_or(default.rtol);
        match self.args.atol {
            Some(atol) => Tolerance { rtol, atol },
            None => Tolerance { rtol, ..default }.at(largest(dtype, reference)),
        }
    }
}

/// Whether gradients like this one are divided before they are compared.
fn is_divided(record: &Record) -> bool {
    let (kind, dtype) = (record.id.kind, record.what().dtype);
    kind.is_in(Kind::GRADIENTS) && (dtype.is_float() || dtype.is_complex())
}

/// Zeros for the elements that no row has.
fn blank(whole: &mut Whole, filled: &[u8]) {
    let mut bytes = whole.bytes.to_vec();
    let elements = bytes.chunks_exact_mut(whole.dtype.size()).zip(filled);
    elements.filter(|(_, has)| **has == 0).for_each(|(element, _)| element.fill(0));
    whole.bytes = Bytes::Owned(bytes);
}

/// Why two gradients cannot be brought to one loss, if they cannot.
fn scaled_apart(a: &Record, b: &Record) -> Option<String> {
    let (run, reference) = (a.what().loss_scale, b.what().loss_scale);
    let apart = is_divided(b) && run != reference && run.divisor().zip(reference.divisor()).is_none();
    apart.then(|| format!("the loss was scaled by {run} in the run and by {reference} in the reference"))
}

/// A reason without the record's name, which is beside it.
fn short(reason: &str, id: &Identity) -> String {
    reason.strip_prefix(&format!("{id}: ")).unwrap_or(reason).to_owned()
}
