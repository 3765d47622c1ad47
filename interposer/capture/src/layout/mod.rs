//! How a leaf lies over the ranks: as torch says where it does, else inferred from its shape, the batch that the model was
//! called with, and what each axis of the mesh is there for.
//!
//! What is inferred is not sure, so the rules prefer saying "unknown" to a wrong whole. [`Placement::Unknown`] still becomes
//! whole when all ranks turn out to hold the same bytes.

use wire::{
    codes::{Code, Order, Role},
    hooks::{Kind, ShardHint},
    passes::{self, Run},
    record::{Axis, DATA, MICRO, Placement, PlacementCode},
    tap_abi::{self, ModelDesc, Rank},
};

/// What is known of a tap's tensors.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    /// First sizes of the model's first input; -1 where there is none.
    pub batch: [i64; 3],
    /// A digest of that input; 0 where it was not taken.
    pub input_digest: u32,
    /// First sizes of the module's own first input.
    pub own: [i64; 3],
    /// What the module says.
    pub order: Order,
    /// What is captured.
    pub kind: Kind,
    /// Which microbatch of a pipeline's step, and of how many.
    pub micro: (u32, u32),
}

/// A leaf of what a module takes or gives.
#[derive(Clone, Copy, Debug)]
pub struct Leaf<'a> {
    /// Its shape on this rank.
    pub shape: &'a [u64],
    /// The module's name.
    pub module: &'a str,
    /// Where it is in the structure.
    pub path: &'a str,
}

/// An axis along which a model is distributed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshAxis {
    /// Its name.
    pub name: String,
    /// This rank's coordinate.
    pub index: u32,
    /// Number of members.
    pub size: u32,
    /// What it is there for.
    pub role: Role,
    /// Its members that share this rank's other coordinates.
    pub ranks: Vec<Run>,
    /// Which of the axes it is that the bridge told of.
    pub position: usize,
}

/// The axes of a model, without those of one member.
///
/// # Safety
/// `desc.mesh` must point to `axis_count` axes.
pub unsafe fn mesh_of(desc: &ModelDesc<'_>) -> Vec<MeshAxis> {
    let at = |i: usize| {
        // SAFETY: i < axis_count; the name lives as long as the description.
        let (axis, name) = unsafe {
            let axis = &*desc.mesh.add(i);
            (axis, axis.name.get())
        };
        // SAFETY: `rank_count` ranks, which live as long as the description.
        let ranks = unsafe { tap_abi::array(axis.ranks, axis.rank_count) };
        MeshAxis {
            name: name.to_owned(),
            index: axis.index,
            size: axis.size,
            role: Role::from_code(axis.role).unwrap_or_default(),
            ranks: passes::runs(ranks),
            position: i,
        }
    };
    (0..desc.axis_count).map(at).filter(|axis| axis.size > 1 && axis.index < axis.size).collect()
}

/// What torch says of a leaf.
///
/// # Safety
/// `tensor.axes` must point to `axis_count` axes.
pub unsafe fn from_torch(tensor: &tap_abi::Leaf<'_>) -> Vec<Axis> {
    let at = |i: usize| {
        // SAFETY: i < axis_count; the name lives as long as the description.
        let (axis, name) = unsafe {
            let axis = &*tensor.axes.add(i);
            (axis, axis.name.get())
        };
        // SAFETY: `ndim` sizes, which live as long as the description.
        let sizes = unsafe { tap_abi::array(axis.sizes, axis.ndim) };
        let place = Placement::of(PlacementCode::from_code(axis.placement).unwrap_or_default(), axis.dim, sizes);
        Axis { name: name.to_owned(), index: axis.index, size: axis.size, place, input_digest: None }
    };
    (0..tensor.axis_count).map(at).filter(|axis| axis.size > 1 && axis.index < axis.size).collect()
}

/// Over how many ranks the batch lies.
pub fn data_size(mesh: &[MeshAxis]) -> u32 {
    mesh.iter().filter(|axis| has_batch(axis)).map(|axis| axis.size).product()
}

fn has_batch(axis: &MeshAxis) -> bool {
    matches!(axis.role, Role::Data | Role::Assumed)
}

/// Axes of a leaf: those of the mesh of which torch says nothing, the batch's as one, and then, inside of these, those of
/// which it does.
pub fn infer(
    leaf: Leaf<'_>,
    known: Known,
    hint: Option<&ShardHint>,
    mesh: &[MeshAxis],
    from_torch: Vec<Axis>,
) -> Vec<Axis> {
    let mut axes: Vec<Axis> = Vec::with_capacity(mesh.len());
    for axis in mesh.iter().filter(|axis| !from_torch.iter().any(|t| t.name == axis.name)) {
        match axes.iter_mut().find(|a| a.name == DATA) {
            Some(data) if has_batch(axis) => {
                data.index = data.index * axis.size + axis.index;
                data.size *= axis.size;
            }
            _ => {
                let name = if has_batch(axis) { DATA.to_owned() } else { axis.name.clone() };
                let place = place_along(axis, leaf, known);
                let input_digest =
                    (axis.role == Role::Assumed && place != Placement::Unknown).then_some(known.input_digest);
                axes.push(Axis { name, index: axis.index, size: axis.size, place, input_digest });
            }
        }
    }
    let (index, size) = known.micro;
    if size > 1 && !has_no_batch(leaf.module, leaf.path) {
        let place = place(leaf.shape, leaf.path, known);
        // What has no batch, as far as is known, stays a record of each microbatch.
        if place != Placement::Unknown {
            axes.push(Axis { name: MICRO.to_owned(), index, size, place, input_digest: None });
        }
    }
    axes.extend(from_torch);
    if let Some(hint) = hint {
        apply(hint, leaf.shape.len(), &mut axes);
    }
    axes
}

/// Axes of a leaf where some ranks capture only. On a mesh of several axes these need not be a mesh of their own. A leaf
/// that torch says is a piece stays one of all pieces: without those of the other ranks it is no whole.
pub fn of_some(
    leaf: Leaf<'_>,
    known: Known,
    hint: Option<&ShardHint>,
    (mesh, from_torch): (&[MeshAxis], Vec<Axis>),
    me: Rank,
    ranks: &[u32],
) -> Vec<Axis> {
    if from_torch.iter().any(|axis| axis.place.code().holds_part()) {
        return infer(leaf, known, hint, mesh, from_torch);
    }
    let there = || ranks.iter().filter(|&&r| r < me.world);
    let (index, size) = (there().take_while(|&&r| r != me.rank).count() as u32, there().count() as u32);
    if size <= 1 {
        return Vec::new();
    }
    let axis = match mesh {
        [axis] => MeshAxis { index, size, ..axis.clone() },
        _ => MeshAxis { name: "rank".into(), index, size, role: Role::Other, ranks: Vec::new(), position: 0 },
    };
    infer(leaf, known, hint, &[axis], Vec::new())
}

/// The user's word on the axis of that name; where there is none, on the innermost whose name is not the user's either.
fn apply(hint: &ShardHint, ndim: usize, axes: &mut [Axis]) {
    let named = axes.iter().position(|axis| axis.name == hint.axis);
    let Some(axis) = named.or(axes.len().checked_sub(1)).and_then(|i| axes.get_mut(i)) else { return };
    axis.name.clone_from(&hint.axis);
    axis.place = hinted(ndim, hint.dim);
    axis.input_digest = None;
}

fn place_along(axis: &MeshAxis, leaf: Leaf<'_>, known: Known) -> Placement {
    match axis.role {
        Role::Assumed if known.input_digest == 0 => Placement::Unknown,
        Role::Data | Role::Assumed if has_no_batch(leaf.module, leaf.path) => Placement::Unknown,
        Role::Data | Role::Assumed => place(leaf.shape, leaf.path, known),
        Role::Tensor => piece_of_sequences_or_all(axis, leaf.shape, known),
        // The pieces of a sequence may be in any order.
        Role::Context | Role::Other | Role::Pipeline => Placement::Unknown,
    }
}

/// Sequence parallelism: between the modules that share their work, members of a tensor axis hold pieces of the sequences
/// that the model was called with.
fn piece_of_sequences_or_all(axis: &MeshAxis, shape: &[u64], known: Known) -> Placement {
    let [batch, length, _] = known.batch.map(|n| u64::try_from(n).unwrap_or(u64::MAX));
    // As `torch.chunk` cuts.
    let longest = length.div_ceil(u64::from(axis.size));
    let own = length.saturating_sub(longest * u64::from(axis.index)).min(longest);
    if longest == length {
        // As when tokens are decoded one by one: a piece is no shorter than all, and all have that.
        return Placement::Unknown;
    }
    match (known.order, shape) {
        (Order::Unstated | Order::BatchFirst, &[a, b, _, ..]) if length != u64::MAX && (a, b) == (batch, own) => {
            Placement::ReplicateOrShard { dim: 1 }
        }
        (Order::Turned, &[a, b, _, ..]) if length != u64::MAX && (a, b) == (own, batch) => {
            Placement::ReplicateOrShard { dim: 0 }
        }
        _ => Placement::Unknown,
    }
}

/// What a packed sequence is made of: steps of all its sequences, the longest first, and how a rank has packed them.
const PACKED: [&str; 4] = [".data", ".batch_sizes", ".sorted_indices", ".unsorted_indices"];

fn hinted(ndim: usize, dim: i32) -> Placement {
    let dim = if dim < 0 { dim + ndim as i32 } else { dim };
    match u32::try_from(dim) {
        Ok(dim) if (dim as usize) < ndim => Placement::Shard { dim },
        _ => Placement::Unknown,
    }
}

/// What no size tells: modules inside a parametrization compute weights, pieces of packed sequences are a rank's own, and
/// one of several experts has the rows that were sent to it, however many.
fn has_no_batch(module: &str, path: &str) -> bool {
    let mut inside = module.split('.').zip(module.split('.').skip(1));
    module.split('.').any(|segment| segment == "parametrizations")
        || inside.any(|(outer, inner)| outer.ends_with("experts") && inner.starts_with(|c: char| c.is_ascii_digit()))
        || PACKED.iter().any(|end| path.ends_with(end))
}

fn place(shape: &[u64], path: &str, known: Known) -> Placement {
    match by_order(shape, path, known) {
        // A module that was given no tensor knows nothing of the batch: it has a table.
        _ if known.own[0] < 0 => Placement::Unknown,
        // Each rank has its own share of the gradient of a table. A batch of one is likelier than a table with one row.
        Placement::ReplicateOrShard { .. } if known.kind.is_in(Kind::GRADIENTS) && shape.first() != Some(&1) => {
            Placement::Unknown
        }
        place => place,
    }
}

fn by_order(shape: &[u64], path: &str, known: Known) -> Placement {
    let own = known.own.map(|n| u64::try_from(n).ok());
    match known.order {
        Order::SequenceFirst if own[2].is_some() && shape.len() >= 3 => sequence_first(shape, path, own[0], own[1]),
        // Which of the model's first sizes is the batch is not known, but that these two are length and batch.
        Order::SequenceFirst | Order::InSequenceFirst => match (shape, known.batch.map(|n| n.cast_unsigned())) {
            (&[a, b, ..], [x, y, _]) if (a, b) == (x, y) || (a, b) == (y, x) => shard(1),
            _ => Placement::Unknown,
        },
        Order::Recurrent if path.starts_with("out[1]") || path.starts_with("in[1]") => match shape {
            &[_, batch, _] if Some(batch) == own[0] => shard(1),
            _ => Placement::Unknown,
        },
        Order::BatchFirst | Order::Recurrent => batch_first(shape, own),
        Order::Mixed => match (shape, known.batch.map(|n| n.cast_unsigned())) {
            (&[a, b, ..], [x, y, _]) if (a, b) == (x, y) || (a, b) == (y, x) => Placement::Unknown,
            // A row for each of the batch, or a table with a row for each position.
            (&[a, ..], [x, y, _]) if a == x || a == y => Placement::ReplicateOrShard { dim: 0 },
            _ => Placement::Unknown,
        },
        Order::Turned => turned(shape, known.batch.map(|n| n.cast_unsigned())),
        Order::Unstated => batch_first(shape, known.batch.map(|n| u64::try_from(n).ok())),
    }
}

fn shard(dim: u32) -> Placement {
    Placement::Shard { dim }
}

/// A module that was given `[length, batch, ...]`.
fn sequence_first(shape: &[u64], path: &str, length: Option<u64>, batch: Option<u64>) -> Placement {
    let is = |dim: usize, size: Option<u64>| shape.get(dim).copied() == size;
    match (is(0, batch), is(1, batch)) {
        (false, true) => shard(1),
        // Attention's weights are [batch, length, ...] also here.
        (true, false) if is(1, length) => shard(0),
        // Length and batch are the same number; what a module mainly takes and gives is as it says.
        (true, true) if path == "out" || path == "out[0]" || path.starts_with("in") => shard(1),
        _ => Placement::Unknown,
    }
}

/// A model that was given `[batch, length]` and works on `[length, batch, ...]`, or on a piece of the length. Embeddings
/// are made before they are turned, and attention's weights are `[batch, heads, length, length]`.
fn turned(shape: &[u64], [batch, length, _]: [u64; 3]) -> Placement {
    match *shape {
        [a, b] if (a, b) == (batch, length) => shard(0),
        [a, b, _] if (a, b) == (batch, length) && a != b => shard(0),
        [a, b, c, d] if (a, c, d) == (batch, length, length) && b != batch => shard(0),
        [a, b, _, ..] if b == batch && a > 0 && a <= length && length.is_multiple_of(a) => shard(1),
        _ => Placement::Unknown,
    }
}

/// A model that was given `[batch, length, ...]` or `[batch, ...]`.
fn batch_first(shape: &[u64], [batch, length, _]: [Option<u64>; 3]) -> Placement {
    let (Some(batch), Some(&first)) = (batch, shape.first()) else { return Placement::Unknown };
    let second = shape.get(1).copied();
    let tokens = length.and_then(|n| batch.checked_mul(n));
    if first == batch {
        // A batch of one looks like a tensor that has no batch at all, and one as long as its sequences like a table with
        // a row for each position.
        let looks_alike = batch == 1 || Some(batch) == length && second != length;
        if looks_alike { Placement::ReplicateOrShard { dim: 0 } } else { shard(0) }
    } else if shape.len() >= 2 && Some(first) == tokens && batch > 1 {
        shard(0)
    } else if shape.len() >= 3 && batch > 1 && Some(first) == length && second == Some(batch) {
        shard(1)
    } else if shape.len() >= 2 && batch == 1 && Some(first) == tokens && second != Some(1) && second != length {
        // The tokens of one sequence as rows, or a table with a row for each position. A column might be the batch.
        Placement::ReplicateOrShard { dim: 0 }
    } else {
        Placement::Unknown
    }
}

#[cfg(test)]
mod tests;
