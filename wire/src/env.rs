//! Names and values of the environment variables a job is started with.

use std::ffi::CStr;

use crate::preload;

/// Hook clauses, or the path of a TOML file that holds them. Absent: nothing of ours is in the process. Empty: nothing is tapped,
/// and hooks can be added while the job runs.
pub const HOOKS: &str = text(preload::HOOKS);
/// `1` switches everything off, whatever else is set.
pub const DISABLE: &str = text(preload::DISABLE);
/// Where the agent listens: `unix:PATH`.
pub const AGENT: &str = "FLEXMODEL_AGENT";
/// What a tap does when the slab is full: `wait` (default) or `drop`.
pub const ON_FULL: &str = "FLEXMODEL_ON_FULL";
/// Most bytes of all of a rank's slabs together, with an optional `K`, `M` or `G` suffix (powers of 1024).
pub const SLAB: &str = "FLEXMODEL_SLAB";
/// Path of a bridge to use instead of the one in the cache. It must still be built for the job's torch.
pub const BRIDGE: &str = "FLEXMODEL_BRIDGE";
/// The bridge cache folder; default `$XDG_CACHE_HOME/flexmodel/bridges` or `~/.cache/flexmodel/bridges`.
pub const BRIDGE_CACHE: &str = "FLEXMODEL_BRIDGE_CACHE";
/// Name of this node in records; default: the host name.
pub const NODE: &str = "FLEXMODEL_NODE";
/// Set by a process that captures, for those it starts: `PID:WORLD:RANK`, where RANK is what the variable of that name
/// says. They inherit what says its rank, and are none themselves.
pub const RANK_PROCESS: &str = "FLEXMODEL_RANK_PROCESS";
/// Set by `flexmodel run`: where ranks count what they capture, and for which agent, as [`crate::counts`] has it.
pub const COUNTS: &str = "FLEXMODEL_COUNTS";
/// A secret that the agents of a job's nodes share, where they have no folder that they share: what they tell each other in the
/// job's store is signed with it.
pub const KEY: &str = "FLEXMODEL_KEY";
/// Name of a fault to inject in tests (`panic-in-tap`, `panic-in-load`, `throw-in-tap`).
pub const FAULT: &str = "FLEXMODEL_TEST_FAULT";

/// Path of an open library that stands in for NCCL in tests: tensors of the CPU are gathered over it.
pub const TEST_NCCL: &str = "FLEXMODEL_TEST_NCCL";

/// In tests: the CPU stands in for a device. `1` while its operations count as captured into a CUDA graph; a process that does not
/// have the name at its first tap never looks again.
pub const TEST_GRAPH: &str = "FLEXMODEL_TEST_GRAPH";

/// A name that is text at compile time.
const fn text(name: &CStr) -> &str {
    match name.to_str() {
        Ok(text) => text,
        Err(_) => panic!("a name that is not UTF-8"),
    }
}

/// Bytes of a rank's slabs when [`SLAB`] is not set.
pub const DEFAULT_SLAB_BYTES: u64 = 256 << 20;
/// Bytes of a rank's first slab, and the smallest value of [`SLAB`]: it must hold a few frames of metadata and payload.
pub const MIN_SLAB_BYTES: u64 = 1 << 20;

/// What a tap does when its record does not fit into the slab.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnFull {
    /// Wait for the agent to make room, as long as it is alive and makes progress.
    #[default]
    Wait,
    /// Drop the record and count it.
    Drop,
}

impl OnFull {
    /// Parses `wait` or `drop`; the error is a whole sentence.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text {
            "" | "wait" => Ok(Self::Wait),
            "drop" => Ok(Self::Drop),
            other => Err(format!("'{other}' is not wait or drop")),
        }
    }
}

/// Parses a byte count such as `64M`; the error is a whole sentence.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'k' | b'K') => (&text[..text.len() - 1], 10),
        Some(b'm' | b'M') => (&text[..text.len() - 1], 20),
        Some(b'g' | b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let count: u64 =
        digits.parse().map_err(|_| format!("'{text}' is not a number of bytes such as 268435456, 256M or 1G"))?;
    count.checked_mul(1 << shift).ok_or_else(|| format!("'{text}' is more than 2^64 bytes"))
}

/// This node's name: [`NODE`], or the host name.
pub fn node() -> String {
    std::env::var(NODE).ok().filter(|n| !n.is_empty()).unwrap_or_else(host)
}

/// The host name.
pub fn host() -> String {
    let mut buffer = [0u8; 256];
    // SAFETY: the buffer is valid for its length, and keeps its last NUL.
    unsafe { libc::gethostname(buffer.as_mut_ptr().cast(), buffer.len() - 1) };
    buffer.iter().take_while(|&&b| b != 0).map(|&b| char::from(b)).collect()
}

/// Path of the socket in a [`AGENT`] value; the error is a whole sentence.
pub fn agent_socket(value: &str) -> Result<&str, String> {
    match value.strip_prefix("unix:") {
        Some(path) if !path.is_empty() => Ok(path),
        _ => Err(format!("'{value}' is not of the form unix:PATH")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_counts_take_suffixes_and_refuse_the_rest() {
        assert_eq!(parse_bytes("4096"), Ok(4096));
        assert_eq!(parse_bytes("64M"), Ok(64 << 20));
        assert!(parse_bytes("").is_err());
        assert!(parse_bytes("9999999999999G").is_err());
    }

    #[test]
    fn agent_address_needs_the_unix_prefix_and_a_path() {
        assert_eq!(agent_socket("unix:/tmp/a.sock"), Ok("/tmp/a.sock"));
        assert!(agent_socket("unix:").is_err());
        assert!(agent_socket("tcp:1").is_err());
    }
}
