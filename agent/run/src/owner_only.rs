//! What FlexModel makes is its owner's alone: runs, bridges, locks, sockets and the folders that they are in.
//!
//! Modes are given where a file is made, since a folder's default ACL overrides the umask. A program that writes sets
//! its umask too, since one that takes the owner's own bits away (0777) would leave files that not even we can open.

use std::{
    fs::{DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::Path,
};

/// A folder's mode.
const FOLDER: u32 = 0o700;
/// A file's mode.
pub const FILE: u32 = 0o600;

/// How a file is opened that may have to be made; a link in its place is an error.
pub fn file() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.mode(FILE).custom_flags(libc::O_NOFOLLOW);
    options
}

/// Makes a folder that must not be there yet.
pub fn make_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(FOLDER).create(path)
}

/// Makes a folder, and those above it, where they are not there yet.
pub fn make_folders(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(FOLDER).create(path)
}

/// Why others could make and change files in a folder that is open, if they could.
pub fn intruders(folder: &File) -> io::Result<Option<String>> {
    let found = folder.metadata()?;
    // SAFETY: geteuid has no effects and cannot fail.
    let own = unsafe { libc::geteuid() };
    let mode = found.mode() & 0o7777;
    Ok(if found.uid() != own {
        Some(format!("belongs to user {}, who could change what is captured", found.uid()))
    } else if mode & 0o022 != 0 {
        Some(format!("may be written to by others (mode {mode:o}), who could change what is captured"))
    } else {
        None
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn a_link_in_a_files_place_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (mine, link) = (dir.path().join("mine"), dir.path().join("link"));
        fs::write(&mine, "precious").unwrap();
        std::os::unix::fs::symlink(&mine, &link).unwrap();
        assert!(file().write(true).create(true).truncate(true).open(&link).is_err());
        assert_eq!(fs::read(&mine).unwrap(), b"precious");
    }

    #[test]
    fn a_folder_is_ours_alone_or_it_is_said_who_else_could_write() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        make_folders(&path).unwrap();
        assert_eq!(fs::metadata(dir.path().join("a")).unwrap().mode() & 0o777, 0o700);
        assert!(make_folder(&path).is_err(), "there already");
        let said = |mode| {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            intruders(&File::open(&path).unwrap()).unwrap()
        };
        assert_eq!((said(0o700), said(0o755)), (None, None));
        for mode in [0o720, 0o702, 0o777, 0o1777, 0o2770] {
            assert!(said(mode).unwrap().contains(&format!("(mode {mode:o})")));
        }
    }
}
