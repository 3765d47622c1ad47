//! Lines of `manifest.jsonl`: `{"crc":"1a2b3c4d","rec":{...}}`.
//!
//! A line is written with one `write` and ends in a newline. What an interrupted write leaves behind is a last line
//! without one: [`Reader`] gives it as [`LineError::Torn`], which is no damage. Anything else that does not read is.

use std::io::{self, BufRead};

use serde::Deserialize;
use serde_json::value::RawValue;

use super::format::Line;

/// Longest line that is taken for one; names, shapes and axes of a part cannot exceed it.
pub const MAX_LINE: usize = 1 << 20;

/// Why a line does not read.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// The last line has no newline: the writer was interrupted in the middle of it.
    #[error("the last line is cut short")]
    Torn,
    /// Not `{"crc":...,"rec":...}`.
    #[error("not a manifest line: {0}")]
    Malformed(String),
    /// The checksum does not match.
    #[error("its checksum is {found:08x}, the line says {said}")]
    Checksum {
        /// crc32c of the inner object as it stands.
        found: u32,
        /// The line's own word.
        said: String,
    },
    /// Checksum right, but not something this version knows.
    #[error("not a known kind of line: {0}")]
    Unknown(String),
}

#[derive(Deserialize)]
struct Outer<'a> {
    crc: &'a str,
    #[serde(borrow)]
    rec: &'a RawValue,
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
    let outer: Outer = serde_json::from_slice(bytes).map_err(|e| LineError::Malformed(e.to_string()))?;
    let rec = outer.rec.get();
    let found = crc32c::crc32c(rec.as_bytes());
    if u32::from_str_radix(outer.crc, 16) != Ok(found) {
        return Err(LineError::Checksum { found, said: outer.crc.chars().take(16).collect() });
    }
    serde_json::from_str(rec).map_err(|e| LineError::Unknown(e.to_string()))
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

/// Goes through a manifest line by line, holding one line at a time.
#[derive(Debug)]
pub struct Reader<R> {
    from: R,
    number: u64,
    offset: u64,
    buffer: Vec<u8>,
}

impl<R: BufRead> Reader<R> {
    /// From the start of a manifest.
    pub fn new(from: R) -> Self {
        Self { from, number: 0, offset: 0, buffer: Vec::new() }
    }

    /// Byte offset behind the last line given.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The next line; `None` at the end.
    pub fn next_line(&mut self) -> io::Result<Option<Entry>> {
        self.buffer.clear();
        let start = self.offset;
        let mut overlong = false;
        let ended = loop {
            let available = self.from.fill_buf()?;
            if available.is_empty() {
                break false;
            }
            let newline = available.iter().position(|&b| b == b'\n');
            let used = newline.map_or(available.len(), |at| at + 1);
            if self.buffer.len() + used <= MAX_LINE {
                self.buffer.extend_from_slice(available.get(..used).unwrap_or(available));
            } else {
                overlong = true;
            }
            self.from.consume(used);
            self.offset += used as u64;
            if newline.is_some() {
                break true;
            }
        };
        if self.offset == start {
            return Ok(None);
        }
        self.number += 1;
        let line = match (ended, overlong) {
            (false, _) => Err(LineError::Torn),
            (true, true) => Err(LineError::Malformed(format!("longer than {MAX_LINE} bytes"))),
            (true, false) => decode_line(&self.buffer),
        };
        Ok(Some(Entry { number: self.number, offset: start, line }))
    }
}

impl<R: BufRead> Iterator for Reader<R> {
    type Item = io::Result<Entry>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_line().transpose()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use wire::loss_scale::LossScale;

    use super::*;

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
        let line = Line::Part(crate::store::testing::part("layers.0.mlp", 1, 2));
        assert_eq!(decode_line(&encode_line(&line)).unwrap(), line);
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
            let mut part = crate::store::testing::part("layers.0.mlp", 1, 2);
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
        let mut bytes = vec![b'x'; MAX_LINE * 3];
        bytes.push(b'\n');
        bytes.extend_from_slice(&encode_line(&sealed()));
        let mut reader = Reader::new(&bytes[..]);
        assert!(matches!(reader.next_line().unwrap().unwrap().line, Err(LineError::Malformed(_))));
        assert!(reader.buffer.capacity() <= 2 * MAX_LINE);
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
