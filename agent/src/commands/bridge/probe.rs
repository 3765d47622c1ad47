//! What torch an interpreter has, asked without importing it.

use std::{
    env,
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use wire::{
    bridge_marker::{self, OLDEST_PYTHON as OLDEST},
    env as names,
};

use crate::umask;

const SCRIPT: &str = include_str!("probe.py");

/// An interpreter's answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Python {
    /// Version.
    #[serde(rename = "python")]
    pub version: (u32, u32, u32),
    /// Its own word on where it is.
    pub executable: PathBuf,
    /// `cpython`, as a rule.
    #[serde(default)]
    pub implementation: String,
    /// Built without the interpreter lock.
    #[serde(default)]
    pub free_threaded: bool,
    /// Folder of its headers.
    #[serde(default)]
    pub include: PathBuf,
    /// Whether `Python.h` is there.
    #[serde(default)]
    pub python_h: bool,
    /// Its torch.
    pub torch: Option<Torch>,
}

/// A torch.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Torch {
    /// The package's folder.
    pub root: PathBuf,
    /// `torch.__version__`.
    pub version: String,
    /// CUDA that it was built with.
    pub cuda: Option<String>,
    /// 1 for the C++11 ABI of libstdc++.
    pub cxx11_abi: u8,
    /// Whether its C++ headers are there.
    pub headers: bool,
}

impl Python {
    /// Whether taps can work in it at all, with the way out.
    pub fn suits(&self) -> Result<(), String> {
        let (major, minor, patch) = self.version;
        if (major, minor) < OLDEST {
            return Err(format!("Python {major}.{minor}.{patch} is too old; use {}.{} or newer", OLDEST.0, OLDEST.1));
        }
        if self.implementation != "cpython" || self.free_threaded {
            let which = if self.free_threaded { "free-threaded Python" } else { self.implementation.as_str() };
            return Err(format!("{which} is not supported; use ordinary CPython"));
        }
        Ok(())
    }

    /// The name of the bridge for this torch: what must be equal for one to be loaded.
    pub fn key(&self) -> Option<String> {
        let torch = self.torch.as_ref()?;
        let (major, minor, _) = self.version;
        Some(bridge_marker::key(&torch.version, torch.cuda.as_deref(), torch.cxx11_abi, (major, minor)))
    }
}

/// Asks `python`.
pub fn probe(python: &Path) -> anyhow::Result<Python> {
    // What it compiles of its own modules on the way is the user's, and not our file.
    let output = umask::as_before(&mut Command::new(python))
        .arg("-c")
        .arg(SCRIPT)
        .env_remove("LD_PRELOAD")
        .env_remove(names::HOOKS)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{}: cannot be started", python.display()))?;
    // A site customisation may print before the answer.
    let text = String::from_utf8_lossy(&output.stdout);
    let answer = text.lines().rev().find_map(|line| serde_json::from_str::<Python>(line).ok());
    let Some(answer) = answer.filter(|_| output.status.success()) else {
        let errors = String::from_utf8_lossy(&output.stderr);
        let last = errors.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("it printed nothing");
        bail!("{}: is not a Python that can be asked for its torch ({}): {last}", python.display(), output.status);
    };
    if let Some(torch) = &answer.torch
        && (torch.version.is_empty() || torch.version.contains(['/', '\0', '"', '\\', ' ', ';']))
    {
        bail!(
            "{}: its torch at {} does not say its version; install torch again",
            python.display(),
            torch.root.display()
        );
    }
    Ok(answer)
}

/// The interpreter that the user most likely means: the active virtual environment's, the one beside this command as
/// it was called, else the first on PATH.
pub fn default_python() -> anyhow::Result<PathBuf> {
    let named = env::var_os("VIRTUAL_ENV").filter(|v| !v.is_empty()).map(|v| Path::new(&v).join("bin/python"));
    let first = on_path("python3").or_else(|| on_path("python"));
    let active = first.clone().filter(|python| in_environment(python));
    let beside = env::args_os().next().map(PathBuf::from).and_then(|me| {
        let folder = me.parent().filter(|p| !p.as_os_str().is_empty())?.to_owned();
        Some(folder.join("python"))
    });
    [named, active, beside, first]
        .into_iter()
        .flatten()
        .find(|p| p.is_file())
        .context("no python on PATH; activate your environment or give --python PATH")
}

/// Whether an interpreter on PATH is a virtual environment's: its folder was put there by activation.
fn in_environment(python: &Path) -> bool {
    python.parent().and_then(Path::parent).is_some_and(|prefix| prefix.join("pyvenv.cfg").is_file())
}

/// The first executable of this name on PATH.
pub fn on_path(name: impl AsRef<OsStr>) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|folder| folder.join(name.as_ref())).find(|p| is_executable(p))
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn python(version: (u32, u32, u32), cuda: Option<&str>) -> Python {
        Python {
            version,
            executable: "python".into(),
            implementation: "cpython".into(),
            free_threaded: false,
            include: PathBuf::new(),
            python_h: true,
            torch: Some(Torch {
                root: PathBuf::new(),
                version: "2.11.0+cu130".into(),
                cuda: cuda.map(str::to_owned),
                cxx11_abi: 1,
                headers: true,
            }),
        }
    }

    #[test]
    fn the_key_says_what_must_be_equal() {
        assert_eq!(python((3, 11, 7), Some("13.0")).key().unwrap(), "torch2.11.0+cu130-cuda13.0-cxx11abi1-cp311");
        assert!(python((3, 12, 0), None).key().unwrap().ends_with("-cudanone-cxx11abi1-cp312"));
    }

    #[test]
    fn an_old_python_is_refused_by_its_version() {
        assert!(python((3, 9, 1), None).suits().unwrap_err().contains("3.9.1"));
        assert!(python((3, 10, 0), None).suits().is_ok());
    }
}
