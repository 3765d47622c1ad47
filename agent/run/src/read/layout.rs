//! How the parts of a record make the whole: from their layouts to the tree of an
//! [`AssemblyPlan`](super::AssemblyPlan), without touching a byte.
//!
//! Replicas are one tensor and must look alike. What is left is grouped by its coordinate on the first mesh axis, each
//! group is planned over the remaining axes, and the axis's [`Placement`] says how the groups combine. The result is a tree
//! that [`super::assemble`] and [`super::fill`] carry out.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use wire::{
    dtype::DType,
    hooks::Kind,
    record::{Axis, MICRO, Placement},
};

use super::{
    rows::{self, Pad},
    tree::Node,
};
use crate::{
    check::is_possible,
    format::{Joined, Location, Part, Stats},
    limits::NAMED,
    text::{clip, few, range},
};

/// Coordinates on a mesh: axis name, index, size.
pub type Coordinates = Vec<(String, u32, u32)>;

/// Why parts do not make a whole.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Ranks have not (yet) delivered; not damage.
    #[error("incomplete: {}", missing_text(.0))]
    Missing(Vec<Coordinates>),
    /// It is not known yet whether the parts are of one pass; not damage.
    #[error("pending: it is not known yet whether ranks {0} made this pass together")]
    Pending(String),
    /// The layout is not known.
    #[error("how the parts lie along axis {axis} is not known; read them one by one: {parts}")]
    Unknown {
        /// The axis.
        axis: String,
        /// Each part.
        parts: String,
    },
    /// Two ranks should have the same, and have not.
    #[error("ranks {0} and {1} hold replicas that differ; read them one by one")]
    Replicas(u32, u32),
    /// Rows of sizes of their own, which need something to fill them up: not damage.
    #[error(
        "each rank padded its rows to its own longest ({}): `pad=0` (of `flexmodel export`, --pad 0) fills up the \
         shorter ones, `nested=True` keeps them as they are", range(.low, .high)
    )]
    Ragged {
        /// Smallest size of each dimension.
        low: Vec<u64>,
        /// Largest; of dimension 0, of all rows together.
        high: Vec<u64>,
    },
    /// Parts that are sound, each by itself, and do not go together: not damage.
    #[error("{0}; read them one by one")]
    Apart(String),
    /// The parts contradict each other.
    #[error("{0}")]
    Conflict(String),
}

/// At most [`NAMED`] of them are there.
fn missing_text(missing: &[Coordinates]) -> String {
    let one = |c: &Coordinates| {
        c.iter().map(|(name, index, size)| format!("{name} {index} of {size}")).collect::<Vec<_>>().join(", ")
    };
    clip(&format!("no part from {}", missing.iter().map(one).collect::<Vec<_>>().join("; ")))
}

/// Where a part sits on the mesh.
pub fn coordinates(axes: &[Axis]) -> Coordinates {
    axes.iter().map(|a| (a.name.clone(), a.index, a.size)).collect()
}

/// The parts of one rank as they lie among themselves: along the axes of which it is more than one member.
pub fn of_one_rank(mut parts: Vec<Part>) -> Vec<Part> {
    let Some(first) = parts.first().map(|part| part.what.axes.clone()) else { return parts };
    let differs =
        |depth: usize, index: u32| parts.iter().any(|p| p.what.axes.get(depth).is_none_or(|a| a.index != index));
    let shared: Vec<bool> = first.iter().enumerate().map(|(depth, axis)| differs(depth, axis.index)).collect();
    for part in &mut parts {
        let mut keep = shared.iter();
        part.what.axes.retain(|_| keep.next().copied().unwrap_or(true));
        part.what.joined = Joined::default();
    }
    parts
}

/// The tree that makes the whole of a record's parts. Takes hostile parts.
pub fn plan(parts: &[Part]) -> Result<Node, LayoutError> {
    let tree = padded(parts, &Pad::default())?;
    match rows::sizes(&tree) {
        Some((low, high)) => Err(LayoutError::Ragged { low, high }),
        None => Ok(tree),
    }
}

/// The tree that makes the whole, with rows that ranks padded to their own longest filled up by `pad`.
pub fn padded(parts: &[Part], pad: &Pad) -> Result<Node, LayoutError> {
    let first = parts.first().ok_or_else(|| LayoutError::Conflict("a record without parts".into()))?;
    if parts.iter().any(|part| part.what.joined == Joined::Pending) {
        return Err(LayoutError::Pending(few(parts.iter().map(|part| part.what.rank))));
    }
    let mut axes = settled(parts, &first.what.axes);
    for part in parts {
        let (a, b) = (&first.what, &part.what);
        if a.dtype != b.dtype {
            let (x, y) = (a.dtype.name(), b.dtype.name());
            return Err(LayoutError::Apart(format!("rank {} has {x} and rank {} has {y}", a.rank, b.rank)));
        }
        let cut = |part: &Part| part.what.slice.as_ref().map(|slice| (slice.by.clone(), slice.of.clone()));
        if cut(first) != cut(part) {
            let one = |part: &Part| cut(part).map_or("all".to_owned(), |(by, of)| format!("{by} of {of:?}"));
            let (x, y) = (clip(&one(first)), clip(&one(part)));
            return Err(LayoutError::Apart(format!("rank {} has {x} and rank {} has {y}", a.rank, b.rank)));
        }
        let same = |x: &Axis, y: &Axis| x.name == y.name && x.size == y.size;
        let differ = || format!("ranks {} and {} describe different layouts", a.rank, b.rank);
        if axes.len() != b.axes.len() || !axes.iter().zip(&b.axes).all(|(x, y)| same(x, y)) {
            return Err(LayoutError::Conflict(differ()));
        }
        if let Some(odd) = b.axes.iter().find(|axis| axis.index >= axis.size) {
            let (index, name, size) = (odd.index, &odd.name, odd.size);
            return Err(LayoutError::Conflict(format!("rank {} says {name} {index} of {size}", b.rank)));
        }
        // What was inferred from different shapes may differ.
        if !axes.iter().zip(&b.axes).all(|(x, y)| same_place(&x.place, &y.place)) {
            return Err(LayoutError::Apart(differ()));
        }
    }
    for (_, axis) in axes.iter_mut().enumerate().filter(|(depth, _)| are_given_the_same(parts, *depth)) {
        axis.place = Placement::Unknown;
    }
    let one_each = unique(parts)?;
    Planner { parts, axes: &axes, pad }.group(&one_each, 0, true, &mut Vec::new())
}

/// Statistics of the whole from those of its parts; `None` for sums, and where a part has none.
pub fn stats(node: &Node, parts: &[Part]) -> Option<Stats> {
    match node {
        Node::Leaf { part, .. } => parts.get(*part)?.stats,
        Node::Concat { children, .. } | Node::Rows { children, .. } | Node::HeadTail { children, .. } => {
            children.iter().map(|c| stats(c, parts)).reduce(|a, b| Some(a?.merge(&b?))).flatten()
        }
        Node::Flat { child, .. } => stats(child, parts),
        Node::Sum { .. } => None,
    }
}

fn same_place(a: &Placement, b: &Placement) -> bool {
    match (a, b) {
        (Placement::Shard { dim: x }, Placement::Shard { dim: y }) => x == y,
        (Placement::Shard { dim: x }, Placement::ReplicateOrShard { dim: y })
        | (Placement::ReplicateOrShard { dim: x }, Placement::Shard { dim: y }) => x == y,
        _ => a == b,
    }
}

/// The first part's axes; where its batch of one was ambiguous, another part that says it is a shard counts.
fn settled(parts: &[Part], axes: &[Axis]) -> Vec<Axis> {
    let mut axes = axes.to_vec();
    for (depth, axis) in axes.iter_mut().enumerate() {
        let Placement::ReplicateOrShard { dim } = axis.place else { continue };
        let is_shard = |place: &Placement| matches!(place, Placement::Shard { dim: d } if *d == dim);
        if parts.iter().any(|p| p.what.axes.get(depth).is_some_and(|a| is_shard(&a.place))) {
            axis.place = Placement::Shard { dim };
        }
    }
    axes
}

/// Whether two members along an axis were given the same, so that they have no rows of the batch of their own.
fn are_given_the_same(parts: &[Part], depth: usize) -> bool {
    let axes = parts.iter().filter_map(|part| part.what.axes.get(depth));
    let given: BTreeMap<u32, u32> = axes.filter_map(|axis| Some((axis.index, axis.input_digest?))).collect();
    given.len() > given.values().collect::<BTreeSet<_>>().len()
}

/// Over how many ranks the batch of a record lies, times the microbatches that a pipeline cuts a rank's rows into.
pub fn data_size(parts: &[Part]) -> u32 {
    let Some(Part { what, .. }) = parts.first() else { return 1 };
    let micro = what.axes.iter().find(|axis| axis.name == MICRO).map_or(1, |axis| axis.size);
    let given_the_same = (0..what.axes.len()).any(|depth| are_given_the_same(parts, depth));
    micro.saturating_mul(if given_the_same { 1 } else { what.dp_size.max(1) })
}

/// One part of every set of replicas, in order of their coordinates.
fn unique(parts: &[Part]) -> Result<Vec<usize>, LayoutError> {
    let mut kept: BTreeMap<Vec<u32>, usize> = BTreeMap::new();
    for (i, part) in parts.iter().enumerate() {
        let own = |axis: &&Axis| axis.place != Placement::Replicate;
        let place = part.what.axes.iter().filter(own).map(|axis| axis.index).collect();
        let other = *kept.entry(place).or_insert(i);
        let (a, b) = (&parts[other], part);
        if !alike(a, b) {
            let ranks = format!("ranks {} and {}", a.what.rank, b.what.rank);
            if b.what.axes.iter().any(|axis| axis.place == Placement::Replicate) {
                return Err(LayoutError::Replicas(a.what.rank, b.what.rank));
            }
            // Stages of a pipeline may have modules of one name: each has its own root.
            return Err(LayoutError::Apart(format!("{ranks} differ, and the layout does not tell them apart")));
        }
    }
    Ok(kept.into_values().collect())
}

fn borrows_bytes(part: &Part) -> bool {
    part.at.is_none() && part.same.is_some()
}

/// Whether parts say of each other what has to be settled.
pub fn are_unsettled(parts: &[Part]) -> bool {
    parts.iter().any(borrows_bytes) || are_doubted(parts)
}

/// Settles what parts say of each other.
pub fn settle(parts: &mut [Part]) {
    let are_doubted = are_doubted(parts);
    if parts.iter().any(borrows_bytes) {
        lend(parts);
    }
    if are_doubted {
        doubt(parts);
    }
}

/// Gives parts of which another rank sent the bytes, and this one their checksum, the location of these bytes.
fn lend(parts: &mut [Part]) {
    let key = |part: &Part, crc: u32| (part.what.dtype, part.what.shape.clone(), crc);
    let mut lenders: HashMap<_, (Location, Option<Stats>)> = HashMap::new();
    for part in parts.iter() {
        if let Some(at) = &part.at {
            lenders.entry(key(part, at.crc)).or_insert_with(|| (at.clone(), part.stats));
        }
    }
    for part in parts.iter_mut().filter(|part| borrows_bytes(part)) {
        if let Some((at, stats)) = part.same.and_then(|crc| lenders.get(&key(part, crc))) {
            (part.at, part.stats) = (Some(at.clone()), *stats);
        }
    }
}

/// Whether parts of a parameter say that they are replicas along an axis along which others do not know what they are: a rank may
/// have taken it in a pass that others do not make, where it does not pass for one.
fn are_doubted(parts: &[Part]) -> bool {
    if !parts.first().is_some_and(|part| part.what.id.kind.is_in(Kind::OF_PARAMETERS)) {
        return false;
    }
    let says = |depth: usize, place: Placement| {
        parts.iter().any(|part| part.what.axes.get(depth).is_some_and(|axis| axis.place == place))
    };
    let depth = parts.first().map_or(0, |part| part.what.axes.len());
    (0..depth).any(|depth| says(depth, Placement::Replicate) && says(depth, Placement::Unknown))
}

/// Makes what some do not know unknown for all.
fn doubt(parts: &mut [Part]) {
    let depth = parts.first().map_or(0, |part| part.what.axes.len());
    for depth in 0..depth {
        let mut axes: Vec<&mut Axis> = parts.iter_mut().filter_map(|part| part.what.axes.get_mut(depth)).collect();
        if axes.iter().any(|axis| axis.place == Placement::Unknown) {
            axes.iter_mut()
                .filter(|axis| axis.place == Placement::Replicate)
                .for_each(|axis| axis.place = Placement::Unknown);
        }
    }
}

/// Parts that should be replicas of an earlier one and are not: indexes of both.
pub fn differing_replicas(parts: &[Part]) -> Vec<(usize, usize)> {
    let mut first: BTreeMap<Vec<u32>, usize> = BTreeMap::new();
    let mut found = Vec::new();
    for (i, part) in parts.iter().enumerate() {
        let axes = &part.what.axes;
        if axes.iter().any(|a| a.size > 1 && a.place == Placement::Replicate) {
            let place = axes.iter().filter(|a| a.place != Placement::Replicate).map(|a| a.index).collect();
            let other = *first.entry(place).or_insert(i);
            if !alike(&parts[other], part) {
                found.push((other, i));
            }
        }
    }
    found
}

/// Whether two parts hold the same bytes, by their checksums (by their statistics where bytes were not kept).
fn alike(a: &Part, b: &Part) -> bool {
    a.what.shape == b.what.shape
        && match (a.crc(), b.crc()) {
            (Some(x), Some(y)) => x == y,
            _ => a.stats == b.stats,
        }
}

struct Planner<'a> {
    parts: &'a [Part],
    axes: &'a [Axis],
    pad: &'a Pad,
}

impl Planner<'_> {
    /// `members` is not empty, and has one part for each set of coordinates on axes that are not replicas. `rows`: nothing
    /// but rows is put together outside of them, so that they may be padded.
    fn group(&self, members: &[usize], depth: usize, rows: bool, at: &mut Coordinates) -> Result<Node, LayoutError> {
        let Some(axis) = self.axes.get(depth) else {
            let part = members[0];
            return Ok(Node::Leaf { part, shape: self.parts[part].what.shape.clone() });
        };
        if axis.place == Placement::Replicate {
            return self.group(members, depth + 1, rows, at);
        }
        let mut groups: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        for &m in members {
            // `plan` made sure that every part has every axis.
            groups.entry(self.parts[m].what.axes[depth].index).or_default().push(m);
        }
        let mut missing = self.missing(&groups, axis, at);
        let mut nodes = Vec::with_capacity(groups.len());
        let rows_inside = rows && (groups.len() == 1 || has_rows(&axis.place));
        for (&index, group) in &groups {
            at.push((axis.name.clone(), index, axis.size));
            match self.group(group, depth + 1, rows_inside, at) {
                Ok(node) => nodes.push(node),
                Err(LayoutError::Missing(more)) => missing.extend(more.into_iter().take(NAMED - missing.len())),
                Err(other) => return Err(other),
            }
            at.pop();
        }
        if !missing.is_empty() {
            return Err(LayoutError::Missing(missing));
        }
        self.combine(axis, nodes, rows, &groups.into_values().collect::<Vec<_>>())
    }

    fn missing(&self, groups: &BTreeMap<u32, Vec<usize>>, axis: &Axis, at: &Coordinates) -> Vec<Coordinates> {
        if groups.len() == axis.size as usize {
            return Vec::new();
        }
        // A hostile axis may claim four billion members; a few names are enough.
        (0..axis.size)
            .filter(|i| !groups.contains_key(i))
            .take(NAMED)
            .map(|i| at.iter().cloned().chain([(axis.name.clone(), i, axis.size)]).collect())
            .collect()
    }

    /// `groups` are the parts that each of `nodes` was made of.
    fn combine(
        &self,
        axis: &Axis,
        mut nodes: Vec<Node>,
        rows: bool,
        groups: &[Vec<usize>],
    ) -> Result<Node, LayoutError> {
        if let Placement::Flat { shape } = &axis.place {
            return flat(nodes, shape, axis);
        }
        // A lone member has its head and its tail side by side.
        if nodes.len() == 1 {
            return Ok(nodes.remove(0));
        }
        match axis.place {
            Placement::ReplicateOrShard { .. } if self.all_alike(groups) => Ok(nodes.swap_remove(0)),
            Placement::Shard { dim: 0 } | Placement::ReplicateOrShard { dim: 0 }
                if rows && rows::are_ragged(&nodes) =>
            {
                rows::join(nodes, axis, self.pad)
            }
            Placement::Shard { dim } | Placement::ReplicateOrShard { dim } => concat(dim as usize, nodes, axis),
            Placement::HeadTail { dim } => head_tail(dim as usize, nodes, axis),
            Placement::Partial => {
                let shape = nodes[0].shape().to_vec();
                if nodes.iter().any(|n| n.shape() != shape) {
                    return Err(LayoutError::Conflict(format!("addends along {} differ in shape", axis.name)));
                }
                Ok(Node::Sum { children: nodes, shape })
            }
            // Equal bytes show that there was nothing to know.
            Placement::Unknown if self.all_alike(groups) => Ok(nodes.swap_remove(0)),
            Placement::Unknown => Err(LayoutError::Unknown { axis: axis.name.clone(), parts: self.describe(groups) }),
            // Replicas are one part by now, and runs are joined.
            Placement::Replicate | Placement::Flat { .. } => {
                Err(LayoutError::Conflict(format!("{} along {}", self.describe(groups), axis.name)))
            }
        }
    }

    /// Whether every group has what the first has, part by part: both are in order of their coordinates on further axes. Of
    /// slices, what they are of tells: they may be equal where that is not.
    fn all_alike(&self, groups: &[Vec<usize>]) -> bool {
        let first = &groups[0];
        let whole = |part: &Part| part.what.slice.as_ref().map(|slice| slice.crc);
        let same = |(&a, &b): (&usize, &usize)| {
            let (a, b) = (&self.parts[a], &self.parts[b]);
            alike(a, b) && whole(a) == whole(b) && whole(a) != Some(None)
        };
        groups.iter().all(|group| group.len() == first.len() && group.iter().zip(first).all(same))
    }

    fn describe(&self, groups: &[Vec<usize>]) -> String {
        let members: Vec<usize> = groups.iter().flatten().copied().collect();
        let one = |&m: &usize| format!("rank {} {:?}", self.parts[m].what.rank, self.parts[m].what.shape);
        few(members.iter().map(one))
    }
}

/// Whether what lies so along an axis has rows that are put one after the other, or one member's.
fn has_rows(place: &Placement) -> bool {
    matches!(place, Placement::Shard { dim: 0 } | Placement::ReplicateOrShard { dim: 0 } | Placement::Unknown)
}

fn flat(nodes: Vec<Node>, shape: &[u64], axis: &Axis) -> Result<Node, LayoutError> {
    let vector = concat(0, nodes, axis)?;
    let elements = |shape: &[u64]| shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
    if vector.shape().len() != 1 || elements(vector.shape()) != elements(shape) {
        let (runs, name) = (vector.shape(), &axis.name);
        return Err(LayoutError::Apart(format!("runs of {runs:?} elements along {name} do not make {shape:?}")));
    }
    Ok(Node::Flat { child: Box::new(vector), shape: shape.to_vec() })
}

fn head_tail(dim: usize, nodes: Vec<Node>, axis: &Axis) -> Result<Node, LayoutError> {
    let one = nodes.first().map(|n| n.shape().to_vec()).unwrap_or_default();
    let whole = concat(dim, nodes, axis)?;
    let Node::Concat { dim, children, shape } = whole else { return Ok(whole) };
    if !one[dim].is_multiple_of(2) || children.iter().any(|child| child.shape() != one) {
        let name = &axis.name;
        return Err(LayoutError::Apart(format!("pieces of {one:?} along {name} have no halves of one length")));
    }
    Ok(Node::HeadTail { dim, children, shape })
}

fn concat(dim: usize, nodes: Vec<Node>, axis: &Axis) -> Result<Node, LayoutError> {
    let mut shape = nodes.first().map(|n| n.shape().to_vec()).unwrap_or_default();
    if dim >= shape.len() {
        return Err(LayoutError::Conflict(format!(
            "a shard of dimension {dim} along {}, which {shape:?} lacks",
            axis.name
        )));
    }
    let mut total: u64 = 0;
    for node in &nodes {
        let other = node.shape();
        let fits = other.len() == shape.len() && (0..shape.len()).all(|d| d == dim || other[d] == shape[d]);
        if !fits {
            return Err(LayoutError::Apart(format!(
                "shapes {shape:?} and {other:?} do not go together on dimension {dim} along {}",
                axis.name
            )));
        }
        total = total
            .checked_add(other[dim])
            .ok_or_else(|| LayoutError::Conflict(format!("dimension {dim} along {} is too long", axis.name)))?;
    }
    shape[dim] = total;
    if !is_possible(1, &shape) {
        return Err(LayoutError::Apart(format!("pieces along {} make {shape:?}, the shape of no tensor", axis.name)));
    }
    Ok(Node::Concat { dim, children: nodes, shape })
}

/// Bytes of a tensor; `None` on overflow.
pub fn byte_len(dtype: DType, shape: &[u64]) -> Option<u64> {
    shape.iter().try_fold(dtype.size() as u64, |n, &d| n.checked_mul(d))
}
