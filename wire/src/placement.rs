//! How a tensor lies along one axis of the mesh: as a code that crosses boundaries, and with what some ways need besides.

use std::fmt;

use bytemuck::CheckedBitPattern;
use serde::{Deserialize, Serialize};

use crate::codes::Code;

/// How a tensor lies along one mesh axis, without what some ways need besides. See [`Placement`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, CheckedBitPattern)]
#[repr(u8)]
pub enum PlacementCode {
    /// The same on every member.
    Replicate = 0,
    /// Pieces of a dimension, in order of the members; they may be uneven, and empty.
    Shard = 1,
    /// Either of these: the bytes of all parts tell which.
    ReplicateOrShard = 2,
    /// Addends.
    Partial = 3,
    /// Not in these words.
    #[default]
    Unknown = 4,
    /// Runs of the elements of a tensor, in order of the members.
    Flat = 5,
    /// Two pieces of a dimension each, one from its head and one from its tail.
    HeadTail = 6,
}

impl Code for PlacementCode {}

impl PlacementCode {
    /// Whether what one member holds is certainly not all of it.
    pub fn holds_part(self) -> bool {
        self == Self::Partial || self.is_piece()
    }

    /// Whether it certainly is a piece of one dimension. Then so is its gradient.
    pub fn is_piece(self) -> bool {
        matches!(self, Self::Shard | Self::HeadTail)
    }

    /// The mask that C++ and Python have: a bit for each code of a piece of a dimension.
    pub fn pieces() -> (&'static str, u32) {
        let pieces = Self::all().filter(|placement| placement.is_piece());
        ("PLACEMENTS_OF_PIECES", pieces.fold(0, |mask, placement| mask | 1 << placement as u32))
    }
}

/// How a tensor lies along one mesh axis.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Placement {
    /// Every member holds the same tensor.
    Replicate,
    /// Members hold consecutive pieces of dimension `dim`, in `index` order. The length is the part's own size in that
    /// dimension, and the lengths of all members tell where each begins (batches may be uneven).
    Shard {
        /// The dimension.
        dim: u32,
    },
    /// Replicate if all parts turn out to be equal bytes, else a shard (a batch of size 1 is ambiguous). Where another part
    /// says `Shard` of the same dimension, so does this one.
    ReplicateOrShard {
        /// The dimension.
        dim: u32,
    },
    /// Members hold consecutive runs of the elements of a tensor, in `index` order: their own shape is `[elements]`, which
    /// may be none. FSDP1 and DeepSpeed ZeRO lay parameters so.
    Flat {
        /// Of the tensor.
        shape: Vec<u64>,
    },
    /// Members hold two consecutive pieces of dimension `dim` each, all of one length: the `index`-th from the head of the
    /// whole, then the `index`-th from its tail, whose order among themselves is that of the whole. Context parallelism
    /// balances the work of causal attention so.
    HeadTail {
        /// The dimension.
        dim: u32,
    },
    /// Members hold addends of the whole.
    Partial,
    /// It is sharded or differs, and how is not known: parts are kept apart, unless they turn out to be equal bytes.
    Unknown,
}

impl Placement {
    /// The place with this code. `dim` is the dimension, where there is one, and `shape` the whole tensor's for
    /// [`Placement::Flat`].
    pub fn of(placement: PlacementCode, dim: u32, shape: &[u64]) -> Self {
        match placement {
            PlacementCode::Replicate => Self::Replicate,
            PlacementCode::Shard => Self::Shard { dim },
            PlacementCode::ReplicateOrShard => Self::ReplicateOrShard { dim },
            PlacementCode::Flat => Self::Flat { shape: shape.to_vec() },
            PlacementCode::HeadTail => Self::HeadTail { dim },
            PlacementCode::Partial => Self::Partial,
            PlacementCode::Unknown => Self::Unknown,
        }
    }

    /// The shape of the whole, where members hold runs of its elements.
    pub fn flattened(&self) -> Option<&[u64]> {
        match self {
            Self::Flat { shape } => Some(shape),
            _ => None,
        }
    }

    /// The dimension of which members hold pieces, or may hold some.
    pub fn dim(&self) -> Option<u32> {
        match self {
            Self::Shard { dim } | Self::ReplicateOrShard { dim } | Self::HeadTail { dim } => Some(*dim),
            Self::Replicate | Self::Flat { .. } | Self::Partial | Self::Unknown => None,
        }
    }

    /// Its code.
    pub fn code(&self) -> PlacementCode {
        match self {
            Self::Replicate => PlacementCode::Replicate,
            Self::Shard { .. } => PlacementCode::Shard,
            Self::ReplicateOrShard { .. } => PlacementCode::ReplicateOrShard,
            Self::Flat { .. } => PlacementCode::Flat,
            Self::HeadTail { .. } => PlacementCode::HeadTail,
            Self::Partial => PlacementCode::Partial,
            Self::Unknown => PlacementCode::Unknown,
        }
    }
}

/// In words.
impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Replicate => f.write_str("replicated"),
            Self::Shard { dim } => write!(f, "shard of dim {dim}"),
            Self::ReplicateOrShard { dim } => write!(f, "shard of dim {dim}, or replicated where equal"),
            Self::Flat { shape } => write!(f, "run of the elements of {shape:?}"),
            Self::HeadTail { dim } => write!(f, "two pieces of dim {dim}, from its head and its tail"),
            Self::Partial => f.write_str("addends"),
            Self::Unknown => f.write_str("not known"),
        }
    }
}
