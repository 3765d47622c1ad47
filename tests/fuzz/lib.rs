//! What the targets have in common.

pub mod answers;
pub mod mutate;
pub mod ranks;
pub mod tree;

/// A manifest whose lines have `text`'s lines as records, under the right checksums.
pub fn manifest(text: &str) -> String {
    text.lines().map(|rec| format!("{{\"crc\":\"{:08x}\",\"rec\":{rec}}}\n", crc32c::crc32c(rec.as_bytes()))).collect()
}
