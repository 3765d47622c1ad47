//! Where FlexModel's own files are: the preload library, the in-job Python package, the bridge's sources.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};

/// Names the folder, for installs and tests that have it elsewhere.
pub const HOME_VARIABLE: &str = "FLEXMODEL_HOME";
/// The preload library in the home.
pub const LIBRARY: &str = "libflexmodel.so";
/// What the preload library loads from beside itself where torch comes.
pub const ENGINE: &str = "libflexmodel_engine.so";

/// The folder with `libflexmodel.so`, `flexmodel_inside/` and `bridge/`: `$FLEXMODEL_HOME`, else `lib/flexmodel` beside
/// the folder of this executable.
pub fn home() -> anyhow::Result<PathBuf> {
    if let Some(named) = env::var_os(HOME_VARIABLE).filter(|v| !v.is_empty()) {
        let named = PathBuf::from(named);
        if !named.is_dir() {
            bail!("{HOME_VARIABLE} names {}, which is not a folder; run scripts/setup or unset it", named.display());
        }
        return absolute(&named);
    }
    let exe =
        env::current_exe().and_then(|exe| exe.canonicalize()).context("cannot tell where flexmodel is installed")?;
    let beside = exe.parent().and_then(Path::parent).map(|prefix| prefix.join("lib/flexmodel"));
    match beside {
        Some(home) if home.is_dir() => Ok(home),
        _ => bail!(
            "{} has no lib/flexmodel beside its folder; run scripts/setup, or set {HOME_VARIABLE} to where {LIBRARY} is",
            exe.display()
        ),
    }
}

/// The preload library, which has its engine beside it.
pub fn library() -> anyhow::Result<PathBuf> {
    let home = home()?;
    let missing = [ENGINE, LIBRARY].map(|name| home.join(name)).into_iter().find(|path| !path.is_file());
    match missing {
        Some(path) => bail!("{} is missing; run scripts/setup", path.display()),
        None => Ok(home.join(LIBRARY)),
    }
}

fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    path.canonicalize().with_context(|| format!("cannot resolve {}", path.display()))
}
