//! What the environment says: hooks, where the agent is, how large slabs may be, and who this process is.

use std::{io::Read, path::PathBuf};

use capture::transport::Settings;
use wire::{
    control::{CONTROL_VERSION, Hello},
    counts::Counts,
    env::{self, OnFull},
};

use crate::launch;

fn set(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The hooks as the user wrote them.
///
/// # Errors
/// They are not UTF-8.
pub fn hooks() -> Result<String, String> {
    std::env::var(env::HOOKS).map_err(|_| format!("{} is not UTF-8", env::HOOKS))
}

/// How captures get to the agent.
///
/// # Errors
/// No agent is named, or a value cannot be understood: what to do is in the sentence.
pub fn transport(hooks: &str) -> Result<Settings, String> {
    let agent = set(env::AGENT).ok_or_else(|| {
        format!(
            "{} is not set; start one with: flexmodel agent --socket PATH --out DIR, or use flexmodel run",
            env::AGENT
        )
    })?;
    let socket = env::agent_socket(&agent).map_err(|why| format!("{}: {why}", env::AGENT))?;
    let slab_bytes = match set(env::SLAB) {
        Some(text) => env::parse_bytes(&text).map_err(|why| format!("{}: {why}", env::SLAB))?,
        None => env::DEFAULT_SLAB_BYTES,
    };
    let on_full =
        OnFull::parse(&set(env::ON_FULL).unwrap_or_default()).map_err(|why| format!("{}: {why}", env::ON_FULL))?;
    let hello = Hello {
        version: CONTROL_VERSION,
        rank: 0,
        world: 1,
        pid: std::process::id(),
        node: env::node(),
        torch: String::new(),
        python: String::new(),
        command: command(),
        hooks: hooks.to_owned(),
        on_full,
        wrapper: String::new(),
        job: Box::new(launch::signs()),
    };
    let counts = set(env::COUNTS).and_then(|name| Counts::open(&name, &agent));
    Ok(Settings { socket: socket.to_owned(), slab_bytes, counts, hello })
}

/// The agent's socket, if one is named.
pub fn agent_socket() -> Option<PathBuf> {
    env::agent_socket(&set(env::AGENT)?).ok().map(PathBuf::from)
}

/// Number of ranks that share this machine's memory, as the launcher says it.
pub fn ranks_of_node() -> Option<u32> {
    launch::RANKS_OF_NODE.iter().find_map(|name| set(name)?.parse().ok()).filter(|n| *n > 0)
}

fn command() -> Vec<String> {
    let mut bytes = Vec::new();
    if let Ok(file) = std::fs::File::open("/proc/self/cmdline") {
        let _ = file.take(1 << 16).read_to_end(&mut bytes);
    }
    bytes.split(|&b| b == 0).filter(|w| !w.is_empty()).map(|w| String::from_utf8_lossy(w).into_owned()).collect()
}
