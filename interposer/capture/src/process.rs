//! What the capture engine needs of the process that it is in, and cannot have for itself: it has no globals.

/// The process of the job. Every function may be called from any thread.
pub trait Process: Send + Sync {
    /// One line for the user, where the job's stderr still is.
    fn line(&self, text: &str);

    /// The rank is known: later lines name it.
    fn set_rank(&self, rank: u32);

    /// This process as a person calls it, such as `rank 3`.
    fn who(&self) -> String;

    /// Number of ranks on this machine, where the launcher says it.
    fn ranks_of_node(&self) -> Option<u32>;

    /// Whether taps may be triggered.
    fn is_on(&self) -> bool;

    /// Turns everything off for good, with one line that says why (OPEN-1).
    fn off(&self, why: &str);

    /// Nanoseconds since the Unix epoch.
    fn now_ns(&self) -> u64;
}
