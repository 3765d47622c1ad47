//! What the commands find in a run directory, for a comparison with what Python finds there.

use std::path::Path;

use flexmodel_run::{
    ReadError, Record, Run,
    format::Identity,
    read::{
        AssemblyPlan, Found, LayoutError, PlanError, Said, assemble,
        layout::byte_len,
        rows::{Number, Pad, Side},
    },
};
use serde_json::{Value, json};

/// Bytes of a whole from which on another reader may have no memory for it.
const LARGE: usize = 32 << 20;

/// What there is to say of a folder: `null` if it is refused.
pub fn answers(path: &Path) -> Value {
    let Ok(run) = Run::open(path) else { return Value::Null };
    let no_info = |found: &Found| matches!(found, Found::NoInfo | Found::Info(_));
    if run.records.is_empty() && run.problems.iter().any(|problem| no_info(&problem.found)) {
        // A command has something to say of it, and Python has nothing to give.
        return Value::Null;
    }
    let torn = |said: Said| said == Said::HalfALine && run.finished();
    let problems = run.problems.iter().map(|problem| problem.file());
    let notes = run.notes.iter().filter(|note| torn(note.said)).map(ToString::to_string);
    json!({
        "problems": problems.chain(notes).chain(run.shard_problems()).collect::<Vec<_>>(),
        "modules": run.modules_in_model_order(),
        "lost": [run.lost.refused.len(), run.lost.divergences.len(), run.lost.dropped.len()],
        "records": run.records.iter().map(|record| of_record(&run, record)).collect::<Vec<_>>(),
    })
}

fn of_record(run: &Run, record: &Record) -> Value {
    let (id, what) = (&record.id, record.what());
    if too_much_once_padded(record) {
        return json!({"id": of(id), "whole": "large"});
    }
    // Every type has a one.
    let pad = Pad::new(Number::Integer(1), what.dtype, Side::Left).unwrap();
    let whole = unchecked(run, record, &pad);
    let checked = run.padded(record, &pad);
    match (&whole, &checked) {
        (Ok(one), Ok(other)) => assert!(**one == *other.bytes, "{id}: the bytes differ with their checksums"),
        (Err(one), Ok(_)) => panic!("{id}: {one}, and it reads"),
        // A checksum is wrong.
        (Ok(_), Err(_)) => {}
        (Err(one), Err(other)) => {
            let damage = |e: &ReadError| matches!(e, ReadError::Damage(_));
            assert_eq!(damage(one), damage(other), "{id}: {one}, {other}");
        }
    }
    json!({
        "id": of(id),
        "what": [what.dtype.name(), what.class, what.group, what.time_ns],
        "shape": record.shape().ok(),
        "padded_shape": record.padded_shape(),
        "ranks": record.ranks(),
        "dp_size": record.data_size(),
        "count": record.stats().map(|stats| stats.count),
        "parts": record.parts.iter().map(|part| part.crc()).collect::<Vec<_>>(),
        "whole": match &whole {
            Ok(bytes) if bytes.len() >= LARGE => "large".into(),
            Ok(bytes) => json!([bytes.len(), adler32(bytes)]),
            Err(e) => class(e).into(),
        },
    })
}

fn of(id: &Identity) -> Value {
    let (job, attempt) = (id.job.job, id.job.attempt);
    let pass = json!([id.step, id.micro, id.call, id.repeat, id.train]);
    json!([job, attempt, id.module, id.kind.name(), id.path, id.model, pass, id.again, id.apart])
}

/// A few bytes may be many times as many once rows are filled up.
fn too_much_once_padded(record: &Record) -> bool {
    let bytes = record.padded_shape().map(|shape| byte_len(record.what().dtype, &shape));
    bytes.is_some_and(|bytes| bytes.is_none_or(|bytes| bytes >= LARGE as u64))
}

/// The whole by the commands' executor, whatever the checksums of its parts say.
fn unchecked(run: &Run, record: &Record, pad: &Pad) -> Result<assemble::Bytes, ReadError> {
    let plan = AssemblyPlan::padded(&record.parts, pad).map_err(|e| match e {
        PlanError::Layout(LayoutError::Missing(_)) => ReadError::Incomplete(e.to_string()),
        e => run.shards().refusal(&e),
    })?;
    let source = |part: usize| plan.sources.get(part).and_then(Option::as_ref);
    let mut part = |at: usize| match source(at) {
        Some(at) => run.shards().mapped(at),
        None => Err(ReadError::Damage("a part that is not there".into())),
    };
    assemble::assemble(&plan.tree, plan.dtype, &mut part)
}

/// The error that Python has for it.
fn class(e: &ReadError) -> &'static str {
    match e {
        ReadError::Incomplete(_) | ReadError::Layout(_) => "NotCapturedError",
        ReadError::NoSum(_) => "TypeError",
        ReadError::Damage(_) => "RunError",
    }
}

/// The checksum that Python has at hand.
fn adler32(bytes: &[u8]) -> u32 {
    let (a, b) = bytes.iter().fold((1u32, 0u32), |(a, b), &byte| {
        let a = (a + u32::from(byte)) % 65521;
        (a, (a + b) % 65521)
    });
    b << 16 | a
}
