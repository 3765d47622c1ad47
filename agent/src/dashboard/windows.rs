//! Bytes of a record's parts, read from their shards through a bounded number of bounded windows.
//!
//! By pread and not by a map: a shard that is cut short meanwhile (a quota, a network file system) is an error here, and
//! would be a signal there that ends the agent.

use std::{fs::File, io, os::unix::fs::FileExt};

use flexmodel_run::{
    ReadError,
    format::{HEADER_SPACE, Location},
    read::Shards,
};

/// Most windows.
const MAX_WINDOWS: usize = 64;
/// Bytes read at a time, unless more are asked for.
const WINDOW: u64 = 64 << 10;
/// Most shards that are open at a time.
const MAX_OPEN: usize = 8;

/// Gives bytes of parts, by their number.
pub trait Parts {
    /// Bytes `begin..begin + len` of a part. The error is a whole sentence.
    fn bytes(&mut self, part: usize, begin: u64, len: usize) -> Result<&[u8], String>;
}

/// The parts of one record, while a picture of it is made.
pub struct Windows<'a> {
    shards: &'a Shards,
    /// Where a plan's parts lie, by their number; `None`: none of its bytes are wanted.
    sources: Vec<Option<Location>>,
    /// Newest last.
    open: Vec<(String, File)>,
    /// A part has one slot among these.
    windows: Vec<Option<Window>>,
}

struct Window {
    part: usize,
    begin: u64,
    bytes: Vec<u8>,
}

impl<'a> Windows<'a> {
    /// Of the parts of a plan; says if a shard is gone, or ends before one of them does.
    pub fn new(shards: &'a Shards, sources: Vec<Option<Location>>) -> Result<Self, String> {
        let count = sources.iter().flatten().count().clamp(1, MAX_WINDOWS);
        let windows = std::iter::repeat_with(|| None).take(count).collect();
        let mut all = Self { shards, sources, open: Vec::new(), windows };
        for at in all.sources.clone().iter().flatten().filter(|at| at.len > 0) {
            let damage = |what: String| ReadError::Damage(what).about(&shards.name(&at.shard)).to_string();
            let end = at.offset.checked_add(at.len).filter(|_| at.offset >= HEADER_SPACE);
            let end =
                end.ok_or_else(|| damage(format!("bytes {}+{} are outside of every shard", at.offset, at.len)))?;
            let there = all.file(&at.shard)?.metadata().map_err(|e| damage(e.to_string()))?.len();
            if there < end {
                return Err(damage(too_short(&format!("it ends at byte {there}"), end)));
            }
        }
        Ok(all)
    }

    fn file(&mut self, stem: &str) -> Result<&File, String> {
        let at = match self.open.iter().position(|(open, _)| open == stem) {
            Some(at) => at,
            None => {
                let (_, file) = self.shards.file(stem).map_err(|e| format!("{}: {e}", self.shards.name(stem)))?;
                if self.open.len() >= MAX_OPEN {
                    self.open.remove(0);
                }
                self.open.push((stem.to_owned(), file));
                self.open.len() - 1
            }
        };
        Ok(&self.open[at].1)
    }

    /// Reads a window of a part into `bytes`.
    fn load(&mut self, part: usize, begin: u64, len: usize, mut bytes: Vec<u8>) -> Result<Vec<u8>, String> {
        let Some(at) = self.sources.get(part).cloned().flatten() else { return Err("a part without bytes".into()) };
        let rest = at.len.saturating_sub(begin);
        if rest < len as u64 {
            return Err("the stored length does not fit the shape; run flexmodel verify".into());
        }
        // At least what is asked for, which a picture keeps small.
        bytes.resize(rest.min(WINDOW).max(len as u64) as usize, 0);
        let from = at.offset + begin;
        self.file(&at.shard)?.read_exact_at(&mut bytes, from).map_err(|e| {
            let what = match e.kind() {
                io::ErrorKind::UnexpectedEof => too_short("it was cut short", from + bytes.len() as u64),
                _ => format!("the file does not read ({e})"),
            };
            ReadError::Damage(what).about(&self.shards.name(&at.shard)).to_string()
        })?;
        Ok(bytes)
    }
}

fn too_short(how: &str, end: u64) -> String {
    format!("the file is shorter than the manifest says: {how}, before byte {end}; `flexmodel verify` lists all damage")
}

impl Parts for Windows<'_> {
    fn bytes(&mut self, part: usize, begin: u64, len: usize) -> Result<&[u8], String> {
        let slot = part % self.windows.len();
        let holds = |w: &Window| {
            let skip = begin.checked_sub(w.begin).filter(|_| w.part == part)?;
            let skip = usize::try_from(skip).ok()?;
            (skip.checked_add(len)? <= w.bytes.len()).then_some(skip)
        };
        let skip = match self.windows[slot].as_ref().and_then(holds) {
            Some(skip) => skip,
            None => {
                let old = self.windows[slot].take().map_or_else(Vec::new, |w| w.bytes);
                let bytes = self.load(part, begin, len, old)?;
                self.windows[slot] = Some(Window { part, begin, bytes });
                0
            }
        };
        let window = self.windows[slot].as_ref().map_or(&[][..], |w| &w.bytes);
        Ok(&window[skip..skip + len])
    }
}
