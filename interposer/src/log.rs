//! Lines for the user on stderr, by one `write`, and only if descriptor 2 still is what it was when we were loaded:
//! a job that closed it and opened a file of its own must not find our words in there.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

static DEVICE: AtomicU64 = AtomicU64::new(u64::MAX);
static INODE: AtomicU64 = AtomicU64::new(u64::MAX);
static RANK: AtomicU32 = AtomicU32::new(u32::MAX);

fn stderr_identity() -> Option<(u64, u64)> {
    // SAFETY: stat is plain data, filled by fstat.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: a closed descriptor answers -1.
    (unsafe { libc::fstat(2, &mut stat) } == 0).then_some((stat.st_dev, stat.st_ino))
}

/// Remembers what descriptor 2 is.
pub fn remember_stderr() {
    if let Some((device, inode)) = stderr_identity() {
        DEVICE.store(device, Ordering::Relaxed);
        INODE.store(inode, Ordering::Relaxed);
    }
}

/// Puts the rank into later lines.
pub fn set_rank(rank: u32) {
    RANK.store(rank, Ordering::Relaxed);
}

/// This process, as others call it: its rank, or what the launcher says is its rank while it does not know itself.
pub fn who() -> String {
    let known = Some(RANK.load(Ordering::Relaxed)).filter(|rank| *rank != u32::MAX);
    match known.or_else(|| std::env::var("RANK").ok()?.parse().ok()) {
        Some(rank) => format!("rank {rank}"),
        None => "a process of the job".into(),
    }
}

/// Writes one line. errno is preserved. At a terminal it begins with a line break: the job may have left the cursor behind
/// the first half of a number, or behind a progress bar.
pub fn line(text: &str) {
    // SAFETY: errno is a thread-local integer.
    let errno = unsafe { *libc::__errno_location() };
    write(text);
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

fn write(text: &str) {
    if stderr_identity() != Some((DEVICE.load(Ordering::Relaxed), INODE.load(Ordering::Relaxed))) {
        return;
    }
    let rank = RANK.load(Ordering::Relaxed);
    let who = if rank == u32::MAX { String::new() } else { format!("rank {rank}: ") };
    // SAFETY: isatty only asks.
    let start = if unsafe { libc::isatty(2) } == 1 { "\n" } else { "" };
    let bytes = format!("{start}flexmodel: {who}{}\n", text.replace('\n', " "));
    // SAFETY: the buffer is valid for its length; a failed write is no concern of the job's.
    unsafe { libc::write(2, bytes.as_ptr().cast(), bytes.len()) };
}
