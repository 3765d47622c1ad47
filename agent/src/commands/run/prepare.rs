//! Everything that can be wrong is looked at before anything is started.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::Context;
use flexmodel_run::write::dir::{Fresh, above_nodes, check_fresh, of_this_node};
use wire::{
    env::{self as names, OnFull},
    hooks::{self, HookError},
    trust::Distrust,
};

use super::{Args, absolute, interpreter};
use crate::{
    cli::Usage,
    commands::bridge,
    home,
    text::{complain, complain_in_lines},
    umask,
};

/// What will be started.
#[derive(Debug)]
pub struct Plan {
    /// The command as given.
    pub command: Vec<OsString>,
    /// Clauses, or the absolute path of a TOML file. Empty: nothing is tapped until hooks are added.
    pub hooks: String,
    /// The run directory, absolute.
    pub out: PathBuf,
    /// The folder that holds the run directories of all nodes, if that is how they are laid out.
    pub nodes: Option<PathBuf>,
    /// The dashboard's port.
    pub port: u16,
    /// Hooks are not changed while the job runs.
    pub read_only: bool,
    /// What a tap does when the slab is full.
    pub on_full: OnFull,
    /// The preload library.
    pub library: PathBuf,
    /// The bridge, where it is certain which interpreter the job uses.
    pub bridge: Option<PathBuf>,
    /// Leaves no empty folder where nothing came of it.
    _fresh: Fresh,
}

/// What came of it.
#[derive(Debug)]
pub enum Prepared {
    /// All is well.
    Ready(Box<Plan>),
    /// There is nothing to run; it was said why.
    Exit(ExitCode),
}

/// Checks everything.
pub fn prepare(args: Args) -> anyhow::Result<Prepared> {
    let Some(program) = args.command.first().cloned() else {
        return Err(usage("no command; write it behind --").into());
    };
    if env::var_os(names::DISABLE).is_some_and(|v| v == "1") {
        return Ok(Prepared::Exit(untapped(&args.command)));
    }
    let hooks = hooks_of(args.hooks)?;
    let on_full = on_full_of(args.on_full)?;
    if let Some(slab) = set(names::SLAB) {
        names::parse_bytes(&slab).map_err(|why| usage(format!("{}: {why}", names::SLAB)))?;
    }
    let Some(path) = interpreter::find(&program) else {
        let shown = Path::new(&program).display();
        complain("flexmodel", format_args!("{shown}: command not found"));
        return Ok(Prepared::Exit(ExitCode::from(127)));
    };
    let library = home::library()?;
    let nodes = args.out.as_deref().and_then(above_nodes).map(|nodes| absolute(&nodes)).transpose()?;
    let out = match args.out {
        Some(out) => of_this_node(&out),
        None => Path::new("runs").join(stamp()),
    };
    let fresh = check_fresh(&out)?;
    let bridge = bridge_for(&path)?;
    Ok(Prepared::Ready(Box::new(Plan {
        command: args.command,
        hooks,
        out: absolute(&out)?,
        nodes,
        port: args.port,
        read_only: args.read_only,
        on_full,
        library,
        bridge,
        _fresh: fresh,
    })))
}

/// Becomes the command, when everything is switched off.
fn untapped(command: &[OsString]) -> ExitCode {
    use std::os::unix::process::CommandExt;
    let Some((program, arguments)) = command.split_first() else { return ExitCode::from(2) };
    let error = umask::as_before(Command::new(program).args(arguments)).exec();
    complain("flexmodel", format_args!("{}: {error}", Path::new(program).display()));
    ExitCode::from(if error.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 })
}

fn hooks_of(given: Option<String>) -> anyhow::Result<String> {
    let given_as = if given.is_some() { "--hooks" } else { names::HOOKS };
    let text = given.or_else(|| env::var(names::HOOKS).ok()).ok_or_else(|| {
        usage(format!(
            "no hooks; give --hooks or set {}, for example --hooks 'layers.*.mlp:forward', or --hooks '' to add them while \
             the job runs",
            names::HOOKS
        ))
    })?;
    if text.trim().is_empty() {
        return Ok(String::new());
    }
    let parsed = hooks::parse(&text).map_err(|e| usage(HookError { given_as, ..e }.to_string()))?;
    if let Some((hook, why)) = parsed.iter().find_map(|h| h.unsupported().map(|why| (h, why))) {
        return Err(usage(format!("{given_as}: '{}': {why}", hook.text)).into());
    }
    if hooks::names_a_file(&text) {
        let path = absolute(Path::new(text.trim()))?;
        // The job may change its folder before the library reads it.
        return path.into_os_string().into_string().ok().context("the path of the hooks file is not UTF-8");
    }
    Ok(text)
}

fn on_full_of(given: Option<String>) -> anyhow::Result<OnFull> {
    let text = given.or_else(|| set(names::ON_FULL)).unwrap_or_default();
    OnFull::parse(&text).map_err(|why| usage(format!("--on-full: {why}")).into())
}

/// The bridge for the interpreter that the command uses, built first if it is missing.
fn bridge_for(program: &Path) -> anyhow::Result<Option<PathBuf>> {
    let Some(found) = interpreter::of(program) else {
        let shown = program.display();
        complain("flexmodel", format_args!("{shown} is no Python and there is none on PATH: nothing may be captured"));
        return Ok(None);
    };
    match bridge::ensure(&found.python) {
        Ok(path) if found.certain => Ok(Some(path)),
        // A script may start another interpreter; the library looks for its bridge in the cache.
        Ok(_) => Ok(None),
        Err(e) if found.is_command || e.is::<Distrust>() => Err(e),
        Err(e) => {
            let then = "the command runs, and captures only if it uses another Python";
            complain_in_lines(format_args!("flexmodel: {e:#}; {then}"));
            Ok(None)
        }
    }
}

/// `YYYYmmdd-HHMMSS-PID`, local time.
fn stamp() -> String {
    // SAFETY: time and localtime_r write to memory of ours; tm is plain data.
    let tm = unsafe {
        let now = libc::time(std::ptr::null_mut());
        let mut tm: libc::tm = std::mem::zeroed();
        libc::localtime_r(&now, &mut tm);
        tm
    };
    format!(
        "{:04}{:02}{:02}-{:02}{:02}{:02}-{}",
        tm.tm_year + 1900,
        tm.tm_mon + 1,
        tm.tm_mday,
        tm.tm_hour,
        tm.tm_min,
        tm.tm_sec,
        std::process::id()
    )
}

fn set(name: &str) -> Option<String> {
    env::var(name).ok().filter(|v| !v.is_empty())
}

fn usage(text: impl Into<String>) -> Usage {
    Usage(text.into())
}
