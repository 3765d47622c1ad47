//! A run that is there already: its manifest fills the live state, under the same bounds as the ingest threads do.

use std::{io, path::Path};

use flexmodel_run::{
    format::{Line, MANIFEST_FILE, RunInfo, Totals},
    joining::Joining,
    manifest,
};

use super::{Ended, Live};

impl Live {
    /// Takes in what a run captured so far, one line of its manifest at a time; `totals` are those of all of it. Of which pass
    /// the last parts are is not known yet, unless it is `finished`: its store tells of them later.
    pub fn replay(&self, run: &Path, totals: Totals, finished: bool) -> io::Result<()> {
        let mut lines = match manifest::open(&run.join(MANIFEST_FILE)) {
            Ok(lines) => lines,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(e),
        };
        let mut joining = Joining::default();
        while let Some(entry) = lines.next_line()? {
            // What does not read is left out; verify names it.
            let Ok(line) = entry.line else { continue };
            match &line {
                Line::Refused { what, reason } => self.refused(what, reason),
                Line::Dropped { rank, count, .. } => self.dropped(*rank, *count),
                Line::Revision(revision) => self.revision(revision),
                _ => joining.line(line).iter().for_each(|told| self.told(told)),
            }
        }
        let rest = if finished { joining.end(true) } else { joining.look() };
        rest.iter().for_each(|told| self.told(told));
        self.change(|inner| {
            inner.totals = totals;
            inner.run_changed();
        });
        Ok(())
    }

    /// The run is over, as `info` says, and is only shown again until a rank attaches.
    pub fn show_again(&self, info: &RunInfo) {
        let Some(finished_ns) = info.finished_ns else { return };
        self.change(|inner| {
            inner.ended = Some(Ended { finished_ns, exit_code: info.exit_code });
            inner.take_info(info.clone());
        });
    }

    /// Whether the run was over before and no rank has attached since.
    pub fn is_shown_again(&self) -> bool {
        self.lock().ended.is_some()
    }
}
