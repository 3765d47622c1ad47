//! File descriptors of the agent: how many there are, and who may have how many.
//!
//! Whoever connects uses them up, so each kind of connection has a share, and what is left over is for the run's files.
//! The page, which other users of the machine reach too, has the smallest.

/// Most connections of the page.
const MAX_PAGE: usize = 256;
/// Most connections of processes that have not said hello.
const MAX_ARRIVING: usize = 64;
/// Most ranks.
const MAX_RANKS: usize = 4096;
/// Kept for files: the run's, its shards that wait to be sealed, listeners, what the page reads.
const FILES: usize = 64;
/// What a process that arrives brings: its connection and its memory.
const AN_ARRIVAL: usize = 2;
/// What a rank keeps: its connection and its memory, which may be two for a while, and room for another connection.
const A_RANK: usize = 4;

/// How many of each may be open at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shares {
    /// Connections of the page.
    pub page: usize,
    /// Connections on the unix socket without a hello.
    pub arriving: usize,
    /// Ranks.
    pub ranks: usize,
}

impl Shares {
    /// Of this process, by its limit.
    pub fn now() -> Self {
        Self::of(limit().0)
    }

    /// Of `limit` descriptors.
    fn of(limit: u64) -> Self {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        // Some of each, however small the limit is.
        let page = (limit / 8).clamp(4, MAX_PAGE);
        let arriving = (limit / 16).clamp(2, MAX_ARRIVING);
        let rest = limit.saturating_sub(page + AN_ARRIVAL * arriving + FILES);
        Self { page, arriving, ranks: (rest / A_RANK).clamp(1, MAX_RANKS) }
    }
}

/// Raises the soft limit on descriptors to the hard one: what a shell sets is for interactive programs.
pub fn raise() {
    let (soft, hard) = limit();
    if soft < hard {
        let wanted = libc::rlimit { rlim_cur: hard, rlim_max: hard };
        // SAFETY: a valid rlimit. If it fails the shares are those of the soft limit.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &wanted) };
    }
}

/// Soft and hard.
fn limit() -> (u64, u64) {
    let mut found = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: room for the answer.
    match unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut found) } {
        0 => (found.rlim_cur, found.rlim_max),
        // POSIX's least.
        _ => (20, 20),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_fit_into_the_limit_and_leave_room_for_files() {
        for limit in [256, 1024, 4096, 1 << 20] {
            let Shares { page, arriving, ranks } = Shares::of(limit);
            let all = page + AN_ARRIVAL * arriving + A_RANK * ranks + FILES;
            assert!(all as u64 <= limit && page as u64 <= limit / 8, "{limit}: {all}");
        }
        assert_eq!(Shares::of(u64::MAX), Shares { page: MAX_PAGE, arriving: MAX_ARRIVING, ranks: MAX_RANKS });
        assert!(Shares::of(256).ranks >= 16);
    }
}
