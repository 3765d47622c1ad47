//! Files of a run directory, opened whatever somebody put in their place.
//!
//! What is read may lie behind a link: a run may be a folder of links to where its files are kept. What is written to may
//! not, and has no second name elsewhere: it would be another file that changes. Neither is ever a pipe, which would be
//! waited for, or a device.

use std::{
    fs::{File, Metadata, OpenOptions},
    io::{self, Read},
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::Path,
};

const FLAGS: libc::c_int = libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;

/// Opens a file to read it.
pub fn open_to_read(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(FLAGS).open(path).map_err(|e| explained(path, e))?;
    regular(&file.metadata()?)?;
    Ok(file)
}

/// All of a file of at most `limit` bytes.
pub fn read_whole(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut file = open_to_read(path)?;
    let len = file.metadata()?.len();
    if len > limit {
        return Err(io::Error::other(format!("it has {len} bytes, and no more than {limit} are read")));
    }
    let mut bytes = Vec::with_capacity(len as usize);
    file.by_ref().take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// How a file is opened for writing. It can be read too, and is never cut by opening it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToWrite {
    /// It is there.
    Old,
    /// It is there, or is made.
    Any,
    /// The same; every write goes to its end.
    Append,
    /// It is not there, and is made.
    New,
}

/// Opens a file of a run to write to it; what is made is its owner's alone.
pub fn open_to_write(path: &Path, how: ToWrite) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600).custom_flags(FLAGS | libc::O_NOFOLLOW);
    match how {
        ToWrite::Old => {}
        ToWrite::Any => _ = options.create(true),
        ToWrite::Append => _ = options.append(true).create(true),
        ToWrite::New => _ = options.create_new(true),
    }
    let file = options.open(path).map_err(|e| explained(path, e))?;
    let meta = file.metadata()?;
    regular(&meta).map_err(|e| io::Error::other(format!("{}: {e}", name(path))))?;
    if meta.nlink() > 1 {
        let why = "has another name elsewhere (a hard link), so that writing to it would change that file too";
        return Err(io::Error::other(format!("{} {why}; copy the run first", name(path))));
    }
    Ok(file)
}

/// Why it does not open, where the system's words do not say it.
fn explained(path: &Path, error: io::Error) -> io::Error {
    let link = path.symlink_metadata().is_ok_and(|meta| meta.is_symlink());
    match error.raw_os_error() {
        Some(libc::ELOOP) if link => {
            let why =
                "is a symbolic link, and only files of the run itself are written to; copy the run first (cp -rL)";
            io::Error::other(format!("{} {why}", name(path)))
        }
        // A socket, or a pipe that nobody reads.
        Some(libc::ENXIO) => path.metadata().and_then(|meta| regular(&meta)).err().unwrap_or(error),
        _ => error,
    }
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

fn regular(meta: &Metadata) -> io::Result<()> {
    let kind = meta.file_type();
    let what = if kind.is_file() {
        return Ok(());
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a pipe"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a device"
    };
    Err(io::Error::other(format!("is {what}, not a file")))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    const ALL: [ToWrite; 4] = [ToWrite::Old, ToWrite::Any, ToWrite::Append, ToWrite::New];

    #[test]
    fn what_is_written_to_is_a_file_with_one_name_and_no_link() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        fs::write(&victim, "precious").unwrap();
        let planted = dir.path().join("planted");
        let plants: [&dyn Fn(); 4] = [
            &|| symlink(&victim, &planted).unwrap(),
            &|| symlink(dir.path().join("not there"), &planted).unwrap(),
            &|| fs::hard_link(&victim, &planted).unwrap(),
            &|| fs::create_dir(&planted).unwrap(),
        ];
        for plant in plants {
            plant();
            for how in ALL {
                assert!(open_to_write(&planted, how).is_err(), "{how:?}");
            }
            assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
            assert!(!dir.path().join("not there").exists());
            fs::remove_file(&planted).or_else(|_| fs::remove_dir(&planted)).unwrap();
        }
        open_to_write(&planted, ToWrite::New).unwrap();
        assert_eq!(planted.metadata().unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn what_is_no_file_is_neither_waited_for_nor_read() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        let text = std::ffi::CString::new(pipe.to_str().unwrap()).unwrap();
        // SAFETY: a path that ends with a zero.
        assert_eq!(unsafe { libc::mkfifo(text.as_ptr(), 0o600) }, 0);
        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        for (path, what) in [(pipe, "a pipe"), (socket, "a socket"), (dir.path().into(), "a directory")] {
            let error = open_to_read(&path).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
            assert!(ALL.iter().all(|&how| open_to_write(&path, how).is_err()));
        }
        assert!(open_to_read(Path::new("/dev/zero")).unwrap_err().to_string().contains("a device"));
    }
}
