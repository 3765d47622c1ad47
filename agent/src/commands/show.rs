//! `flexmodel show`: statistics and a small picture of one tensor.

mod picture;

use std::{collections::BTreeSet, io::IsTerminal, path::PathBuf, process::ExitCode};

use anyhow::bail;
use flexmodel_run::{
    ReadError, Record, Run, Whole,
    format::{Identity, JobId, Stats},
    read::{Filter, display_module, natural, nearest},
    stats,
};
use serde::Serialize;
use wire::hooks::Kind;

use crate::text;

/// Options of `flexmodel show`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The run's directory.
    pub run: PathBuf,
    /// The module's name as `flexmodel ls` shows it; `(root)` is the model itself.
    pub module: String,
    /// What of the module, see `flexmodel ls`.
    #[arg(long, value_parser = parse_kind, help = format!("What of the module: {}", kinds()))]
    pub kind: Option<Kind>,
    /// Leaf, such as `out[0]`.
    #[arg(long)]
    pub path: Option<String>,
    /// Step; without it, the last one that is complete.
    #[arg(long)]
    pub step: Option<u64>,
    /// Job, where several wrote into the run; without it, the newest that has the module.
    #[arg(long)]
    pub job: Option<u32>,
    /// Attempt of the job; without it, the last that has the module.
    #[arg(long)]
    pub attempt: Option<u32>,
    /// Microbatch within the step.
    #[arg(long)]
    pub micro: Option<u32>,
    /// Call of the module within the forward pass.
    #[arg(long)]
    pub call: Option<u32>,
    /// Model number, where there are several.
    #[arg(long)]
    pub model: Option<u32>,
    /// Only evaluation passes.
    #[arg(long, conflicts_with = "train")]
    pub eval: bool,
    /// Only training passes.
    #[arg(long)]
    pub train: bool,
    /// What this rank captured, instead of the whole.
    #[arg(long)]
    pub rank: Option<u32>,
    /// Print JSON, without the picture.
    #[arg(long)]
    pub json: bool,
}

/// A kind's word; the error offers the nearest.
pub fn parse_kind(word: &str) -> Result<Kind, String> {
    Kind::from_name(word).ok_or_else(|| {
        let best = nearest(word, &Kind::ALL.map(Kind::name), 1).join("");
        format!("there is no kind {word}; did you mean {best}? ({})", kinds())
    })
}

/// The words of all kinds.
fn kinds() -> String {
    Kind::ALL.map(Kind::name).join(", ")
}

#[derive(Serialize)]
struct Shown<'a> {
    name: String,
    #[serde(flatten)]
    id: &'a Identity,
    class: &'a str,
    dtype: &'static str,
    shape: &'a [u64],
    bytes: Option<usize>,
    ranks: BTreeSet<u32>,
    dp_size: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    revision: Option<u64>,
    stats: Option<Stats>,
    histogram: Option<picture::Histogram>,
    /// Records that fit the question as well.
    others: usize,
}

/// Runs the command.
pub fn main(args: Args) -> anyhow::Result<ExitCode> {
    let run = Run::open(&args.run)?;
    let module = if args.module == "(root)" { "" } else { args.module.as_str() };
    let mut found: Vec<&Record> = matching(&run, &args, module)?;
    found.sort_by(|a, b| order(a).cmp(&order(b)));
    let Chosen { record, whole, skipped } = choose(&run, &args, &found)?;
    let measured = match &whole {
        Some(whole) => stats::compute(whole.dtype, &whole.bytes),
        None => part_or_whole_stats(record, args.rank),
    };
    let picture = whole.as_ref().map(|whole| {
        let values = picture::Values::new(whole.dtype, &whole.bytes);
        let histogram = picture::histogram(&values, 40);
        (values, histogram, whole)
    });
    let shape = match &whole {
        Some(whole) => whole.shape.clone(),
        None => shape_of(record, args.rank),
    };
    let revision = Some(record.revision()).filter(|&revision| revision > 0 || !run.revisions.is_empty());
    if args.json {
        let shown = Shown {
            name: record.id.to_string(),
            id: &record.id,
            class: &record.what().class,
            dtype: record.what().dtype.name(),
            shape: &shape,
            bytes: whole.as_ref().map(|whole| whole.bytes.len()),
            ranks: args.rank.map_or_else(|| record.ranks(), |rank| BTreeSet::from([rank])),
            dp_size: record.data_size(),
            revision,
            stats: measured,
            histogram: picture.map(|(_, histogram, _)| histogram),
            others: found.len() - 1,
        };
        text::emit_json(&shown)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut out = heading(record, run.jobs.len() > 1, revision, &shape, whole.as_ref(), args.rank);
    if let Some(measured) = measured {
        out += &statistics(&measured);
    }
    if let Some((values, histogram, whole)) = picture {
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        out += &picture::draw(&values, &whole.shape, picture::terminal_width(), colour);
        out += &picture::sparkline(&histogram);
    }
    out += &rest(&found, record);
    if let Some(reason) = skipped {
        out += &format!("a later step is not complete and was passed over: {}\n", text::safe(&reason));
    }
    text::paint(&out)?;
    Ok(ExitCode::SUCCESS)
}

fn matching<'a>(run: &'a Run, args: &Args, module: &str) -> anyhow::Result<Vec<&'a Record>> {
    let mut filter = Filter { module: Some(module.to_owned()), ..Filter::default() };
    let mut of_module: Vec<&Record> = run.records.iter().map(|r| &**r).filter(|r| filter.wants(r)).collect();
    if of_module.is_empty() {
        let names = run.modules();
        let near = nearest(module, &names, 3).into_iter().map(|name| text::safe(&text::clip(display_module(name))));
        let near: Vec<String> = near.collect();
        match near.is_empty() {
            true => bail!("{}: no records at all", args.run.display()),
            false => bail!(
                "{}: no records of module {}; the nearest are {} (`flexmodel ls` shows all {})",
                args.run.display(),
                text::safe(display_module(module)),
                near.join(", "),
                names.len()
            ),
        }
    }
    // Steps of an earlier attempt are never shown for those of the newest.
    let fits = |id: JobId| args.job.is_none_or(|n| n == id.job) && args.attempt.is_none_or(|n| n == id.attempt);
    if let Some(newest) = of_module.iter().map(|r| r.id.job).filter(|&id| fits(id)).max() {
        of_module.retain(|r| r.id.job == newest);
    }
    filter = Filter {
        module: filter.module,
        job: args.job,
        attempt: args.attempt,
        kind: args.kind,
        path: args.path.clone(),
        model: args.model,
        step: args.step,
        micro: args.micro,
        call: args.call,
        train: match (args.train, args.eval) {
            (true, _) => Some(true),
            (_, true) => Some(false),
            _ => None,
        },
        rank: args.rank,
    };
    let found: Vec<&Record> = of_module.iter().copied().filter(|r| filter.wants(r)).collect();
    if found.is_empty() {
        bail!(
            "{}: no such record of {}; there is {}",
            args.run.display(),
            text::safe(display_module(module)),
            choices(&of_module, None)
        );
    }
    Ok(found)
}

/// What there is among records, in one line; of what they all have in common with `shown`, nothing.
fn choices(records: &[&Record], shown: Option<&Record>) -> String {
    let one = |what: &str, value: &dyn Fn(&Record) -> Vec<String>| {
        let mut names: Vec<String> = records.iter().flat_map(|r| value(r)).collect();
        names.sort_by(|a, b| natural(a).cmp(&natural(b)));
        names.dedup();
        if names.is_empty() || shown.is_some_and(|shown| value(shown) == names) {
            return None;
        }
        Some(match names.len() {
            1..=8 => format!("{what} {}", names.join(", ")),
            n => format!("{what} {} .. {} ({n} of them)", names[0], names[n - 1]),
        })
    };
    let all = [
        one("kind", &|r| vec![r.id.kind.name().into()]),
        one("path", &|r| vec![text::safe(&r.id.path)]),
        one("step", &|r| vec![r.id.step.to_string()]),
        one("model", &|r| vec![r.id.model.to_string()]),
        one("micro", &|r| vec![r.id.micro.to_string()]),
        one("call", &|r| vec![r.id.call.to_string()]),
        one("job", &|r| vec![r.id.job.job.to_string()]),
        one("attempt", &|r| vec![r.id.job.attempt.to_string()]),
        one("repeat", &|r| vec![r.id.repeat.to_string()]),
        one("mode", &|r| vec![if r.id.train { "train" } else { "eval" }.into()]),
        one("rank", &|r| r.parts.iter().map(|p| p.what.rank.to_string()).collect()),
    ];
    all.into_iter().flatten().collect::<Vec<_>>().join("; ")
}

/// Last step first; within a step what most people mean first.
#[allow(clippy::type_complexity)]
fn order(r: &Record) -> (std::cmp::Reverse<u64>, bool, Kind, u32, u32, u32, &str, (u32, u32)) {
    let id = &r.id;
    (std::cmp::Reverse(id.step), !id.train, id.kind, id.model, id.micro, id.call, &id.path, (id.repeat, id.again))
}

/// What is shown.
struct Chosen<'a> {
    record: &'a Record,
    /// `None` where only statistics were kept.
    whole: Option<Whole>,
    /// Why a later step was passed over.
    skipped: Option<String>,
}

/// The first of `found` that is complete. A step that was asked for is not replaced.
fn choose<'a>(run: &Run, args: &Args, found: &[&'a Record]) -> anyhow::Result<Chosen<'a>> {
    let mut skipped = None;
    for &record in found {
        let read = match args.rank {
            _ if record.stats_only() && (args.rank.is_some() || record.shape().is_ok()) => {
                return Ok(Chosen { record, whole: None, skipped });
            }
            Some(rank) => run.part(record, rank),
            None => run.whole(record),
        };
        match read {
            Ok(whole) => return Ok(Chosen { record, whole: Some(whole), skipped }),
            Err(e @ ReadError::Incomplete(_)) if args.step.is_none() => {
                skipped.get_or_insert_with(|| e.to_string());
            }
            Err(ReadError::Damage(e)) => bail!(text::safe(&e)),
            Err(e) => bail!("{}; --rank N shows what one rank captured", text::safe(&e.to_string())),
        }
    }
    bail!("{}; --rank N shows what one rank captured", text::safe(&skipped.unwrap_or_default()))
}

fn part_or_whole_stats(record: &Record, rank: Option<u32>) -> Option<Stats> {
    rank.map_or_else(|| record.stats(), |rank| record.of_rank(rank)?.stats())
}

fn shape_of(record: &Record, rank: Option<u32>) -> Vec<u64> {
    match rank {
        Some(rank) => record.of_rank(rank).and_then(|own| own.shape().ok()).unwrap_or_default(),
        None => record.shape().unwrap_or_default(),
    }
}

fn heading(
    record: &Record,
    several_jobs: bool,
    revision: Option<u64>,
    shape: &[u64],
    whole: Option<&Whole>,
    rank: Option<u32>,
) -> String {
    let (id, what) = (&record.id, record.what());
    let mut when = format!("step {}, micro {}, call {}", id.step, id.micro, id.call);
    if id.repeat > 0 {
        when += &format!(", backward pass {}", id.repeat);
    }
    when += if id.train { ", train" } else { ", eval" };
    if several_jobs {
        when += &format!(", job {}, attempt {}", id.job.job, id.job.attempt);
    }
    if let Some(revision) = revision {
        when += &format!(", revision {revision} of the hooks");
    }
    let ranks = text::count(record.ranks().len() as u64, "rank");
    let from = match rank {
        Some(rank) => format!("rank {rank}'s part, of {ranks}"),
        None => format!("whole, from {ranks}"),
    };
    format!(
        "{} ({})  {} {}  model {}\n{when}\n{} {:?}  {}  {from}\n",
        text::safe(display_module(&id.module)),
        text::safe(&what.class),
        id.kind.name(),
        text::safe(&id.path),
        id.model,
        what.dtype.name(),
        shape,
        whole.map_or_else(|| "statistics only".into(), |whole| text::bytes(whole.bytes.len() as u64))
    )
}

fn statistics(s: &Stats) -> String {
    let mut line = format!(
        "mean {}  std {}  l2 {}  min {}  max {}  absmax {}",
        text::optional(s.mean),
        text::optional(s.std),
        text::optional(s.l2),
        text::optional(s.min),
        text::optional(s.max),
        text::optional(s.absmax)
    );
    for (n, what) in [(s.zero, "zero"), (s.nan, "NaN"), (s.inf, "infinite")] {
        if n > 0 {
            line += &format!("  {what} {n} of {}", s.count);
        }
    }
    line + "\n"
}

/// What else the question fits.
fn rest(found: &[&Record], shown: &Record) -> String {
    let others: Vec<&Record> = found.iter().copied().filter(|r| r.id != shown.id).collect();
    match others.len() {
        0 => String::new(),
        n => format!("{} more: {}\n", n, choices(&others, Some(shown))),
    }
}
