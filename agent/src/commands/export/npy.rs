//! One `.npy` file a tensor, and `manifest.json` that says which is which.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::Write,
    path::Path,
};

use flexmodel_run::{Record, Run, format::Identity, unique::Unique};
use serde::Serialize;
use wire::dtype::DType;

use super::{Args, Outcome};

/// Longest file name before its ending; file systems allow 255 bytes.
const NAME: usize = 180;

#[derive(Serialize)]
struct Entry<'a> {
    file: String,
    #[serde(flatten)]
    id: &'a Identity,
    class: &'a str,
    dtype: &'static str,
    shape: Vec<u64>,
    /// What the file calls the type.
    npy: &'static str,
    dp_size: u32,
}

#[derive(Serialize)]
struct Manifest<'a> {
    run: String,
    records: Vec<Entry<'a>>,
    left_out: &'a [String],
}

/// Writes `records` into the folder `args.dest`.
pub fn export(run: &Run, records: &[&Record], args: &Args) -> anyhow::Result<Outcome> {
    let dest = &args.dest;
    fs::create_dir_all(dest)?;
    let mut outcome = Outcome::default();
    let mut names = Unique::ignoring_case();
    let mut entries = Vec::new();
    let mut renamed = BTreeSet::new();
    for record in records {
        let whole = match args.whole(run, record) {
            Ok(whole) => whole,
            Err(e) => {
                outcome.missed(&e);
                continue;
            }
        };
        let (npy, same, extra) = descr(whole.dtype);
        if !same {
            renamed.insert((whole.dtype.name(), npy));
        }
        let file = names.name(file_name(&record.id)) + ".npy";
        let shape = whole.shape.iter().copied().chain(extra).collect::<Vec<_>>();
        replace(&dest.join(&file), |out| {
            out.write_all(&header(npy, &shape))?;
            out.write_all(&whole.bytes)
        })?;
        outcome.written += 1;
        outcome.bytes += whole.bytes.len() as u64;
        let what = record.what();
        entries.push(Entry {
            file,
            id: &record.id,
            class: &what.class,
            dtype: whole.dtype.name(),
            shape: whole.shape,
            npy,
            dp_size: record.data_size(),
        });
    }
    let left_out = [outcome.incomplete.as_slice(), &outcome.failed].concat();
    let manifest = Manifest { run: run.path.display().to_string(), records: entries, left_out: &left_out };
    let json = serde_json::to_vec_pretty(&manifest)?;
    replace(&dest.join("manifest.json"), |out| out.write_all(&json))?;
    outcome.renamed = renamed
        .into_iter()
        .map(|(dtype, npy)| format!("npy has no {dtype}: written as {npy}, the true type is in manifest.json"))
        .collect();
    Ok(outcome)
}

/// Writes a file beside its place and renames it there.
fn replace(path: &Path, write: impl FnOnce(&mut File) -> std::io::Result<()>) -> std::io::Result<()> {
    let partial = path.with_extension("partial");
    let made = super::partial(&partial).and_then(|mut file| write(&mut file)).and_then(|()| fs::rename(&partial, path));
    if made.is_err() {
        // The first error is the one to tell.
        let _ = fs::remove_file(&partial);
    }
    made
}

/// NumPy's name of a type, whether it means the same, and a trailing dimension that it needs.
fn descr(dtype: DType) -> (&'static str, bool, Option<u64>) {
    let same = |name| (name, true, None);
    match dtype {
        DType::Float64 => same("<f8"),
        DType::Float32 => same("<f4"),
        DType::Float16 => same("<f2"),
        DType::Int64 => same("<i8"),
        DType::Int32 => same("<i4"),
        DType::Int16 => same("<i2"),
        DType::Int8 => same("|i1"),
        DType::UInt64 => same("<u8"),
        DType::UInt32 => same("<u4"),
        DType::UInt16 => same("<u2"),
        DType::UInt8 => same("|u1"),
        DType::Bool => same("|b1"),
        DType::Complex64 => same("<c8"),
        DType::Complex128 => same("<c16"),
        DType::BFloat16 => ("<u2", false, None),
        DType::Complex32 => ("<f2", false, Some(2)),
        DType::Float8E4M3Fn
        | DType::Float8E5M2
        | DType::Float8E4M3Fnuz
        | DType::Float8E5M2Fnuz
        | DType::Float8E8M0Fnu => ("|u1", false, None),
    }
}

/// An npy 1.0 header; the elements follow at a multiple of 64 bytes.
fn header(descr: &str, shape: &[u64]) -> Vec<u8> {
    let mut dims = shape.iter().map(|d| format!("{d},")).collect::<Vec<_>>().join(" ");
    if shape.len() > 1 {
        dims.pop();
    }
    let dict = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({dims}), }}");
    // 10 bytes of magic, version and length before it, a newline behind; 64 dimensions fit into 65535 easily.
    let len = (10 + dict.len() + 1).next_multiple_of(64) - 10;
    let mut out = b"\x93NUMPY\x01\x00".to_vec();
    out.extend_from_slice(&(len as u16).to_le_bytes());
    out.extend_from_slice(format!("{dict:<width$}\n", width = len - 1).as_bytes());
    out
}

/// A name that every file system takes and a shell need not quote.
fn file_name(id: &Identity) -> String {
    let module = if id.module.is_empty() { "root" } else { &id.module };
    let name = id.to_string();
    let when = name.rsplit_once('@').map_or("", |(_, when)| when).replace('.', "-");
    let mut text = format!("{module}-{}-{}-{when}", id.kind.name(), id.path);
    text = text
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '_' })
        .collect::<String>();
    if text.starts_with(['.', '-']) {
        text.insert(0, '_');
    }
    if text.len() > NAME {
        // The end tells records apart.
        text = format!("{}__{}", &text[..NAME / 2], &text[text.len() - NAME / 2 + 2..]);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(module: &str, path: &str) -> Identity {
        Identity {
            job: Default::default(),
            module: module.into(),
            kind: wire::hooks::Kind::Forward,
            path: path.into(),
            model: 0,
            step: 3,
            micro: 0,
            call: 1,
            repeat: 0,
            train: false,
            apart: None,
            own: false,
            pending: false,
            again: 0,
        }
    }

    #[test]
    fn headers_are_aligned_and_tuples_are_pythons() {
        for (shape, text) in [(&[][..], "()"), (&[3][..], "(3,)"), (&[2, 0][..], "(2, 0)")] {
            let h = header("<f4", shape);
            assert_eq!(h.len() % 64, 0);
            assert!(String::from_utf8_lossy(&h[10..]).contains(&format!("'shape': {text}")), "{h:?}");
        }
    }

    #[test]
    fn file_names_are_safe() {
        assert_eq!(
            file_name(&id("layers.0.mlp", "out[0]")),
            "layers.0.mlp-forward-out_0_-model0-step3-micro0-call1-eval"
        );
        assert!(!file_name(&id("../../etc", "out")).contains('/'));
        assert!(file_name(&id("../x", "out")).starts_with("_.."));
        assert!(file_name(&id(&"é".repeat(500), "out")).len() <= NAME);
    }
}
