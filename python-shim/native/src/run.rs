//! A run, and its records in order.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use flexmodel_run::{
    Record as Read, Run as Opened,
    read::{Growing, Wanted, natural},
};
use pyo3::{exceptions::PyIndexError, prelude::*};
use serde::Serialize;

use crate::{
    NotCapturedError,
    asked::{flag, number, text},
    bounded,
    open::{expect_run, problems, refused},
    record::{IdentityFields, Record, identity},
};

/// A run as it was when it was last looked at, and what is made of it once it is asked for.
struct State {
    run: Arc<Opened>,
    problems: Vec<String>,
    by_module: OnceLock<HashMap<String, Vec<usize>>>,
    modules: OnceLock<Vec<String>>,
    order: OnceLock<Vec<usize>>,
}

impl State {
    fn new(run: Arc<Opened>) -> PyResult<Arc<Self>> {
        let problems = problems(&run)?;
        Ok(Arc::new(Self {
            run,
            problems,
            by_module: OnceLock::new(),
            modules: OnceLock::new(),
            order: OnceLock::new(),
        }))
    }

    /// Records of each module, in the order of their first parts.
    fn by_module(&self) -> &HashMap<String, Vec<usize>> {
        self.by_module.get_or_init(|| {
            let mut found: HashMap<String, Vec<usize>> = HashMap::new();
            for (at, record) in self.run.records.iter().enumerate() {
                match found.get_mut(&record.id.module) {
                    Some(records) => records.push(at),
                    None => _ = found.insert(record.id.module.clone(), vec![at]),
                }
            }
            found
        })
    }

    fn modules(&self) -> &[String] {
        self.modules.get_or_init(|| self.run.modules_in_model_order().into_iter().map(str::to_owned).collect())
    }

    /// By job, step, microbatch, module, and then as [`in_module`].
    fn order(&self) -> &[usize] {
        self.order.get_or_init(|| {
            let position: HashMap<&str, usize> =
                self.modules().iter().enumerate().map(|(at, name)| (name.as_str(), at)).collect();
            let mut all: Vec<usize> = (0..self.run.records.len()).collect();
            all.sort_by_cached_key(|&at| {
                let record = &self.run.records[at];
                let id = &record.id;
                (id.job, id.step, id.micro, position.get(id.module.as_str()).copied(), in_module(record))
            });
            all
        })
    }

    fn of_module(&self, module: &str) -> PyResult<&[usize]> {
        self.by_module().get(module).map(Vec::as_slice).ok_or_else(|| {
            let names: Vec<&str> = self.modules().iter().map(String::as_str).collect();
            NotCapturedError::new_err(self.run.no_such_module(module, &names))
        })
    }
}

/// The order of a module's records. Passes have the same numbers where one trains and one does not: they are as they came
/// on the first rank.
fn in_module(record: &Read) -> impl Ord + use<'_> {
    let (id, began) = (&record.id, record.what().time_ns);
    let first = (id.job, id.step, id.micro, id.call, id.model, id.kind, natural(&id.path));
    (first, id.repeat, began, !id.train, id.apart, id.again)
}

/// A run directory.
#[pyclass(frozen, module = "flexmodel._native")]
pub struct Run {
    growing: Mutex<Growing>,
    state: Mutex<Arc<State>>,
}

impl Run {
    fn state(&self) -> Arc<State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Something that the format has, as it has it.
    fn json<T: Serialize + Sync>(&self, py: Python<'_>, of: impl FnOnce(&Opened) -> &T + Send) -> PyResult<String> {
        let state = self.state();
        py.detach(|| serde_json::to_string(of(&state.run)))
            .map_err(|e| crate::RunError::new_err(format!("{}: {e}", state.run.path.display())))
    }
}

#[pymethods]
impl Run {
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        py.detach(|| {
            bounded(|| {
                expect_run(&path)?;
                let growing = Growing::open(&path).map_err(refused)?;
                let state = State::new(growing.run())?;
                Ok(Self { growing: Mutex::new(growing), state: Mutex::new(state) })
            })
        })
    }

    /// Reads what has come since; how many parts are new.
    fn refresh(&self, py: Python<'_>) -> PyResult<u64> {
        py.detach(|| {
            bounded(|| {
                let mut growing = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
                let new = growing.refresh().map_err(refused)?;
                if Arc::ptr_eq(&growing.run(), &self.state().run) {
                    return Ok(0);
                }
                let state = State::new(growing.run())?;
                *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
                Ok(new)
            })
        })
    }

    /// Folders of the nodes' runs; empty for a run of one folder.
    #[getter]
    fn nodes(&self) -> Vec<String> {
        self.state().run.nodes.clone()
    }

    /// What `run.json` says, as JSON.
    fn info(&self, py: Python<'_>) -> PyResult<String> {
        self.json(py, |run| &run.info)
    }

    /// Its jobs and their attempts, as JSON.
    fn jobs(&self, py: Python<'_>) -> PyResult<String> {
        self.json(py, |run| &run.jobs)
    }

    /// The revisions of their hooks that began while they ran, as JSON.
    fn revisions(&self, py: Python<'_>) -> PyResult<String> {
        self.json(py, |run| &run.revisions)
    }

    /// Names of the modules that have records, in the model's order.
    fn modules(&self, py: Python<'_>) -> Vec<String> {
        let state = self.state();
        py.detach(|| state.modules().to_vec())
    }

    fn has(&self, py: Python<'_>, module: &Bound<'_, PyAny>) -> bool {
        let state = self.state();
        // What is no name of a module is the name of none.
        let Ok(Some(module)) = text("module", Some(module)) else { return false };
        py.detach(|| state.by_module().contains_key(&module))
    }

    fn record_count(&self) -> usize {
        self.state().run.records.len()
    }

    fn module_count(&self, py: Python<'_>) -> usize {
        let state = self.state();
        py.detach(|| state.by_module().len())
    }

    /// Every record, in order.
    fn records(&self, py: Python<'_>) -> Records {
        let state = self.state();
        py.detach(|| _ = state.order());
        Records { state }
    }

    /// The records of a module, in order.
    fn of_module(&self, py: Python<'_>, module: &Bound<'_, PyAny>) -> PyResult<Vec<Record>> {
        let state = self.state();
        let module = text("module", Some(module))?.unwrap_or_default();
        py.detach(|| {
            let mut all = state.of_module(&module)?.to_vec();
            all.sort_by_cached_key(|&at| in_module(&state.run.records[at]));
            Ok(all.into_iter().map(|at| Record::new(&state.run, at)).collect())
        })
    }

    /// The one record that is meant.
    #[allow(clippy::too_many_arguments)]
    #[pyo3(signature = (module, *, job, attempt, kind, model, train, step, micro, call, path, repeat, apart, again))]
    fn one(
        &self,
        py: Python<'_>,
        module: &Bound<'_, PyAny>,
        job: Option<&Bound<'_, PyAny>>,
        attempt: Option<&Bound<'_, PyAny>>,
        kind: Option<&Bound<'_, PyAny>>,
        model: Option<&Bound<'_, PyAny>>,
        train: Option<&Bound<'_, PyAny>>,
        step: Option<&Bound<'_, PyAny>>,
        micro: Option<&Bound<'_, PyAny>>,
        call: Option<&Bound<'_, PyAny>>,
        path: Option<&Bound<'_, PyAny>>,
        repeat: Option<&Bound<'_, PyAny>>,
        apart: Option<&Bound<'_, PyAny>>,
        again: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Record> {
        let state = self.state();
        let module = text("module", Some(module))?.unwrap_or_default();
        let wanted = Wanted {
            job: number("job", job)?,
            attempt: number("attempt", attempt)?,
            kind: text("kind", kind)?,
            model: number("model", model)?,
            train: flag("train", train)?,
            step: number("step", step)?,
            micro: number("micro", micro)?,
            call: number("call", call)?,
            path: text("path", path)?,
            repeat: number("repeat", repeat)?,
            apart: number("apart", apart)?,
            again: number("again", again)?,
        };
        let at = py.detach(|| {
            bounded(|| {
                let all = state.of_module(&module)?;
                state.run.one(&module, all, &wanted).map_err(NotCapturedError::new_err)
            })
        })?;
        Ok(Record::new(&state.run, at))
    }

    fn refused(&self, py: Python<'_>) -> Vec<(IdentityFields, u32, String)> {
        let state = self.state();
        let all = state.run.lost.refused.iter();
        py.detach(|| all.map(|(what, why)| (identity(&what.id), what.rank, why.clone())).collect())
    }

    fn divergences(&self, py: Python<'_>) -> Vec<(IdentityFields, u32, u32)> {
        let state = self.state();
        let all = state.run.lost.divergences.iter();
        py.detach(|| all.map(|(what, against)| (identity(&what.id), what.rank, *against)).collect())
    }

    fn dropped(&self, py: Python<'_>) -> Vec<(u32, u64, String)> {
        let state = self.state();
        py.detach(|| state.run.lost.dropped.clone())
    }

    fn problems(&self) -> Vec<String> {
        self.state().problems.clone()
    }
}

/// All records of a run, as it was then, in order; each is made when it is asked for.
#[pyclass(frozen, module = "flexmodel._native")]
pub struct Records {
    state: Arc<State>,
}

#[pymethods]
impl Records {
    fn __len__(&self) -> usize {
        self.state.order().len()
    }

    fn at(&self, index: usize) -> PyResult<Record> {
        let at = self.state.order().get(index).ok_or_else(|| PyIndexError::new_err("record index out of range"))?;
        Ok(Record::new(&self.state.run, *at))
    }
}
