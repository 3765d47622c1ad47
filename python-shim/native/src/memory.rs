//! A tensor's bytes, for numpy.

use flexmodel_run::read::fill::Own;
use pyo3::{prelude::*, types::PyDict};

/// Bytes that Python may write to. They are freed, or unmapped, with the last array over them.
#[pyclass(frozen, module = "flexmodel._native")]
pub struct Memory {
    address: usize,
    own: Own,
}

impl Memory {
    pub fn new(mut own: Own) -> Self {
        // Where the bytes are does not change when what owns them is moved.
        Self { address: own.as_mut_ptr() as usize, own }
    }
}

#[pymethods]
impl Memory {
    /// numpy's protocol; an array over this object holds it.
    #[getter]
    fn __array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let interface = PyDict::new(py);
        interface.set_item("version", 3)?;
        interface.set_item("data", (self.address, false))?;
        interface.set_item("shape", (self.own.len(),))?;
        interface.set_item("typestr", "|u1")?;
        Ok(interface)
    }
}
