//! What Python asks for: a value that equals one of a record's is that one, as in Python itself, whatever type it is of.

use flexmodel_run::read::{
    rows::{Number, Side},
    shown,
};
use pyo3::{
    exceptions::{PyTypeError, PyValueError},
    prelude::*,
    types::{PyBool, PyComplex, PyFloat, PyString},
};

use crate::NotCapturedError;

type Asked<'a, 'py> = Option<&'a Bound<'py, PyAny>>;

/// Numbers up to here are floats exactly.
const EXACT: f64 = (1u64 << 53) as f64;

/// A number: `1`, `1.0` and `True` are one.
pub fn number(field: &str, asked: Asked<'_, '_>) -> PyResult<Option<i128>> {
    let Some(asked) = asked else { return Ok(None) };
    if let Ok(float) = asked.cast::<PyFloat>() {
        let value = float.value();
        let whole = value.fract() == 0.0 && value.abs() <= EXACT;
        return if whole { Ok(Some(value as i128)) } else { Err(never(field, asked)) };
    }
    match asked.extract::<i128>() {
        Ok(value) => Ok(Some(value)),
        Err(e) if e.is_instance_of::<PyTypeError>(asked.py()) => Err(wrong(field, "a number", asked)),
        Err(_) => Err(never(field, asked)),
    }
}

/// A flag: what equals `True` or `False`.
pub fn flag(field: &str, asked: Asked<'_, '_>) -> PyResult<Option<bool>> {
    let Some(asked) = asked else { return Ok(None) };
    for value in [true, false] {
        if asked.eq(PyBool::new(asked.py(), value))? {
            return Ok(Some(value));
        }
    }
    Err(wrong(field, "True or False", asked))
}

/// A text. Those in a run are Unicode, and a lone surrogate is not.
pub fn text(field: &str, asked: Asked<'_, '_>) -> PyResult<Option<String>> {
    let Some(asked) = asked else { return Ok(None) };
    let text = asked.cast::<PyString>().map_err(|_| wrong(field, "a str", asked))?;
    text.extract().map(Some).map_err(|_| {
        let lossy = shown(&text.to_string_lossy());
        NotCapturedError::new_err(format!("there is no {field} {lossy}: it has lone surrogates, which no name has"))
    })
}

/// What rows are filled up with: any number, also numpy's, or a tensor of one element.
pub fn pad(asked: Asked<'_, '_>) -> PyResult<Option<Number>> {
    let Some(asked) = asked else { return Ok(None) };
    let number = if let Ok(float) = asked.cast::<PyFloat>() {
        Number::Real(float.value())
    } else if let Ok(complex) = asked.cast::<PyComplex>() {
        Number::Complex(complex.real(), complex.imag())
    } else if let Ok(integer) = asked.extract::<i128>() {
        Number::Integer(integer)
    } else if let Ok(float) = asked.extract::<f64>() {
        Number::Real(float)
    } else {
        return Err(wrong("pad", "a number", asked));
    };
    Ok(Some(number))
}

/// The side on which rows are filled up.
pub fn side(asked: &str) -> PyResult<Side> {
    Side::from_name(asked).ok_or_else(|| PyValueError::new_err(format!("side is 'right' or 'left', not '{asked}'")))
}

fn wrong(field: &str, expected: &str, asked: &Bound<'_, PyAny>) -> PyErr {
    let kind = asked.get_type().name().map_or_else(|_| "another type".to_owned(), |name| name.to_string());
    PyTypeError::new_err(format!("{field} is {expected}, not {kind}"))
}

fn never(field: &str, asked: &Bound<'_, PyAny>) -> PyErr {
    let value = asked.str().map_or_else(|_| "a number".to_owned(), |text| text.to_string_lossy().into_owned());
    NotCapturedError::new_err(format!("no record has {field}={}", flexmodel_run::text::clip(&value)))
}
