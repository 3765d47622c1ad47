//! Run directories as a whole: making, locking and refusing them; `run.json`.

use std::{
    ffi::{CString, OsStr},
    fs::{self, File},
    io::{self, BufWriter, Seek, Write},
    mem::MaybeUninit,
    os::{fd::AsRawFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, anyhow, bail};

use super::seal::sync_dir;
use crate::{
    files::{ToWrite, open_to_write, read_whole},
    format::{FORMAT, LOCK_FILE, MANIFEST_FILE, RUN_FILE, RunInfo},
    limits::RUN_FILE_BYTES,
    lock::Holder,
    owner_only,
};

/// Stands for a node's name in `--out`.
const MARK: &str = "{node}";

/// A run directory that this process alone writes to, as long as it holds this.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    folder: Arc<Folder>,
    lock: File,
}

/// A folder that is open, and a path that leads to it as long as it is: who may write to the folder above it (a group's)
/// can put another in its place.
#[derive(Debug)]
pub struct Folder {
    place: PathBuf,
    _open: File,
}

impl Folder {
    /// Opens it, unless somebody else could make files in it or change ours.
    fn open(path: &Path) -> anyhow::Result<Self> {
        let opened = File::open(path).and_then(|folder| Ok((owner_only::intruders(&folder)?, folder)));
        match opened.map_err(|e| cannot_write(path, &e))? {
            (Some(why), _) => bail!("{}", give_another(path, &why)),
            (None, open) => {
                let place = PathBuf::from(format!("/proc/self/fd/{}", open.as_raw_fd()));
                // Where there is no /proc its own path must do.
                Ok(Self { place: if place.is_dir() { place } else { path.to_owned() }, _open: open })
            }
        }
    }

    /// For everything that is made, renamed or removed in it; not to be shown.
    pub fn place(&self) -> &Path {
        &self.place
    }
}

impl RunDir {
    /// Makes the directory, or takes over a run that nobody writes to.
    pub fn claim(path: &Path) -> anyhow::Result<Self> {
        owner_only::make_folders(path).map_err(|e| cannot_write(path, &e))?;
        let path = path.canonicalize().map_err(|e| cannot_write(path, &e))?;
        let folder = Folder::open(&path)?;
        if !is_empty(&path)? && !is_run(&path) {
            bail!("{}", give_another(&path, "holds other files than a run's"));
        }
        let lock = open_to_write(&folder.place().join(LOCK_FILE), ToWrite::Any).map_err(|e| cannot_write(&path, &e))?;
        // SAFETY: the descriptor is open.
        if unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::WouldBlock {
                return Err(cannot_write(&path, &error));
            }
            bail!(
                "{} is being written by another agent (process {}); attach to that one, or give --out {}",
                path.display(),
                Holder::read(&lock).pid,
                free_name(&path).display()
            );
        }
        // Only for the message above, until it is asked for more.
        let _ = Holder::this().write(&lock);
        let run = Self { path, folder: Arc::new(folder), lock };
        let format = run.read_info().format;
        if format > FORMAT {
            bail!(
                "{} was written in format {format}, and this flexmodel knows up to {FORMAT}; use a newer one",
                run.path.display()
            );
        }
        Ok(run)
    }

    /// Its absolute path, to be shown and read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The same directory to write in.
    pub fn folder(&self) -> &Arc<Folder> {
        &self.folder
    }

    /// Says in the lock where the agent that holds it answers HTTP: a port of loopback, and the token that it wants.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn answers_at(&self, port: u16, token: &str) -> io::Result<()> {
        Holder { port: Some(port), token: Some(token.to_owned()), ..Holder::this() }.write(&self.lock)
    }

    /// What `run.json` says; nothing if there is none that reads.
    pub fn read_info(&self) -> RunInfo {
        let bytes = read_whole(&self.folder.place().join(RUN_FILE), RUN_FILE_BYTES).ok();
        bytes
            .and_then(|b| serde_json::from_slice(&b).ok())
            .filter(|info: &RunInfo| info.check().is_ok())
            .unwrap_or_default()
    }

    /// Replaces `run.json`. While a run is under way the next one's space is kept, so that a disk that fills up in between
    /// does not hide how the run ended.
    pub fn write_info(&self, info: &RunInfo) -> io::Result<()> {
        let place = self.folder.place();
        let new = place.join(format!("{RUN_FILE}.new"));
        let file = open_to_write(&new, ToWrite::Any)?;
        // Piece by piece: it may be long.
        let mut json = BufWriter::new(&file);
        serde_json::to_writer_pretty(&mut json, info)?;
        json.write_all(b"\n")?;
        json.flush()?;
        let len = json.stream_position()?;
        drop(json);
        file.set_len(len)?;
        file.sync_all()?;
        fs::rename(&new, place.join(RUN_FILE))?;
        sync_dir(place)?;
        if info.finished_ns.is_none() {
            // Without it the next write may fail, and says so then.
            let _ = reserve(&new, i64::try_from(2 * len).unwrap_or(i64::MAX));
        }
        Ok(())
    }
}

fn reserve(path: &Path, bytes: i64) -> io::Result<()> {
    let file = open_to_write(path, ToWrite::Any)?;
    file.set_len(0)?;
    // SAFETY: the descriptor is open.
    match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, bytes) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Bytes that are free on the file system of `path`, if it says.
pub fn free(path: &Path) -> Option<u64> {
    let path = CString::new(path.as_os_str().as_bytes()).ok()?;
    let mut found = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: a path that ends with a zero, and room for the answer, which is there when 0 is returned.
    let found = unsafe {
        if libc::statvfs(path.as_ptr(), found.as_mut_ptr()) != 0 {
            return None;
        }
        found.assume_init()
    };
    Some(found.f_bavail.saturating_mul(found.f_frsize))
}

/// Directories made for a run. When dropped, those that are still empty are removed.
#[derive(Debug)]
pub struct Fresh {
    /// Innermost first.
    made: Vec<PathBuf>,
}

impl Drop for Fresh {
    fn drop(&mut self) {
        for folder in &self.made {
            // It stays if there is anything in it.
            let _ = fs::remove_dir(folder);
        }
    }
}

/// Refuses a directory that a new run cannot have: one that is there and not empty, or cannot be written. Makes it.
pub fn check_fresh(path: &Path) -> anyhow::Result<Fresh> {
    if path.is_dir() && !is_empty(path)? {
        bail!("{}", give_another(path, if is_run(path) { "holds a run already" } else { "is not empty" }));
    }
    let absolute = std::path::absolute(path)?;
    let missing = absolute.ancestors().take_while(|folder| !folder.exists());
    let fresh = Fresh { made: missing.map(Path::to_owned).collect() };
    owner_only::make_folders(path).map_err(|e| cannot_write(path, &e))?;
    let folder = Folder::open(path)?;
    let probe = folder.place().join(LOCK_FILE);
    open_to_write(&probe, ToWrite::New).and_then(|_| fs::remove_file(&probe)).map_err(|e| cannot_write(path, &e))?;
    Ok(fresh)
}

/// `--out` as given, with `{node}` in it replaced by this node's name: on a file system that nodes share, each has a run
/// of its own, beside the others.
pub fn of_this_node(out: &Path) -> PathBuf {
    match out.to_str().filter(|text| text.contains(MARK)) {
        Some(text) => PathBuf::from(text.replace(MARK, &node_folder(&wire::env::node()))),
        None => out.to_owned(),
    }
}

/// The folder that holds those of all nodes, where `--out` has `{node}`.
pub fn above_nodes(out: &Path) -> Option<PathBuf> {
    let has_mark = |part: &OsStr| part.to_str().is_some_and(|part| part.contains(MARK));
    out.iter().any(has_mark).then(|| {
        let above: PathBuf = out.iter().take_while(|part| !has_mark(part)).collect();
        if above.as_os_str().is_empty() { PathBuf::from(".") } else { above }
    })
}

/// A node's name as the name of a folder.
fn node_folder(name: &str) -> String {
    let safe = |c: char| if c.is_alphanumeric() || matches!(c, '.' | '-' | '_') { c } else { '_' };
    let folder: String = name.chars().map(safe).collect();
    if folder.trim_matches('.').is_empty() { "node".into() } else { folder }
}

/// The error for a directory that cannot be written.
pub fn cannot_write(path: &Path, error: &io::Error) -> anyhow::Error {
    anyhow!("cannot write to {}: {error}; give a folder of yours with --out", path.display())
}

fn give_another(path: &Path, why: &str) -> String {
    format!("{} {why}; give another folder, such as --out {}", path.display(), free_name(path).display())
}

/// `PATH-2`, or the next number that is free.
fn free_name(path: &Path) -> PathBuf {
    let name = |n: u32| {
        let mut name = path.as_os_str().to_owned();
        name.push(format!("-{n}"));
        PathBuf::from(name)
    };
    (2..1000).map(name).find(|p| !p.exists()).unwrap_or_else(|| name(1000))
}

fn is_empty(path: &Path) -> anyhow::Result<bool> {
    let mut entries = fs::read_dir(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(entries.next().is_none())
}

/// Whether an agent made this directory; it may have died before it wrote anything but its lock.
fn is_run(path: &Path) -> bool {
    [RUN_FILE, MANIFEST_FILE, LOCK_FILE].iter().any(|name| path.join(name).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nodes_name_is_one_folder() {
        assert_eq!(node_folder("gpu-7.cluster"), "gpu-7.cluster");
        assert_eq!(node_folder("../a b/c"), ".._a_b_c");
        assert_eq!(node_folder(".."), "node");
        assert_eq!(of_this_node(Path::new("runs/x")), Path::new("runs/x"));
        let above = |out: &str| above_nodes(Path::new(out));
        assert_eq!((above("runs/x"), above("runs/x/{node}")), (None, Some("runs/x".into())));
        assert_eq!((above("{node}"), above("/a/b-{node}/c")), (Some(".".into()), Some("/a".into())));
        let node = of_this_node(Path::new("runs/{node}/y"));
        assert!(node.starts_with("runs") && node.ends_with("y") && node.components().count() == 3, "{node:?}");
    }
}
