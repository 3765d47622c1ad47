//! What a path is, if it is no run, and what is wrong with a run, in the words of the Python package.

use std::{fs, os::unix::ffi::OsStrExt, path::Path};

use flexmodel_run::{
    OpenError, Run,
    format::{MANIFEST_FILE, RUN_FILE},
    read::{
        Found, Said,
        nodes::{inside, is_run},
    },
    text::{clip, safe},
};
use pyo3::PyErr;

use crate::{RunError, RunNotFoundError};

/// The error that helps most if there is no run.
pub fn expect_run(path: &Path) -> Result<(), PyErr> {
    let shown = path.display();
    let refuse = |why: String| Err(RunError::new_err(why));
    if path.as_os_str().as_bytes().contains(&0) {
        return refuse(format!("{shown} cannot be read: it has a zero byte"));
    }
    let hint = "pass the directory that `flexmodel run --out` was given";
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(e) if matches!(e.raw_os_error(), Some(2 | 20 | 40)) => {
            return Err(RunNotFoundError::new_err(format!("there is no run at {shown}: {hint}")));
        }
        Err(e) => return refuse(format!("{shown} cannot be read: {e}")),
    };
    if !meta.is_dir() {
        return refuse(match path.parent() {
            Some(parent) if is_run(parent) => format!("{shown} is a file: open its directory, {}", parent.display()),
            _ => format!("{shown} is a file: pass the directory of a run"),
        });
    }
    if is_run(path) {
        return Ok(());
    }
    let entries = match fs::read_dir(path) {
        Ok(mut entries) => entries.next().is_some(),
        Err(e) => return refuse(format!("{shown} cannot be read: {e}")),
    };
    match inside(path).as_slice() {
        [one] => refuse(format!("{shown} is not a run but holds one: open {one} in it")),
        [] if entries => {
            refuse(format!("{shown} is not a run (it has neither {RUN_FILE} nor {MANIFEST_FILE}): {hint}"))
        }
        [] => refuse(format!("{shown} is empty: {hint}")),
        _ => Ok(()),
    }
}

pub fn refused(error: OpenError) -> PyErr {
    RunError::new_err(error.to_string())
}

/// What was found to be wrong. An error if nothing of the run reads.
pub fn problems(run: &Run) -> Result<Vec<String>, PyErr> {
    let root = run.path.display();
    let mut all = Vec::new();
    for problem in &run.problems {
        let file = problem.file();
        let info = match &problem.found {
            Found::Info(why) => format!("{root}/{file} cannot be read ({why})"),
            Found::NoInfo => format!("{root}/{file} is missing"),
            Found::Line { number, why } => {
                all.push(format!("{root}/{file}: line {number} is skipped: {}", clip(why)));
                continue;
            }
            Found::NoManifest | Found::MoreLines(_) | Found::Other { .. } => {
                all.push(format!("{root}/{file}: {}", clip(&problem.what())));
                continue;
            }
        };
        if run.records.is_empty() {
            let nothing = "there is no readable record: this is no run, or nothing of it is left";
            return Err(RunError::new_err(format!("{info}, and {nothing}")));
        }
        all.push(format!("{info}; the records are served without it"));
    }
    if run.finished() {
        let torn = run.notes.iter().filter(|note| note.said == Said::HalfALine);
        all.extend(torn.map(|note| format!("{root}: {note}")));
    }
    all.extend(run.shard_problems().into_iter().map(|what| format!("{root}: {what}")));
    Ok(all.iter().map(|text| safe(text)).collect())
}
