//! Lines of `manifest.jsonl`: `{"crc":"1a2b3c4d","rec":{...}}`.
//!
//! A line is written with one `write` and ends in a newline. What an interrupted write leaves behind is a last line
//! without one: [`Reader`] gives it as [`LineError::Torn`], which is no damage. Anything else that does not read is.

use std::{
    borrow::Cow,
    fs::File,
    io::{self, BufRead, BufReader, Seek, SeekFrom},
    os::fd::AsRawFd,
    path::Path,
};

use super::{
    files::open_to_read,
    format::Line,
    limits::{LINE, MESSAGE},
};

/// Why a line does not read.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// The last line has no newline: the writer was interrupted in the middle of it.
    #[error("the last line is cut short")]
    Torn,
    /// Not `{"crc":...,"rec":...}`.
    #[error("not a manifest line: {0}")]
    Malformed(Cow<'static, str>),
    /// The checksum does not match.
    #[error("its checksum is wrong")]
    Checksum {
        /// crc32c of the inner object as it stands.
        found: u32,
        /// The line's own word.
        said: String,
    },
    /// Checksum right, but not something this version knows.
    #[error("not a known kind of line: {0}")]
    Unknown(String),
    /// Checksum right, but it says what cannot be.
    #[error("{0}")]
    Impossible(String),
}

/// The line with its newline.
pub fn encode_line(line: &Line) -> Vec<u8> {
    // Maps with string keys, numbers and strings only: serde_json has no way to fail on them.
    let rec = serde_json::to_vec(line).unwrap_or_default();
    let mut out = Vec::with_capacity(rec.len() + 32);
    out.extend_from_slice(b"{\"crc\":\"");
    out.extend_from_slice(format!("{:08x}", crc32c::crc32c(&rec)).as_bytes());
    out.extend_from_slice(b"\",\"rec\":");
    out.extend_from_slice(&rec);
    out.extend_from_slice(b"}\n");
    out
}

/// Reads a line, with or without its newline. Takes hostile bytes.
pub fn decode_line(bytes: &[u8]) -> Result<Line, LineError> {
    let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let framed = || bytes.strip_prefix(b"{\"crc\":\"")?.strip_suffix(b"}")?.split_at_checked(8);
    let frame = framed().and_then(|(crc, rest)| Some((crc, rest.strip_prefix(b"\",\"rec\":")?)));
    let (crc, rec) = frame.ok_or(LineError::Malformed("it is not {\"crc\":...,\"rec\":...}".into()))?;
    let found = crc32c::crc32c(rec);
    if crc != format!("{found:08x}").as_bytes() {
        return Err(LineError::Checksum { found, said: String::from_utf8_lossy(crc).into_owned() });
    }
    if !rec.starts_with(b"{") || !rec.ends_with(b"}") {
        return Err(LineError::Malformed("it is not one object".into()));
    }
    let clipped = |text: String| text.chars().take(MESSAGE).collect();
    let line: Line = serde_json::from_slice(rec).map_err(|e| LineError::Unknown(clipped(e.to_string())))?;
    line.check().map_err(|why| LineError::Impossible(clipped(why)))?;
    Ok(line)
}

/// A line and where it stands.
#[derive(Debug)]
pub struct Entry {
    /// From 1.
    pub number: u64,
    /// Byte offset of its start.
    pub offset: u64,
    /// The line, or why it does not read.
    pub line: Result<Line, LineError>,
}

/// What lines are read from.
pub trait Source: BufRead {
    /// Passes over a hole in a file, which has no line's end; how many bytes. The buffer is empty.
    fn skip_hole(&mut self) -> io::Result<u64> {
        Ok(0)
    }
}

impl Source for &[u8] {}

impl Source for BufReader<File> {
    fn skip_hole(&mut self) -> io::Result<u64> {
        let at = self.stream_position()?;
        // SAFETY: the descriptor is open.
        let data = unsafe { libc::lseek(self.get_ref().as_raw_fd(), at as libc::off_t, libc::SEEK_DATA) };
        let nothing_more = data < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::ENXIO);
        let to = match u64::try_from(data) {
            Ok(data) => SeekFrom::Start(data),
            Err(_) if nothing_more => SeekFrom::End(0),
            // A file system that does not know holes.
            Err(_) => SeekFrom::Start(at),
        };
        Ok(self.seek(to)?.saturating_sub(at))
    }
}

/// Bytes that are read at a time.
pub const BUFFER: usize = 1 << 18;

/// Opens a manifest; special files are refused.
pub fn open(path: &Path) -> io::Result<Reader<BufReader<File>>> {
    Ok(Reader::new(BufReader::with_capacity(BUFFER, open_to_read(path)?)))
}

/// A place between two lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Lines before it.
    pub number: u64,
    /// Bytes before it.
    pub offset: u64,
}

/// Goes through a manifest line by line, holding one line at a time. It takes as long as what is on the disk, and no
/// longer for a hole in a line.
#[derive(Debug)]
pub struct Reader<R> {
    from: R,
    at: Position,
    buffer: Vec<u8>,
}

impl<R: Source> Reader<R> {
    /// From the start of a manifest.
    pub fn new(from: R) -> Self {
        Self::at(from, Position::default())
    }

    /// From a place within a manifest, where `from` is.
    pub fn at(from: R, at: Position) -> Self {
        Self { from, at, buffer: Vec::new() }
    }

    /// Behind the last line given.
    pub fn reached(&self) -> Position {
        self.at
    }

    /// What lines were read from.
    pub fn into_inner(self) -> R {
        self.from
    }

    /// The next line; `None` at the end.
    pub fn next_line(&mut self) -> io::Result<Option<Entry>> {
        self.buffer.clear();
        let start = self.at.offset;
        let mut overlong = false;
        let ended = loop {
            let available = self.from.fill_buf()?;
            if available.is_empty() {
                break false;
            }
            let newline = memchr::memchr(b'\n', available);
            let used = newline.map_or(available.len(), |at| at + 1);
            if self.buffer.len() + used <= LINE {
                self.buffer.extend_from_slice(available.get(..used).unwrap_or(available));
            } else {
                overlong = true;
            }
            self.from.consume(used);
            self.at.offset += used as u64;
            if newline.is_some() {
                break true;
            }
            if overlong {
                self.at.offset += self.from.skip_hole()?;
            }
        };
        if self.at.offset == start {
            return Ok(None);
        }
        self.at.number += 1;
        let line = match (ended, overlong) {
            (false, _) => Err(LineError::Torn),
            (true, true) => Err(LineError::Malformed(format!("longer than {LINE} bytes").into())),
            (true, false) => decode_line(&self.buffer),
        };
        Ok(Some(Entry { number: self.at.number, offset: start, line }))
    }
}

impl<R: Source> Iterator for Reader<R> {
    type Item = io::Result<Entry>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_line().transpose()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use wire::{control::StepRule, loss_scale::LossScale, revision::MAX_PLAN};

    use super::*;
    use crate::{format::JobId, testing::revision};

    fn sealed() -> Line {
        Line::Sealed { shard: "shard-00000".into(), len: 1 << 40 }
    }

    #[test]
    fn a_line_round_trips() {
        let bytes = encode_line(&sealed());
        assert_eq!(bytes.iter().filter(|&&b| b == b'\n').count(), 1);
        assert_eq!(decode_line(&bytes).unwrap(), sealed());
    }

    #[test]
    fn every_part_of_a_part_round_trips() {
        let line = Line::Part(crate::testing::part("layers.0.mlp", 1, 2));
        assert_eq!(decode_line(&encode_line(&line)).unwrap(), line);
    }

    #[test]
    fn every_part_of_a_revision_round_trips() {
        let told = revision(JobId { job: 2, attempt: 1 }, 3, 120, &["layers.*.mlp", "lm_head:forward"]);
        let empty = revision(JobId::default(), u64::MAX, u64::MAX, &[]);
        let alone = crate::format::Revision { begins: None, ..told.clone() };
        let passes = crate::format::Revision { rule: StepRule::Inference, ..told.clone() };
        let words = ["revision 3 from step 120 on: layers.*.mlp; lm_head:forward".to_owned()].into_iter().chain([
            format!("revision {0} from step {0} on: no hooks", u64::MAX),
            "revision 3 from each rank's next pass on: layers.*.mlp; lm_head:forward".to_owned(),
            "revision 3 from pass 120 on: layers.*.mlp; lm_head:forward".to_owned(),
        ]);
        for (told, words) in [told, empty, alone, passes].into_iter().zip(words) {
            assert_eq!(told.to_string(), words);
            let line = Line::Revision(told);
            assert_eq!(decode_line(&encode_line(&line)).unwrap(), line);
        }
    }

    #[test]
    fn a_revision_that_cannot_be_is_refused() {
        let decoded = |line: &Line| decode_line(&encode_line(line)).map_err(|e| e.to_string());
        let of = |clauses: &[&str]| Line::Revision(revision(JobId::default(), 1, 0, clauses));
        let longest = "x".repeat(MAX_PLAN);
        assert!(decoded(&of(&[&longest])).is_ok());
        for (line, why) in [
            (of(&[&longest, "x"]), format!("it has 2 clauses of {} bytes", MAX_PLAN + 1)),
            (of(&vec![""; LINE / 20]), "longer than 1048576 bytes".into()),
            (Line::Revision(revision(JobId::default(), 0, 0, &[])), "says revision 0".into()),
        ] {
            let bytes = encode_line(&line);
            let read = Reader::new(&bytes[..]).next_line().unwrap().unwrap().line.map_err(|e| e.to_string());
            assert!(read.as_ref().is_err_and(|e| e.contains(&why)), "{read:?} is not {why}");
        }
        let text = serde_json::to_string(&of(&["a"])).unwrap();
        for (from, to) in [
            ("{\"id\":1,\"text\":\"a\"}", "[1,\"a\"]"),
            ("\"id\":1", "\"id\":-1"),
            ("\"optimizer\"", "\"never\""),
            ("\"begins\":0", "\"begins\":1.5"),
            ("\"ranks\":2", "\"ranks\":4294967296"),
        ] {
            let bad = crate::testing::fixture::line_of(&text.replace(from, to));
            assert!(text.contains(from) && matches!(decode_line(&bad), Err(LineError::Unknown(_))), "{to}");
        }
    }

    #[test]
    fn a_part_of_the_hooks_that_a_job_was_started_with_is_as_before_there_were_others() {
        let mut part = crate::testing::part("layers.0.mlp", 1, 2);
        assert!(!String::from_utf8(encode_line(&Line::Part(part.clone()))).unwrap().contains("revision"));
        part.what.revision = u64::MAX;
        let line = Line::Part(part);
        assert_eq!(decode_line(&encode_line(&line)).unwrap(), line);
    }

    #[test]
    fn a_line_of_an_older_version_says_the_same() {
        let shard = wire::record::Placement::Shard { dim: 0 };
        let mut part = crate::testing::part("layers.0.mlp", 1, 2);
        part.what.axes = crate::testing::on_rank(crate::testing::meta("", 0, 2), 0, 2, shard).axes;
        part.what.axes[0].input_digest = Some(7);
        let line = Line::Part(part);
        let new = serde_json::to_string(&line).unwrap();
        let older = new
            .replace("\"train\":true", "\"train\":true,\"recompute\":false")
            .replace("{\"dim\":0}", "{\"dim\":0,\"offset\":null}")
            .replace("input_digest", "given");
        let added = ",\"recompute\":false,\"offset\":null".len() + "given".len() - "input_digest".len();
        assert_eq!(older.len(), new.len() + added);
        let framed = format!("{{\"crc\":\"{:08x}\",\"rec\":{older}}}\n", crc32c::crc32c(older.as_bytes()));
        assert_eq!(decode_line(framed.as_bytes()).unwrap(), line);
    }

    #[test]
    fn a_loss_scale_that_json_has_no_number_for_round_trips() {
        for (scale, json) in [
            (f64::INFINITY, "\"inf\""),
            (f64::NEG_INFINITY, "\"-inf\""),
            (f64::NAN, "\"nan\""),
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (65536.0, "65536.0"),
        ] {
            let mut part = crate::testing::part("layers.0.mlp", 1, 2);
            part.what.loss_scale = LossScale(scale);
            let line = Line::Part(part);
            let bytes = encode_line(&line);
            let text = String::from_utf8(bytes.clone()).unwrap();
            assert!(text.contains(&format!("\"loss_scale\":{json},")), "{text}");
            assert_eq!(decode_line(&bytes).unwrap(), line);
        }
    }

    #[test]
    fn a_loss_scale_of_other_writers_is_read_for_what_it_says() {
        let read = |json: &str| serde_json::from_str::<LossScale>(json);
        for (json, scale) in [("2", 2.0), ("-1", -1.0), ("1e3", 1000.0), ("null", f64::NAN)] {
            assert_eq!(read(json).unwrap(), LossScale(scale), "{json}");
        }
        for json in ["\"Infinity\"", "\"2\"", "true", "[]", "{}"] {
            assert!(read(json).is_err(), "{json}");
        }
    }

    #[test]
    fn a_changed_byte_is_refused() {
        let bytes = encode_line(&sealed());
        for at in 0..bytes.len() - 1 {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert!(decode_line(&bad).is_err(), "byte {at} changed unnoticed");
        }
    }

    #[test]
    fn the_reader_tells_torn_from_damaged_and_knows_where_it_is() {
        let good = encode_line(&sealed());
        let mut bytes = good.clone();
        bytes.extend_from_slice(b"garbage\n");
        bytes.extend_from_slice(&good);
        bytes.extend_from_slice(&good[..good.len() - 5]);
        let entries: Vec<_> = Reader::new(&bytes[..]).map(Result::unwrap).collect();
        assert_eq!(entries.iter().map(|e| e.number).collect::<Vec<_>>(), [1, 2, 3, 4]);
        assert_eq!(entries[2].offset, good.len() as u64 + 8);
        assert!(entries[0].line.is_ok() && entries[2].line.is_ok());
        assert!(matches!(entries[1].line, Err(LineError::Malformed(_))));
        assert!(matches!(entries[3].line, Err(LineError::Torn)));
    }

    #[test]
    fn an_endless_line_is_damage_and_costs_no_memory() {
        let mut bytes = vec![b'x'; LINE * 3];
        bytes.push(b'\n');
        bytes.extend_from_slice(&encode_line(&sealed()));
        let mut reader = Reader::new(&bytes[..]);
        assert!(matches!(reader.next_line().unwrap().unwrap().line, Err(LineError::Malformed(_))));
        assert!(reader.buffer.capacity() <= 2 * LINE);
        assert!(reader.next_line().unwrap().unwrap().line.is_ok());
        assert!(reader.next_line().unwrap().is_none());
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode_line(&bytes);
        }

        #[test]
        fn any_loss_scale_round_trips(bits: u64) {
            let scale = LossScale(f64::from_bits(bits));
            let json = serde_json::to_string(&scale).unwrap();
            prop_assert_eq!(serde_json::from_str::<LossScale>(&json).unwrap(), scale, "{}", json);
        }
    }
}
