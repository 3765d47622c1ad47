//! `flexmodel._native`: the reader of runs, for Python. It decides nothing: `flexmodel-run` does, and the package
//! `flexmodel` has the types and the documentation that people see.

mod asked;
mod memory;
mod open;
mod record;
mod run;

use std::panic::{AssertUnwindSafe, catch_unwind};

use flexmodel_run::text;
use pyo3::{prelude::*, types::PyString};
use wire::{dtype::DType, hooks::Kind};

pyo3::import_exception!(flexmodel._errors, RunError);
pyo3::import_exception!(flexmodel._errors, RunNotFoundError);
pyo3::import_exception!(flexmodel._errors, NotCapturedError);

/// Runs what reads: a panic of ours reaches Python as an error that it can catch as such.
fn bounded<T>(read: impl FnOnce() -> PyResult<T>) -> PyResult<T> {
    catch_unwind(AssertUnwindSafe(read))
        .unwrap_or_else(|_| Err(RunError::new_err("the reader itself failed, see above")))
}

/// Text for one line of a terminal.
#[pyfunction]
fn safe(text: &Bound<'_, PyString>) -> String {
    text::safe(&text.to_string_lossy())
}

/// The start of a text that is too long for a message.
#[pyfunction]
fn clip(text: &Bound<'_, PyString>) -> String {
    text::clip(&text.to_string_lossy())
}

/// Names of the element types, with their bytes.
#[pyfunction]
fn dtypes() -> Vec<(&'static str, usize)> {
    DType::ALL.iter().map(|dtype| (dtype.name(), dtype.size())).collect()
}

/// Words of the kinds, in the order of their bits.
#[pyfunction]
fn kinds() -> Vec<&'static str> {
    Kind::ALL.map(Kind::name).to_vec()
}

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<run::Run>()?;
    module.add_class::<run::Records>()?;
    module.add_class::<record::Record>()?;
    module.add_class::<memory::Memory>()?;
    module.add_function(wrap_pyfunction!(safe, module)?)?;
    module.add_function(wrap_pyfunction!(clip, module)?)?;
    module.add_function(wrap_pyfunction!(dtypes, module)?)?;
    module.add_function(wrap_pyfunction!(kinds, module)?)
}
