//! The key of a run that several nodes write: by it agents know that what they find in the job's store is from one of them.
//!
//! It is what `FLEXMODEL_KEY` says, or a file in the folder that holds the nodes' folders, which whoever needs it first makes.
//! It is never shown.

use std::{
    fmt, fs,
    io::{self, Read, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use flexmodel_run::files::{ToWrite, open_to_write};
use hmac::{Hmac, Mac};
use sha2::Sha256;
use wire::env;

/// The file's name.
pub const FILE: &str = "hooks.key";
/// Bytes of a code.
pub const CODE: usize = 32;
/// Fewest bytes of a key.
const MIN: usize = 16;
/// Most bytes of a key that are read.
const MAX: u64 = 4096;

/// Where an agent has its key from.
#[derive(Debug)]
pub struct Source {
    given: Option<Key>,
    /// The folder that holds the nodes' folders.
    folder: Option<PathBuf>,
}

impl Source {
    /// Of an agent whose run is in this folder of several nodes' runs, if it is.
    pub fn new(folder: Option<PathBuf>) -> Self {
        let given = std::env::var(env::KEY).ok().filter(|key| !key.is_empty());
        Self { given: given.map(|key| Key(key.into_bytes())), folder }
    }

    /// The key; `make`: also where there is none yet.
    ///
    /// # Errors
    /// There is none, or it is not secret.
    pub fn key(&self, make: bool) -> Result<Key, String> {
        if let Some(key) = &self.given {
            return key.clone().if_long(env::KEY);
        }
        let Some(folder) = &self.folder else {
            return Err(format!(
                "the job has ranks on other nodes, and no key tells their agents from anybody else: start every node with \
                 --out FOLDER/{{node}}, in a folder that the nodes share, or with the same {} in the environment",
                env::KEY
            ));
        };
        let path = folder.join(FILE);
        let of = |e: io::Error| format!("{}: {e}", path.display());
        match read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound && make => {
                self::make(folder, &path).map_err(of)?;
                read(&path).map_err(of)?
            }
            outcome => outcome.map_err(of)?,
        }
        .if_long(FILE)
    }
}

/// A secret.
#[derive(Clone)]
pub struct Key(Vec<u8>);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

impl Key {
    /// One that is known, for tests.
    #[cfg(test)]
    pub fn of(text: &str) -> Self {
        Self(text.into())
    }

    fn if_long(self, name: &str) -> Result<Self, String> {
        if self.0.len() < MIN {
            return Err(format!("{name} has {} bytes, and a key has at least {MIN}", self.0.len()));
        }
        Ok(self)
    }

    /// HMAC-SHA256 of some texts, one after the other, of which none can pass for a part of another.
    fn hmac(&self, texts: &[&[u8]]) -> Option<Hmac<Sha256>> {
        let mut hmac = Hmac::<Sha256>::new_from_slice(&self.0).ok()?;
        for text in texts {
            hmac.update(&(text.len() as u64).to_le_bytes());
            hmac.update(text);
        }
        Some(hmac)
    }

    /// A code that only who has the key can make.
    pub fn code(&self, texts: &[&[u8]]) -> Vec<u8> {
        self.hmac(texts).map(|hmac| hmac.finalize().into_bytes().to_vec()).unwrap_or_default()
    }

    /// Whether this is the code of these texts.
    pub fn is_code(&self, code: &[u8], texts: &[&[u8]]) -> bool {
        self.hmac(texts).is_some_and(|hmac| hmac.verify_slice(code).is_ok())
    }
}

fn read(path: &Path) -> io::Result<Key> {
    // It is opened as what is written to is, so that no link is followed and nothing is made.
    let file = open_to_write(path, ToWrite::Old)?;
    let found = file.metadata()?;
    // SAFETY: geteuid has no effects and cannot fail.
    if found.uid() != unsafe { libc::geteuid() } {
        return Err(io::Error::other(format!("belongs to user {}: remove it", found.uid())));
    }
    let mode = found.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(io::Error::other(format!("others can have it (mode {mode:o}): remove it, and it is made anew")));
    }
    let mut bytes = Vec::new();
    file.take(MAX).read_to_end(&mut bytes)?;
    Ok(Key(bytes.trim_ascii().to_owned()))
}

/// Makes the file, unless another agent has: it is there as a whole or not at all.
fn make(folder: &Path, path: &Path) -> io::Result<()> {
    let mut random = [0u8; 32];
    fs::File::open("/dev/urandom")?.read_exact(&mut random)?;
    let text: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    let new = folder.join(format!("{FILE}.{}.{}", wire::env::host(), std::process::id()));
    let written = open_to_write(&new, ToWrite::New).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    let made = written.and_then(|()| fs::hard_link(&new, path));
    // Where it could not be made there may be none.
    let _ = fs::remove_file(&new);
    match made {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::Permissions, os::unix::fs::PermissionsExt};

    use super::*;

    fn of(folder: Option<PathBuf>) -> Source {
        Source { given: None, folder }
    }

    #[test]
    fn agents_in_one_folder_have_one_key_that_is_theirs_alone() {
        let dir = tempfile::tempdir().unwrap();
        let source = of(Some(dir.path().into()));
        assert!(source.key(false).unwrap_err().contains(FILE), "who only follows makes none");
        let key = source.key(true).unwrap();
        assert_eq!(key.0.len(), 64);
        assert_eq!(of(Some(dir.path().into())).key(true).unwrap().0, key.0);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
        let path = dir.path().join(FILE);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(format!("{key:?}"), "Key");
        for mode in [0o640, 0o604, 0o620] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            assert!(source.key(true).unwrap_err().contains(&format!("mode {mode:o}")));
        }
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, "short").unwrap();
        assert!(source.key(true).unwrap_err().contains("at least"));
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        assert!(source.key(true).is_err());
    }

    #[test]
    fn without_a_folder_both_ways_to_a_key_are_named() {
        let why = of(None).key(true).unwrap_err();
        assert!(why.contains("{node}") && why.contains("FLEXMODEL_KEY"), "{why}");
        let given = |text: &str| Source { given: Some(Key(text.into())), folder: None }.key(true);
        assert!(given("0123456789abcdef").is_ok());
        let why = given("secret").unwrap_err();
        assert!(why.contains("at least 16") && !why.contains("secret"), "{why}");
    }

    #[test]
    fn a_code_is_of_its_texts_and_its_key() {
        let (key, other) = (Key::of("0123456789abcdef"), Key::of("0123456789abcdeg"));
        let code = key.code(&[b"ab", b"c"]);
        assert_eq!(code.len(), CODE);
        assert!(key.is_code(&code, &[b"ab", b"c"]));
        assert!(!key.is_code(&code, &[b"a", b"bc"]) && !key.is_code(&code, &[b"abc"]));
        assert!(!other.is_code(&code, &[b"ab", b"c"]) && !key.is_code(&code[1..], &[b"ab", b"c"]));
    }
}
