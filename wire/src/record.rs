//! A record says exactly what a captured tensor is.
//!
//! Every slab frame that starts a tensor carries its [`RecordMeta`] in full, so a frame can be read without any
//! other: an agent that comes back after a crash loses nothing it needs. The encoding is little-endian, fixed
//! ([`RECORD_VERSION`]) and written by hand, since it lives in shared memory.

use serde::{Deserialize, Serialize};

pub use crate::placement::{Placement, PlacementCode};
use crate::{codes::Code, dtype::DType, hooks::Kind, loss_scale::LossScale};

/// Version of the encoding below.
pub const RECORD_VERSION: u16 = 8;
/// Most dimensions a tensor may have.
pub const MAX_DIMS: usize = 64;
/// Most mesh axes a layout may have.
pub const MAX_AXES: usize = 8;
/// Longest name (module, class, path, reason) in bytes.
pub const MAX_NAME: usize = 4096;

/// The name of the axes over which the batch lies, taken together.
pub const DATA: &str = "dp";
/// The name of the axis over which a pipeline cuts the batch of a step. All of its members are on one rank.
pub const MICRO: &str = "micro";

/// One mesh axis of a layout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Axis {
    /// `dp`, `tp`, `cp`, `pp` or `ep`.
    pub name: String,
    /// This rank's coordinate, `0..size`, among the ranks that capture.
    pub index: u32,
    /// Number of members that capture.
    pub size: u32,
    /// How the tensor lies along the axis.
    pub place: Placement,
    /// Where nothing but the number of ranks says that members have rows of the batch of their own: a digest of what this
    /// member's model was given in the same pass. If two members were given the same, they have not, and `place` counts
    /// as [`Placement::Unknown`].
    #[serde(default, skip_serializing_if = "Option::is_none", alias = "given")]
    pub input_digest: Option<u32>,
}

/// Which elements of a tensor a record has, where it has not all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sliced {
    /// In the words of [`crate::hooks::Slice`]: `[:,-1]`.
    pub by: String,
    /// This part's sizes, before, of the dimensions that are cut. Parts of which these differ make no whole.
    pub of: Vec<u64>,
    /// crc32c of all elements of this part, where their equality tells how it lies: slices of tensors that differ may be
    /// equal. `None`: it was not needed, or could not be had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crc: Option<u32>,
}

/// What one rank's captured tensor is. Its bytes (row-major, `shape`, `dtype`) follow in the slab.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecordMeta {
    /// Canonical module name; empty for the model itself.
    pub module: String,
    /// The module's class name.
    pub class: String,
    /// What of the module.
    pub kind: Kind,
    /// The leaf: `out`, `out[0]`, `out.logits`, `in[0]`, `in.states`.
    pub path: String,
    /// The hook group, empty for none.
    pub group: String,
    /// Number of the model, in construction order of the models that were selected from.
    pub model: u32,
    /// Optimizer steps so far when the forward ran.
    pub step: u64,
    /// Forward pass of the model within the step; counted apart for training and evaluation.
    pub micro: u32,
    /// Call of this module within that forward pass.
    pub call: u32,
    /// For gradients: which backward pass over the same forward (`retain_graph`); otherwise 0.
    pub repeat: u32,
    /// Revision of the hooks that it was captured under; that of the environment is 0.
    pub revision: u64,
    /// The pass trains: gradients were enabled when the model was called, and some module of it was in training mode.
    pub train: bool,
    /// The optimizer did not use this gradient, since it is not finite.
    pub skipped: bool,
    /// Keep statistics only.
    pub stats_only: bool,
    /// Element type of the bytes that follow.
    pub dtype: DType,
    /// This part's shape.
    pub shape: Vec<u64>,
    /// It is a slice of what this rank has.
    pub slice: Option<Sliced>,
    /// Global rank that captured it.
    pub rank: u32,
    /// Layout, one entry a mesh axis; empty for one process.
    pub axes: Vec<Axis>,
    /// Data-parallel size: a gradient of a mean loss over equal shards is this many times the one-process gradient.
    pub dp_size: u32,
    /// For gradients of activations: how many times the gradient of the loss that the script computed it is, where a
    /// GradScaler or DeepSpeed scaled that loss; otherwise 1.
    pub loss_scale: LossScale,
    /// crc32c of the bytes, which do not follow: a replica that another rank sends.
    pub same: Option<u32>,
    /// Nanoseconds since the Unix epoch when the tap was triggered.
    pub time_ns: u64,
    /// Not empty: the tensor was refused for this reason and no bytes follow.
    pub refused: String,
}

/// Why bytes are not a record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("record metadata: {0}")]
pub struct RecordError(pub &'static str);

impl RecordMeta {
    /// The only output of a module in the first pass of a job of one process. Producers change what differs:
    /// `RecordMeta { step, ..RecordMeta::output("layers.0.mlp", dtype, shape) }`.
    pub fn output(module: &str, dtype: DType, shape: Vec<u64>) -> Self {
        Self {
            module: module.to_owned(),
            class: String::new(),
            kind: Kind::Forward,
            path: "out".to_owned(),
            group: String::new(),
            model: 0,
            step: 0,
            micro: 0,
            call: 0,
            repeat: 0,
            revision: 0,
            train: true,
            skipped: false,
            stats_only: false,
            dtype,
            shape,
            slice: None,
            rank: 0,
            axes: Vec::new(),
            dp_size: 1,
            loss_scale: LossScale::ONE,
            same: None,
            time_ns: 0,
            refused: String::new(),
        }
    }

    /// Bytes of payload: the product of `shape` times the element size, 0 if refused or sent by another rank; `None` on
    /// overflow.
    pub fn payload_len(&self) -> Option<u64> {
        if !self.refused.is_empty() || self.same.is_some() {
            return Some(0);
        }
        self.shape.iter().try_fold(self.dtype.size() as u64, |n, &d| n.checked_mul(d))
    }

    /// Appends the encoding to `out`. Names longer than [`MAX_NAME`] are cut at a character boundary.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&RECORD_VERSION.to_le_bytes());
        let [train, stats_only, same, skipped, sliced] =
            [self.train, self.stats_only, self.same.is_some(), self.skipped, self.slice.is_some()].map(u8::from);
        let flags = train | stats_only << 1 | same << 2 | skipped << 3 | sliced << 4;
        out.extend_from_slice(&[self.kind as u8, self.dtype as u8, flags]);
        for n in [self.model, self.micro, self.call, self.repeat, self.rank, self.dp_size] {
            out.extend_from_slice(&n.to_le_bytes());
        }
        out.extend_from_slice(&self.step.to_le_bytes());
        out.extend_from_slice(&self.revision.to_le_bytes());
        out.extend_from_slice(&self.time_ns.to_le_bytes());
        out.extend_from_slice(&self.loss_scale.0.to_le_bytes());
        out.extend_from_slice(&self.same.unwrap_or_default().to_le_bytes());
        out.push(self.shape.len().min(MAX_DIMS) as u8);
        for d in self.shape.iter().take(MAX_DIMS) {
            out.extend_from_slice(&d.to_le_bytes());
        }
        out.push(self.axes.len().min(MAX_AXES) as u8);
        for axis in self.axes.iter().take(MAX_AXES) {
            put_str(out, &axis.name);
            out.extend_from_slice(&axis.index.to_le_bytes());
            out.extend_from_slice(&axis.size.to_le_bytes());
            let shape = axis.place.flattened().map(|shape| &shape[..shape.len().min(MAX_DIMS)]);
            let dim = shape.map_or(axis.place.dim().unwrap_or(0), |shape| shape.len() as u32);
            out.push(axis.place.code() as u8);
            out.extend_from_slice(&dim.to_le_bytes());
            out.extend_from_slice(&axis.input_digest.map_or(u64::MAX, u64::from).to_le_bytes());
            shape.into_iter().flatten().for_each(|d| out.extend_from_slice(&d.to_le_bytes()));
        }
        for s in [&self.module, &self.class, &self.path, &self.group, &self.refused] {
            put_str(out, s);
        }
        if let Some(Sliced { by, of, crc }) = &self.slice {
            put_str(out, by);
            out.push(of.len().min(MAX_DIMS) as u8);
            of.iter().take(MAX_DIMS).for_each(|d| out.extend_from_slice(&d.to_le_bytes()));
            out.extend_from_slice(&crc.map_or(u64::MAX, u64::from).to_le_bytes());
        }
    }

    /// Decodes what [`encode`](Self::encode) wrote. Takes hostile bytes; refuses trailing ones.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let mut r = Reader(bytes);
        if r.u16()? != RECORD_VERSION {
            return Err(RecordError("unknown version"));
        }
        let kind = Kind::from_code(r.u8()?).ok_or(RecordError("unknown kind"))?;
        let dtype = DType::from_code(r.u8()?).ok_or(RecordError("unknown dtype"))?;
        let flags = r.u8()?;
        if flags > 31 {
            return Err(RecordError("unknown flags"));
        }
        let [model, micro, call, repeat, rank, dp_size] = [r.u32()?, r.u32()?, r.u32()?, r.u32()?, r.u32()?, r.u32()?];
        let step = r.u64()?;
        let revision = r.u64()?;
        let time_ns = r.u64()?;
        let loss_scale = LossScale(f64::from_bits(r.u64()?));
        let same = Some(r.u32()?).filter(|_| flags & 4 != 0);
        let ndim = usize::from(r.u8()?);
        if ndim > MAX_DIMS {
            return Err(RecordError("too many dimensions"));
        }
        let shape = (0..ndim).map(|_| r.u64()).collect::<Result<Vec<_>, _>>()?;
        let naxes = usize::from(r.u8()?);
        if naxes > MAX_AXES {
            return Err(RecordError("too many mesh axes"));
        }
        let mut axes = Vec::with_capacity(naxes);
        for _ in 0..naxes {
            let name = r.str()?;
            let (index, size) = (r.u32()?, r.u32()?);
            if index >= size {
                return Err(RecordError("mesh coordinate outside its axis"));
            }
            let (code, dim) = (r.u8()?, r.u32()?);
            let input_digest = r.digest()?;
            let placement = PlacementCode::from_code(code).ok_or(RecordError("unknown placement"))?;
            let shape: Vec<u64> = match placement {
                _ if placement.is_piece() && dim as usize >= ndim => {
                    return Err(RecordError("pieces of a dimension the tensor does not have"));
                }
                PlacementCode::Flat if dim as usize > MAX_DIMS => return Err(RecordError("too many dimensions")),
                PlacementCode::Flat => (0..dim).map(|_| r.u64()).collect::<Result<_, _>>()?,
                _ => Vec::new(),
            };
            let place = Placement::of(placement, dim, &shape);
            axes.push(Axis { name, index, size, place, input_digest });
        }
        let [module, class, path, group, refused] = [r.str()?, r.str()?, r.str()?, r.str()?, r.str()?];
        let slice = if flags & 16 != 0 { Some(r.sliced()?) } else { None };
        if !r.0.is_empty() {
            return Err(RecordError("trailing bytes"));
        }
        Ok(Self {
            module,
            class,
            kind,
            path,
            group,
            model,
            step,
            micro,
            call,
            repeat,
            revision,
            train: flags & 1 != 0,
            stats_only: flags & 2 != 0,
            skipped: flags & 8 != 0,
            dtype,
            shape,
            slice,
            rank,
            axes,
            dp_size,
            loss_scale,
            same,
            time_ns,
            refused,
        })
    }
}

fn put_str(out: &mut Vec<u8>, s: &str) {
    let mut len = s.len().min(MAX_NAME);
    while !s.is_char_boundary(len) {
        len -= 1;
    }
    out.extend_from_slice(&(len as u16).to_le_bytes());
    out.extend_from_slice(&s.as_bytes()[..len]);
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], RecordError> {
        let (head, rest) = self.0.split_at_checked(n).ok_or(RecordError("cut short"))?;
        self.0 = rest;
        Ok(head)
    }
    fn array<const N: usize>(&mut self) -> Result<[u8; N], RecordError> {
        self.take(N)?.try_into().map_err(|_| RecordError("cut short"))
    }
    fn u8(&mut self) -> Result<u8, RecordError> {
        Ok(self.array::<1>()?[0])
    }
    fn u16(&mut self) -> Result<u16, RecordError> {
        self.array().map(u16::from_le_bytes)
    }
    fn u32(&mut self) -> Result<u32, RecordError> {
        self.array().map(u32::from_le_bytes)
    }
    fn u64(&mut self) -> Result<u64, RecordError> {
        self.array().map(u64::from_le_bytes)
    }
    /// 32 bits, if there are any.
    fn digest(&mut self) -> Result<Option<u32>, RecordError> {
        match self.u64()? {
            u64::MAX => Ok(None),
            digest => u32::try_from(digest).map(Some).map_err(|_| RecordError("a digest of more than 32 bits")),
        }
    }
    fn sliced(&mut self) -> Result<Sliced, RecordError> {
        let (by, ndim) = (self.str()?, usize::from(self.u8()?));
        if ndim > MAX_DIMS {
            return Err(RecordError("too many dimensions"));
        }
        let of = (0..ndim).map(|_| self.u64()).collect::<Result<_, _>>()?;
        Ok(Sliced { by, of, crc: self.digest()? })
    }
    fn str(&mut self) -> Result<String, RecordError> {
        let len = usize::from(self.u16()?);
        if len > MAX_NAME {
            return Err(RecordError("name too long"));
        }
        std::str::from_utf8(self.take(len)?).map(str::to_owned).map_err(|_| RecordError("name is not UTF-8"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn example() -> RecordMeta {
        RecordMeta {
            class: "MLP".into(),
            path: "out[0]".into(),
            model: 1,
            step: 7,
            micro: 2,
            call: 3,
            revision: 4,
            rank: 1,
            axes: vec![
                Axis {
                    name: "dp".into(),
                    index: 1,
                    size: 2,
                    place: Placement::Shard { dim: 0 },
                    input_digest: Some(7),
                },
                Axis {
                    name: "tp".into(),
                    index: 0,
                    size: 2,
                    place: Placement::Flat { shape: vec![3, 4] },
                    input_digest: None,
                },
            ],
            dp_size: 2,
            loss_scale: LossScale(1024.0),
            same: Some(7),
            slice: Some(Sliced { by: "[:,-1]".into(), of: vec![9], crc: Some(u32::MAX) }),
            time_ns: 99,
            ..RecordMeta::output("layers.0.mlp", DType::BFloat16, vec![2, 0, 5])
        }
    }

    #[test]
    fn a_record_round_trips() {
        let mut bytes = Vec::new();
        example().encode(&mut bytes);
        assert_eq!(RecordMeta::decode(&bytes), Ok(example()));
    }

    #[test]
    fn every_loss_scale_round_trips() {
        for scale in [0.0, -0.0, 1.0 / 3.0, f64::MIN_POSITIVE, f64::INFINITY, f64::NEG_INFINITY, f64::NAN] {
            let meta = RecordMeta { loss_scale: LossScale(scale), ..example() };
            let mut bytes = Vec::new();
            meta.encode(&mut bytes);
            assert_eq!(RecordMeta::decode(&bytes), Ok(meta));
        }
    }

    #[test]
    fn every_truncation_is_refused() {
        let mut bytes = Vec::new();
        example().encode(&mut bytes);
        for n in 0..bytes.len() {
            assert!(RecordMeta::decode(&bytes[..n]).is_err(), "{n} bytes were taken for a record");
        }
    }

    #[test]
    fn payload_overflow_is_none() {
        let meta = RecordMeta { shape: vec![u64::MAX, 2], same: None, ..example() };
        assert_eq!(meta.payload_len(), None);
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = RecordMeta::decode(&bytes);
        }

        #[test]
        fn a_flipped_byte_decodes_or_is_refused(at in 0usize..200, value: u8) {
            let mut bytes = Vec::new();
            example().encode(&mut bytes);
            let at = at % bytes.len();
            bytes[at] = value;
            let _ = RecordMeta::decode(&bytes);
        }
    }
}
