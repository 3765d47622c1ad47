//! Bounds of what is read of a run directory, whoever made it.
//!
//! A line of the manifest that is beyond one of them costs what it tells of, and is named; everything else is served. All
//! are far beyond what an agent writes: jobs have names of 4096 bytes, 8 mesh axes and 64 models at most
//! ([`wire::record`], [`wire::control`]).

/// Bytes of a line of the manifest, with its newline.
pub const LINE: usize = 1 << 20;
/// Characters of a name, a path or a reason.
pub const TEXT: usize = 1 << 14;
/// Dimensions of a tensor.
pub const DIMS: usize = 64;
/// Mesh axes of a layout.
pub const AXES: usize = 64;
/// Bytes of a tensor (dimensions of size 0 count as 1), and of a shard.
pub const BYTES: u64 = i64::MAX as u64;
/// Bytes of `run.json`.
pub const RUN_FILE_BYTES: u64 = 64 << 20;
/// Bytes of `agent.lock`.
pub const LOCK_BYTES: usize = 4096;
/// Models in `run.json`.
pub const MODELS: usize = 1024;
/// Jobs that a manifest tells of; what is captured of others is read all the same.
pub const JOBS: usize = 1 << 16;
/// Revisions of hooks that a manifest tells of, of all jobs.
pub const REVISIONS: usize = 1 << 16;
/// Bytes of all clauses of a revision, and how many there are.
pub const PLAN: usize = wire::revision::MAX_PLAN;
/// Notices in `run.json`.
pub const NOTICES: usize = 4096;
/// Runs of nodes in one folder.
pub const NODES: usize = 4096;
/// Names within each other in a module's name.
pub const DEPTH: usize = 127;
/// Ranks of a group.
pub const RANKS: u64 = 1 << 20;
/// Models of all ranks of a job whose passes are told of, and kinds of these.
pub const MODELS_OF_RANKS: usize = 1 << 17;
/// Ranks counted while it is told which of them have a module.
pub const OWNED: usize = 1 << 24;
/// Number of the last shard.
pub const SHARDS: u32 = 99_999_999;
/// Problems of one kind that are named one by one; others are counted.
pub const PROBLEMS: usize = 1000;
/// How many times the elements of rows are made of them by padding.
pub const PADDED: u64 = 1024;
/// Ranks, pieces or values that a message names one by one.
pub const NAMED: usize = 16;
/// Characters of somebody else's text in a message.
pub const MESSAGE: usize = 500;
