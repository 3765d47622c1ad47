//! Runs of several nodes in one folder: every reading command takes the folder for the run of their job.

mod command;

use std::{fs, path::Path};

use command::{flexmodel, text};
use flexmodel_run::{
    Run,
    format::{FORMAT, Identity, JobId, JobInfo, Line, RUN_FILE, Revision, RunInfo},
    testing::{fixture::*, revision},
};
use tempfile::TempDir;
use wire::{dtype::DType, hooks::Kind, record::Placement};

/// The command's stdout, after it ended with `code`.
fn ends(code: i32, args: &[&str]) -> String {
    let output = flexmodel(args);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

fn refused(args: &[&str]) -> String {
    let output = flexmodel(args);
    let line = text(&output.stderr);
    assert!(!output.status.success() && line.trim_end().lines().count() == 1, "{args:?}: {line}");
    line
}

fn at(dir: &Path) -> &str {
    dir.to_str().unwrap()
}

fn info() -> RunInfo {
    RunInfo {
        format: FORMAT,
        world: 4,
        hooks: "mlp".into(),
        torch: "2.11.0".into(),
        finished_ns: Some(2),
        ..RunInfo::default()
    }
}

fn say(run: &Path, info: &RunInfo) {
    fs::write(run.join(RUN_FILE), serde_json::to_vec(info).unwrap()).unwrap();
}

/// A gradient, whose size tells of the data-parallel size.
fn gradient() -> Identity {
    Identity { kind: Kind::Backward, path: "in[0]".into(), ..id("mlp", 0) }
}

/// What these ranks of four captured: a row of a batch, and a table.
fn node(job: &TempDir, name: &str, ranks: &[u32], table: u8) {
    let mut f = Fixture::default();
    for &rank in ranks {
        let row = f32s(&[rank as f32, 4.0 * rank as f32]);
        f.part(gradient(), DType::Float32, &[1, 2], rank, dp(rank, 4, shard(0)), &row);
        f.part(id("table", 0), DType::UInt8, &[2], rank, dp(rank, 4, Placement::Replicate), &[7, table]);
    }
    put(job, name, f);
}

/// What a rank of two captured in jobs of these groups, which its agent numbers in this order: a row with a value.
fn node_of(job: &TempDir, name: &str, rank: u32, jobs: &[(JobId, &str, f32)]) {
    let mut f = Fixture::default();
    for &(job, group, value) in jobs {
        let info = JobInfo { id: job, group: group.into(), world: 2, ..JobInfo::default() };
        f.line(&Line::Job(info));
        let what = Identity { job, ..id("mlp", 0) };
        f.part(what, DType::Float32, &[1, 1], rank, dp(rank, 2, shard(0)), &f32s(&[value]));
    }
    put(job, name, f);
}

fn put(job: &TempDir, name: &str, f: Fixture) {
    let made = f.finish();
    let place = job.path().join(name);
    fs::create_dir(&place).unwrap();
    for file in fs::read_dir(made.path()).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), place.join(file.file_name())).unwrap();
    }
    say(&place, &info());
}

fn job() -> TempDir {
    let job = tempfile::tempdir().unwrap();
    node(&job, "node-a", &[0, 1], 8);
    node(&job, "node-b", &[2, 3], 8);
    job
}

#[test]
fn ls_and_show_speak_of_the_whole_job() {
    let job = job();
    let out = ends(0, &["ls", at(job.path())]);
    assert!(out.contains("[4, 2]") && out.ends_with("2 records, 40 B, 4 ranks, 2 nodes\n"), "{out}");
    let listing: serde_json::Value = serde_json::from_str(&ends(0, &["ls", at(job.path()), "--json"])).unwrap();
    assert_eq!(listing["nodes"], serde_json::json!(["node-a", "node-b"]));
    let out = ends(0, &["show", at(job.path()), "mlp"]);
    assert!(out.contains("float32 [4, 2]") && out.contains("whole, from 4 ranks") && out.contains("max 12 "), "{out}");
}

/// Agents number jobs as they met them, and each may tell of a revision.
#[test]
fn a_revision_that_several_nodes_tell_of_is_one() {
    let job = tempfile::tempdir().unwrap();
    let numbers = |number| JobId { job: number, attempt: 0 };
    for (name, rank, groups) in [("node-a", 0, ["x", "y"]), ("node-b", 1, ["y", "x"])] {
        let mut f = Fixture::default();
        for (number, group) in (0..).zip(groups) {
            let info = JobInfo { id: numbers(number), group: group.into(), world: 2, ..JobInfo::default() };
            f.line(&Line::Job(info));
            if group == "x" {
                f.line(&Line::Revision(Revision { ranks: rank + 1, ..revision(numbers(number), 3, 7, &["mlp"]) }));
            }
            f.revision = if group == "x" { 3 } else { 0 };
            let what = Identity { job: numbers(number), ..id("mlp", 7) };
            f.part(what, DType::Float32, &[1, 1], rank, dp(rank, 2, shard(0)), &f32s(&[1.0]));
        }
        if rank == 1 {
            f.line(&Line::Revision(revision(numbers(1), 4, 9, &[])));
        }
        put(&job, name, f);
    }
    let run = Run::open(job.path()).unwrap();
    let x = run.jobs.iter().find(|info| info.group == "x").unwrap().id;
    assert_eq!(run.revisions, [revision(x, 3, 7, &["mlp"]), revision(x, 4, 9, &[])]);
    let of = |job: JobId| run.records.iter().find(|record| record.id.job == job).unwrap();
    assert_eq!(run.jobs.iter().filter(|info| of(info.id).revision() == 3).map(|info| info.id).collect::<Vec<_>>(), [x]);
    let out = ends(0, &["ls", at(job.path())]);
    assert!(out.contains(&format!("job {}, attempt 0, revision 3 from step 7 on: mlp\n", x.job)), "{out}");
    assert!(ends(0, &["verify", at(job.path())]).starts_with("ok: 2 records"));
}

#[test]
fn one_node_alone_is_still_read_as_what_it_is() {
    let job = job();
    let output = flexmodel(&["ls", at(&job.path().join("node-b"))]);
    assert!(text(&output.stderr).contains("no part from dp 0 of 4; dp 1 of 4"), "{}", text(&output.stderr));
    let lone = tempfile::tempdir().unwrap();
    node(&lone, "node-a", &[0, 1], 8);
    assert!(refused(&["ls", at(lone.path())]).contains("there is one in it, "));
}

#[test]
fn a_job_of_two_nodes_is_certified_and_exported() {
    let job = job();
    let mut f = Fixture::default();
    let rows: Vec<f32> = (0..4).flat_map(|rank| [rank as f32 / 4.0, rank as f32]).collect();
    f.part(gradient(), DType::Float32, &[4, 2], 0, Vec::new(), &f32s(&rows));
    f.part(id("table", 0), DType::UInt8, &[2], 0, Vec::new(), &[7, 8]);
    let reference = f.finish();
    let out = ends(0, &["certify", at(job.path()), at(reference.path()), "--exact"]);
    assert!(out.contains("4 in the run, 1 in the reference") && out.contains("2 equal"), "{out}");
    let dest = job.path().join("x.pt");
    assert!(ends(0, &["export", at(job.path()), "--to", "torch", at(&dest)]).starts_with("2 tensors"));
}

#[test]
fn verify_checks_every_nodes_files_and_names_the_node() {
    let job = job();
    assert_eq!(ends(0, &["verify", at(job.path())]), "ok: 2 records, 8 parts, 40 bytes checked\n");
    ends(0, &["ls", at(job.path())]);
    let shard = job.path().join("node-b/shard-00000.safetensors");
    let sound = fs::read(&shard).unwrap();
    let mut bytes = sound.clone();
    bytes[flexmodel_run::format::HEADER_SPACE as usize] ^= 1;
    fs::write(&shard, bytes).unwrap();
    let out = ends(1, &["verify", at(job.path())]);
    assert!(
        out.starts_with("node-b/shard-00000.safetensors, mlp:backward:in[0]") && out.contains("of rank 2"),
        "{out}"
    );
    assert_eq!(out.lines().count(), 2, "{out}");
    let mut bytes = sound.clone();
    bytes.push(0);
    fs::write(&shard, bytes).unwrap();
    let out = ends(1, &["verify", at(job.path())]);
    assert!(out.contains("node-b/shard-00000.safetensors: ") && out.contains("as when it was sealed"), "{out}");
    fs::write(&shard, sound).unwrap();
    fs::write(job.path().join("node-a").join(RUN_FILE), "{").unwrap();
    assert!(ends(1, &["verify", at(job.path())]).contains("node-a/run.json: damaged"));
}

#[test]
fn replicas_of_two_nodes_that_differ_are_a_finding_and_no_damage() {
    let job = tempfile::tempdir().unwrap();
    node(&job, "node-a", &[0, 1], 8);
    node(&job, "node-b", &[2, 3], 9);
    let output = flexmodel(&["ls", at(job.path())]);
    assert!(text(&output.stdout).contains("2 divergent"), "{}", text(&output.stdout));
    let output = flexmodel(&["verify", at(job.path())]);
    assert!(output.status.success(), "{}", text(&output.stdout));
    assert!(text(&output.stderr).contains("ranks 0 and 2 hold replicas that differ"), "{}", text(&output.stderr));
}

#[test]
fn runs_of_several_jobs_are_refused_in_one_line_that_says_why() {
    let job = job();
    let other = job.path().join("node-b");
    let changes: [(RunInfo, &str); 4] = [
        (RunInfo { world: 8, ..info() }, "node-a has a world of 4 and node-b 8"),
        (RunInfo { hooks: "attn".into(), ..info() }, "node-a has the hooks mlp and node-b attn"),
        (RunInfo { torch: "2.15.0".into(), ..info() }, "node-a has torch 2.11.0 and node-b 2.15.0"),
        (RunInfo { format: 99, ..info() }, "format 99"),
    ];
    for (info, why) in changes {
        say(&other, &info);
        for command in ["ls", "verify"] {
            let line = refused(&[command, at(job.path())]);
            assert!(line.contains(why), "{line}");
        }
    }
    let twice = tempfile::tempdir().unwrap();
    node(&twice, "first", &[2, 0, 1], 8);
    node(&twice, "second", &[2, 1, 3], 8);
    assert!(refused(&["ls", at(twice.path())]).contains("first and second both have rank 1; open one of them"));
}

/// Whose agents met the jobs in another order, and one of them alone saw that ranks were started again.
#[test]
fn jobs_of_two_nodes_are_joined_by_their_groups() {
    let of = |job, attempt| JobId { job, attempt };
    let job = tempfile::tempdir().unwrap();
    node_of(&job, "node-a", 0, &[(of(0, 0), "x", 1.0), (of(0, 1), "y", 2.0), (of(1, 0), "z", 3.0)]);
    node_of(&job, "node-b", 1, &[(of(0, 0), "z", 30.0), (of(1, 0), "x", 10.0), (of(2, 0), "y", 20.0)]);
    let run = Run::open(job.path()).unwrap();
    let found: Vec<_> = run
        .records
        .iter()
        .map(|record| (record.id.job.job, record.id.job.attempt, run.whole(record).unwrap().bytes.to_vec()))
        .collect();
    let rows = |a: f32, b: f32| f32s(&[a, b]);
    assert_eq!(found, [(0, 0, rows(1.0, 10.0)), (0, 1, rows(2.0, 20.0)), (1, 0, rows(3.0, 30.0))]);
    assert_eq!(run.jobs.iter().map(|info| (info.id, info.world)).collect::<Vec<_>>().len(), 3);
    assert!(ends(0, &["show", at(job.path()), "mlp"]).contains("max 30 "), "the newest");
    assert!(ends(0, &["show", at(job.path()), "mlp", "--job", "0"]).contains("max 20 "), "its last attempt");
    assert!(ends(0, &["show", at(job.path()), "mlp", "--job", "0", "--attempt", "0"]).contains("max 10 "));
    let out = ends(0, &["ls", at(job.path())]);
    assert!(out.starts_with("job  attempt  module") && out.contains("2 jobs, 3 attempts, "), "{out}");
    ends(0, &["verify", at(job.path())]);
    let strangers = tempfile::tempdir().unwrap();
    node_of(&strangers, "first", 0, &[(of(0, 0), "x", 1.0)]);
    node_of(&strangers, "second", 0, &[(of(0, 0), "y", 2.0)]);
    assert!(refused(&["ls", at(strangers.path())]).contains("first and second both have rank 0"));
}

#[test]
fn a_shard_of_another_folder_is_never_opened() {
    let job = job();
    let manifest = job.path().join("node-a/manifest.jsonl");
    let lines = fs::read_to_string(&manifest).unwrap();
    let first = lines.lines().next().unwrap();
    let rec = first.split_once("\"rec\":").unwrap().1.strip_suffix('}').unwrap();
    for name in ["../node-b/shard-00000", "node-b/shard-00000", "/shard-00000"] {
        let hostile = rec.replace("shard-00000", name);
        fs::write(&manifest, line_of(&hostile)).unwrap();
        let out = ends(1, &["verify", at(job.path())]);
        assert!(out.contains("is not the name of a shard"), "{out}");
    }
}
