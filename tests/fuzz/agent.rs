//! The agent is a program, not a library: what the target `ranks` needs of its server is taken in by path.

#[path = "../../agent/src"]
mod program {
    pub mod descriptors;
    pub mod live;
    pub mod newcomers;
    pub mod say;
    pub mod secrets;
    pub mod server;
    pub mod text;
}
// As the program's own paths say.
pub use program::{descriptors, live, newcomers, say, secrets, server, text};

pub mod mutate;
pub mod ranks;
pub mod tree;

/// A manifest whose lines have `text`'s lines as records, under the right checksums.
pub fn manifest(text: &str) -> String {
    text.lines().map(|rec| format!("{{\"crc\":\"{:08x}\",\"rec\":{rec}}}\n", crc32c::crc32c(rec.as_bytes()))).collect()
}
