//! `flexmodel export`: a run's whole tensors in a format of others.

mod npy;
mod pickle;
mod torch;
mod zip;

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, bail};
use clap::ValueEnum;
use flexmodel_run::{
    ReadError, Record, Run, Whole,
    read::{
        LayoutError, in_order,
        rows::{Number, Pad, Side},
    },
};

use super::selection::{Selection, parse_side};
use crate::text;

/// Options of `flexmodel export`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The run's directory.
    pub run: PathBuf,
    /// npy: a folder with one file a tensor; torch: one file for torch.load.
    #[arg(long, value_name = "FORMAT")]
    pub to: Format,
    /// Where to.
    pub dest: PathBuf,
    /// Which records.
    #[command(flatten)]
    pub selection: Selection,
    /// What fills up rows that each rank padded to its own longest, such as 0; without it they are left out.
    #[arg(long, value_name = "NUMBER", allow_hyphen_values = true, value_parser = parse_number)]
    pub pad: Option<Number>,
    /// On which side of a row: right or left.
    #[arg(long, default_value = "right", requires = "pad", value_parser = parse_side)]
    pub side: Side,
    /// Write over what is there.
    #[arg(long)]
    pub force: bool,
}

fn parse_number(word: &str) -> Result<Number, String> {
    Number::parse(word).ok_or_else(|| format!("'{word}' is not a number such as 0"))
}

impl Args {
    /// The whole of a record, as it is to be written.
    fn whole(&self, run: &Run, record: &Record) -> Result<Whole, ReadError> {
        match (self.pad, record.shape()) {
            (Some(number), Err(LayoutError::Ragged { .. })) => {
                let pad = Pad::new(number, record.what().dtype, self.side);
                run.padded(record, &pad.map_err(|e| ReadError::Layout(format!("{}: --pad: {e}", record.id)))?)
            }
            _ => run.whole(record),
        }
    }
}

/// What can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// NumPy files.
    Npy,
    /// A `.pt` file.
    Torch,
    /// Not in this version.
    #[value(hide = true)]
    Hf,
    /// Not in this version.
    #[value(hide = true)]
    Zarr,
}

/// What became of the records.
#[derive(Default)]
struct Outcome {
    written: u64,
    bytes: u64,
    incomplete: Vec<String>,
    failed: Vec<String>,
    /// Types that the format has no name for, and what they were written as.
    renamed: Vec<String>,
}

impl Outcome {
    fn missed(&mut self, e: &ReadError) {
        match e {
            ReadError::Damage(text) => self.failed.push(text.clone()),
            ReadError::Incomplete(text) | ReadError::Layout(text) => self.incomplete.push(text.clone()),
            ReadError::NoSum(_) => self.incomplete.push(e.to_string()),
        }
    }
}

/// Runs the command.
pub fn main(args: Args) -> anyhow::Result<ExitCode> {
    if matches!(args.to, Format::Hf | Format::Zarr) {
        let word = args.to.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
        bail!("--to {word} is not in this version; npy and torch are");
    }
    let run = Run::open(&args.run)?;
    let mut records: Vec<&Record> =
        run.records.iter().map(|r| &**r).filter(|r| args.selection.wants(r.what())).collect();
    if records.is_empty() {
        bail!("{}: no record fits; `flexmodel ls` shows what is there", args.run.display());
    }
    records.sort_by_cached_key(|r| in_order(&r.id));
    check_dest(&args)?;
    let outcome = match args.to {
        Format::Npy => npy::export(&run, &records, &args),
        _ => torch::export(&run, &records, &args),
    }
    .with_context(|| format!("export to {}", args.dest.display()))?;
    report(&args, &outcome)
}

fn report(args: &Args, outcome: &Outcome) -> anyhow::Result<ExitCode> {
    outcome.renamed.iter().for_each(|line| text::complain("note", line));
    text::complain_of("note: left out", &outcome.incomplete, 5, "");
    text::complain_of("problem", &outcome.failed, 5, "");
    text::emit(&format!(
        "{} ({}) written to {}\n",
        text::count(outcome.written, "tensor"),
        text::bytes(outcome.bytes),
        text::safe(&args.dest.display().to_string())
    ))?;
    Ok(if outcome.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn check_dest(args: &Args) -> anyhow::Result<()> {
    let dest = &args.dest;
    let folder = args.to == Format::Npy;
    match fs::symlink_metadata(dest) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => bail!("{}: {e}", dest.display()),
        Ok(meta) if folder && !meta.is_dir() && !dest.is_dir() => {
            bail!("{}: is a file; --to npy writes a folder, name another", dest.display())
        }
        Ok(_) if !folder && dest.is_dir() => {
            bail!(
                "{}: is a folder; --to torch writes one file, such as {}",
                dest.display(),
                dest.join("run.pt").display()
            )
        }
        Ok(_) if args.force || folder && is_empty(dest) => {}
        Ok(_) => bail!("{}: is there already; name another or give --force to write over it", dest.display()),
    }
    match (dest.parent(), folder) {
        (Some(parent), false) if !parent.as_os_str().is_empty() && !parent.is_dir() => {
            bail!("{}: no such folder; make it first", parent.display())
        }
        _ => Ok(()),
    }
}

/// Makes the file that an export is written to before it takes its place. What somebody left there is not written through.
fn partial(path: &Path) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    File::create_new(path)
}

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none())
}
