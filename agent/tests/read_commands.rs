//! The reading commands on run directories made by hand: what they print, and how they end.

mod command;

use std::{fs, path::Path};

use command::{flexmodel, text};
use flexmodel_run::{
    format::{JobId, Line},
    testing::{
        fixture::{self, *},
        revision,
    },
};
use tempfile::TempDir;
use wire::{
    dtype::DType,
    hooks::Kind,
    record::{Axis, MICRO, Placement},
};

/// Runs the command, which must succeed; its stdout.
fn ok(args: &[&str]) -> String {
    let output = flexmodel(args);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// Runs the command, which must fail in one line; that line.
fn refused(args: &[&str]) -> String {
    let output = flexmodel(args);
    assert_eq!(output.status.code(), Some(1), "{args:?} did not fail: {}", text(&output.stdout));
    let line = text(&output.stderr);
    assert_eq!(line.trim_end().lines().count(), 1, "{line}");
    line
}

fn json(args: &[&str]) -> serde_json::Value {
    serde_json::from_str(&ok(args)).unwrap()
}

fn at(dir: &TempDir) -> &str {
    dir.path().to_str().unwrap()
}

/// Two ranks, two steps of a batch laid over them, and the model's own output in evaluation.
fn example() -> Fixture {
    let mut f = Fixture::default();
    for step in 0..2 {
        for rank in 0..2u32 {
            f.part(
                id("layers.0.mlp", step),
                DType::Float32,
                &[1, 3],
                rank,
                dp(rank, 2, shard(0)),
                &f32s(&[step as f32, rank as f32, -2.0]),
            );
        }
        f.align();
    }
    let mut root = id("", 1);
    (root.kind, root.train, root.path) = (Kind::ForwardPre, false, "in[0]".into());
    f.part(root, DType::Int64, &[2], 0, Vec::new(), &[1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    f
}

#[test]
fn ls_shows_whole_shapes_and_totals() {
    let dir = example().finish();
    let out = ok(&["ls", at(&dir)]);
    let line = out.lines().find(|l| l.starts_with("layers.0.mlp")).unwrap();
    let cells: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(cells, ["layers.0.mlp", "forward", "out", "0..1", "train", "2", "[2,", "3]", "float32", "48", "B"]);
    assert!(out.contains("(root)") && out.contains("eval"), "{out}");
    assert_eq!(out.lines().last().unwrap(), "3 records, 64 B, 2 ranks");
    let listing = json(&["ls", at(&dir), "--json"]);
    assert_eq!(listing["rows"].as_array().unwrap().len(), 2);
    assert_eq!(listing["rows"][1]["shape"], serde_json::json!([[2, 3], [2, 3]]));
}

#[test]
fn ls_of_a_live_or_killed_run_says_so_and_names_the_missing_rank() {
    let mut f = example();
    f.part(id("layers.0.mlp", 2), DType::Float32, &[1, 3], 1, dp(1, 2, shard(0)), &f32s(&[0.0; 3]));
    f.lines.extend_from_slice(b"{\"crc\":");
    let dir = f.kill();
    let output = flexmodel(&["ls", at(&dir)]);
    assert!(output.status.success());
    assert!(text(&output.stdout).contains("3 (1 incomplete)") && text(&output.stdout).contains("not finished"));
    assert!(text(&output.stderr).contains("dp 0 of 2 (rank 0)"), "{}", text(&output.stderr));
}

#[test]
fn show_takes_the_last_complete_step_and_says_what_else_there_is() {
    let mut f = example();
    f.part(id("layers.0.mlp", 2), DType::Float32, &[1, 3], 1, dp(1, 2, shard(0)), &f32s(&[0.0; 3]));
    let dir = f.kill();
    let out = ok(&["show", at(&dir), "layers.0.mlp"]);
    assert!(out.contains("step 1") && out.contains("float32 [2, 3]") && out.contains("from 2 ranks"), "{out}");
    assert!(out.contains("min -2 "), "{out}");
    assert!(out.contains("2 more:") && out.contains("passed over"), "{out}");
    assert!(!out.contains('\x1b'), "colours in a file");
    assert!(refused(&["show", at(&dir), "layers.0.mlp", "--step", "2"]).contains("rank 0"));
    let part = json(&["show", at(&dir), "layers.0.mlp", "--step", "2", "--rank", "1", "--json"]);
    assert_eq!(part["shape"], serde_json::json!([1, 3]));
    let whole = json(&["show", at(&dir), "layers.0.mlp", "--step", "0", "--json"]);
    assert_eq!(whole["stats"]["absmax"], 2.0);
    assert_eq!(whole["ranks"], serde_json::json!([0, 1]));
    assert_eq!(json(&["show", at(&dir), "(root)", "--json"])["train"], false);
}

#[test]
fn show_counts_ranks_and_not_the_microbatches_that_each_has() {
    let mut f = Fixture::default();
    for (rank, micro) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let axes = [dp(rank, 2, shard(0)), vec![Axis { name: MICRO.into(), ..dp(micro, 2, shard(0)).remove(0) }]];
        f.part(id("mlp", 0), DType::UInt8, &[1], rank, axes.concat(), &[(10 * rank + micro) as u8]);
    }
    let dir = f.finish();
    let whole = ok(&["show", at(&dir), "mlp"]);
    assert!(whole.contains("uint8 [4]") && whole.contains("whole, from 2 ranks\n"), "{whole}");
    let part = ok(&["show", at(&dir), "mlp", "--rank", "1"]);
    assert!(part.contains("uint8 [2]") && part.contains("rank 1's part, of 2 ranks\n"), "{part}");
    assert_eq!(json(&["show", at(&dir), "mlp", "--json"])["ranks"], serde_json::json!([0, 1]));
}

#[test]
fn show_of_what_is_not_there_names_the_nearest() {
    let dir = example().finish();
    assert!(refused(&["show", at(&dir), "layers.0.mpl"]).contains("layers.0.mlp"));
    assert!(refused(&["show", at(&dir), "layers.0.mlp", "--kind", "backward"]).contains("there is kind forward"));
    assert!(refused(&["show", at(&dir), "layers.0.mlp", "--step", "9"]).contains("step 0, 1"));
    let output = flexmodel(&["show", at(&dir), "layers.0.mlp", "--kind", "forwad"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("did you mean forward?"), "{}", text(&output.stderr));
}

#[test]
fn hooks_that_changed_are_listed_and_a_record_says_of_which_it_is() {
    let mut f = example();
    f.revision = 2;
    for rank in 0..2 {
        f.part(id("layers.0.mlp", 2), DType::Float32, &[1, 3], rank, dp(rank, 2, shard(0)), &f32s(&[0.0; 3]));
    }
    f.line(&Line::Revision(revision(JobId::default(), 1, 1, &[])));
    f.line(&Line::Revision(revision(JobId::default(), 2, 2, &["layers.*.mlp", "lm_head:forward\nx\x1b"])));
    let dir = f.finish();
    let out = ok(&["ls", at(&dir)]);
    let cells = |module: &str| {
        let line = out.lines().find(|line| line.starts_with(module)).unwrap();
        line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(cells("layers.0.mlp")[3..6], ["0..2", "0..2", "train"]);
    assert_eq!(cells("(root)")[3..6], ["1", "0", "eval"]);
    let told: Vec<&str> = out.lines().filter(|line| line.starts_with("revision ")).collect();
    let second = "revision 2 from step 2 on: layers.*.mlp; lm_head:forward\\nx\\u{1b}";
    assert_eq!(told, ["revision 1 from step 1 on: no hooks", second]);
    let listing = json(&["ls", at(&dir), "--json"]);
    assert_eq!(listing["revisions"][1]["clauses"][0], serde_json::json!({"id": 1, "text": "layers.*.mlp"}));
    assert_eq!(
        (&listing["rows"][1]["revision"], listing["rows"][0].get("revision")),
        (&serde_json::json!([0, 2]), None)
    );
    let show = |step: &str| ok(&["show", at(&dir), "layers.0.mlp", "--step", step]);
    assert!(
        show("2").contains(", train, revision 2 of the hooks\n") && show("1").contains(", revision 0 of the hooks\n")
    );
    assert_eq!(json(&["show", at(&dir), "layers.0.mlp", "--json"])["revision"], 2);
    let never = example().finish();
    assert!(!ok(&["ls", at(&never)]).contains("revision"));
    assert!(json(&["show", at(&never), "layers.0.mlp", "--json"]).get("revision").is_none());
}

#[test]
fn a_list_of_many_revisions_ends_with_the_newest() {
    let mut f = example();
    (1..=30).for_each(|n| f.line(&Line::Revision(revision(JobId::default(), n, n, &["a"]))));
    let dir = f.finish();
    let out = ok(&["ls", at(&dir)]);
    assert!(out.contains("10 revisions before these; --json lists them\nrevision 11 from step 11 on: a\n"), "{out}");
    assert!(out.contains("revision 30 from step 30 on: a\n"), "{out}");
    assert_eq!(json(&["ls", at(&dir), "--json"])["revisions"].as_array().map(Vec::len), Some(30));
}

#[test]
fn verify_names_a_record_whose_parts_are_of_several_revisions() {
    let mut f = example();
    for rank in 0..2 {
        f.revision = u64::from(rank) + 1;
        f.part(id("mixed", 0), DType::UInt8, &[1], rank, dp(rank, 2, shard(0)), &[1]);
    }
    let out = problems(&f.finish(), |_| {});
    assert!(out.contains("mixed:forward:out") && out.contains("its parts are of revisions 1, 2 of the hooks"), "{out}");
}

#[test]
fn verify_of_a_good_run_counts_what_it_checked() {
    let dir = example().finish();
    assert_eq!(ok(&["verify", at(&dir)]), "ok: 3 records, 5 parts, 64 bytes checked\n");
    assert_eq!(json(&["verify", at(&dir), "--json"])["ok"], true);
    let header = fs::read(dir.path().join("shard-00000.safetensors")).unwrap();
    assert!(safetensors::SafeTensors::deserialize(&header).is_ok(), "the fixture itself is not safetensors");
}

#[test]
fn verify_notes_incomplete_records_of_a_killed_run_and_is_content() {
    let mut f = example();
    f.part(id("layers.0.mlp", 2), DType::Float32, &[1, 3], 1, dp(1, 2, shard(0)), &f32s(&[0.0; 3]));
    let dir = f.kill();
    let output = flexmodel(&["verify", at(&dir)]);
    assert!(output.status.success(), "{}", text(&output.stdout));
    assert!(text(&output.stderr).contains("1 record incomplete"));
}

/// What `verify` prints about a run that something was done to.
fn problems(dir: &TempDir, harm: impl FnOnce(&Path)) -> String {
    harm(dir.path());
    let output = flexmodel(&["verify", at(dir)]);
    assert_eq!(output.status.code(), Some(1), "nothing was found: {}", text(&output.stdout));
    text(&output.stdout)
}

fn edit(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

#[test]
fn verify_names_every_kind_of_damage() {
    let data = flexmodel_run::format::HEADER_SPACE as usize;
    let shard = "shard-00000.safetensors";
    let out = problems(&example().finish(), |p| edit(&p.join(shard), |b| b[data + 13] ^= 4));
    assert!(
        out.contains("shard-00000.safetensors, layers.0.mlp:forward:out@model0.step0") && out.contains("of rank 1"),
        "{out}"
    );
    assert_eq!(out.lines().count(), 2, "{out}");
    let out = problems(&example().finish(), |p| edit(&p.join(shard), |b| b.truncate(data + 70)));
    assert!(out.contains("cut short") && out.contains("as when it was sealed"), "{out}");
    let out = problems(&example().finish(), |p| edit(&p.join(shard), |b| b[8] = b'['));
    assert!(out.contains("its header is not JSON"), "{out}");
    let out = problems(&example().finish(), |p| fs::remove_file(p.join(shard)).unwrap());
    assert!(out.contains("missing"), "{out}");
    let out = problems(&example().finish(), |p| edit(&p.join("manifest.jsonl"), |b| b[40] ^= 1));
    assert!(out.contains("manifest.jsonl line 1: "), "{out}");
    let out = problems(&example().finish(), |p| fs::write(p.join("run.json"), "{").unwrap());
    assert!(out.contains("run.json: damaged"), "{out}");
}

#[test]
fn verify_finds_parts_that_overlap_or_contradict_each_other() {
    let mut f = example();
    let line = text(&f.lines).lines().nth(4).unwrap().to_owned();
    let rec = line.split_once("\"rec\":").unwrap().1.strip_suffix('}').unwrap().to_owned();
    // Two bytes of int64 [1, 2], as a record of its own in the middle of the other.
    let start: u64 = rec.split_once("\"offset\":").unwrap().1.split(',').next().unwrap().parse().unwrap();
    let rec = rec
        .replace("\"in[0]\"", "\"in[1]\"")
        .replace(&format!("\"offset\":{start}"), &format!("\"offset\":{}", start + 7))
        .replace("\"len\":16", "\"len\":2")
        .replace("int64", "uint8");
    let crc = rec.split_once("\"crc\":").unwrap().1.split('}').next().unwrap().to_owned();
    let rec = rec.replace(&format!("\"crc\":{crc}"), &format!("\"crc\":{}", crc32c::crc32c(&[0, 2])));
    f.lines.extend(line_of(&rec));
    f.part(id("odd", 0), DType::UInt8, &[1, 2], 0, dp(0, 2, fixture::shard(0)), &[1, 2]);
    f.part(id("odd", 0), DType::UInt8, &[1, 2], 1, dp(1, 3, fixture::shard(0)), &[1, 2]);
    let out = problems(&f.finish(), |_| {});
    assert!(out.contains("overlap"), "{out}");
    assert!(out.contains("odd:forward:out") && out.contains("different layouts"), "{out}");
    assert_eq!(out.lines().count(), 3, "{out}");
}

#[test]
fn parts_that_only_do_not_go_together_are_no_damage() {
    let mut f = example();
    // Each rank padded its rows to their own longest; and on one of them a tensor looked like its batch.
    f.part(id("padded", 0), DType::UInt8, &[1, 2], 0, dp(0, 2, fixture::shard(0)), &[1, 2]);
    f.part(id("padded", 0), DType::UInt8, &[1, 3], 1, dp(1, 2, fixture::shard(0)), &[1, 2, 3]);
    f.part(id("packed", 0), DType::UInt8, &[2], 0, dp(0, 2, fixture::shard(0)), &[1, 2]);
    f.part(id("packed", 0), DType::UInt8, &[3], 1, dp(1, 2, Placement::Unknown), &[1, 2, 3]);
    let dir = f.finish();
    assert!(ok(&["verify", at(&dir)]).starts_with("ok"));
    let line = refused(&["show", at(&dir), "padded"]);
    assert!(line.contains("its own longest") && line.contains("--rank N"), "{line}");
    assert!(ok(&["ls", at(&dir)]).contains("[2, 2..3]"));
}

#[test]
fn what_is_no_run_is_one_line_in_every_command() {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("x");
    for args in [
        vec!["ls", at(&dir)],
        vec!["show", at(&dir), "m"],
        vec!["verify", at(&dir)],
        vec!["export", at(&dir), "--to", "npy", dest.to_str().unwrap()],
    ] {
        assert!(refused(&args).contains("not a FlexModel run"), "{args:?}");
    }
    let run = example().finish();
    fs::remove_file(run.path().join("manifest.jsonl")).unwrap();
    assert!(refused(&["ls", at(&run)]).contains("copied in part"));
}

#[test]
fn statistics_that_were_kept_alone_are_shown_for_the_whole() {
    let mut f = Fixture::default();
    for rank in 0..2 {
        f.part(id("m", 0), DType::Float32, &[1, 2], rank, dp(rank, 2, fixture::shard(0)), &f32s(&[1.0; 2]));
    }
    let lines = text(&f.lines);
    f.lines.clear();
    for line in lines.lines() {
        let rec = line.split_once("\"rec\":").unwrap().1.strip_suffix('}').unwrap();
        let (head, _) = rec.split_once("\"at\":").unwrap();
        let stats = "{\"count\":2,\"mean\":1.0,\"std\":0.0,\"l2\":1.5,\"absmax\":1.0,\"min\":1.0,\"max\":1.0,\"nan\":0,\"inf\":0,\"zero\":0}";
        f.lines.extend(line_of(&format!("{head}\"at\":null,\"stats\":{stats}}}")));
    }
    let dir = f.finish();
    assert!(ok(&["ls", at(&dir)]).contains("[2, 2]"));
    let out = ok(&["show", at(&dir), "m"]);
    assert!(out.contains("[2, 2]  statistics only") && out.contains("mean 1 "), "{out}");
    assert_eq!(json(&["show", at(&dir), "m", "--json"])["stats"]["count"], 4);
    let dest = dir.path().join("x.pt");
    let export = flexmodel(&["export", at(&dir), "--to", "torch", dest.to_str().unwrap()]);
    assert!(text(&export.stderr).contains("statistics only"), "{}", text(&export.stderr));
}
