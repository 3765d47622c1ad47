//! A run that may still be written: read, and read again once its files have changed.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{OpenError, Run};
use crate::{
    format::{MANIFEST_FILE, RUN_FILE},
    limits::PROBLEMS,
};

/// A run as it was when it was last looked at. What was taken of it before stays as it was.
pub struct Growing {
    path: PathBuf,
    seen: Vec<Look>,
    run: Arc<Run>,
}

/// What tells that a file has changed: its inode, length and time.
type Look = Option<(u64, u64, i64, i64)>;

impl Growing {
    /// Opens a run as [`Run::open`] does.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let mut seen = look(path, &nodes(path));
        let run = Arc::new(Run::open(path)?);
        if nodes(path) != run.nodes {
            // A node came meanwhile: nothing is known to be as it was.
            seen.clear();
        }
        Ok(Self { path: path.to_owned(), seen, run })
    }

    /// The run as it was then.
    pub fn run(&self) -> Arc<Run> {
        self.run.clone()
    }

    /// Looks whether the files have changed, and reads the run anew if so; how many parts are new.
    pub fn refresh(&mut self) -> Result<u64, OpenError> {
        let nodes = nodes(&self.path);
        let seen = look(&self.path, &nodes);
        if seen == self.seen && nodes == self.run.nodes {
            return Ok(0);
        }
        let before = self.run.part_count();
        let new = Self::open(&self.path)?;
        let now = new.run.part_count();
        *self = new;
        // One with fewer is another run in the same place.
        Ok(now.checked_sub(before).unwrap_or(now))
    }
}

fn nodes(path: &Path) -> Vec<String> {
    if super::nodes::is_run(path) { Vec::new() } else { super::nodes::inside(path) }
}

/// Of what is read, before it is read.
fn look(path: &Path, nodes: &[String]) -> Vec<Look> {
    let one =
        |file: PathBuf| fs::metadata(file).ok().map(|meta| (meta.ino(), meta.len(), meta.mtime(), meta.mtime_nsec()));
    let folders = if nodes.is_empty() { vec![path.to_owned()] } else { nodes.iter().map(|n| path.join(n)).collect() };
    folders.iter().flat_map(|folder| [one(folder.join(RUN_FILE)), one(folder.join(MANIFEST_FILE))]).collect()
}

impl Run {
    /// Parts that were written, also those that a later one took the place of.
    pub fn part_count(&self) -> u64 {
        (self.records.iter().map(|record| record.parts.len()).sum::<usize>() + self.replaced.len()) as u64
    }

    /// Shards that are missing, or shorter than the manifest needs.
    pub fn shard_problems(&self) -> Vec<String> {
        let mut ends: std::collections::BTreeMap<&str, u64> = std::collections::BTreeMap::new();
        let all = self.records.iter().flat_map(|record| &record.parts).chain(&self.replaced);
        let parts =
            all.filter_map(|part| part.at.as_ref()).map(|at| (at.shard.as_str(), at.offset.saturating_add(at.len)));
        for (stem, end) in parts.chain(self.sealed.iter().map(|(stem, len)| (stem.as_str(), *len))) {
            let needed = ends.entry(stem).or_default();
            *needed = end.max(*needed);
        }
        let mut found = ends.into_iter().filter_map(|(stem, end)| self.shards().problem(stem, end));
        let mut problems: Vec<String> = found.by_ref().take(PROBLEMS).collect();
        if found.next().is_some() {
            problems.push("other shards were not looked at".to_owned());
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use wire::dtype::DType;

    use super::*;
    use crate::testing::fixture::*;

    #[test]
    fn what_has_come_since_is_read_and_what_was_taken_stays() {
        let mut f = Fixture::default();
        f.part(id("mlp", 0), DType::UInt8, &[1], 0, dp(0, 2, shard(0)), &[1]);
        let lines = f.lines.clone();
        f.part(id("mlp", 0), DType::UInt8, &[1], 1, dp(1, 2, shard(0)), &[2]);
        let all = f.lines.clone();
        let dir = f.kill();
        let manifest = dir.path().join(MANIFEST_FILE);
        fs::write(&manifest, &lines).unwrap();
        let mut growing = Growing::open(dir.path()).unwrap();
        let before = growing.run();
        assert_eq!(growing.refresh().unwrap(), 0);
        assert!(Arc::ptr_eq(&before, &growing.run()), "nothing was read again");
        fs::write(&manifest, &all[..all.len() - 5]).unwrap();
        assert_eq!(growing.refresh().unwrap(), 0, "half a line is none");
        fs::write(&manifest, &all).unwrap();
        assert_eq!(growing.refresh().unwrap(), 1);
        assert_eq!(growing.run().records[0].shape().unwrap(), [2]);
        assert!(before.records[0].shape().is_err());
        fs::write(&manifest, &lines).unwrap();
        assert_eq!(growing.refresh().unwrap(), 1, "a run written anew");
    }

    #[test]
    fn a_shard_that_is_short_or_gone_is_named_once() {
        let mut f = Fixture::default();
        f.part(id("mlp", 0), DType::UInt8, &[3], 0, Vec::new(), &[1, 2, 3]);
        let dir = f.kill();
        let run = Run::open(dir.path()).unwrap();
        assert!(run.shard_problems().is_empty());
        let shard = dir.path().join("shard-00000.open");
        fs::File::options().write(true).open(&shard).unwrap().set_len((1 << 20) + 2).unwrap();
        assert!(run.shard_problems()[0].contains("shard-00000 is cut short"));
        fs::remove_file(shard).unwrap();
        assert!(run.shard_problems()[0].contains("shard-00000.safetensors is missing"));
    }
}
