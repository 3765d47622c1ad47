//! A record: what it says, and its bytes.

use std::sync::Arc;

use flexmodel_run::{
    ReadError, Record as Read, Run,
    format::{Identity, JobId, Part, Stats},
    read::{
        AssemblyPlan, LayoutError, PlanError, Source, fill,
        layout::{self, byte_len},
    },
    text::{clip, few, total},
};
use pyo3::{exceptions::PyTypeError, prelude::*, types::PyDict};
use serde::Serialize;

use crate::{NotCapturedError, RunError, asked::number, bounded, memory::Memory};

/// One record of a run as it was then. It keeps what it says, and with the run's other records what reads its bytes; neither
/// the other records nor what the run said of itself.
#[pyclass(frozen, module = "flexmodel._native")]
pub struct Record {
    record: Arc<Read>,
    source: Arc<Source>,
}

type StatsFields = (u64, Option<f64>, Option<f64>, Option<f64>, Option<f64>, Option<f64>, Option<f64>, u64, u64, u64);
/// Those of Python's `Identity`, in order.
pub type IdentityFields = (String, &'static str, String, u32, u64, u32, u32, u32, bool, u32, u32, u32);

pub fn identity(id: &Identity) -> IdentityFields {
    let name = (id.module.clone(), id.kind.name(), id.path.clone());
    let JobId { job, attempt } = id.job;
    (name.0, name.1, name.2, id.model, id.step, id.micro, id.call, id.repeat, id.train, job, attempt, id.again)
}

/// As the format has it: Python's types take it apart, and whatever the format says more is passed on.
fn json(value: &impl Serialize) -> PyResult<String> {
    serde_json::to_string(value).map_err(|e| RunError::new_err(e.to_string()))
}

/// What Python is told where bytes do not read.
fn unread(name: &str, error: ReadError) -> PyErr {
    match error {
        ReadError::NoSum(_) => {
            PyTypeError::new_err(format!("{error}; each rank's part is kept: ask for it with rank="))
        }
        ReadError::Layout(why) | ReadError::Incomplete(why) => NotCapturedError::new_err(format!("{name}: {why}")),
        ReadError::Damage(why) => RunError::new_err(format!("{name}: {why}")),
    }
}

fn stats(s: &Stats) -> StatsFields {
    (s.count, s.mean, s.std, s.l2, s.absmax, s.min, s.max, s.nan, s.inf, s.zero)
}

impl Record {
    /// One of the records of `run`.
    pub fn new(run: &Run, at: usize) -> Self {
        Self { record: run.records[at].clone(), source: run.source().clone() }
    }

    /// Why there is no whole.
    fn no_whole(&self, name: &str, error: LayoutError) -> PyErr {
        let ranks = few(self.record.ranks());
        let why = match error {
            LayoutError::Missing(missing) => return self.incomplete(name, &missing),
            LayoutError::Unknown { axis, .. } => format!("how they lie along {axis} is not known"),
            LayoutError::Apart(why) => why,
            LayoutError::Replicas(one, other) => format!("ranks {one} and {other} hold replicas that differ"),
            LayoutError::Conflict(why) => why,
        };
        NotCapturedError::new_err(format!("{name}: {why}; each rank's part is kept: ask for rank= one of {ranks}"))
    }

    fn incomplete(&self, name: &str, missing: &[layout::Coordinates]) -> PyErr {
        let (mut names, mut ranks) = (Vec::new(), Vec::new());
        for place in missing {
            let one = |(axis, index, size): &(String, u32, u32)| format!("{axis} {index} of {size}");
            let text = clip(&place.iter().map(one).collect::<Vec<_>>().join(", "));
            match self.source.rank_at(place) {
                Some(rank) => {
                    ranks.push(rank);
                    names.push(format!("rank {rank} ({text})"));
                }
                None => names.push(text),
            }
        }
        let reasons: Vec<&str> = self.source.why_dropped(&ranks).into_iter().collect();
        let why = match reasons.as_slice() {
            [] => String::new(),
            all => format!("; parts were dropped there: {}", clip(&all.join(", "))),
        };
        NotCapturedError::new_err(format!(
            "{name} is incomplete: no part of {}{why}. Parts of rank {} are there: ask with rank=; while the job runs, \
             run.refresh() reads what has come since",
            names.join("; "),
            few(self.record.ranks())
        ))
    }
}

#[pymethods]
impl Record {
    /// What it says, by the names of Python's fields.
    fn fields<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let record = &self.record;
        let (id, what) = (&record.id, record.what());
        // A record may have thousands of parts.
        let (shape, ranks, data_size) = py.detach(|| (record.shape().ok(), record.ranks(), record.data_size()));
        let stored = || total(record.parts.iter().filter_map(|part| Some(part.at.as_ref()?.len)));
        let nbytes = shape.as_deref().and_then(|shape| byte_len(what.dtype, shape)).unwrap_or_else(stored);
        let complete = shape.is_some() && record.parts.iter().all(|part| part.at.is_some());
        let fields = PyDict::new(py);
        fields.set_item(pyo3::intern!(py, "module"), &id.module)?;
        fields.set_item(pyo3::intern!(py, "kind"), id.kind.name())?;
        fields.set_item(pyo3::intern!(py, "path"), &id.path)?;
        fields.set_item(pyo3::intern!(py, "step"), id.step)?;
        fields.set_item(pyo3::intern!(py, "micro"), id.micro)?;
        fields.set_item(pyo3::intern!(py, "call"), id.call)?;
        fields.set_item(pyo3::intern!(py, "train"), id.train)?;
        fields.set_item(pyo3::intern!(py, "shape"), shape.map(|s| pyo3::types::PyTuple::new(py, s)).transpose()?)?;
        fields.set_item(pyo3::intern!(py, "dtype"), what.dtype.name())?;
        fields.set_item(pyo3::intern!(py, "job"), id.job.job)?;
        fields.set_item(pyo3::intern!(py, "attempt"), id.job.attempt)?;
        fields.set_item(pyo3::intern!(py, "again"), id.again)?;
        fields.set_item(pyo3::intern!(py, "model"), id.model)?;
        fields.set_item(pyo3::intern!(py, "repeat"), id.repeat)?;
        fields.set_item(pyo3::intern!(py, "class_name"), &what.class)?;
        fields.set_item(pyo3::intern!(py, "group"), &what.group)?;
        fields.set_item(pyo3::intern!(py, "layout"), json(&what.axes)?)?;
        fields.set_item(pyo3::intern!(py, "dp_size"), data_size)?;
        fields.set_item(pyo3::intern!(py, "loss_scale"), what.loss_scale.0)?;
        fields.set_item(pyo3::intern!(py, "skipped"), what.skipped)?;
        let first = record.parts.iter().map(|part| part.what.time_ns).min();
        fields.set_item(pyo3::intern!(py, "time_ns"), first)?;
        fields.set_item(pyo3::intern!(py, "ranks"), pyo3::types::PyTuple::new(py, ranks)?)?;
        fields.set_item(pyo3::intern!(py, "nbytes"), nbytes)?;
        fields.set_item(pyo3::intern!(py, "complete"), complete)?;
        Ok(fields)
    }

    /// It never changes, so a copy of what holds it may share it.
    fn __deepcopy__(slf: Py<Self>, _memo: &Bound<'_, PyAny>) -> Py<Self> {
        slf
    }

    /// What each rank captured, as JSON.
    fn parts(&self, py: Python<'_>) -> PyResult<String> {
        py.detach(|| json(&self.record.parts))
    }

    /// Statistics of the whole.
    fn stats(&self, py: Python<'_>) -> Option<StatsFields> {
        py.detach(|| self.record.stats().as_ref().map(stats))
    }

    /// The bytes of the whole, or of one rank's part of it, their shape and type; `name` is the record's, for errors.
    fn bytes(
        &self,
        py: Python<'_>,
        name: &str,
        rank: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<(Memory, Vec<u64>, &'static str)> {
        let rank = number("rank", rank)?;
        py.detach(|| {
            bounded(|| {
                let record = &self.record;
                let own: Vec<Part>;
                let parts = match rank {
                    None => &record.parts,
                    Some(rank) => {
                        let of = |part: &&Part| i128::from(part.what.rank) == rank;
                        own = layout::of_one_rank(record.parts.iter().filter(of).cloned().collect());
                        &own
                    }
                };
                if parts.is_empty() {
                    let (rank, stored) = (rank.unwrap_or_default(), few(self.record.ranks()));
                    return Err(NotCapturedError::new_err(format!(
                        "{name} has no part of rank {rank}, only of {stored}"
                    )));
                }
                let shards = self.source.shards();
                let plan = AssemblyPlan::new(parts).map_err(|e| match e {
                    PlanError::Layout(e) => self.no_whole(name, e),
                    e => unread(name, shards.refusal(&e)),
                })?;
                let own = fill::own(&plan, shards).map_err(|e| unread(name, e))?;
                Ok((Memory::new(own), plan.shape().to_vec(), plan.dtype.name()))
            })
        })
    }
}
