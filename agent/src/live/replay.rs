//! A run that is there already: its manifest fills the live state, under the same bounds as the ingest threads do.

use std::{io, path::Path};

use flexmodel_run::{
    format::{Line, MANIFEST_FILE, RunInfo, Totals},
    manifest,
};

use super::{Ended, Live};

impl Live {
    /// Takes in what a run captured so far, one line of its manifest at a time; `totals` are those of all of it.
    pub fn replay(&self, run: &Path, totals: Totals) -> io::Result<()> {
        let mut lines = match manifest::open(&run.join(MANIFEST_FILE)) {
            Ok(lines) => lines,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(e),
        };
        while let Some(entry) = lines.next_line()? {
            // What does not read is left out; verify names it.
            let Ok(line) = entry.line else { continue };
            self.change(|inner| match &line {
                Line::Part(part) => inner.part(part),
                Line::Refused { what, reason } => inner.refused(what, reason),
                Line::Divergence { what, against } => inner.diverged(what, *against),
                Line::Dropped { rank, count, .. } => inner.dropped(*rank, *count),
                Line::Job(_) | Line::Left { .. } | Line::Pass { .. } | Line::Sealed { .. } => {}
            });
        }
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
