//! `flexmodel bridge`: the libraries that each belong to one torch.

pub mod build;
pub mod cache;
pub mod probe;

use std::{
    env,
    fs::{self, File},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, bail};
use flexmodel_run::owner_only;
use serde_json::json;
use wire::{env as names, trust};

use crate::{say, text};

/// Options of `flexmodel bridge`.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand, Debug)]
enum What {
    /// Show the bridges that are there
    List {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Build the bridge for a Python's torch, unless it is there and up to date
    Build {
        /// The interpreter; default: the active environment's.
        #[arg(long)]
        python: Option<PathBuf>,
        /// Build it in any case.
        #[arg(long)]
        force: bool,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Runs the command.
pub fn main(args: Args) -> anyhow::Result<ExitCode> {
    match args.what {
        What::List { json } => list(json)?,
        What::Build { python, force, json } => {
            let python = python.map_or_else(probe::default_python, Ok)?;
            let (path, built) = up_to_date(&python, force)?;
            let marker = cache::marker(&path)?;
            text::emit(&match json {
                true => json!({"path": path, "built": built, "bridge": marker}).to_string() + "\n",
                false => {
                    let how = if built { "built" } else { "up to date" };
                    format!("{how}: {}\n{}\n", marker.key, path.display())
                }
            })?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The bridge for `python`'s torch, built first if it is missing or from other sources.
pub fn ensure(python: &Path) -> anyhow::Result<PathBuf> {
    up_to_date(python, false).map(|(path, _)| path)
}

fn up_to_date(python: &Path, force: bool) -> anyhow::Result<(PathBuf, bool)> {
    let found = probe::probe(python)?;
    let torch = build::ready(&found, python)?;
    let key = found.key().context("no torch")?;
    let sources = build::installed()?;
    if let Some(given) = env::var_os(names::BRIDGE).filter(|v| !v.is_empty()).map(PathBuf::from) {
        let marker = cache::marker(&given).with_context(|| format!("{}, which may be unset", names::BRIDGE))?;
        if marker.key != key {
            bail!(
                "{}: {} was built for {}, and the job has {key}; unset it",
                names::BRIDGE,
                given.display(),
                marker.key
            );
        }
        if !marker.fits(&key, &sources.digest) {
            bail!(
                "{}: {} was built from other sources than this FlexModel's; unset it",
                names::BRIDGE,
                given.display()
            );
        }
        return Ok((given, false));
    }
    let path = cache::place(&key, &sources.digest)?;
    trust::check_up_to(&path).with_context(cache::not_used)?;
    let current = || cache::marker(&path).is_ok_and(|m| m.fits(&key, &sources.digest));
    if !force && current() {
        return Ok((path, false));
    }
    build::compiler()?;
    let _lock = lock(&path)?;
    // Another process may have built it while this one waited.
    if !force && current() {
        return Ok((path, false));
    }
    Ok((build::build(&found, torch, &key, &sources)?, true))
}

/// One build of a bridge at a time; released when dropped.
fn lock(library: &Path) -> anyhow::Result<File> {
    let folder = library.parent().context("the cache has no folder")?;
    let place = || format!("{}: cannot be written; set {} to a folder of yours", folder.display(), names::BRIDGE_CACHE);
    owner_only::make_folders(folder).with_context(place)?;
    // Somebody else may have made it a moment before.
    trust::check(folder).with_context(cache::not_used)?;
    let file = owner_only::file().write(true).create(true).truncate(false).open(folder.join("lock"));
    let file = file.with_context(place)?;
    if file.try_lock().is_err() {
        say::line("waiting for another process that builds this bridge ...");
        file.lock().with_context(place)?;
    }
    Ok(file)
}

fn list(json: bool) -> anyhow::Result<()> {
    let all = cache::all()?;
    let digest = build::installed().ok().map(|s| s.digest);
    let wanted = probe::default_python().ok().and_then(|p| probe::probe(&p).ok()).and_then(|p| p.key());
    let state = |marker: &anyhow::Result<cache::Marker>| match (marker, &digest) {
        (Err(e), _) if e.is::<trust::Distrust>() => "not trusted",
        (Err(_), _) => "damaged",
        (Ok(m), Some(d)) if m.digest == *d => "current",
        (Ok(_), Some(_)) => "from other sources",
        (Ok(_), None) => "not comparable",
    };
    if json {
        let rows: Vec<_> = all
            .iter()
            .map(|(path, marker)| json!({"path": path, "bridge": marker.as_ref().ok(), "state": state(marker)}))
            .collect();
        let answer = json!({"cache": cache::folder()?, "wanted": wanted, "bridges": rows});
        return Ok(text::emit(&(serde_json::to_string_pretty(&answer)? + "\n"))?);
    }
    let mut out = String::new();
    if all.is_empty() {
        out += &format!("no bridges in {}; `flexmodel bridge build` makes one\n", cache::folder()?.display());
    } else {
        let row = |(path, marker): &(PathBuf, anyhow::Result<cache::Marker>)| {
            let key = marker.as_ref().map_or("?", |m| m.key.as_str());
            let size = fs::metadata(path).map_or(0, |m| m.len());
            let mine = if wanted.as_deref() == Some(key) { "*" } else { "" };
            vec![mine.into(), key.to_owned(), state(marker).into(), text::bytes(size), path.display().to_string()]
        };
        out += &text::table(&["", "bridge", "state", "size", "file"], &all.iter().map(row).collect::<Vec<_>>(), &[3]);
    }
    for distrust in all.iter().filter_map(|(_, marker)| marker.as_ref().err()?.downcast_ref::<trust::Distrust>()) {
        out += &format!("not trusted: {distrust}\n");
    }
    if let Some(wanted) = wanted {
        out += &format!("this environment's torch wants {wanted}\n");
    }
    Ok(text::emit(&out)?)
}
