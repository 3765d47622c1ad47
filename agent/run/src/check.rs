//! Whether a line that decodes is one that can be: every value within its bounds.

use wire::{
    passes::{MAX_GROUPS, MAX_RUNS, Pass, Run},
    record::Axis,
};

use super::{
    format::{JobInfo, Line, Location, Part, Revision, RunInfo, What},
    limits,
};

impl Line {
    /// Why it cannot be.
    pub fn check(&self) -> Result<(), String> {
        match self {
            Line::Part(part) => part.check(),
            Line::Refused { what, reason } => what.check().and_then(|()| text("a reason", reason)),
            Line::Divergence { what, .. } => what.check(),
            Line::Dropped { reason, .. } => text("a reason", reason),
            Line::Job(info) => info.check(),
            Line::Revision(revision) => revision.check(),
            Line::Sealed { shard, len } => text("a name", shard).and_then(|()| bytes(*len)),
            Line::Pass { pass, .. } => check_pass(pass),
            Line::Left { .. } => Ok(()),
        }
    }
}

impl JobInfo {
    fn check(&self) -> Result<(), String> {
        [&self.group, &self.launch, &self.launcher].into_iter().try_for_each(|name| text("a sign", name))?;
        check_ranks(&self.here)
    }
}

impl Revision {
    fn check(&self) -> Result<(), String> {
        if self.revision == 0 {
            return Err("it is of hooks that took the place of others, and says revision 0".into());
        }
        let bytes = self.clauses.iter().fold(0usize, |n, clause| n.saturating_add(clause.text.len()));
        if bytes > limits::PLAN || self.clauses.len() > limits::PLAN {
            return Err(format!("it has {} clauses of {bytes} bytes", self.clauses.len()));
        }
        Ok(())
    }
}

impl Part {
    fn check(&self) -> Result<(), String> {
        self.what.check()?;
        if !is_possible(self.what.dtype.size(), &self.what.shape) {
            return Err(format!("its shape {:?} is that of no tensor", self.what.shape));
        }
        self.at.as_ref().map_or(Ok(()), Location::check)
    }
}

impl Location {
    fn check(&self) -> Result<(), String> {
        text("a name", &self.shard)?;
        bytes(self.offset.saturating_add(self.len))
    }
}

impl What {
    fn check(&self) -> Result<(), String> {
        for name in [&self.id.module, &self.id.path, &self.class, &self.group] {
            text("a name", name)?;
        }
        if self.shape.len() > limits::DIMS {
            return Err(format!("it has a tensor of {} dimensions", self.shape.len()));
        }
        if self.axes.len() > limits::AXES {
            return Err(format!("it has {} mesh axes", self.axes.len()));
        }
        if let Some(slice) = &self.slice {
            text("a slice", &slice.by)?;
            if slice.of.len() > limits::DIMS {
                return Err(format!("it is a slice of a tensor of {} dimensions", slice.of.len()));
            }
        }
        // Where a part is a run of a flattened tensor's elements, dimensions are those of that tensor.
        let flat = self.axes.iter().find_map(|axis| axis.place.flattened());
        let dims = flat.unwrap_or(&self.shape).len();
        self.axes.iter().try_for_each(|axis| check_axis(axis, dims))
    }
}

fn check_axis(axis: &Axis, dims: usize) -> Result<(), String> {
    text("an axis", &axis.name)?;
    if axis.index >= axis.size {
        return Err(format!("it says {} {} of {}", axis.name, axis.index, axis.size));
    }
    if let Some(dim) = axis.place.dim().filter(|&dim| dim as usize >= dims) {
        return Err(format!("it shards dimension {dim} of a tensor that has {dims}"));
    }
    match axis.place.flattened() {
        Some(shape) if shape.len() > limits::DIMS => Err(format!("it is of a tensor of {} dimensions", shape.len())),
        _ => Ok(()),
    }
}

fn check_pass(pass: &Pass) -> Result<(), String> {
    if pass.groups.len() > MAX_GROUPS {
        return Err(format!("it has {} groups of ranks", pass.groups.len()));
    }
    pass.groups.iter().try_for_each(|group| check_ranks(&group.ranks))
}

fn check_ranks(runs: &[Run]) -> Result<(), String> {
    let ranks = runs.iter().fold(0u64, |n, run| n + u64::from(run.count));
    let last = |run: &Run| u64::from(run.first) + u64::from(run.by) * u64::from(run.count);
    let cannot_be = |run: &Run| run.count == 0 || last(run) > u64::from(u32::MAX);
    if ranks > limits::RANKS || runs.len() > MAX_RUNS || runs.iter().any(cannot_be) {
        return Err(format!("it has a group of {ranks} ranks"));
    }
    Ok(())
}

impl RunInfo {
    /// Why it cannot be.
    pub fn check(&self) -> Result<(), String> {
        let counted = [("models", self.models.len(), limits::MODELS), ("notices", self.notices.len(), limits::NOTICES)];
        match counted.into_iter().find(|(_, count, limit)| count > limit) {
            Some((name, count, limit)) => Err(format!("{name} are {count}, and no more than {limit} are read")),
            None => Ok(()),
        }
    }
}

/// Whether a tensor of elements of so many bytes can have this shape: dimensions of size 0 count as 1, as they do where torch
/// computes strides.
pub fn is_possible(element: usize, shape: &[u64]) -> bool {
    let size = shape.iter().try_fold(element as u64, |n, &d| n.checked_mul(d.max(1)));
    size.is_some_and(|n| n <= limits::BYTES)
}

fn text(what: &str, text: &str) -> Result<(), String> {
    // No text has more characters than bytes, and counting them takes time.
    if text.len() > limits::TEXT && text.chars().count() > limits::TEXT {
        return Err(format!("it has {what} of {} characters", text.chars().count()));
    }
    Ok(())
}

fn bytes(end: u64) -> Result<(), String> {
    if end > limits::BYTES { Err("its bytes lie outside of every file".into()) } else { Ok(()) }
}
