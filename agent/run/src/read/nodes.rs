//! Runs of several nodes, read as the one job that they are.
//!
//! Every node's agent writes a run of its own, with the parts of its ranks. A folder that is no run and holds such runs
//! (`runs/x/node-a`, `runs/x/node-b`) is read as the run of the whole job: parts with the same identity are one record's,
//! whichever node they came from. A shard is then named with its node's folder (`node-a/shard-00000`).

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
};

use super::{Lost, OpenError, Problem, Record, Run, Shards, layout, read_info};
use crate::{
    format::{Identity, MANIFEST_FILE, ModelInfo, RUN_FILE, RunInfo, Totals},
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

/// Opens the runs `names` (at least two) in `path` as one. Refuses those that are not of one job.
pub fn open(path: &Path, names: Vec<String>) -> Result<Run, OpenError> {
    let refuse = |why: String| OpenError::NotARun {
        path: path.display().to_string(),
        reason: format!(
            "not a FlexModel run, and the runs in it are not the nodes of one job: {why}; open one of them"
        ),
    };
    if names.len() > NODES {
        return Err(refuse(format!("it holds more than {NODES}")));
    }
    // What `run.json` says first: a folder of a hundred other runs is refused without reading them.
    // Damage is reported when the run itself is opened.
    let info = |name: &String| read_info(&path.join(name), &mut Vec::new()).unwrap_or_default();
    let infos: Vec<(&str, RunInfo)> = names.iter().map(|name| (name.as_str(), info(name))).collect();
    same_job(&infos).map_err(refuse)?;
    let mut all = Run {
        path: path.to_owned(),
        nodes: names.clone(),
        info: RunInfo::default(),
        records: Vec::new(),
        replaced: Vec::new(),
        lost: Lost::default(),
        sealed: Vec::new(),
        problems: Vec::new(),
        notes: Vec::new(),
        shards: Shards::of_nodes(path, &names),
        ranks: BTreeMap::new(),
    };
    let mut owners: BTreeMap<u32, String> = BTreeMap::new();
    let mut by_id: HashMap<Identity, usize> = HashMap::new();
    let mut infos = Vec::new();
    for name in &names {
        let mut run = Run::open_one(&path.join(name))?;
        for rank in run.records.iter().flat_map(|r| &r.parts).map(|p| p.what.rank) {
            let owner = owners.entry(rank).or_insert_with(|| name.clone());
            if owner != name {
                return Err(refuse(format!("{owner} and {name} both have rank {rank}")));
            }
        }
        infos.push(std::mem::take(&mut run.info));
        all.take_node(name, run, &mut by_id);
    }
    all.info = joined(infos, all.records.len() as u64);
    all.settle();
    all.compare_replicas();
    Ok(all)
}

/// Why these are not the runs of one job's nodes. One that no rank has attached to (yet) says nothing.
fn same_job(infos: &[(&str, RunInfo)]) -> Result<(), String> {
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
fn joined(infos: Vec<RunInfo>, records: u64) -> RunInfo {
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
    /// Adds what node `name` wrote.
    fn take_node(&mut self, name: &str, run: Run, by_id: &mut HashMap<Identity, usize>) {
        let here = |shard: &mut String| *shard = format!("{name}/{shard}");
        for mut record in run.records {
            record.parts.iter_mut().filter_map(|p| p.at.as_mut()).for_each(|at| here(&mut at.shard));
            match by_id.get(&record.id) {
                Some(&at) => self.records[at].parts.append(&mut record.parts),
                None => {
                    by_id.insert(record.id.clone(), self.records.len());
                    self.records.push(record);
                }
            }
        }
        for mut part in run.replaced {
            part.at.iter_mut().for_each(|at| here(&mut at.shard));
            self.replaced.push(part);
        }
        self.sealed.extend(run.sealed.into_iter().map(|(stem, len)| (format!("{name}/{stem}"), len)));
        self.lost.refused.extend(run.lost.refused);
        self.lost.divergences.extend(run.lost.divergences);
        self.lost.dropped.extend(run.lost.dropped);
        self.problems.extend(run.problems.into_iter().map(|p| p.within(name)));
        self.notes.extend(run.notes.into_iter().map(|note| format!("{name}: {note}")));
        run.ranks.into_iter().for_each(|(place, rank)| _ = self.ranks.entry(place).or_insert(rank));
    }

    /// No agent saw replicas of two nodes side by side: it is noticed here where they differ.
    fn compare_replicas(&mut self) {
        let mut found = Vec::new();
        let known: HashSet<_> = self.lost.divergences.iter().map(|(what, _)| (&what.id, what.rank)).collect();
        for Record { parts, .. } in &mut self.records {
            parts.sort_by_key(|p| p.what.rank);
            for (first, other) in layout::differing_replicas(parts) {
                let (what, against) = (&parts[other].what, parts[first].what.rank);
                if !known.contains(&(&what.id, what.rank)) {
                    found.push((what.clone(), against));
                }
            }
        }
        let all = &mut self.info.totals.divergences;
        *all = all.saturating_add(found.len() as u64);
        self.lost.divergences.extend(found);
    }

    /// The folders that its files are in: its own, or one a node, each with its name.
    pub fn folders(&self) -> Vec<(String, PathBuf)> {
        match self.nodes.is_empty() {
            true => vec![(String::new(), self.path.clone())],
            false => self.nodes.iter().map(|name| (name.clone(), self.path.join(name))).collect(),
        }
    }
}

impl Problem {
    /// The same problem, of a node's run.
    pub fn within(self, node: &str) -> Self {
        Self { place: format!("{node}/{}", self.place), what: self.what }
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
