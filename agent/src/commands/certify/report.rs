//! What a comparison of two runs found, as text and as JSON.

use std::collections::BTreeMap;

use flexmodel_run::{
    Run, Whole,
    compare::{Difference, Side, Tolerance, Worst},
    format::Identity,
};
use serde::{Serialize, Serializer};
use wire::hooks::Kind;

use crate::text;

/// Names that are spelled out in a line of text; JSON has all of them.
const NAMED: usize = 5;

/// The certificate.
#[derive(Serialize)]
pub struct Report {
    run: String,
    reference: String,
    /// Whether every record is there, and equal or close.
    pub same: bool,
    records: u64,
    equal: u64,
    close: u64,
    /// By kind and dtype.
    pub rows: Vec<Row>,
    /// Records whose values differ.
    pub different: Vec<String>,
    /// Records whose shape or dtype differs, or whose slice.
    pub unlike: Vec<Finding>,
    /// Records of the reference alone.
    pub missing: Vec<String>,
    /// Records of the run alone.
    pub extra: Vec<String>,
    /// Records without a whole, or refused, on one side at least.
    pub not_comparable: Vec<Finding>,
    /// Tensors that neither run has, for named reasons.
    pub refused_in_both: u64,
    /// Gradients that were divided, by the data-parallel sizes of the run and the reference.
    #[serde(serialize_with = "divided")]
    pub divided: BTreeMap<(u32, u32), u64>,
    /// Records whose rows each rank padded to its own longest: compared where both runs have rows.
    pub rows_of_their_own: u64,
    /// Gradients that were divided by loss scales that differ.
    pub unscaled: u64,
    /// The record with the element that is furthest outside its tolerance; none where all bytes are equal.
    pub worst: Option<WorstRecord>,
}

/// A record, and what about it.
#[derive(Serialize)]
pub struct Finding {
    /// Its name.
    pub record: String,
    /// What was found.
    pub what: String,
}

/// Records of one kind and dtype. Errors that are infinite are `null` in JSON.
#[derive(Serialize)]
pub struct Row {
    kind: &'static str,
    dtype: &'static str,
    /// That both runs have whole.
    pub records: u64,
    /// Of equal bytes.
    pub equal: u64,
    /// Within tolerance.
    pub close: u64,
    /// Not.
    pub different: u64,
    /// Largest over all elements.
    pub max_abs_error: f64,
    /// Largest over all elements whose reference is not zero.
    pub max_rel_error: f64,
}

impl Row {
    /// An empty one.
    pub fn new(kind: Kind, dtype: &'static str) -> Self {
        let kind = kind.name();
        Self { kind, dtype, records: 0, equal: 0, close: 0, different: 0, max_abs_error: 0.0, max_rel_error: 0.0 }
    }
}

/// The record that is furthest off, and its worst element.
#[derive(Serialize)]
pub struct WorstRecord {
    record: String,
    dtype: &'static str,
    shape: Vec<u64>,
    index: Vec<u64>,
    run: String,
    reference: String,
    error: f64,
    allowed_rtol: f64,
    allowed_atol: f64,
    outside: u64,
    elements: u64,
    /// How it compares with others.
    #[serde(skip)]
    pub place: Worst,
}

impl WorstRecord {
    /// `sides` are the run's and the reference's, of the shape and dtype of `whole`.
    pub fn new(
        id: &Identity,
        whole: &Whole,
        sides: (Side<'_>, Side<'_>),
        found: Difference,
        tolerance: Tolerance,
    ) -> Self {
        Self {
            record: id.to_string(),
            dtype: whole.dtype.name(),
            shape: whole.shape.clone(),
            index: unravel(found.worst.index as u64, &whole.shape),
            run: sides.0.text(whole.dtype, found.worst.index),
            reference: sides.1.text(whole.dtype, found.worst.index),
            error: found.worst.error,
            allowed_rtol: tolerance.rtol,
            allowed_atol: tolerance.atol,
            outside: found.outside,
            elements: whole.shape.iter().product(),
            place: found.worst,
        }
    }

    fn text(&self) -> String {
        format!(
            "worst: {}, {} {:?}, at {:?}: {} and {} in the reference, error {} (rtol {}, atol {}); {} of {} outside\n",
            text::safe(&self.record),
            self.dtype,
            self.shape,
            self.index,
            self.run,
            self.reference,
            text::number(self.error),
            text::number(self.allowed_rtol),
            text::number(self.allowed_atol),
            self.outside,
            text::count(self.elements, "element")
        )
    }
}

/// The index of an element in every dimension.
fn unravel(element: u64, shape: &[u64]) -> Vec<u64> {
    let mut left = element;
    let mut index: Vec<u64> = shape
        .iter()
        .rev()
        .map(|&size| {
            let at = left % size.max(1);
            left /= size.max(1);
            at
        })
        .collect();
    index.reverse();
    index
}

fn divided<S: Serializer>(all: &BTreeMap<(u32, u32), u64>, out: S) -> Result<S::Ok, S::Error> {
    out.collect_seq(all.iter().map(|(&(run, reference), &records)| {
        BTreeMap::from([("run_dp_size", u64::from(run)), ("reference_dp_size", reference.into()), ("records", records)])
    }))
}

impl Report {
    /// One that has found nothing yet.
    pub fn new(run: &Run, reference: &Run) -> Self {
        Self {
            run: run.path.display().to_string(),
            reference: reference.path.display().to_string(),
            same: false,
            records: 0,
            equal: 0,
            close: 0,
            rows: Vec::new(),
            different: Vec::new(),
            unlike: Vec::new(),
            missing: Vec::new(),
            extra: Vec::new(),
            not_comparable: Vec::new(),
            refused_in_both: 0,
            divided: BTreeMap::new(),
            rows_of_their_own: 0,
            unscaled: 0,
            worst: None,
        }
    }

    /// Counts, and judges.
    pub fn conclude(mut self) -> Self {
        let sum = |of: fn(&Row) -> u64| self.rows.iter().map(of).sum();
        (self.records, self.equal, self.close) = (sum(|r| r.records), sum(|r| r.equal), sum(|r| r.close));
        self.same = self.mismatches().iter().all(|(count, _)| *count == 0);
        self
    }

    /// Whether neither run had anything to compare.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.refused_in_both == 0 && self.mismatches().iter().all(|(count, _)| *count == 0)
    }

    fn mismatches(&self) -> [(usize, &'static str); 5] {
        [
            (self.different.len(), "different"),
            (self.unlike.len(), "of another shape or dtype"),
            (self.missing.len(), "missing"),
            (self.extra.len(), "extra"),
            (self.not_comparable.len(), "not comparable"),
        ]
    }

    /// The certificate for people.
    pub fn text(&self) -> String {
        let header = ["kind", "dtype", "records", "equal", "close", "different", "max abs error", "max rel error"];
        let cells = |row: &Row| {
            let counts = [row.records, row.equal, row.close, row.different].map(|n| n.to_string());
            let errors = [row.max_abs_error, row.max_rel_error].map(text::number);
            [row.kind.to_owned(), row.dtype.to_owned()].into_iter().chain(counts).chain(errors).collect()
        };
        let rows: Vec<Vec<String>> = self.rows.iter().map(cells).collect();
        let mut out = text::table(&header, &rows, &[2, 3, 4, 5, 6, 7]);
        for ((run, reference), records) in &self.divided {
            out += &format!(
                "{} divided by the data-parallel size before comparison: {run} in the run, {reference} in the reference\n",
                text::count(*records, "gradient")
            );
        }
        if self.unscaled > 0 {
            let gradients = text::count(self.unscaled, "gradient");
            out.push_str(&format!("{gradients} divided by the job's loss scale before comparison\n"));
        }
        if self.rows_of_their_own > 0 {
            let records = text::count(self.rows_of_their_own, "record");
            out.push_str(&format!("{records} compared without what would pad rows to the longest of all ranks\n"));
        }
        let names = |found: &[Finding]| found.iter().map(|f| format!("{}: {}", f.record, f.what)).collect::<Vec<_>>();
        out += &list("different", &self.different);
        out += &list("another shape or dtype", &names(&self.unlike));
        out += &list("missing, only in the reference", &self.missing);
        out += &list("extra, only in the run", &self.extra);
        out += &list("not comparable", &names(&self.not_comparable));
        if self.refused_in_both > 0 {
            out += &format!("refused in both runs: {}\n", text::count(self.refused_in_both, "tensor"));
        }
        if let Some(worst) = &self.worst {
            out += &worst.text();
        }
        out + &self.verdict()
    }

    fn verdict(&self) -> String {
        let counted = format!("{}, {} equal, {} close", text::count(self.records, "record"), self.equal, self.close);
        if self.same {
            return format!("certified: {counted}\n");
        }
        let found = self.mismatches().into_iter().filter(|(count, _)| *count > 0);
        let found: Vec<String> = found.map(|(count, what)| format!("{count} {what}")).collect();
        format!("not certified: {} ({counted})\n", found.join(", "))
    }
}

/// A line for the heading and for each of the first names; nothing for none.
fn list(what: &str, names: &[String]) -> String {
    if names.is_empty() {
        return String::new();
    }
    let mut out = format!("{what}: {}\n", text::count(names.len() as u64, "record"));
    for name in names.iter().take(NAMED) {
        out += &format!("  {}\n", text::safe(name));
    }
    if names.len() > NAMED {
        out += &format!("  and {} more\n", names.len() - NAMED);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_element_has_an_index_in_every_dimension() {
        assert_eq!(unravel(0, &[]), [0u64; 0]);
        assert_eq!(unravel(7, &[2, 5]), [1, 2]);
        assert_eq!(unravel(23, &[2, 3, 4]), [1, 2, 3]);
    }
}
