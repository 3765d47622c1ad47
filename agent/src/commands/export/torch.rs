//! One file that `torch.load(weights_only=True)` reads: a dict from a record's name to its tensor.

use std::{
    ffi::OsString,
    fs,
    io::{self, BufWriter},
    path::{Path, PathBuf},
};

use flexmodel_run::{Record, Run};

use super::{
    Args, Outcome,
    pickle::{self, Tensor},
    zip::Zip,
};

/// Writes `records` into the file `args.dest`, which appears whole or not at all.
pub fn export(run: &Run, records: &[&Record], args: &Args) -> anyhow::Result<Outcome> {
    let dest = &args.dest;
    let partial = beside(dest);
    let made = write(run, records, args, &partial).and_then(|outcome| {
        fs::rename(&partial, dest)?;
        Ok(outcome)
    });
    if made.is_err() {
        // The first error is the one to tell.
        let _ = fs::remove_file(&partial);
    }
    Ok(made?)
}

fn beside(dest: &Path) -> PathBuf {
    let mut name = dest.file_name().map_or_else(|| OsString::from("run.pt"), OsString::from);
    name.push(".partial");
    dest.with_file_name(name)
}

fn write(run: &Run, records: &[&Record], args: &Args, path: &Path) -> io::Result<Outcome> {
    let mut zip = Zip::new(BufWriter::with_capacity(1 << 16, super::partial(path)?));
    let mut outcome = Outcome::default();
    let mut tensors: Vec<Tensor> = Vec::new();
    for record in records {
        let whole = match args.whole(run, record) {
            Ok(whole) => whole,
            Err(e) => {
                outcome.missed(&e);
                continue;
            }
        };
        let key = tensors.len();
        zip.add(&format!("archive/data/{key}"), &whole.bytes)?;
        outcome.written += 1;
        outcome.bytes += whole.bytes.len() as u64;
        tensors.push(Tensor { name: record.id.to_string(), dtype: whole.dtype, shape: whole.shape, key });
    }
    zip.add("archive/data.pkl", &pickle::dict(&tensors))?;
    zip.add("archive/byteorder", b"little")?;
    zip.add("archive/version", b"3\n")?;
    zip.finish()?.into_inner().map_err(|e| e.into_error())?;
    Ok(outcome)
}
