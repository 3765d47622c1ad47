//! The one definition of what lies in a run directory.
//!
//! ```text
//! RUN/run.json                      RunInfo; replaced whole by rename
//! RUN/manifest.jsonl                one Line per line; appended, never changed
//! RUN/shard-00000.safetensors       sealed: any safetensors reader opens it
//! RUN/shard-00001.open              being written: header space is zero, bytes as the manifest says
//! RUN/agent.lock                    flock()ed by the agent that writes here; its [`Holder`](crate::lock::Holder)
//! ```
//!
//! A line of the manifest is JSON and carries its own checksum:
//! `{"crc":"1a2b3c4d","rec":{...}}`, crc32c (eight hex digits) over the bytes of the inner object as they stand.
//! Offsets are from the start of the shard file and do not change when it is sealed.
//!
//! Several jobs may write into one run, in turn or at once, and each may have several attempts. A [`Line::Job`] says what is known
//! of one; numbers of jobs are this directory's own.
//!
//! A *part* is what one rank captured of one tensor. The parts of a record share an [`Identity`]; their `axes` say how
//! they make the whole. Parts that are consecutive pieces of dimension 0 are laid side by side in rank order, so that
//! the whole is one contiguous range and one entry of the sealed shard.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use wire::{
    control::StepRule,
    dtype::DType,
    hooks::Kind,
    loss_scale::LossScale,
    passes::{Pass, Run},
    record::{Axis, MICRO, RecordMeta, Sliced},
    revision::Clause,
};

use super::objects;

/// Version of everything in this module. In 1, parts had a `recompute`, always false, and shards of a dimension an
/// `offset`, always null: neither is read. Until 2, the `input_digest` of an axis was `given`, and is read as that. Until 3
/// a run was of one job. Until 4 hooks did not change while a job ran: all of its parts are of revision 0.
pub const FORMAT: u32 = 5;
/// `run.json`.
pub const RUN_FILE: &str = "run.json";
/// `manifest.jsonl`.
pub const MANIFEST_FILE: &str = "manifest.jsonl";
/// `agent.lock`.
pub const LOCK_FILE: &str = "agent.lock";
/// Bytes at the start of every shard that are kept for its safetensors header (8 bytes of length, JSON, spaces).
pub const HEADER_SPACE: u64 = 1 << 20;
/// Tensors start at multiples of this in a shard.
pub const TENSOR_ALIGN: u64 = 64;
/// Entries of a sealed shard whose names start with this are filler (safetensors allows no holes).
pub const FILLER: &str = "__flexmodel_filler__.";

/// `run.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunInfo {
    /// [`FORMAT`].
    pub format: u32,
    /// Version of FlexModel that wrote it.
    pub flexmodel: String,
    /// The command, as given to `flexmodel run` or read from rank 0; without the values of secrets.
    pub command: Vec<String>,
    /// The hooks as the user wrote them.
    pub hooks: String,
    /// Nanoseconds since the Unix epoch.
    pub started_ns: u64,
    /// The same; `None` while the run is going on or if its agent died.
    pub finished_ns: Option<u64>,
    /// The command's exit code, where `flexmodel run` started it.
    pub exit_code: Option<i32>,
    /// Number of ranks.
    pub world: u32,
    /// Node that wrote this directory.
    pub node: String,
    /// `torch.__version__` of the job.
    pub torch: String,
    /// Python of the job.
    pub python: String,
    /// How the job wraps its model.
    pub wrapper: String,
    /// By which rules steps were counted, in the order in which they came into force.
    pub steps: Vec<StepRule>,
    /// The module tree of every model, by model number, as far as it is within [`names`](super::names) and
    /// [`owners`](super::ownership).
    #[serde(deserialize_with = "objects::list")]
    pub models: Vec<ModelInfo>,
    /// Which modules the ranks have that said so. They differ where a pipeline or experts are distributed over them. None
    /// where these lists were too long.
    #[serde(deserialize_with = "objects::list")]
    pub owners: Vec<Owners>,
    /// What the user should read once.
    pub notices: Vec<String>,
    /// Counters over all ranks; final once `finished_ns` is set.
    #[serde(deserialize_with = "objects::one")]
    pub totals: Totals,
}

/// A model's modules.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelInfo {
    /// Its number.
    pub model: u32,
    /// Its modules.
    #[serde(deserialize_with = "objects::shared_list")]
    pub modules: Arc<Vec<Module>>,
}

/// A module of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Module {
    /// Canonical name; empty for the model itself.
    pub name: Arc<str>,
    /// Class name.
    pub class: Arc<str>,
    /// Mask of [`Kind::bit`]s that are tapped; 0: not selected.
    pub kinds: u32,
}

/// Ranks that have the same modules of a model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owners {
    /// The job.
    #[serde(flatten)]
    pub job: JobId,
    /// Its number; `None`: of all models of which these ranks capture nothing.
    pub model: Option<u32>,
    /// Global ranks, in order.
    pub ranks: Vec<u32>,
    /// Names of the modules, in order.
    pub modules: Arc<Vec<Arc<str>>>,
}

/// Counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Totals {
    /// Whole records: identities with at least one part.
    pub records: u64,
    /// Parts journalled.
    pub parts: u64,
    /// Tensor bytes stored.
    pub bytes: u64,
    /// Parts lost: slab full, agent absent or stopped, disk full, a job that died in the middle.
    pub dropped: u64,
    /// Parts refused for a named reason.
    pub refused: u64,
    /// Replicas that should be equal and are not.
    pub divergences: u64,
}

/// A line of the manifest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "t", rename_all = "snake_case")]
pub enum Line {
    /// A part whose bytes are in a shard.
    Part(Part),
    /// A tensor that was not captured, and why.
    Refused {
        /// What it is.
        #[serde(flatten)]
        what: What,
        /// Why.
        reason: String,
    },
    /// Replicas differ.
    Divergence {
        /// The part that differs from the first one seen.
        #[serde(flatten)]
        what: What,
        /// Rank of the first one seen.
        against: u32,
    },
    /// Parts lost on a rank since the last such line.
    Dropped {
        /// The rank.
        rank: u32,
        /// How many.
        count: u64,
        /// Why.
        reason: String,
        /// The slab that they were to come through, and the last of them that is known by number.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from: Option<Origin>,
    },
    /// A job, or an attempt of one, as far as it is known: of several lines about it the last counts.
    Job(JobInfo),
    /// Other hooks began in a job: of several lines about one revision the last counts.
    Revision(Revision),
    /// A shard was sealed.
    Sealed {
        /// Its stem, such as `shard-00000`.
        shard: String,
        /// Its length in bytes.
        len: u64,
    },
    /// A rank is gone, for all that is known, and tells of no more passes.
    Left {
        /// The job.
        #[serde(flatten)]
        job: JobId,
        /// The rank.
        rank: u32,
    },
    /// A rank made a forward pass of a model.
    Pass {
        /// The job.
        #[serde(flatten)]
        job: JobId,
        /// The rank.
        rank: u32,
        /// Which, and what tells the passes of other ranks that are one with it.
        #[serde(flatten)]
        pass: Pass,
    },
}

/// Which job of a run, and which attempt of it: ranks that were started again make another attempt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct JobId {
    /// Number of the job, in the order in which jobs were first seen.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub job: u32,
    /// How often its ranks had been started again.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub attempt: u32,
}

impl JobId {
    /// In words.
    pub fn words(self) -> String {
        format!("job={} attempt={}", self.job, self.attempt)
    }
}

fn is_zero<T: Default + PartialEq>(n: &T) -> bool {
    *n == T::default()
}

/// An attempt of a job.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobInfo {
    /// Its number.
    #[serde(flatten)]
    pub id: JobId,
    /// What all of its ranks have in common and no other attempt has, on whichever node: the number of their process group in
    /// hexadecimal. Empty where they have none.
    pub group: String,
    /// What its launcher calls it, or where its ranks meet, or the process that it is.
    pub launch: String,
    /// Who started its ranks on this node.
    pub launcher: String,
    /// Number of ranks.
    pub world: u32,
    /// Those of this node, where their launchers say it.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "objects::list")]
    pub here: Vec<Run>,
    /// The command line of the rank that came first, without the values of secrets.
    pub command: Vec<String>,
    /// The hooks as the user wrote them.
    pub hooks: String,
    /// When its first rank came, nanoseconds since the Unix epoch.
    pub started_ns: u64,
}

/// Hooks that took the place of others while a job ran.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revision {
    /// The attempt of the job.
    #[serde(flatten)]
    pub job: JobId,
    /// Which, from 1: the hooks that the job was started with are revision 0.
    pub revision: u64,
    /// The step, or the pass, that it begins with; `None`: with each rank's next pass.
    #[serde(default)]
    pub begins: Option<u64>,
    /// What `begins` counts: steps, or in inference passes of all models.
    pub rule: StepRule,
    /// Number of ranks that it began on.
    pub ranks: u32,
    /// All of its clauses, in the order in which they were given.
    #[serde(deserialize_with = "objects::list")]
    pub clauses: Vec<Clause>,
    /// The highest number that a clause of the job ever had: none is given twice.
    #[serde(default)]
    pub last_id: u32,
    /// When it was decided, nanoseconds since the Unix epoch.
    pub time_ns: u64,
}

impl Revision {
    /// Since when it holds, in words.
    pub fn since(&self) -> String {
        match (self.begins, self.rule) {
            (Some(pass), StepRule::Inference) => format!("from pass {pass} on"),
            (Some(step), _) => format!("from step {step} on"),
            (None, _) => "from each rank's next pass on".to_owned(),
        }
    }
}

/// As `flexmodel ls` lists it.
impl std::fmt::Display for Revision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "revision {} {}: ", self.revision, self.since())?;
        match self.clauses.as_slice() {
            [] => f.write_str("no hooks"),
            [first, rest @ ..] => {
                f.write_str(&first.text)?;
                rest.iter().try_for_each(|clause| write!(f, "; {}", clause.text))
            }
        }
    }
}

/// A stored part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// What it is.
    #[serde(flatten)]
    pub what: What,
    /// Where its bytes are; `None` for statistics only, and where another rank sent them.
    #[serde(default, deserialize_with = "objects::optional")]
    pub at: Option<Location>,
    /// Statistics of this part; `None` for dtypes without (bool, integers have them).
    #[serde(default, deserialize_with = "objects::optional")]
    pub stats: Option<Stats>,
    /// crc32c of the bytes where this rank sent no more: those of a replica that another rank sent, if all is well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub same: Option<u32>,
}

impl Part {
    /// crc32c of its bytes, if any rank sent them.
    pub fn crc(&self) -> Option<u32> {
        self.at.as_ref().map(|at| at.crc).or(self.same)
    }
}

/// Where bytes are.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Location {
    /// Stem of the shard; the file is `STEM.safetensors`, or `STEM.open` before it is sealed.
    pub shard: String,
    /// From the start of the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// crc32c of the bytes.
    pub crc: u32,
}

/// What tells one record from every other. Displayed, it is the record's name in a sealed shard.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Identity {
    /// The job and the attempt.
    #[serde(flatten)]
    pub job: JobId,
    /// Canonical module name; empty for the model itself.
    pub module: String,
    /// What of the module.
    pub kind: Kind,
    /// Leaf in the structure.
    pub path: String,
    /// Model number.
    pub model: u32,
    /// Step.
    pub step: u64,
    /// Microbatch.
    pub micro: u32,
    /// Call.
    pub call: u32,
    /// Backward pass over the same forward.
    pub repeat: u32,
    /// The pass trains.
    pub train: bool,
    /// Which it is of those that are called the same; readers number them. All but the first were captured when nobody
    /// knew how to tell them apart.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub again: u32,
    /// Never written: not all ranks that have the model made this pass, and this is the lowest that did.
    #[serde(skip)]
    pub apart: Option<u32>,
    /// Likewise: ranks have models of their own under these names.
    #[serde(skip)]
    pub own: bool,
    /// Likewise: it is not known yet of which pass this is, and another one has these numbers.
    #[serde(skip)]
    pub pending: bool,
}

/// What a part is: an identity, and this rank's piece of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct What {
    /// Which record it belongs to.
    #[serde(flatten)]
    pub id: Identity,
    /// Class of the module.
    pub class: String,
    /// Hook group; empty for none.
    pub group: String,
    /// Element type.
    pub dtype: DType,
    /// Shape of this part.
    pub shape: Vec<u64>,
    /// It is a slice of what this rank had.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "objects::optional")]
    pub slice: Option<Sliced>,
    /// Global rank.
    pub rank: u32,
    /// Layout.
    #[serde(deserialize_with = "objects::list")]
    pub axes: Vec<Axis>,
    /// Data-parallel size.
    pub dp_size: u32,
    /// By how much the job scaled the loss, for gradients of activations; otherwise 1.
    #[serde(default)]
    pub loss_scale: LossScale,
    /// The optimizer did not use this gradient, since it is not finite.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skipped: bool,
    /// Revision of the hooks that it was captured under; that of the environment is 0.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub revision: u64,
    /// When the tap was triggered, nanoseconds since the Unix epoch.
    pub time_ns: u64,
    /// The slab that it came through. An agent that takes a run over tells by this what is in it already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Origin>,
    /// Never written: whether this is of one pass with the parts of other ranks.
    #[serde(skip)]
    pub joined: Joined,
}

/// Memory of a layout, about.
pub fn memory_of(axes: &[Axis]) -> usize {
    let axis = |axis: &Axis| {
        let flat = axis.place.flattened().map_or(0, <[u64]>::len);
        size_of::<Axis>() + axis.name.len() + flat * size_of::<u64>()
    };
    axes.iter().map(axis).sum()
}

/// Whether parts of several ranks are of one pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Joined {
    /// Nobody has asked, or their numbers are all that is known of them.
    #[default]
    ByNumber,
    /// They are.
    Known,
    /// They are if ranks that make equally many passes make them in the same order.
    Assumed,
    /// That is not known yet.
    Pending,
}

/// A tensor of a slab: the slab's number, and the tensor's in it, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin(pub u64, pub u64);

/// Statistics of a tensor's finite elements; complex elements count by magnitude. Not-a-number results are `null`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Elements in all.
    pub count: u64,
    /// Arithmetic mean.
    pub mean: Option<f64>,
    /// Population standard deviation.
    pub std: Option<f64>,
    /// Square root of the sum of squares.
    pub l2: Option<f64>,
    /// Largest magnitude.
    pub absmax: Option<f64>,
    /// Smallest.
    pub min: Option<f64>,
    /// Largest.
    pub max: Option<f64>,
    /// Not-a-number elements.
    pub nan: u64,
    /// Infinite elements.
    pub inf: u64,
    /// Elements equal to zero.
    pub zero: u64,
}

impl What {
    /// The rank and which microbatch of a pipeline's step: no two parts of a record have the same.
    pub fn seat(&self) -> (u32, u32) {
        let micro = self.axes.iter().find(|axis| axis.name == MICRO);
        (self.rank, micro.map_or(0, |axis| axis.index))
    }

    /// From what came through a slab; of the run's first job, until it is told of which.
    pub fn from_meta(m: RecordMeta) -> Self {
        Self {
            id: Identity {
                job: JobId::default(),
                module: m.module,
                kind: m.kind,
                path: m.path,
                model: m.model,
                step: m.step,
                micro: m.micro,
                call: m.call,
                repeat: m.repeat,
                train: m.train,
                again: 0,
                apart: None,
                own: false,
                pending: false,
            },
            class: m.class,
            group: m.group,
            dtype: m.dtype,
            shape: m.shape,
            slice: m.slice,
            rank: m.rank,
            axes: m.axes,
            dp_size: m.dp_size,
            loss_scale: m.loss_scale,
            skipped: m.skipped,
            revision: m.revision,
            time_ns: m.time_ns,
            from: None,
            joined: Joined::default(),
        }
    }
}

/// As names of records begin their place in a run: nothing of the first job's first attempt.
impl std::fmt::Display for JobId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.job > 0 {
            write!(f, "job{}.", self.job)?;
        }
        if self.attempt > 0 {
            write!(f, "attempt{}.", self.attempt)?;
        }
        Ok(())
    }
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}:{}:{}@{}model{}.step{}.micro{}.call{}",
            self.module,
            self.kind.name(),
            self.path,
            self.job,
            self.model,
            self.step,
            self.micro,
            self.call
        )?;
        if self.repeat > 0 {
            write!(f, ".repeat{}", self.repeat)?;
        }
        if !self.train {
            write!(f, ".eval")?;
        }
        if self.again > 0 {
            write!(f, ".again{}", self.again)?;
        }
        if let Some(rank) = self.apart {
            write!(f, "#rank{rank}")?;
        }
        if self.own {
            write!(f, "#own")?;
        }
        if self.pending {
            write!(f, "#pending")?;
        }
        Ok(())
    }
}
