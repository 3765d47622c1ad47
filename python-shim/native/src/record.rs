//! A record: what it says, and its bytes.

use std::{borrow::Cow, sync::Arc};

use flexmodel_run::{
    ReadError, Record as Read, Run,
    format::{Identity, JobId, Joined, Part, Stats},
    read::{
        AssemblyPlan, LayoutError, PlanError, Source, fill,
        layout::{self, byte_len},
        rows::{self, Pad},
        tree::Node,
    },
    text::{clip, few, total},
};
use pyo3::{
    exceptions::{PyTypeError, PyValueError},
    prelude::*,
    types::PyDict,
};
use serde::Serialize;

use crate::{
    NotCapturedError, RunError,
    asked::{self, number},
    bounded,
    memory::Memory,
};

/// One record of a run as it was then. It keeps what it says, and with the run's other records what reads its bytes; neither
/// the other records nor what the run said of itself.
#[pyclass(frozen, module = "flexmodel._native")]
pub struct Record {
    record: Arc<Read>,
    source: Arc<Source>,
}

/// Bytes, their shape, and the name of their type.
type Tensor = (Memory, Vec<u64>, &'static str);

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

    /// Why parts make no whole.
    fn no_whole(&self, name: &str, error: LayoutError) -> String {
        let ranks = few(self.record.ranks());
        let why = match error {
            LayoutError::Missing(missing) => return self.incomplete(name, &missing),
            LayoutError::Pending(_) => "it is not known yet whether these ranks made this pass together".to_owned(),
            LayoutError::Unknown { axis, .. } => {
                format!("how they lie along {axis} is not known, unless a clause says so with shard=DIM@{axis}")
            }
            error @ LayoutError::Ragged { .. } => error.to_string(),
            LayoutError::Apart(why) => why,
            LayoutError::Replicas(one, other) => format!("ranks {one} and {other} hold replicas that differ"),
            LayoutError::Conflict(why) => why,
        };
        format!("{name}: {why}; each rank's part is kept: ask for rank= one of {ranks}")
    }

    fn incomplete(&self, name: &str, missing: &[layout::Coordinates]) -> String {
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
        format!(
            "{name} is incomplete: no part of {}{why}. Parts of rank {} are there: ask with rank=; while the job runs, \
             run.refresh() reads what has come since",
            names.join("; "),
            few(self.record.ranks())
        )
    }
}

#[pymethods]
impl Record {
    /// What it says, by the names of Python's fields.
    fn fields<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let record = &self.record;
        let (id, what) = (&record.id, record.what());
        // A record may have thousands of parts.
        let (shape, padded, ranks, data_size) =
            py.detach(|| (record.shape().ok(), record.padded_shape(), record.ranks(), record.data_size()));
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
        let padded = padded.map(|s| pyo3::types::PyTuple::new(py, s)).transpose()?;
        fields.set_item(pyo3::intern!(py, "padded_shape"), padded)?;
        fields.set_item(pyo3::intern!(py, "dtype"), what.dtype.name())?;
        fields.set_item(pyo3::intern!(py, "slice"), what.slice.as_ref().map(|slice| &slice.by))?;
        fields.set_item(pyo3::intern!(py, "job"), id.job.job)?;
        fields.set_item(pyo3::intern!(py, "attempt"), id.job.attempt)?;
        fields.set_item(pyo3::intern!(py, "again"), id.again)?;
        fields.set_item(pyo3::intern!(py, "model"), id.model)?;
        fields.set_item(pyo3::intern!(py, "repeat"), id.repeat)?;
        fields.set_item(pyo3::intern!(py, "revision"), record.revision())?;
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
        let some = |joined: Joined| record.parts.iter().any(|part| part.what.joined == joined);
        let own = id.own.then_some(what.rank);
        fields.set_item(pyo3::intern!(py, "apart"), id.apart.or(own))?;
        fields.set_item(pyo3::intern!(py, "assumed"), some(Joined::Assumed))?;
        fields.set_item(pyo3::intern!(py, "pending"), some(Joined::Pending))?;
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

    /// Why there is no whole, as `bytes` says it; `None` where there is one.
    fn reason(&self, py: Python<'_>, name: &str) -> Option<String> {
        py.detach(|| match AssemblyPlan::new(&self.record.parts).err()? {
            PlanError::Layout(error) => Some(self.no_whole(name, error)),
            error => Some(format!("{name}: {}", self.source.shards().refusal(&error))),
        })
    }

    /// Statistics of the whole.
    fn stats(&self, py: Python<'_>) -> Option<StatsFields> {
        py.detach(|| self.record.stats().as_ref().map(stats))
    }

    /// The bytes of the whole, or of one rank's part of it, their shape and type; `name` is the record's, for errors. Rows
    /// that ranks padded to their own longest are filled up by `pad` on this `side`, if it is given.
    #[pyo3(signature = (name, rank, pad, side))]
    fn bytes(
        &self,
        py: Python<'_>,
        name: &str,
        rank: Option<&Bound<'_, PyAny>>,
        pad: Option<&Bound<'_, PyAny>>,
        side: &str,
    ) -> PyResult<Tensor> {
        let (rank, pad, side) = (number("rank", rank)?, asked::pad(pad)?, asked::side(side)?);
        py.detach(|| {
            bounded(|| {
                let parts = self.parts_of(name, rank)?;
                let plan = match (AssemblyPlan::new(&parts), pad) {
                    (Err(PlanError::Layout(LayoutError::Ragged { .. })), Some(number)) => {
                        let dtype = parts.first().map_or(self.record.what().dtype, |part| part.what.dtype);
                        let pad =
                            Pad::new(number, dtype, side).map_err(|e| PyValueError::new_err(format!("pad: {e}")))?;
                        AssemblyPlan::padded(&parts, &pad)
                    }
                    (plan, _) => plan,
                };
                let plan = plan.map_err(|e| self.no_plan(name, e))?;
                self.carried_out(name, &plan, &plan.tree)
            })
        })
    }

    /// As `bytes`, the pieces that make the whole one after the other on dimension 0, each as it is.
    fn pieces(&self, py: Python<'_>, name: &str, rank: Option<&Bound<'_, PyAny>>) -> PyResult<Vec<Tensor>> {
        let rank = number("rank", rank)?;
        py.detach(|| {
            bounded(|| {
                let parts = self.parts_of(name, rank)?;
                let plan = AssemblyPlan::padded(&parts, &Pad::default()).map_err(|e| self.no_plan(name, e))?;
                rows::pieces(&plan.tree).into_iter().map(|node| self.carried_out(name, &plan, node)).collect()
            })
        })
    }
}

impl Record {
    /// All parts, or those of one rank.
    fn parts_of(&self, name: &str, rank: Option<i128>) -> PyResult<Cow<'_, [Part]>> {
        let Some(rank) = rank else { return Ok(Cow::Borrowed(&self.record.parts)) };
        let of = |part: &&Part| i128::from(part.what.rank) == rank;
        let own = layout::of_one_rank(self.record.parts.iter().filter(of).cloned().collect());
        if own.is_empty() {
            let stored = few(self.record.ranks());
            return Err(NotCapturedError::new_err(format!("{name} has no part of rank {rank}, only of {stored}")));
        }
        Ok(Cow::Owned(own))
    }

    fn no_plan(&self, name: &str, error: PlanError) -> PyErr {
        match error {
            PlanError::Layout(e) => NotCapturedError::new_err(self.no_whole(name, e)),
            e => unread(name, self.source.shards().refusal(&e)),
        }
    }

    fn carried_out(&self, name: &str, plan: &AssemblyPlan, node: &Node) -> PyResult<Tensor> {
        let own = fill::own_of(node, plan, self.source.shards()).map_err(|e| unread(name, e))?;
        Ok((Memory::new(own), node.shape().to_vec(), plan.dtype.name()))
    }
}
