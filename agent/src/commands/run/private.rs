//! A folder that only we can enter: the agent's socket, and where it is needed a link to the folder of the preload
//! library, which loads what lies beside it.

use std::{
    env,
    ffi::OsString,
    fs, io,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::symlink,
    },
    path::{Path, PathBuf},
};

use anyhow::bail;

/// The agent's socket in the folder.
const SOCKET: &str = "agent.sock";
/// The link in the folder.
const LINK: &str = "home";
/// Longest path of the folder that the system's is made in: unix sockets allow no more than 107 bytes.
const LONGEST: usize = 60;

/// The folder; removed when dropped.
#[derive(Debug)]
pub struct PrivateFolder {
    path: PathBuf,
    library: PathBuf,
}

impl PrivateFolder {
    /// Makes it. The folder of `library` is linked to from there if the dynamic linker would not take its path as it is.
    pub fn make(library: &Path) -> anyhow::Result<Self> {
        let link = !fits_preload(library);
        let mut last = None;
        for base in [env::temp_dir(), "/tmp".into(), "/dev/shm".into()] {
            if base.as_os_str().len() > LONGEST || (link && !fits_preload(&base)) {
                continue;
            }
            let made = make_in(&base).and_then(|path| {
                let mut folder = Self { path, library: library.to_owned() };
                if let (true, Some(home), Some(name)) = (link, library.parent(), library.file_name()) {
                    let linked = folder.path.join(LINK);
                    symlink(home, &linked)?;
                    folder.library = linked.join(name);
                }
                Ok(folder)
            });
            match made {
                Ok(folder) => return Ok(folder),
                Err(e) => last = Some(e),
            }
        }
        let why = last.map_or_else(|| "no short path".to_owned(), |e| e.to_string());
        bail!("cannot make a temporary folder for the agent's socket: {why}; set TMPDIR to a folder of yours")
    }

    /// Where the agent listens.
    pub fn socket(&self) -> PathBuf {
        self.path.join(SOCKET)
    }

    /// The preload library.
    pub fn library(&self) -> &Path {
        &self.library
    }
}

impl Drop for PrivateFolder {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// Removes the folder and what we put there. Whatever else is there is left.
pub fn remove(folder: &Path) {
    // The agent removes its socket, unless it was killed.
    let _ = fs::remove_file(folder.join(SOCKET));
    let link = folder.join(LINK);
    if link.is_symlink() {
        let _ = fs::remove_file(link);
    }
    let _ = fs::remove_dir(folder);
}

/// Whether the dynamic linker takes this path in LD_PRELOAD for one path, and for what it says: it splits at spaces and
/// colons, and replaces `$ORIGIN` and its like.
fn fits_preload(path: &Path) -> bool {
    !path.as_os_str().as_bytes().iter().any(|b| b.is_ascii_whitespace() || matches!(b, b':' | b'$'))
}

fn make_in(base: &Path) -> io::Result<PathBuf> {
    // mkdtemp makes it with mode 0700.
    let mut name = base.join("flexmodel-XXXXXX").into_os_string().into_encoded_bytes();
    name.push(0);
    // SAFETY: a NUL-terminated buffer of ours, which mkdtemp changes in place.
    if unsafe { libc::mkdtemp(name.as_mut_ptr().cast()) }.is_null() {
        return Err(io::Error::last_os_error());
    }
    name.pop();
    Ok(OsString::from_vec(name).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::home::{ENGINE, LIBRARY};

    #[test]
    fn a_path_that_the_dynamic_linker_would_split_is_linked_to() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["with space", "with:colon", "with$ORIGIN", "tab\there"] {
            let library = dir.path().join(name).join(LIBRARY);
            fs::create_dir_all(library.parent().unwrap()).unwrap();
            fs::write(&library, "").unwrap();
            fs::write(library.with_file_name(ENGINE), "").unwrap();
            let folder = PrivateFolder::make(&library).unwrap();
            assert!(fits_preload(folder.library()), "{:?}", folder.library());
            assert_eq!(folder.library().canonicalize().unwrap(), library.canonicalize().unwrap());
            assert!(folder.library().with_file_name(ENGINE).exists(), "what it loads is not beside it");
            let path = folder.path.clone();
            drop(folder);
            assert!(!path.exists() && library.exists(), "{name}");
        }
    }

    #[test]
    fn any_other_path_stays_as_it_is() {
        let folder = PrivateFolder::make(Path::new("/opt/flexmodel/libflexmodel.so")).unwrap();
        assert_eq!(folder.library(), "/opt/flexmodel/libflexmodel.so");
        assert!(!folder.path.join(LINK).is_symlink());
    }
}
