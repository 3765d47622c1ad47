//! The agent is a program, not a library: its decoders are taken in by path.

#[path = "../../agent/src/read/mod.rs"]
pub mod read;
#[path = "../../agent/src/store/mod.rs"]
pub mod store;

/// A manifest whose lines have `text`'s lines as records, under the right checksums.
pub fn manifest(text: &str) -> String {
    text.lines().map(|rec| format!("{{\"crc\":\"{:08x}\",\"rec\":{rec}}}\n", crc32c::crc32c(rec.as_bytes()))).collect()
}
