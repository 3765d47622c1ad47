//! What a bridge is built from: the launcher compiles it, and the interposer loads a bridge of these sources and no other.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

/// The folder of the sources, in the folder of `libflexmodel.so`.
pub const FOLDER: &str = "bridge";
/// The Rust half, compiled when FlexModel was.
pub const ARCHIVE: &str = "libflexmodel_bridge.a";

/// The sources in a folder.
#[derive(Clone, Debug)]
pub struct Sources {
    /// Where they are.
    pub folder: PathBuf,
    /// Relative to the folder, in order.
    pub files: Vec<PathBuf>,
    /// Over the names and bytes of all of them.
    pub digest: String,
}

impl Sources {
    /// Reads all of a folder's sources. It is an error where there are none.
    pub fn read(folder: &Path) -> io::Result<Self> {
        let mut files = Vec::new();
        walk(folder, Path::new(""), &mut files)?;
        files.sort();
        if !files.iter().any(|f| is_source(f)) || !folder.join(ARCHIVE).is_file() {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("has no *.cc and {ARCHIVE}")));
        }
        let mut digest = 0;
        for file in &files {
            digest = add(digest, file, File::open(folder.join(file))?)?;
        }
        Ok(Self { folder: folder.to_owned(), files, digest: format!("{digest:08x}") })
    }
}

/// Whether a file is to be compiled.
pub fn is_source(file: &Path) -> bool {
    file.extension().is_some_and(|e| e == "cc")
}

/// The archive has some 30 MB: it is never held.
fn add(digest: u32, name: &Path, mut file: File) -> io::Result<u32> {
    let len = file.metadata()?.len();
    let name = name.as_os_str().as_encoded_bytes();
    let mut digest = [name, &[0], &len.to_le_bytes()].into_iter().fold(digest, crc32c::crc32c_append);
    let mut buffer = vec![0; 1 << 17];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(digest),
            Ok(n) => digest = crc32c::crc32c_append(digest, buffer.get(..n).unwrap_or_default()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// `*.cc` and the archive at the top, headers below `include/`.
fn walk(root: &Path, below: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(root.join(below))? {
        let file = below.join(entry?.file_name());
        if root.join(&file).is_dir() {
            if file.starts_with("include") {
                walk(root, &file, files)?;
            }
        } else if file.starts_with("include") || is_source(&file) || file == Path::new(ARCHIVE) {
            files.push(file);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_over_names_and_bytes_of_inputs_alone() {
        let root = std::env::temp_dir().join(format!("flexmodel-sources-{}", std::process::id()));
        fs::create_dir_all(root.join("include/sub")).unwrap();
        for (name, text) in [("a.cc", "int a;"), ("include/sub/a.h", "#pragma once"), (ARCHIVE, "!<arch>\n")] {
            fs::write(root.join(name), text).unwrap();
        }
        let digest = || Sources::read(&root).unwrap().digest;
        let first = digest();
        fs::write(root.join("README"), "not an input").unwrap();
        assert_eq!(digest(), first);
        fs::write(root.join("include/sub/a.h"), "#pragma once\n").unwrap();
        let changed = digest();
        assert_ne!(changed, first);
        fs::rename(root.join("a.cc"), root.join("b.cc")).unwrap();
        assert_ne!(digest(), changed);
        fs::remove_file(root.join(ARCHIVE)).unwrap();
        assert!(Sources::read(&root).is_err());
        fs::remove_dir_all(&root).unwrap();
    }
}
