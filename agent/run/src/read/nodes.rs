//! Runs of several nodes, read as the one job that they are.
//!
//! Every node's agent writes a run of its own, with the parts of its ranks. A folder that is no run and holds such runs
//! (`runs/x/node-a`, `runs/x/node-b`) is read as the run of the whole job: parts with the same identity are one record's,
//! whichever node they came from. A shard is then named with its node's folder (`node-a/shard-00000`).

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
};

use super::{
    OpenError, Run,
    folder::{self, Folder},
    gathered::Gathered,
};
use crate::{
    format::{LOCK_FILE, MANIFEST_FILE, ModelInfo, RUN_FILE, RunInfo, Totals},
    limits::NODES,
    text,
};

/// Whether a folder is a run itself.
pub fn is_run(path: &Path) -> bool {
    path.join(RUN_FILE).is_file() || path.join(MANIFEST_FILE).is_file()
}

/// Names of the folders in `path` that are runs, in order; of too many, [`NODES`] and one.
pub fn inside(path: &Path) -> Vec<String> {
    let name = |entry: fs::DirEntry| entry.file_name().into_string().ok().filter(|_| is_run(&entry.path()));
    let names = fs::read_dir(path).into_iter().flatten().flatten().filter_map(name);
    let mut names: Vec<String> = names.take(NODES + 1).collect();
    names.sort();
    names
}

/// The folders that are written to for the run in `path`: itself, or those of a job's nodes in it.
///
/// # Errors
/// It is no run, and those in it are not of one job.
pub fn folders(path: &Path) -> Result<Vec<PathBuf>, OpenError> {
    if !path.is_dir() || is_run(path) || path.join(LOCK_FILE).is_file() {
        Gathered::of_one(path)?;
        return Ok(vec![path.to_owned()]);
    }
    let names = inside(path);
    if names.len() < 2 {
        return Err(OpenError::NotARun { path: path.display().to_string(), reason: folder::foreign(path) });
    }
    expect_few(path, &names)?;
    let paths: Vec<PathBuf> = names.iter().map(|name| path.join(name)).collect();
    let known = |(path, name): (&PathBuf, &String)| {
        let mut folder = Folder::new(path.clone(), name);
        folder.info = folder::read_info(path).0;
        folder
    };
    expect_one_job(path, &paths.iter().zip(&names).map(known).collect::<Vec<_>>())?;
    Ok(paths)
}

/// Why the runs in `path` are not opened as one.
pub(super) fn refusal(path: &Path, why: &str) -> OpenError {
    OpenError::NotARun {
        path: path.display().to_string(),
        reason: format!(
            "not a FlexModel run, and the runs in it are not the nodes of one job: {why}; open one of them"
        ),
    }
}

/// Refuses more nodes than a job has.
pub(super) fn expect_few(path: &Path, names: &[String]) -> Result<(), OpenError> {
    if names.len() > NODES {
        return Err(refusal(path, &format!("it holds more than {NODES}")));
    }
    Ok(())
}

/// Refuses runs that are not of one job, by what `run.json` says of each: a folder of a hundred other runs is refused
/// without reading them.
pub(super) fn expect_one_job(path: &Path, folders: &[Folder]) -> Result<(), OpenError> {
    let unknown = RunInfo::default();
    let infos: Vec<(&str, &RunInfo)> =
        folders.iter().map(|folder| (folder.name.as_str(), folder.info.as_ref().unwrap_or(&unknown))).collect();
    same_job(&infos).map_err(|why| refusal(path, &why))
}

/// Why these are not the runs of one job's nodes. One that no rank has attached to (yet) says nothing.
fn same_job(infos: &[(&str, &RunInfo)]) -> Result<(), String> {
    let mut known = infos.iter().filter(|(_, info)| info.world > 0);
    let Some((first, a)) = known.next() else { return Err("no rank has attached to any of them".into()) };
    if a.world < 2 {
        return Err(format!("{first} is a run of one process"));
    }
    for (name, b) in known {
        let fields = [
            ("a world of", a.world.to_string(), b.world.to_string()),
            ("the hooks", a.hooks.clone(), b.hooks.clone()),
            ("torch", a.torch.clone(), b.torch.clone()),
            ("Python", a.python.clone(), b.python.clone()),
        ];
        if let Some((what, x, y)) = fields.into_iter().find(|(_, x, y)| x != y) {
            return Err(format!("{first} has {what} {} and {name} {}", text::clip(&x), text::clip(&y)));
        }
    }
    Ok(())
}

/// What is true of the job.
pub(super) fn joined(infos: Vec<RunInfo>, records: u64) -> RunInfo {
    let mut all = RunInfo::default();
    let mut said = HashSet::new();
    let (mut nodes, mut finished): (Vec<String>, Vec<Option<u64>>) = (Vec::new(), Vec::new());
    let mut codes: Vec<Option<i32>> = Vec::new();
    for info in infos {
        if all.world == 0 {
            all = RunInfo {
                started_ns: all.started_ns,
                totals: all.totals,
                models: all.models,
                notices: all.notices,
                ..info.clone()
            };
        }
        if all.command.is_empty() {
            all.command = info.command;
        }
        all.started_ns = if all.started_ns == 0 { info.started_ns } else { all.started_ns.min(info.started_ns) };
        codes.push(info.exit_code);
        finished.push(info.finished_ns);
        nodes.push(info.node);
        info.models.into_iter().for_each(|model| add_model(&mut all.models, model));
        all.owners.extend(info.owners);
        for notice in info.notices {
            if said.insert(notice.clone()) {
                all.notices.push(notice);
            }
        }
        let (sum, one) = (&mut all.totals, info.totals);
        *sum = Totals {
            records: 0,
            parts: sum.parts.saturating_add(one.parts),
            bytes: sum.bytes.saturating_add(one.bytes),
            dropped: sum.dropped.saturating_add(one.dropped),
            refused: sum.refused.saturating_add(one.refused),
            divergences: sum.divergences.saturating_add(one.divergences),
        };
    }
    // The job failed where one node did, and went well where all are known to have.
    let failed = codes.iter().copied().find(|code| code.is_some_and(|code| code != 0));
    all.exit_code = failed.unwrap_or_else(|| codes.iter().copied().min().flatten());
    nodes.dedup();
    all.node = nodes.join(", ");
    all.finished_ns = finished.into_iter().collect::<Option<Vec<u64>>>().and_then(|all| all.into_iter().max());
    all.totals.records = records;
    all
}

/// A node of a pipeline may know a part of the model only.
fn add_model(models: &mut Vec<ModelInfo>, model: ModelInfo) {
    match models.iter_mut().find(|known| known.model == model.model) {
        None => models.push(model),
        Some(known) => _ = known.add(model.modules.iter().cloned(), usize::MAX),
    }
}

impl Run {
    /// The folders that its files are in: its own, or one a node, each with its name.
    pub fn folders(&self) -> Vec<(String, PathBuf)> {
        match self.nodes.is_empty() {
            true => vec![(String::new(), self.path.clone())],
            false => self.nodes.iter().map(|name| (name.clone(), self.path.join(name))).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_code_of_several_nodes_is_unknown_where_that_of_one_is() {
        let of = |codes: &[Option<i32>]| {
            let info = |&exit_code: &Option<i32>| RunInfo { world: 2, exit_code, ..RunInfo::default() };
            joined(codes.iter().map(info).collect(), 0).exit_code
        };
        for unknown in [&[Some(0), None][..], &[None, Some(0)], &[Some(0), None, Some(0)], &[None, None]] {
            assert_eq!(of(unknown), None, "{unknown:?}");
        }
        assert_eq!(of(&[Some(0), Some(0)]), Some(0));
        for failed in [[Some(0), Some(3)], [Some(3), Some(0)], [None, Some(3)], [Some(3), None]] {
            assert_eq!(of(&failed), Some(3), "{failed:?}");
        }
    }

    #[test]
    fn a_node_that_no_rank_attached_to_says_with_which_code_it_ended() {
        let info = |world, exit_code| RunInfo { world, exit_code: Some(exit_code), ..RunInfo::default() };
        assert_eq!(joined(vec![info(0, 3), info(2, 0)], 0).exit_code, Some(3));
    }
}
