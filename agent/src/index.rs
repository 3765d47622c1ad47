//! `index.sqlite`: the manifest as two tables, for questions that a line-by-line file answers slowly.
//!
//! It is derived. `meta` says how much of the manifest it was made from; where that is another length, `flexmodel ls` makes
//! it again.
//! It is made line by line: however long a run was, the agent that closes it needs no more memory for that.
//! Integers are SQLite's signed 64 bits: a larger unsigned value is kept with its bits, as a negative number.

use std::{
    fs::{self, File},
    io::BufReader,
    path::Path,
};

use anyhow::Context;
use rusqlite::{Connection, OpenFlags, params};

use crate::{
    read::{Problem, Run},
    store::{
        format::{FORMAT, INDEX_FILE, Line, MANIFEST_FILE, Part},
        manifest::{LineError, Reader},
    },
};

/// The tables, as any SQLite client sees them.
const TABLES: &str = "
CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE parts (
    module TEXT NOT NULL, kind TEXT NOT NULL, path TEXT NOT NULL, model INTEGER NOT NULL, step INTEGER NOT NULL,
    micro INTEGER NOT NULL, call INTEGER NOT NULL, repeat INTEGER NOT NULL, train INTEGER NOT NULL,
    recompute INTEGER NOT NULL, class TEXT NOT NULL, grp TEXT NOT NULL, dtype TEXT NOT NULL, shape TEXT NOT NULL,
    axes TEXT NOT NULL, microbatch INTEGER NOT NULL, rank INTEGER NOT NULL, dp_size INTEGER NOT NULL, loss_scale REAL NOT NULL, time_ns INTEGER NOT NULL,
    shard TEXT, offset INTEGER, len INTEGER, crc INTEGER,
    count INTEGER, mean REAL, std REAL, l2 REAL, absmax REAL, min REAL, max REAL, nan INTEGER, inf INTEGER, zero INTEGER
);
CREATE UNIQUE INDEX parts_by_module
    ON parts (module, kind, path, step, model, micro, call, repeat, train, recompute, rank, microbatch);
";
const KEYS: &str = "CREATE INDEX parts_by_step ON parts (step);";
/// A part that was captured again takes the place of the first, as everywhere.
const INSERT: &str = "INSERT OR REPLACE INTO parts VALUES (
    ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20, ?21, ?22, ?23, ?24, ?25,
    ?26, ?27, ?28, ?29, ?30, ?31, ?32, ?33, ?34)";

/// Makes the index of a run from its manifest; an old one is replaced whole.
pub fn build(run: &Path) -> anyhow::Result<()> {
    let target = run.join(INDEX_FILE);
    let temporary = run.join(format!(".{INDEX_FILE}.{}", std::process::id()));
    let made = fill(&temporary, &run.join(MANIFEST_FILE))
        .and_then(|()| Ok(fs::rename(&temporary, &target)?))
        .with_context(|| format!("{}: cannot be written; the run can be read without it", target.display()));
    if made.is_err() {
        // What is left of it is of no use; that it cannot be removed either says nothing new.
        let _ = fs::remove_file(&temporary);
    }
    made
}

/// Makes the index of a finished run again if it was deleted or is stale. A folder that may not be written to has none.
pub fn refresh(run: &Run) {
    for (_, folder) in run.folders() {
        if run.finished() && !fresh(&folder) {
            // Nothing needs it: the manifest is what is read.
            let _ = build(&folder);
        }
    }
}

/// Whether the index was made from the manifest as it is now.
fn fresh(run: &Path) -> bool {
    let Ok(manifest) = fs::metadata(run.join(MANIFEST_FILE)) else { return false };
    meta(&run.join(INDEX_FILE)).is_ok_and(|meta| meta == (i64::from(FORMAT), signed(manifest.len())))
}

/// For `verify`: an index that is there must read, and if it is up to date, agree.
pub fn check(run: &Run) -> Result<(), Problem> {
    let path = run.path.join(INDEX_FILE);
    if !path.exists() {
        return Ok(());
    }
    let problem =
        |what: String| Problem::new(INDEX_FILE, format!("{what}; delete it and `flexmodel ls` makes it again"));
    let (format, manifest_len) = meta(&path).map_err(|e| problem(format!("does not read ({e})")))?;
    if format != i64::from(FORMAT) || manifest_len != signed(run.manifest_len) {
        return match run.finished() {
            true => Err(problem(format!("was made from {manifest_len} bytes of a manifest of {}", run.manifest_len))),
            false => Ok(()),
        };
    }
    let compare = || -> rusqlite::Result<Option<String>> {
        let db = open_readonly(&path)?;
        let sane: String = db.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
        if sane != "ok" {
            return Ok(Some(sane));
        }
        let rows: i64 = db.query_row("SELECT COUNT(*) FROM parts", [], |row| row.get(0))?;
        let parts: usize = run.records.iter().map(|r| r.parts.len()).sum();
        if rows != parts as i64 {
            return Ok(Some(format!("has {rows} parts and the manifest {parts}")));
        }
        let mut find = db.prepare(
            "SELECT COUNT(*) FROM parts WHERE module = ?1 AND kind = ?2 AND path = ?3 AND step = ?4 AND model = ?5 \
             AND micro = ?6 AND call = ?7 AND repeat = ?8 AND train = ?9 AND recompute = ?10 AND rank = ?11 \
             AND shard IS ?12 AND offset IS ?13 AND len IS ?14 AND crc IS ?15 AND microbatch = ?16",
        )?;
        for part in run.records.iter().flat_map(|r| &r.parts) {
            // What another rank lends is not in the manifest.
            let (id, at) = (&part.what.id, part.at.as_ref().filter(|_| part.same.is_none()));
            let found: i64 = find.query_row(
                params![
                    id.module,
                    id.kind.name(),
                    id.path,
                    signed(id.step),
                    id.model,
                    id.micro,
                    id.call,
                    id.repeat,
                    id.train,
                    id.recompute,
                    part.what.rank,
                    at.map(|a| &a.shard),
                    at.map(|a| signed(a.offset)),
                    at.map(|a| signed(a.len)),
                    part.crc(),
                    part.what.seat().1,
                ],
                |row| row.get(0),
            )?;
            if found != 1 {
                return Ok(Some(format!("has {} of rank {} {found} times", id, part.what.rank)));
            }
        }
        Ok(None)
    };
    match compare() {
        Ok(None) => Ok(()),
        Ok(Some(what)) => Err(problem(what)),
        Err(e) => Err(problem(format!("does not read ({e})"))),
    }
}

fn fill(path: &Path, manifest: &Path) -> anyhow::Result<()> {
    let mut lines = Reader::new(BufReader::with_capacity(1 << 18, File::open(manifest)?));
    // A file left by a process of the same number that died.
    let _ = fs::remove_file(path);
    let mut db = Connection::open(path)?;
    // Written once and renamed when complete: a journal would protect nothing.
    db.execute_batch("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;")?;
    let all = db.transaction()?;
    all.execute_batch(TABLES)?;
    let mut complete = 0;
    {
        let mut insert = all.prepare(INSERT)?;
        while let Some(entry) = lines.next_line()? {
            match entry.line {
                Ok(Line::Part(part)) => add(&mut insert, &part)?,
                Err(LineError::Torn) => break,
                // Not parts, or damage that verify names.
                Ok(_) | Err(_) => {}
            }
            complete = lines.offset();
        }
    }
    all.execute_batch(KEYS)?;
    let meta = [("format", i64::from(FORMAT)), ("manifest_len", signed(complete))];
    for (key, value) in meta {
        all.execute("INSERT INTO meta VALUES (?1, ?2)", params![key, value])?;
    }
    all.commit()?;
    db.close().map_err(|(_, e)| e)?;
    Ok(())
}

fn add(insert: &mut rusqlite::Statement<'_>, part: &Part) -> anyhow::Result<()> {
    let (what, id) = (&part.what, &part.what.id);
    let (at, stats) = (part.at.as_ref(), part.stats.as_ref());
    insert.execute(params![
        id.module,
        id.kind.name(),
        id.path,
        id.model,
        signed(id.step),
        id.micro,
        id.call,
        id.repeat,
        id.train,
        id.recompute,
        what.class,
        what.group,
        what.dtype.name(),
        serde_json::to_string(&what.shape)?,
        serde_json::to_string(&what.axes)?,
        what.seat().1,
        what.rank,
        what.dp_size,
        what.loss_scale,
        signed(what.time_ns),
        at.map(|a| &a.shard),
        at.map(|a| signed(a.offset)),
        at.map(|a| signed(a.len)),
        part.crc(),
        stats.map(|s| signed(s.count)),
        stats.and_then(|s| s.mean),
        stats.and_then(|s| s.std),
        stats.and_then(|s| s.l2),
        stats.and_then(|s| s.absmax),
        stats.and_then(|s| s.min),
        stats.and_then(|s| s.max),
        stats.map(|s| signed(s.nan)),
        stats.map(|s| signed(s.inf)),
        stats.map(|s| signed(s.zero)),
    ])?;
    Ok(())
}

fn signed(n: u64) -> i64 {
    n.cast_signed()
}

fn open_readonly(path: &Path) -> rusqlite::Result<Connection> {
    Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX)
}

/// Format and manifest length that an index was made from.
fn meta(path: &Path) -> rusqlite::Result<(i64, i64)> {
    let db = open_readonly(path)?;
    let get = |key: &str| db.query_row("SELECT value FROM meta WHERE key = ?1", [key], |row| row.get(0));
    Ok((get("format")?, get("manifest_len")?))
}

#[cfg(test)]
mod tests;
