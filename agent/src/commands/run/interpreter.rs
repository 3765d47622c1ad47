//! Which Python a command will use.

use std::{
    ffi::OsStr,
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use crate::commands::bridge::probe::on_path;

/// An interpreter.
#[derive(Debug, PartialEq, Eq)]
pub struct Found {
    /// Its path.
    pub python: PathBuf,
    /// The command is this interpreter or a script that names it, and not something that may start any.
    pub certain: bool,
    /// The command is this interpreter itself.
    pub is_command: bool,
}

/// What the shell would start for this word.
pub fn find(program: &OsStr) -> Option<PathBuf> {
    if program.as_encoded_bytes().contains(&b'/') {
        return Some(PathBuf::from(program)).filter(|p| p.exists());
    }
    on_path(program)
}

/// The interpreter of a program: itself, the one that its first line names, or else the first on PATH.
pub fn of(program: &Path) -> Option<Found> {
    if is_python(program) {
        return Some(Found { python: program.to_owned(), certain: true, is_command: true });
    }
    if let Some(python) = named_in(program) {
        return Some(Found { python, certain: true, is_command: false });
    }
    let python = find(OsStr::new("python3")).or_else(|| find(OsStr::new("python")))?;
    Some(Found { python, certain: false, is_command: false })
}

/// `python`, `python3`, `python3.11`, ...
fn is_python(path: &Path) -> bool {
    let name = path.file_name().and_then(OsStr::to_str).unwrap_or("");
    name.strip_prefix("python").is_some_and(|rest| rest.chars().all(|c| c.is_ascii_digit() || c == '.'))
}

/// The interpreter in a script's first lines.
fn named_in(script: &Path) -> Option<PathBuf> {
    let mut head = [0u8; 1024];
    let read = File::open(script).ok()?.read(&mut head).ok()?;
    let text = String::from_utf8_lossy(head.get(2..read).filter(|_| head.starts_with(b"#!"))?).into_owned();
    let mut lines = text.lines();
    let first: Vec<&str> = lines.next()?.split_whitespace().collect();
    let program = Path::new(first.first()?);
    if is_python(program) {
        return Some(program.to_owned());
    }
    if program.file_name()? == "env" {
        let name = first.iter().skip(1).find(|word| !word.starts_with('-') && !word.contains('='))?;
        return is_python(Path::new(name)).then(|| find(OsStr::new(name)))?;
    }
    // What pip writes where the path is too long or has a space: #!/bin/sh, then '''exec' "/long/python" "$0" "$@".
    let exec = lines.next()?.strip_prefix("'''exec' ")?;
    let path = match exec.strip_prefix('"') {
        Some(quoted) => quoted.split('"').next()?,
        None => exec.split_whitespace().next()?,
    };
    Some(PathBuf::from(path)).filter(|p| is_python(p))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("launcher");
        std::fs::write(&path, text).unwrap();
        (dir, path)
    }

    #[test]
    fn python_is_its_own_interpreter_by_any_name() {
        for name in ["/x/python", "/x/python3", "/x/python3.11"] {
            assert!(of(Path::new(name)).unwrap().is_command, "{name}");
        }
        assert!(!is_python(Path::new("/x/pythonic")));
    }

    #[test]
    fn a_script_names_its_interpreter() {
        for text in [
            "#!/venv/bin/python3\nimport x",
            "#!/venv/bin/python3 -u\n",
            "#!/bin/sh\n'''exec' /venv/bin/python3 \"$0\" \"$@\"\n' '''\n",
            "#!/bin/sh\n'''exec' \"/venv/bin/python3\" \"$0\" \"$@\"\n",
        ] {
            let (_dir, path) = script(text);
            assert_eq!(named_in(&path), Some("/venv/bin/python3".into()), "{text}");
        }
    }

    #[test]
    fn other_scripts_and_programs_name_none() {
        for text in ["#!/bin/bash\npython train.py", "\u{7f}ELF", "", "#!", "#!/usr/bin/env -S bash\n"] {
            let (_dir, path) = script(text);
            assert_eq!(named_in(&path), None, "{text}");
        }
        assert_eq!(find(OsStr::new("no-such-command-anywhere")), None);
    }
}
