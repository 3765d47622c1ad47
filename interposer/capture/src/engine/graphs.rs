//! CUDA graphs that the job captures, inside of which taps do nothing: said once of each clause.

use std::collections::HashSet;

use wire::hooks::Hook;

use super::Reports;

/// What was said.
#[derive(Default)]
pub struct InGraphs {
    /// Clauses as written, whose tensors were refused.
    refused: HashSet<String>,
    /// Clauses as written, whose edit was left out.
    unedited: HashSet<String>,
}

impl InGraphs {
    /// A tensor of `module` is refused that `clause` would have captured.
    pub fn refuse(&mut self, clause: &Hook, module: &str, reports: &dyn Reports) {
        if self.refused.insert(clause.text.clone()) {
            reports.notice(format!(
                "'{}' taps {} inside of a CUDA graph that the job captures: refused there, and replays of the graph record \
                 nothing",
                clause.text,
                shown(module)
            ));
        }
    }

    /// A tensor of `module` stays as it is, which `clause` would have edited.
    pub fn leave(&mut self, clause: &Hook, module: &str, reports: &dyn Reports) {
        if self.unedited.insert(clause.text.clone()) {
            reports.notice(format!(
                "'{}' edits nothing of {} inside of a CUDA graph that the job captures: every replay would repeat it, \
                 whatever the step",
                clause.text,
                shown(module)
            ));
        }
    }
}

fn shown(module: &str) -> &str {
    if module.is_empty() { "the model" } else { module }
}
