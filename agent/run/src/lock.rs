//! `agent.lock`: whether an agent writes to a run, which one, and where it is asked.
//!
//! Who has locked the file is its agent, whatever it says. It says one line of JSON, its [`Holder`], which is written in one
//! piece and is its owner's alone: whoever reads the token may ask that agent for anything. Until there were ports in it, it was
//! the number of a process.

use std::{
    fs::{self, File, Permissions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, PermissionsExt},
    },
    path::Path,
};

use serde::{Deserialize, Serialize};

use crate::{files::open_to_read, format::LOCK_FILE, limits::LOCK_BYTES, owner_only};

/// Most characters of a token.
const MAX_TOKEN: usize = 256;

/// The agent that has locked a run, as it says of itself. Nothing of it is to be trusted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Its process; 0: it does not say.
    pub pid: u32,
    /// Its host's name; empty: it does not say, as before there were ports.
    pub node: String,
    /// The number that its host's kernel drew when it started, since hosts may have one name; empty: it does not say.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub boot: String,
    /// The port on its host's loopback where it answers HTTP; `None` before it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// What it wants to be shown there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
}

impl Holder {
    /// This process, which answers nowhere yet.
    pub fn this() -> Self {
        Self { pid: std::process::id(), node: wire::env::host(), boot: boot(), port: None, token: None }
    }

    /// Whether it runs on this host, as far as it says.
    pub fn is_here(&self) -> bool {
        let (node, boot) = (wire::env::host(), boot());
        (self.node == node || self.node.is_empty()) && (self.boot == boot || self.boot.is_empty() || boot.is_empty())
    }

    /// Writes it over what a file that is open and locked said.
    ///
    /// # Errors
    /// The disk's, or the file cannot be made its owner's alone.
    pub fn write(&self, file: &File) -> io::Result<()> {
        file.set_permissions(Permissions::from_mode(owner_only::FILE))?;
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        // A reader takes the first line: the old one or this.
        file.write_all_at(&line, 0)?;
        file.set_len(line.len() as u64)
    }

    /// What a file that is open says; of one that says nothing that is understood, nothing is known.
    pub fn read(file: &File) -> Self {
        let mut bytes = vec![0; LOCK_BYTES];
        let read = file.read_at(&mut bytes, 0).unwrap_or_default();
        bytes.truncate(read);
        Self::parse(&bytes).unwrap_or_default()
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let line = std::str::from_utf8(bytes).ok()?.lines().next()?.trim();
        if let Ok(pid) = line.parse() {
            return Some(Self { pid, ..Self::default() });
        }
        let holder: Self = serde_json::from_str(line).ok()?;
        // It becomes part of a request.
        let plain = |token: &String| token.len() <= MAX_TOKEN && token.bytes().all(|byte| byte.is_ascii_graphic());
        holder.token.as_ref().is_none_or(plain).then_some(holder)
    }
}

fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// Whether somebody holds the lock of a file.
pub fn is_locked(file: &File) -> bool {
    // SAFETY: the descriptor is open. The lock is one that any number may hold, and goes at once.
    unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_SH | libc::LOCK_NB) != 0 }
}

/// The agent that writes to the run in a folder; `None`: nobody does.
///
/// # Errors
/// The file does not open, or somebody else may have written what it says.
pub fn holder(run: &Path) -> io::Result<Option<Holder>> {
    let file = match open_to_read(&run.join(LOCK_FILE)) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    if !is_locked(&file) {
        return Ok(None);
    }
    match owner_only::intruders(&file)? {
        Some(why) => Err(io::Error::other(why)),
        None => Ok(Some(Holder::read(&file))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_a_shorter_line_leaves_nothing_of_a_longer_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(LOCK_FILE);
        fs::write(&path, "77\n").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        assert_eq!(Holder::read(&file), Holder { pid: 77, ..Holder::default() });
        let silent = Holder::this();
        let listening = Holder { port: Some(33347), token: Some("0123abcd".into()), ..silent.clone() };
        for holder in [&silent, &listening, &silent] {
            holder.write(&file).unwrap();
            assert_eq!(&Holder::read(&file), holder);
            assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 1);
        }
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!((silent.pid, silent.node.is_empty()), (std::process::id(), false));
    }

    #[test]
    fn a_host_is_told_from_another_of_its_name() {
        let this = Holder::this();
        assert!(
            this.is_here() && Holder::default().is_here() && Holder { boot: String::new(), ..this.clone() }.is_here()
        );
        assert!(!Holder { boot: "another".into(), ..this.clone() }.is_here() || this.boot.is_empty());
        assert!(!Holder { node: "another".into(), ..this }.is_here());
    }

    #[test]
    fn of_a_file_that_says_anything_else_nothing_is_known() {
        let line_break = r#"{"pid":1,"node":"a","port":2,"token":"x\r\ny"}"#;
        let long = format!(r#"{{"pid":1,"node":"a","token":"{}"}}"#, "x".repeat(257));
        let longer = format!(r#"{{"pid":1,"node":"{}"}}"#, "n".repeat(LOCK_BYTES));
        let deep = "[".repeat(LOCK_BYTES);
        let port = r#"{"pid":1,"node":"a","port":65536}"#;
        for text in
            ["", "\n", "-1", "no", "{}", "[1,2]", "\u{0}", "4294967296", line_break, &long, &longer, &deep, port]
        {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join(LOCK_FILE);
            fs::write(&path, text).unwrap();
            assert_eq!(Holder::read(&File::open(&path).unwrap()), Holder::default(), "{text}");
        }
    }

    #[test]
    fn only_a_file_that_is_locked_and_ours_alone_names_an_agent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(LOCK_FILE);
        assert_eq!(holder(dir.path()).unwrap(), None);
        fs::write(&path, r#"{"pid":5,"node":"b"}"#).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        assert_eq!(holder(dir.path()).unwrap(), None);
        let file = File::open(&path).unwrap();
        // SAFETY: the descriptor is open.
        assert_eq!(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) }, 0);
        assert_eq!(holder(dir.path()).unwrap(), Some(Holder { pid: 5, node: "b".into(), ..Holder::default() }));
        fs::set_permissions(&path, Permissions::from_mode(0o622)).unwrap();
        assert!(holder(dir.path()).unwrap_err().to_string().contains("(mode 622)"));
    }
}
