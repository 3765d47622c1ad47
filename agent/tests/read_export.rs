//! Exports, read back by the programs they are for: NumPy and torch, in the checkout's environment.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use flexmodel_run::testing::fixture::*;
use tempfile::TempDir;
use wire::dtype::DType;

fn export(run: &TempDir, to: &str, dest: &Path, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_flexmodel"))
        .arg("export")
        .arg(run.path())
        .args(["--to", to])
        .arg(dest)
        .args(more)
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Runs a script in the checkout's Python; its stdout.
fn python(script: &str, arg: &Path) -> String {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv/bin/python");
    assert!(python.is_file(), "this test needs torch: run scripts/setup first");
    let output = Command::new(python).args(["-c", script]).arg(arg).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout)
}

/// Every element type that torch can save, two elements each, as two ranks' halves.
fn every_type() -> (TempDir, Vec<DType>) {
    let types: Vec<DType> = DType::ALL.to_vec();
    let mut f = Fixture::default();
    for (n, &dtype) in types.iter().enumerate() {
        for rank in 0..2u8 {
            let bytes: Vec<u8> =
                (0..dtype.size() as u8).map(|b| if dtype == DType::Bool { rank } else { 1 + rank + b }).collect();
            f.part(id(&format!("m{n}"), 0), dtype, &[1], u32::from(rank), dp(u32::from(rank), 2, shard(0)), &bytes);
        }
        f.align();
    }
    f.part(id("empty", 0), DType::Float32, &[0, 3], 0, Vec::new(), &[]);
    f.part(id("scalar", 0), DType::Float8E4M3Fn, &[], 0, Vec::new(), &[0x38]);
    f.part(id("matrix", 0), DType::Float32, &[2, 3], 0, Vec::new(), &f32s(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
    (f.finish(), types)
}

#[test]
fn torch_loads_what_was_exported_with_every_type_and_byte() {
    let (run, types) = every_type();
    let out = tempfile::tempdir().unwrap();
    let dest = out.path().join("run.pt");
    let done = export(&run, "torch", &dest, &[]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let script = "
import sys, torch, zipfile
d = torch.load(sys.argv[1], weights_only=True)
for name, t in d.items():
    raw = bytes(t.untyped_storage()) if t.numel() else b''
    print(name.split(':')[0], str(t.dtype)[6:], list(t.shape), raw.hex() or '-', t.is_contiguous())
assert zipfile.ZipFile(sys.argv[1]).testzip() is None
m = torch.load(sys.argv[1], weights_only=True, mmap=True)
assert m['matrix:forward:out@model0.step0.micro0.call0'].tolist() == [[1, 2, 3], [4, 5, 6]]
torch.save(d, sys.argv[1] + '.again')
";
    let lines: Vec<String> = python(script, &dest).lines().map(str::to_owned).collect();
    assert_eq!(lines.len(), types.len() + 3);
    for (n, dtype) in types.iter().enumerate() {
        let bytes: String = (0..2u8)
            .flat_map(|rank| {
                (0..dtype.size() as u8).map(move |b| if *dtype == DType::Bool { rank } else { 1 + rank + b })
            })
            .map(|b| format!("{b:02x}"))
            .collect();
        let line = format!("m{n} {} [2] {bytes} True", dtype.name());
        assert!(lines.contains(&line), "{line} is not among {lines:?}");
    }
    assert!(lines.contains(&"empty float32 [0, 3] - True".to_owned()), "{lines:?}");
    assert!(lines.contains(&"scalar float8_e4m3fn [] 38 True".to_owned()), "{lines:?}");
}

#[test]
fn numpy_loads_what_was_exported_and_the_true_type_is_written_down() {
    let (run, types) = every_type();
    let out = tempfile::tempdir().unwrap();
    let dest = out.path().join("arrays");
    let done = export(&run, "npy", &dest, &[]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert!(text(&done.stderr).contains("npy has no bfloat16: written as <u2"));
    let script = "
import json, sys, numpy as np
for r in json.load(open(sys.argv[1] + '/manifest.json'))['records']:
    a = np.load(f\"{sys.argv[1]}/{r['file']}\")
    print(r['module'], r['dtype'], a.dtype.str, list(a.shape), a.tobytes().hex() or '-')
";
    let lines: Vec<String> = python(script, &dest).lines().map(str::to_owned).collect();
    assert_eq!(lines.len(), types.len() + 3);
    for line in
        ["m3 bfloat16 <u2 [2] 01020203", "empty float32 <f4 [0, 3] -", "m20 complex32 <f2 [2, 2] 0102030402030405"]
    {
        assert!(lines.contains(&line.to_owned()), "{line} is not among {lines:?}");
    }
    assert!(lines.iter().any(|l| l.starts_with("matrix float32 <f4 [2, 3] 0000803f")), "{lines:?}");
}

#[test]
fn what_is_there_is_not_written_over_unless_asked() {
    let (run, _) = every_type();
    let out = tempfile::tempdir().unwrap();
    let (file, folder) = (out.path().join("run.pt"), out.path().join("arrays"));
    fs::write(&file, "mine").unwrap();
    fs::create_dir(&folder).unwrap();
    let refusal = |to: &str, dest: &PathBuf| {
        let done = export(&run, to, dest, &[]);
        assert_eq!(done.status.code(), Some(1));
        text(&done.stderr)
    };
    assert!(refusal("torch", &file).contains("--force"));
    assert!(refusal("torch", &folder).contains("is a folder"));
    assert!(refusal("npy", &file).contains("is a file"));
    assert!(refusal("torch", &out.path().join("no/run.pt")).contains("no such folder"));
    for format in ["hf", "zarr"] {
        let line = refusal(format, &out.path().join("x"));
        assert!(line.contains(&format!("--to {format} is not in this version")), "{line}");
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
    assert!(export(&run, "npy", &folder, &[]).status.success(), "an empty folder is free to use");
    assert!(refusal("npy", &folder).contains("--force"));
    assert!(export(&run, "torch", &file, &["--force"]).status.success());
    assert_ne!(fs::read(&file).unwrap(), b"mine");
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 2, "something was left lying");
}

#[test]
fn filters_choose_and_damage_costs_only_its_own_tensor() {
    let mut f = Fixture::default();
    for step in 0..3 {
        for module in ["layers.0.mlp", "layers.1.mlp", "head"] {
            f.part(id(module, step), DType::UInt8, &[1], 0, Vec::new(), &[step as u8]);
        }
    }
    let run = f.finish();
    let out = tempfile::tempdir().unwrap();
    let files = |name: &str, more: &[&str]| {
        let dest = out.path().join(name);
        let done = export(&run, "npy", &dest, more);
        (done, fs::read_dir(&dest).map(|d| d.count() - 1).unwrap_or(0))
    };
    assert_eq!(files("a", &["--module", "layers.*.mlp", "--step", "1.."]).1, 4);
    assert_eq!(files("b", &["--module", "head", "--module", "/^layers.1/", "--kind", "forward"]).1, 6);
    let (none, _) = files("c", &["--step", "9"]);
    assert!(text(&none.stderr).contains("no record fits"));
    let shard = run.path().join("shard-00000.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    bytes[flexmodel_run::format::HEADER_SPACE as usize + 4] ^= 1;
    fs::write(&shard, bytes).unwrap();
    let (damaged, written) = files("d", &[]);
    assert_eq!(damaged.status.code(), Some(1));
    assert!(
        text(&damaged.stderr).contains("problem: layers.1.mlp:forward:out@model0.step1"),
        "{}",
        text(&damaged.stderr)
    );
    assert_eq!(written, 8);
}

#[test]
fn rows_that_ranks_padded_are_exported_once_it_is_said_with_what() {
    let mut f = Fixture::default();
    f.part(id("m", 0), DType::Int64, &[1, 1], 0, dp(0, 2, shard(0)), &7i64.to_le_bytes());
    f.part(id("m", 0), DType::Int64, &[1, 2], 1, dp(1, 2, shard(0)), &[8i64, 9].map(i64::to_le_bytes).concat());
    let run = f.finish();
    let out = tempfile::tempdir().unwrap();
    let left_out = export(&run, "npy", &out.path().join("none"), &[]);
    assert!(left_out.status.success() && text(&left_out.stderr).contains("--pad 0"), "{}", text(&left_out.stderr));
    for (to, read) in [("npy", "numpy.load(sys.argv[1])"), ("torch", "*torch.load(sys.argv[1]).values(),")] {
        let dest = out.path().join(to);
        let done = export(&run, to, &dest, &["--pad", "-100", "--side", "left"]);
        assert!(done.status.success(), "{}", text(&done.stderr));
        let file = match to {
            "npy" => dest.join("m-forward-out-model0-step0-micro0-call0.npy"),
            _ => dest,
        };
        let script =
            format!("import sys, numpy, torch\nx = {read}\nprint((x if type(x) is not tuple else x[0]).tolist())");
        assert_eq!(python(&script, &file), "[[-100, 7], [8, 9]]\n");
    }
    let wrong = export(&run, "npy", &out.path().join("wrong"), &["--pad", "0.5"]);
    assert!(text(&wrong.stderr).contains("--pad: 0.5 is no int64"), "{}", text(&wrong.stderr));
}
