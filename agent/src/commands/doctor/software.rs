//! What is installed: FlexModel's own files, the interpreter, its torch, a compiler and the bridge between them.

use std::{
    env,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use super::Check;
use crate::{
    commands::bridge::{build, cache, probe},
    home,
};

/// Everything about what is installed.
pub fn checks(python: Option<PathBuf>) -> Vec<Check> {
    let mut checks = vec![library(), compiler()];
    let asked = python.map_or_else(probe::default_python, Ok).and_then(|path| Ok((probe::probe(&path)?, path)));
    match asked {
        Err(e) => checks.push(Check::no("python", format!("{e:#}"), "activate your environment or give --python PATH")),
        Ok((python, path)) => checks.extend(of_python(&python, &path)),
    }
    checks
}

/// The preload library loads into a plain command and leaves it alone.
fn library() -> Check {
    let name = "preload library";
    let path = match home::library() {
        Ok(path) => path,
        Err(e) => return Check::no(name, format!("{e:#}"), "run scripts/setup"),
    };
    if path.as_os_str().as_bytes().iter().any(|b| b": ".contains(b)) {
        let why = "has a space or colon, at which LD_PRELOAD is split: by hand, preload a symlink without them";
        return Check::ok(name, format!("{} {why}; `flexmodel run` does", path.display()));
    }
    let run = Command::new("/bin/true").env("LD_PRELOAD", &path).stdin(Stdio::null()).output();
    match run {
        Ok(output) if output.status.success() && output.stderr.is_empty() => {
            Check::ok(name, format!("{} loads into /bin/true", path.display()))
        }
        Ok(output) => Check::no(
            name,
            format!(
                "/bin/true with {} ends with {}: {}",
                path.display(),
                output.status,
                String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or("")
            ),
            "build it on this machine with scripts/setup",
        ),
        Err(e) => Check::no(name, format!("/bin/true cannot be started: {e}"), "try in an ordinary shell"),
    }
}

fn compiler() -> Check {
    let name = "C++ compiler";
    let words = match build::compiler() {
        Ok(words) => words,
        Err(_) => return Check::no(name, "g++ is not on PATH", "install it (apt install g++) or set CXX"),
    };
    let (program, options) = words.split_first().map_or((Path::new("g++"), &words[..]), |(p, o)| (Path::new(p), o));
    let run = Command::new(program).args(options).arg("--version").env("LC_ALL", "C").stdin(Stdio::null()).output();
    match run {
        Ok(output) if output.status.success() => {
            Check::ok(name, String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or("").to_owned())
        }
        Ok(output) => {
            Check::no(name, format!("{} --version ends with {}", program.display(), output.status), "set CXX")
        }
        Err(e) => Check::no(name, format!("{}: {e}", program.display()), "install g++ or set CXX"),
    }
}

fn of_python(python: &probe::Python, path: &Path) -> Vec<Check> {
    let (major, minor, patch) = python.version;
    let found = format!("{} is Python {major}.{minor}.{patch}", path.display());
    if let Err(e) = python.suits() {
        return vec![Check::no("python", format!("{found}: {e}"), "give another with --python PATH")];
    }
    let mut checks = vec![Check::ok("python", found)];
    checks.push(match python.python_h {
        true => Check::ok("Python.h", python.include.display().to_string()),
        false => Check::no(
            "Python.h",
            format!("not in {}", python.include.display()),
            format!("install Python's headers (apt install python{major}.{minor}-dev)"),
        ),
    });
    let Some(torch) = &python.torch else {
        checks.push(Check::no("torch", "this Python has none", "install torch there, or give --python PATH"));
        return checks;
    };
    let cuda = torch.cuda.as_ref().map_or_else(|| "without CUDA".to_owned(), |v| format!("for CUDA {v}"));
    checks.push(match torch.headers {
        true => Check::ok("torch", format!("{} {cuda}", torch.version)),
        false => {
            Check::no("torch", format!("{} came without its C++ headers", torch.version), "install the wheel from PyPI")
        }
    });
    checks.extend(python.key().map(|key| bridge(&key)));
    checks
}

fn bridge(key: &str) -> Check {
    let name = "bridge";
    let sources = match build::installed() {
        Ok(sources) => sources,
        Err(e) => return Check::no(name, format!("{e:#}"), "run scripts/setup"),
    };
    if let Some(given) = env::var_os(wire::env::BRIDGE).filter(|v| !v.is_empty()).map(PathBuf::from) {
        let unset = format!("unset {}", wire::env::BRIDGE);
        return match cache::marker(&given) {
            Ok(m) if m.fits(key, &sources.digest) => {
                Check::ok(name, format!("{}, by {}", given.display(), wire::env::BRIDGE))
            }
            Ok(m) if m.key != key => Check::no(name, format!("{} was built for {}", given.display(), m.key), unset),
            Ok(_) => Check::no(
                name,
                format!("{} was built from other sources than this FlexModel's", given.display()),
                unset,
            ),
            Err(e) => Check::no(name, format!("{e:#}"), unset),
        };
    }
    let distrusted = |place: &PathBuf| wire::trust::check_up_to(place).err();
    if let Some(e) = cache::place(key, &sources.digest).ok().as_ref().and_then(distrusted) {
        return Check::no(name, e.to_string(), format!("set {} to a folder of yours", wire::env::BRIDGE_CACHE));
    }
    let later = "`flexmodel run` builds it before the job starts, or `flexmodel bridge build` now";
    match cache::place(key, &sources.digest).map(|path| (cache::marker(&path), path)) {
        Ok((Ok(m), path)) if m.fits(key, &sources.digest) => Check::ok(name, path.display().to_string()),
        Ok((Ok(_), path)) => Check::absent(name, format!("{} is not what its place says: {later}", path.display())),
        Ok((Err(_), _)) => Check::absent(name, format!("not built yet for {key} by this FlexModel: {later}")),
        Err(e) => Check::no(name, format!("{e:#}"), "set it"),
    }
}
