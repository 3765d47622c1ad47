//! A run that may still be written: read, and read on once its files have grown.

use std::{path::Path, sync::Arc};

use super::{OpenError, Run, folder::Change, gathered::Gathered, nodes};

/// A run as it was when it was last looked at. What was taken of it before stays as it was.
pub struct Growing {
    gathered: Option<Gathered>,
    run: Arc<Run>,
    parts: u64,
    read: u64,
}

impl Growing {
    /// Opens a run as [`Run::open`] does.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let mut gathered = Gathered::of(path)?.growing();
        gathered.read_on()?;
        let run = Arc::new(gathered.run()?);
        let (parts, read) = (gathered.parts(), gathered.read());
        if run.finished() {
            gathered.let_go();
        }
        Ok(Self { gathered: Some(gathered), run, parts, read })
    }

    /// The run as it was then.
    pub fn run(&self) -> Arc<Run> {
        self.run.clone()
    }

    /// Bytes of manifests that were read since it was opened; those that were read twice count twice.
    pub fn read(&self) -> u64 {
        self.read
    }

    /// Reads what is new in the files, and the run anew where they are not those that were read; how many parts are new.
    pub fn refresh(&mut self) -> Result<u64, OpenError> {
        // A run that cannot be read on is read anew, now or the next time.
        let known = self.gathered.take().filter(|known| known.nodes() == names(&self.run.path));
        if let Some(mut known) = known {
            let before = known.read();
            match known.read_on()? {
                Change::None => {
                    self.gathered = Some(known);
                    return Ok(0);
                }
                Change::More => {
                    self.run = Arc::new(known.run()?);
                    self.read += known.read() - before;
                    let new = known.parts() - self.parts;
                    self.parts = known.parts();
                    if self.run.finished() {
                        known.let_go();
                    }
                    self.gathered = Some(known);
                    return Ok(new);
                }
                Change::Other => {}
            }
        }
        let (before, read) = (self.parts, self.read);
        let new = Self::open(&self.run.path)?;
        *self = Self { read: read + new.read, ..new };
        // One with fewer is another run in the same place.
        Ok(self.parts.checked_sub(before).unwrap_or(self.parts))
    }
}

fn names(path: &Path) -> Vec<String> {
    if nodes::is_run(path) { Vec::new() } else { nodes::inside(path) }
}

#[cfg(test)]
mod tests;
