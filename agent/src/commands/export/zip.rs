//! A zip archive of stored (not compressed) entries, written front to back, as torch.load reads them.
//!
//! Every entry's data starts at a multiple of 64 bytes, as torch's own files have it, so that they can be mapped.
//! Sizes and offsets of 4 GiB and more are in zip64 fields.

use std::io::{self, Write};

const ALIGN: u64 = 64;
const BIG: u64 = u32::MAX as u64;
/// Local header without name and extra field.
const LOCAL: u64 = 30;
/// Tag of the filler that aligns data; torch's own.
const FILL: [u8; 2] = *b"FB";

struct Entry {
    name: String,
    crc: u32,
    len: u64,
    at: u64,
}

/// An archive being written.
pub struct Zip<W: Write> {
    out: W,
    at: u64,
    entries: Vec<Entry>,
}

impl<W: Write> Zip<W> {
    /// Starts one.
    pub fn new(out: W) -> Self {
        Self { out, at: 0, entries: Vec::new() }
    }

    /// Adds an entry. `name` is shorter than 64 KiB.
    pub fn add(&mut self, name: &str, data: &[u8]) -> io::Result<()> {
        let entry = Entry { name: name.into(), crc: crc32(data), len: data.len() as u64, at: self.at };
        let zip64 = if entry.len >= BIG { zip64(&[entry.len, entry.len]) } else { Vec::new() };
        let before = self.at + LOCAL + name.len() as u64 + zip64.len() as u64 + 4;
        let fill = before.next_multiple_of(ALIGN) - before;
        let mut extra = zip64;
        extra.extend_from_slice(&FILL);
        extra.extend_from_slice(&(fill as u16).to_le_bytes());
        extra.resize(extra.len() + fill as usize, b'Z');
        let mut head = b"PK\x03\x04".to_vec();
        common(&mut head, &entry);
        head.extend_from_slice(&(extra.len() as u16).to_le_bytes());
        head.extend_from_slice(name.as_bytes());
        head.extend_from_slice(&extra);
        self.put(&head)?;
        self.put(data)?;
        self.entries.push(entry);
        Ok(())
    }

    /// Writes the directory and gives the writer back.
    pub fn finish(mut self) -> io::Result<W> {
        let start = self.at;
        for entry in std::mem::take(&mut self.entries) {
            let mut big = Vec::new();
            if entry.len >= BIG {
                big.extend([entry.len, entry.len]);
            }
            if entry.at >= BIG {
                big.push(entry.at);
            }
            let extra = if big.is_empty() { Vec::new() } else { zip64(&big) };
            let mut head = b"PK\x01\x02".to_vec();
            head.extend_from_slice(&45u16.to_le_bytes());
            common(&mut head, &entry);
            head.extend_from_slice(&(extra.len() as u16).to_le_bytes());
            // Comment length, disk, internal and external attributes: none.
            head.extend_from_slice(&[0; 10]);
            head.extend_from_slice(&(entry.at.min(BIG) as u32).to_le_bytes());
            head.extend_from_slice(entry.name.as_bytes());
            head.extend_from_slice(&extra);
            self.put(&head)?;
            self.entries.push(entry);
        }
        let (len, count, end) = (self.at - start, self.entries.len() as u64, self.at);
        let mut tail = b"PK\x06\x06".to_vec();
        tail.extend_from_slice(&44u64.to_le_bytes());
        tail.extend_from_slice(&[45, 0, 45, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        for n in [count, count, len, start] {
            tail.extend_from_slice(&n.to_le_bytes());
        }
        tail.extend_from_slice(b"PK\x06\x07\0\0\0\0");
        tail.extend_from_slice(&end.to_le_bytes());
        tail.extend_from_slice(&1u32.to_le_bytes());
        tail.extend_from_slice(b"PK\x05\x06\0\0\0\0");
        for n in [count, count] {
            tail.extend_from_slice(&(n.min(u64::from(u16::MAX)) as u16).to_le_bytes());
        }
        for n in [len, start] {
            tail.extend_from_slice(&(n.min(BIG) as u32).to_le_bytes());
        }
        tail.extend_from_slice(&[0, 0]);
        self.put(&tail)?;
        Ok(self.out)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.at += bytes.len() as u64;
        Ok(())
    }
}

/// What local headers and the directory have in common: version, flags, method, time, crc, sizes, name length.
fn common(out: &mut Vec<u8>, entry: &Entry) {
    out.extend_from_slice(&45u16.to_le_bytes());
    // UTF-8 names, stored, 1 January 1980: the same tensors make the same file.
    out.extend_from_slice(&0x0800u16.to_le_bytes());
    out.extend_from_slice(&[0, 0, 0, 0, 0x21, 0]);
    out.extend_from_slice(&entry.crc.to_le_bytes());
    let len = entry.len.min(BIG) as u32;
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(&(entry.name.len() as u16).to_le_bytes());
}

fn zip64(values: &[u64]) -> Vec<u8> {
    let mut out = vec![1, 0];
    out.extend_from_slice(&(values.len() as u16 * 8).to_le_bytes());
    values.iter().for_each(|v| out.extend_from_slice(&v.to_le_bytes()));
    out
}

/// The zip checksum (CRC-32, reflected 0xEDB88320), eight bytes at a time.
fn crc32(data: &[u8]) -> u32 {
    static TABLES: [[u32; 256]; 8] = tables();
    let mut crc = !0u32;
    let (eights, rest) = data.as_chunks::<8>();
    for chunk in eights {
        let word = u64::from_le_bytes(*chunk) ^ u64::from(crc);
        crc = 0;
        for (i, byte) in word.to_le_bytes().into_iter().enumerate() {
            crc ^= TABLES[7 - i][usize::from(byte)];
        }
    }
    for &byte in rest {
        crc = crc >> 8 ^ TABLES[0][usize::from(crc as u8 ^ byte)];
    }
    !crc
}

const fn tables() -> [[u32; 256]; 8] {
    let mut tables = [[0u32; 256]; 8];
    let mut i = 0;
    while i < 256 {
        let mut crc = i as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 };
            bit += 1;
        }
        tables[0][i] = crc;
        i += 1;
    }
    let mut t = 1;
    while t < 8 {
        let mut i = 0;
        while i < 256 {
            let before = tables[t - 1][i];
            tables[t][i] = before >> 8 ^ tables[0][(before & 0xff) as usize];
            i += 1;
        }
        t += 1;
    }
    tables
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_zips() {
        assert_eq!(crc32(b"123456789"), 0xCBF4_3926);
        assert_eq!(crc32(b"The quick brown fox jumps over the lazy dog"), 0x414F_A339);
        assert_eq!(crc32(b""), 0);
    }

    #[test]
    fn data_is_aligned() {
        let mut zip = Zip::new(Vec::new());
        zip.add("archive/data/0", b"needle").unwrap();
        zip.add("archive/data/1", b"NEEDLE").unwrap();
        let bytes = zip.finish().unwrap();
        for needle in [b"needle", b"NEEDLE"] {
            let at = bytes.windows(6).position(|w| w == needle).unwrap();
            assert_eq!(at % 64, 0);
        }
    }
}
