//! The listening socket.

use std::{
    fs, io,
    os::{
        fd::AsRawFd,
        unix::{
            fs::{FileTypeExt, MetadataExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use anyhow::{anyhow, bail};

/// Longest path of a unix socket in bytes.
pub const MAX_PATH: usize = 107;
/// Where a socket is well placed: nobody else may listen there, and be taken for us.
const PLACE: &str = "\"$XDG_RUNTIME_DIR/flexmodel.sock\" or one that mktemp -d makes";
/// Bytes asked for at a time.
pub const CHUNK: usize = 64 << 10;

/// A listening socket that only its owner can reach. Its file goes with it.
#[derive(Debug)]
pub struct Listening {
    listener: UnixListener,
    path: PathBuf,
    inode: u64,
}

impl Listening {
    /// Listens at `path`. A socket whose agent is dead is replaced; a live agent's is refused.
    pub fn bind(path: &Path) -> anyhow::Result<Self> {
        let shown = path.display();
        if path.as_os_str().len() > MAX_PATH {
            bail!(
                "the path of --socket is {} bytes long and may have {MAX_PATH}; give a shorter one, in a folder that \
                 only you can write to, such as {PLACE}",
                path.as_os_str().len()
            );
        }
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                bail!("{shown} is there and is no socket; give another --socket")
            }
            Ok(_) if UnixStream::connect(path).is_ok() => {
                bail!("an agent is listening at {shown} already; attach to that one, or give another --socket")
            }
            Ok(_) => fs::remove_file(path).map_err(|e| cannot_listen(path, &e))?,
            Err(_) => {}
        }
        // SAFETY: umask has no memory effects. No other thread of ours makes files yet.
        let before = unsafe { libc::umask(0o177) };
        let listener = UnixListener::bind(path);
        // SAFETY: as above.
        unsafe { libc::umask(before) };
        let listener = listener.map_err(|e| cannot_listen(path, &e))?;
        let inode = fs::symlink_metadata(path).map_err(|e| cannot_listen(path, &e))?.ino();
        listener.set_nonblocking(true).map_err(|e| cannot_listen(path, &e))?;
        Ok(Self { listener, path: path.to_owned(), inode })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// For tokio, which takes its own copy.
    pub fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }

    /// Whether somebody has connected and was not accepted yet.
    pub fn somebody_waits(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd; a timeout of zero never blocks.
        unsafe { libc::poll(&mut poll, 1, 0) > 0 }
    }
}

/// What is wrong with the folder of a socket, as a line for the user. Ranks look who listens before they send anything;
/// but where others may replace the socket, they may keep it from us.
pub fn open_to_others(path: &Path) -> Option<String> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mode = fs::metadata(folder).ok()?.mode();
    (mode & 0o002 != 0 && mode & 0o1000 == 0).then(|| {
        format!(
            "any user may replace the socket in {}, and ranks then attach to nobody; listen in {PLACE}",
            folder.display()
        )
    })
}

impl Drop for Listening {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|m| m.ino() == self.inode) {
            // Nothing to do about it: the next agent replaces it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn cannot_listen(path: &Path, error: &io::Error) -> anyhow::Error {
    anyhow!("cannot listen at {}: {error}; give another --socket", path.display())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn only_the_owner_can_reach_it_and_it_goes_with_its_agent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listening = Listening::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let text = format!("{:#}", Listening::bind(&path).unwrap_err());
        assert!(text.contains("already"), "{text}");
        drop(listening);
        assert!(!path.exists());
    }

    #[test]
    fn a_dead_agents_socket_is_replaced_and_another_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(Listening::bind(&path).unwrap());
        fs::write(&path, "mine").unwrap();
        assert!(Listening::bind(&path).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"mine");
    }

    #[test]
    fn a_folder_where_anybody_may_replace_the_socket_is_named() {
        let dir = tempfile::tempdir().unwrap();
        for (mode, open) in [(0o700, false), (0o755, false), (0o775, false), (0o1777, false), (0o777, true)] {
            fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
            let said = open_to_others(&dir.path().join("s"));
            assert_eq!(said.is_some(), open, "{mode:o}: {said:?}");
        }
    }

    #[test]
    fn a_path_too_long_is_refused_by_its_length() {
        let path = PathBuf::from(format!("/tmp/{}", "x".repeat(200)));
        let text = format!("{:#}", Listening::bind(&path).unwrap_err());
        assert!(text.contains("205") && text.contains("107"), "{text}");
        assert!(text.contains("only you") && !text.contains("/tmp"), "{text}");
    }
}
