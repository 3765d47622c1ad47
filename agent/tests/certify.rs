//! `flexmodel certify` on run directories made by hand: every verdict, and how it ends.

use std::{
    fs,
    process::{Command, Output},
};

use flexmodel_run::{
    format::{Identity, Line},
    testing::fixture::*,
};
use tempfile::TempDir;
use wire::{
    dtype::DType,
    hooks::Kind,
    loss_scale::LossScale,
    record::{Placement, Sliced},
};

fn certify(run: &TempDir, reference: &TempDir, more: &[&str]) -> Output {
    let paths = [run.path(), reference.path()];
    Command::new(env!("CARGO_BIN_EXE_flexmodel")).arg("certify").args(paths).args(more).output().unwrap()
}

/// The command's stdout, after it ended as expected.
fn ends(code: i32, output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{out}{err}");
    out.into_owned()
}

fn certified(run: &TempDir, reference: &TempDir, more: &[&str]) -> String {
    ends(0, &certify(run, reference, more))
}

fn refused(run: &TempDir, reference: &TempDir, more: &[&str]) -> String {
    ends(1, &certify(run, reference, more))
}

fn json(code: i32, run: &TempDir, reference: &TempDir) -> serde_json::Value {
    serde_json::from_str(&ends(code, &certify(run, reference, &["--json"]))).unwrap()
}

fn of(kind: Kind, module: &str) -> Identity {
    let path = if matches!(kind, Kind::Backward | Kind::ForwardPre) { "in[0]" } else { "out" };
    Identity { kind, path: path.into(), ..id(module, 0) }
}

const ROWS: [[f32; 2]; 2] = [[1.0, -2.0], [3.0, 0.5]];

/// Records of one process: an output and a gradient of `layers.0.mlp`, and integers.
fn one_process(f: &mut Fixture, change: f32) {
    let rows = [ROWS[0], [ROWS[1][0], ROWS[1][1] + change]].concat();
    f.part(id("layers.0.mlp", 0), DType::Float32, &[2, 2], 0, Vec::new(), &f32s(&rows));
    f.part(of(Kind::Backward, "layers.0.mlp"), DType::Float32, &[2, 2], 0, Vec::new(), &f32s(&ROWS.concat()));
    f.part(of(Kind::ForwardPre, ""), DType::UInt8, &[2], 0, Vec::new(), &[7, 8]);
}

/// The same from two ranks: each has its rows, gradients are twice as large, and the integers are replicas.
fn two_ranks() -> Fixture {
    let mut f = Fixture::default();
    for rank in [1, 0] {
        let (row, place) = (ROWS[rank as usize], || dp(rank, 2, shard(0)));
        f.part(id("layers.0.mlp", 0), DType::Float32, &[1, 2], rank, place(), &f32s(&row));
        let double = f32s(&row.map(|x| 2.0 * x));
        f.part(of(Kind::Backward, "layers.0.mlp"), DType::Float32, &[1, 2], rank, place(), &double);
        f.part(of(Kind::ForwardPre, ""), DType::UInt8, &[2], rank, dp(rank, 2, Placement::Replicate), &[7, 8]);
    }
    f
}

fn reference(change: f32) -> TempDir {
    let mut f = Fixture::default();
    one_process(&mut f, change);
    f.finish()
}

#[test]
fn parts_of_two_ranks_are_certified_against_one_process() {
    let out = certified(&two_ranks().finish(), &reference(0.0), &["--exact"]);
    assert!(out.contains("1 gradient divided by the data-parallel size before comparison: 2 in the run, 1 in the"));
    assert_eq!(out.lines().last(), Some("certified: 3 records, 3 equal, 0 close"), "{out}");
    let row = out.lines().find(|line| line.starts_with("backward")).unwrap();
    assert_eq!(row.split_whitespace().collect::<Vec<_>>(), ["backward", "float32", "1", "1", "0", "0", "0", "0"]);
    assert!(!out.contains("worst"), "{out}");
}

#[test]
fn parameters_and_their_gradients_are_never_divided() {
    let run = |ranks: u32| {
        let mut f = Fixture::default();
        for rank in 0..ranks {
            for kind in [Kind::Param, Kind::Grad] {
                let axes = if ranks > 1 { dp(rank, ranks, Placement::Replicate) } else { Vec::new() };
                f.part(of(kind, "w"), DType::Float32, &[1], rank, axes, &f32s(&[3.0]));
            }
        }
        f.finish()
    };
    let out = certified(&run(2), &run(1), &["--exact"]);
    assert!(!out.contains("divided") && out.contains("2 equal"), "{out}");
}

#[test]
fn errors_are_close_within_the_types_tolerance_and_named_beyond_it() {
    let run = two_ranks().finish();
    let near = reference(2e-6);
    assert!(certified(&run, &near, &[]).ends_with("certified: 3 records, 2 equal, 1 close\n"));
    for (reference, more) in [(&near, &["--exact"][..]), (&near, &["--atol", "0"]), (&reference(0.25), &[])] {
        let out = refused(&run, reference, more);
        assert!(out.contains("different: 1 record\n  layers.0.mlp:forward:out@model0.step0"), "{out}");
        assert!(
            out.contains("worst: layers.0.mlp:forward:out@model0.step0.micro0.call0, float32 [2, 2], at [1, 1]: 0.5")
        );
        assert!(out.ends_with("not certified: 1 different (3 records, 2 equal, 0 close)\n"), "{out}");
    }
    let out = refused(&run, &reference(0.25), &[]);
    assert!(
        out.contains(": 0.5 and 0.75 in the reference, error 0.25 (rtol 1.300e-6, atol 1.000e-5); 1 of 4 elements")
    );
    assert!(certified(&run, &reference(0.25), &["--rtol", "0.4"]).contains("1 close"));
    let found = json(1, &run, &reference(0.25));
    assert_eq!((&found["same"], &found["worst"]["error"]), (&false.into(), &0.25.into()));
    assert_eq!(found["worst"]["index"], serde_json::json!([1, 1]));
    assert_eq!(found["divided"][0], serde_json::json!({"run_dp_size": 2, "reference_dp_size": 1, "records": 1}));
    let forward = found["rows"].as_array().unwrap().iter().find(|row| row["kind"] == "forward").unwrap();
    assert_eq!((&forward["max_abs_error"], &forward["different"]), (&0.25.into(), &1.into()));
}

#[test]
fn a_slice_is_held_against_the_same_slice() {
    let run = |by: &str| {
        let mut f = Fixture::default();
        f.slice = (!by.is_empty()).then(|| Sliced { by: by.into(), of: vec![9], crc: None });
        f.part(id("w", 0), DType::Float32, &[1], 0, Vec::new(), &f32s(&[3.0]));
        f.finish()
    };
    assert!(certified(&run("[0]"), &run("[0]"), &["--exact"]).contains("1 equal"));
    for (by, words) in [("[1]", "[0] and [1] in the reference"), ("", "[0] and all of it in the reference")] {
        let out = refused(&run("[0]"), &run(by), &[]);
        assert!(out.contains(words), "{out}");
    }
}

#[test]
fn what_one_run_alone_has_is_a_mismatch_on_either_side() {
    let mut more = Fixture::default();
    one_process(&mut more, 0.0);
    for step in 1..8 {
        more.part(id("layers.0.mlp", step), DType::UInt8, &[1], 0, Vec::new(), &[1]);
    }
    let (more, fewer) = (more.finish(), reference(0.0));
    let out = refused(&fewer, &more, &[]);
    assert!(
        out.contains("missing, only in the reference: 7 records\n  layers.0.mlp:forward:out@model0.step1."),
        "{out}"
    );
    assert!(out.contains("  and 2 more\n") && out.contains("not certified: 7 missing (3 records, 3 equal"), "{out}");
    let out = refused(&more, &fewer, &[]);
    assert!(out.contains("extra, only in the run: 7 records") && out.contains("not certified: 7 extra"), "{out}");
    assert_eq!(json(1, &more, &fewer)["extra"].as_array().unwrap().len(), 7);
    certified(&more, &fewer, &["--step", "0"]);
}

#[test]
fn micro_call_repeat_train_and_group_tell_records_apart_or_not() {
    let one = |change: &dyn Fn(&mut Identity), group: &str| {
        let mut f = Fixture::default();
        let mut id = id("m", 0);
        change(&mut id);
        f.part(id, DType::UInt8, &[1], 0, Vec::new(), &[1]);
        let line = String::from_utf8(f.lines.clone()).unwrap();
        let rec = line.split_once("\"rec\":").unwrap().1.trim_end().strip_suffix('}').unwrap();
        f.lines = line_of(&rec.replace("\"group\":\"\"", &format!("\"group\":\"{group}\"")));
        f.finish()
    };
    let plain = one(&|_| {}, "");
    certified(&plain, &one(&|_| {}, "mine"), &[]);
    let changes: [&dyn Fn(&mut Identity); 6] = [
        &|id| id.micro = 1,
        &|id| id.call = 1,
        &|id| id.repeat = 1,
        &|id| id.train = false,
        &|id| id.model = 1,
        &|id| id.path = "out[0]".into(),
    ];
    for change in changes {
        assert!(refused(&plain, &one(change, ""), &[]).contains("1 missing, 1 extra"));
    }
}

#[test]
fn another_shape_or_dtype_is_a_mismatch_with_both_named() {
    let one = |dtype, shape: &[u64]| {
        let mut f = Fixture::default();
        f.part(id("m", 0), dtype, shape, 0, Vec::new(), &[0; 4]);
        f.finish()
    };
    let reference = one(DType::UInt8, &[4]);
    let out = refused(&one(DType::UInt8, &[2, 2]), &reference, &[]);
    assert!(out.contains("uint8 [2, 2] and uint8 [4] in the reference"), "{out}");
    let out = refused(&one(DType::Int8, &[4]), &reference, &[]);
    assert!(out.contains("int8 [4] and uint8 [4] in the reference"), "{out}");
    assert!(out.ends_with("not certified: 1 of another shape or dtype (1 record, 0 equal, 0 close)\n"), "{out}");
}

#[test]
fn the_worst_record_is_the_one_furthest_outside_its_tolerance() {
    let run = |error: f32| {
        let mut f = Fixture::default();
        // An error of 1 in 1e6 is a smaller sin than one of 0.01 in 1.
        f.part(id("large", 0), DType::Float32, &[1], 0, Vec::new(), &f32s(&[1e6 + 100.0 * error]));
        f.part(id("small", 0), DType::Float32, &[3], 0, Vec::new(), &f32s(&[1.0, 1.0, 1.0 + error]));
        f.finish()
    };
    assert!(
        refused(&run(0.01), &run(0.0), &[])
            .contains("worst: small:forward:out@model0.step0.micro0.call0, float32 [3], at [2]")
    );
    assert!(refused(&run(0.01), &run(0.0), &["--atol", "0.5", "--rtol", "0"]).contains("worst: large:"));
}

#[test]
fn gradients_far_below_the_absolute_tolerance_are_not_close_for_that() {
    let run = |factor: f32| {
        let mut f = Fixture::default();
        f.part(of(Kind::Backward, "m"), DType::Float32, &[2], 0, Vec::new(), &f32s(&[1e-7 * factor, 2e-7]));
        f.finish()
    };
    assert!(refused(&run(2.0), &run(1.0), &[]).contains("worst: m:backward:in[0]"));
    certified(&run(1.000001), &run(1.0), &[]);
    certified(&run(2.0), &run(1.0), &["--atol", "1e-5"]);
}

/// One gradient of a loss that was scaled.
fn scaled(scale: f64, values: &[f32]) -> TempDir {
    let mut f = Fixture::default();
    f.loss_scale = LossScale(scale);
    f.part(of(Kind::Backward, "m"), DType::Float32, &[values.len() as u64], 0, Vec::new(), &f32s(values));
    f.finish()
}

#[test]
fn gradients_of_losses_that_were_scaled_differently_are_divided() {
    let out = certified(&scaled(4.0, &[8.0, -2.0]), &scaled(0.5, &[1.0, -0.25]), &["--exact"]);
    assert!(out.contains("1 equal"), "{out}");
    refused(&scaled(4.0, &[8.0, -2.0]), &scaled(0.5, &[1.0, -0.5]), &[]);
}

#[test]
fn a_loss_scale_that_nothing_can_be_divided_by_hides_no_difference() {
    for scale in [f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 0.0, -0.0] {
        let (run, other) = (scaled(scale, &[f32::INFINITY, 2.0]), scaled(scale, &[f32::INFINITY, 3.0]));
        certified(&run, &run, &["--exact"]);
        assert!(refused(&run, &other, &[]).contains("1 different"), "{scale}");
        for finite in [&[f32::NAN, f32::NAN][..], &[0.0, 0.0], &[f32::INFINITY, 2.0]] {
            let out = refused(&run, &scaled(1.0, finite), &[]);
            let why = format!("m:backward:in[0]@model0.step0.micro0.call0: the loss was scaled by {scale} in the run");
            assert!(out.contains(&why) && out.contains("1 not comparable"), "{out}");
        }
    }
}

#[test]
fn what_has_no_whole_is_not_comparable_and_says_why() {
    let mut f = two_ranks();
    f.part(id("half", 0), DType::UInt8, &[1], 1, dp(1, 2, shard(0)), &[1]);
    for rank in 0..2 {
        f.part(id("odd", 0), DType::UInt8, &[1], rank, dp(rank, 2, Placement::Unknown), &[rank as u8]);
    }
    let run = f.finish();
    let out = refused(&run, &run, &[]);
    assert!(out.contains("half:forward:out@model0.step0.micro0.call0: in the run, incomplete: no part from dp 0 of 2"));
    assert!(out.contains("odd:forward") && out.contains("is not known"), "{out}");
    assert!(out.ends_with("not certified: 2 not comparable (3 records, 3 equal, 0 close)\n"), "{out}");
    certified(&run, &run, &["--module", "layers.*.mlp", "--module", "(root)"]);
}

/// A run with one record, and another that the job refused.
fn with_refusal(reason: &str) -> TempDir {
    let mut f = Fixture::default();
    let line = {
        let mut other = Fixture::default();
        other.part(id("secret", 0), DType::UInt8, &[1], 0, Vec::new(), &[1]);
        String::from_utf8(other.lines).unwrap()
    };
    f.part(id("m", 0), DType::UInt8, &[1], 0, Vec::new(), &[1]);
    let rec = line.split_once("\"rec\":").unwrap().1.trim_end().strip_suffix('}').unwrap();
    let mut what: serde_json::Value = serde_json::from_str(rec).unwrap();
    what["t"] = "refused".into();
    what["reason"] = reason.into();
    let refusal: Line = serde_json::from_value(what).unwrap();
    f.line(&refusal);
    f.finish()
}

#[test]
fn a_tensor_refused_in_both_runs_is_told_and_one_refused_in_one_is_a_mismatch() {
    let (run, other) = (with_refusal("sparse"), with_refusal("sparse too"));
    let out = certified(&run, &other, &[]);
    assert!(out.contains("refused in both runs: 1 tensor"), "{out}");
    let mut f = Fixture::default();
    f.part(id("m", 0), DType::UInt8, &[1], 0, Vec::new(), &[1]);
    f.part(id("secret", 0), DType::UInt8, &[1], 0, Vec::new(), &[1]);
    let full = f.finish();
    assert!(
        refused(&run, &full, &[]).contains("secret:forward:out@model0.step0.micro0.call0: refused in the run: sparse")
    );
    assert!(refused(&full, &run, &[]).contains("refused in the reference: sparse"));
}

#[test]
fn damage_is_not_comparable() {
    let (run, reference) = (reference(0.0), reference(0.0));
    let path = run.path().join("shard-00000.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    bytes[flexmodel_run::format::HEADER_SPACE as usize] ^= 1;
    fs::write(&path, bytes).unwrap();
    let out = refused(&run, &reference, &[]);
    assert!(out.contains("not comparable: 1 record") && out.contains("have checksum"), "{out}");
}

#[test]
fn bad_use_is_one_line_and_exit_code_2() {
    let (run, empty) = (reference(0.0), tempfile::tempdir().unwrap());
    let cases: [(&TempDir, &TempDir, &[&str], &str); 6] = [
        (&empty, &run, &[], "not a FlexModel run"),
        (&run, &empty, &[], "not a FlexModel run"),
        (&run, &run, &["--module", "none"], "no record of"),
        (&run, &run, &["--rtol", "much"], "'much' is not a tolerance"),
        (&run, &run, &["--rtol=-1"], "'-1' is not a tolerance"),
        (&run, &run, &["--exact", "--atol", "1"], "cannot be used with"),
    ];
    for (a, b, more, words) in cases {
        let output = certify(a, b, more);
        assert_eq!(ends(2, &output), "", "{more:?}");
        let line = String::from_utf8(output.stderr).unwrap();
        assert!(line.contains(words) && line.trim_end().lines().count() == 1, "{line}");
    }
}

#[test]
fn rows_that_ranks_padded_are_certified_where_they_are() {
    let mut f = Fixture::default();
    f.part(id("m", 0), DType::Float32, &[1, 2], 0, dp(0, 2, shard(0)), &f32s(&[1.0, 2.0]));
    f.part(id("m", 0), DType::Float32, &[1, 3], 1, dp(1, 2, shard(0)), &f32s(&[3.0, 4.0, 5.0]));
    let run = f.finish();
    let one = |values: &[f32]| {
        let mut f = Fixture::default();
        f.part(id("m", 0), DType::Float32, &[2, 3], 0, Vec::new(), &f32s(values));
        f.finish()
    };
    // What the one process has where a row has ended is no value of the run's.
    let right = one(&[1.0, 2.0, 9.0, 3.0, 4.0, 5.0]);
    let out = certified(&run, &right, &["--exact"]);
    assert!(out.contains("1 record compared without what would pad rows"), "{out}");
    certified(&right, &run, &["--exact"]);
    certified(&run, &run, &["--exact"]);
    certified(&run, &one(&[9.0, 1.0, 2.0, 3.0, 4.0, 5.0]), &["--exact", "--side", "left"]);
    refused(&run, &right, &["--side", "left"]);
    refused(&run, &one(&[1.0, 2.5, 9.0, 3.0, 4.0, 5.0]), &[]);
    let mut f = Fixture::default();
    f.part(id("m", 0), DType::Float32, &[2, 2], 0, Vec::new(), &f32s(&[1.0, 2.0, 3.0, 4.0]));
    let out = refused(&run, &f.finish(), &[]);
    assert!(out.contains("another shape"), "{out}");
}
