//! How the parts of a record make the whole: from layouts to a plan, without touching a byte.
//!
//! Parts are grouped by their coordinate on the first mesh axis, each group is planned over the remaining axes, and the
//! axis's [`Place`] says how the groups combine. The result is a tree that [`super::assemble`] carries out.

use std::collections::BTreeMap;

use wire::{
    dtype::DType,
    record::{Axis, Place},
};

use crate::store::format::Part;

/// Coordinates on a mesh: axis name, index, size.
pub type Coordinates = Vec<(String, u32, u32)>;

/// A plan for a whole tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    /// One part's bytes as they are.
    Leaf {
        /// Index into the record's parts.
        part: usize,
        /// Its shape.
        shape: Vec<u64>,
    },
    /// Children one after the other on `dim`.
    Concat {
        /// The dimension.
        dim: usize,
        /// In order; their shapes agree but for `dim`.
        children: Vec<Node>,
        /// Of the result.
        shape: Vec<u64>,
    },
    /// The sum of children of one shape.
    Sum {
        /// The addends.
        children: Vec<Node>,
        /// Of the result.
        shape: Vec<u64>,
    },
}

impl Node {
    /// Shape of what this node makes.
    pub fn shape(&self) -> &[u64] {
        match self {
            Node::Leaf { shape, .. } | Node::Concat { shape, .. } | Node::Sum { shape, .. } => shape,
        }
    }
}

/// Why parts do not make a whole.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Ranks have not (yet) delivered; not damage.
    #[error("incomplete: {}", missing_text(.0))]
    Missing(Vec<Coordinates>),
    /// A part was kept as statistics only.
    #[error("rank {0} kept statistics only (reduce=stats), so there are no elements to read")]
    StatsOnly(u32),
    /// The layout is not known.
    #[error("how the parts lie along axis {axis} is not known; read them one by one: {parts}")]
    Unknown {
        /// The axis.
        axis: String,
        /// Each part.
        parts: String,
    },
    /// The parts contradict each other.
    #[error("{0}")]
    Conflict(String),
}

fn missing_text(missing: &[Coordinates]) -> String {
    let one = |c: &Coordinates| {
        c.iter().map(|(name, index, size)| format!("{name} {index} of {size}")).collect::<Vec<_>>().join(", ")
    };
    format!("no part from {}", missing.iter().map(one).collect::<Vec<_>>().join("; "))
}

/// Where a part sits on the mesh.
pub fn coordinates(axes: &[Axis]) -> Coordinates {
    axes.iter().map(|a| (a.name.clone(), a.index, a.size)).collect()
}

/// Plans the whole of a record's parts. Takes hostile parts.
pub fn plan(parts: &[Part]) -> Result<Node, LayoutError> {
    let first = parts.first().ok_or_else(|| LayoutError::Conflict("a record without parts".into()))?;
    for part in parts {
        let (a, b) = (&first.what, &part.what);
        if a.dtype != b.dtype {
            return Err(LayoutError::Conflict(format!(
                "rank {} says {}, rank {} says {}",
                a.rank,
                a.dtype.name(),
                b.rank,
                b.dtype.name()
            )));
        }
        let same = |x: &Axis, y: &Axis| x.name == y.name && x.size == y.size && same_place(&x.place, &y.place);
        if a.axes.len() != b.axes.len() || !a.axes.iter().zip(&b.axes).all(|(x, y)| same(x, y)) {
            return Err(LayoutError::Conflict(format!("ranks {} and {} describe different layouts", a.rank, b.rank)));
        }
        if part.at.is_none() {
            return Err(LayoutError::StatsOnly(b.rank));
        }
    }
    // Parts arrive in any order; replicas are compared member by member, so in order of their coordinates.
    let mut all: Vec<usize> = (0..parts.len()).collect();
    all.sort_by_key(|&i| (parts[i].what.axes.iter().map(|a| a.index).collect::<Vec<_>>(), parts[i].what.rank));
    Planner { parts, axes: &first.what.axes }.group(&all, 0, &mut Vec::new())
}

fn same_place(a: &Place, b: &Place) -> bool {
    match (a, b) {
        (Place::Shard { dim: x, .. }, Place::Shard { dim: y, .. }) => x == y,
        _ => a == b,
    }
}

struct Planner<'a> {
    parts: &'a [Part],
    axes: &'a [Axis],
}

impl Planner<'_> {
    fn group(&self, members: &[usize], depth: usize, at: &mut Coordinates) -> Result<Node, LayoutError> {
        let Some(axis) = self.axes.get(depth) else { return self.single(members) };
        let mut groups: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        for &m in members {
            // `plan` made sure that every part has this axis.
            let index = self.parts[m].what.axes[depth].index;
            if index >= axis.size {
                return Err(LayoutError::Conflict(format!(
                    "rank {} says {} {index} of {}",
                    self.parts[m].what.rank, axis.name, axis.size
                )));
            }
            groups.entry(index).or_default().push(m);
        }
        let replicated = matches!(axis.place, Place::Replicate);
        if !replicated && groups.len() < axis.size as usize {
            return Err(LayoutError::Missing(self.missing(&groups, axis, at)));
        }
        let mut nodes = Vec::with_capacity(groups.len());
        let mut missing = Vec::new();
        let mut conflict = None;
        for (&index, group) in &groups {
            at.push((axis.name.clone(), index, axis.size));
            match self.group(group, depth + 1, at) {
                Ok(node) => nodes.push(node),
                Err(LayoutError::Missing(more)) => missing.extend(more),
                Err(other) => conflict = Some(other),
            }
            at.pop();
            // One complete replica is the whole.
            if replicated && conflict.is_none() && nodes.len() == 1 && self.agree(&groups) {
                return Ok(nodes.remove(0));
            }
        }
        if let Some(e) = conflict {
            return Err(e);
        }
        if !missing.is_empty() {
            return Err(LayoutError::Missing(missing));
        }
        self.combine(axis, nodes, members)
    }

    fn missing(&self, groups: &BTreeMap<u32, Vec<usize>>, axis: &Axis, at: &Coordinates) -> Vec<Coordinates> {
        // A hostile axis may claim four billion members; a few names are enough.
        (0..axis.size)
            .filter(|i| !groups.contains_key(i))
            .take(16)
            .map(|i| at.iter().cloned().chain([(axis.name.clone(), i, axis.size)]).collect())
            .collect()
    }

    /// Parts with the same coordinates on every axis must be the same tensor.
    fn single(&self, members: &[usize]) -> Result<Node, LayoutError> {
        let [first, rest @ ..] = members else {
            return Err(LayoutError::Conflict("a record without parts".into()));
        };
        let a = &self.parts[*first];
        for b in rest.iter().map(|&m| &self.parts[m]) {
            if a.what.shape != b.what.shape || crc(a) != crc(b) {
                return Err(LayoutError::Conflict(format!(
                    "the layout does not tell ranks {} and {} apart, and they differ",
                    a.what.rank, b.what.rank
                )));
            }
        }
        Ok(Node::Leaf { part: *first, shape: a.what.shape.clone() })
    }

    /// Whether every group of replicas holds the same shapes and checksums.
    fn agree(&self, groups: &BTreeMap<u32, Vec<usize>>) -> bool {
        let look = |group: &Vec<usize>| -> Vec<(Vec<u64>, Option<u32>)> {
            group.iter().map(|&m| (self.parts[m].what.shape.clone(), crc(&self.parts[m]))).collect()
        };
        let mut looks = groups.values().map(look);
        match looks.next() {
            // Groups of unequal size: some rank is late; what it will say cannot be compared yet.
            Some(first) => looks.all(|other| other.len() != first.len() || other == first),
            None => true,
        }
    }

    fn combine(&self, axis: &Axis, mut nodes: Vec<Node>, members: &[usize]) -> Result<Node, LayoutError> {
        match axis.place {
            Place::Shard { dim, .. } => concat(dim as usize, nodes, axis),
            Place::ReplicateOrShard0 => {
                let parts = || members.iter().map(|&m| &self.parts[m]);
                let equal = parts().all(|p| {
                    let first = &self.parts[members[0]];
                    p.what.shape == first.what.shape && crc(p) == crc(first)
                });
                if equal && !nodes.is_empty() { Ok(nodes.swap_remove(0)) } else { concat(0, nodes, axis) }
            }
            Place::Partial => {
                let shape = nodes.first().map(|n| n.shape().to_vec()).unwrap_or_default();
                if nodes.iter().any(|n| n.shape() != shape) {
                    return Err(LayoutError::Conflict(format!("addends along {} differ in shape", axis.name)));
                }
                if nodes.len() == 1 { Ok(nodes.remove(0)) } else { Ok(Node::Sum { children: nodes, shape }) }
            }
            // Only reached when replicas differ: the first is served nowhere silently.
            Place::Replicate => {
                Err(LayoutError::Conflict(format!("replicas along {} differ: {}", axis.name, self.describe(members))))
            }
            Place::Unknown if nodes.len() == 1 => Ok(nodes.remove(0)),
            Place::Unknown => Err(LayoutError::Unknown { axis: axis.name.clone(), parts: self.describe(members) }),
        }
    }

    fn describe(&self, members: &[usize]) -> String {
        let one = |&m: &usize| format!("rank {} {:?}", self.parts[m].what.rank, self.parts[m].what.shape);
        let mut text = members.iter().take(16).map(one).collect::<Vec<_>>().join(", ");
        if members.len() > 16 {
            text += &format!(" and {} more", members.len() - 16);
        }
        text
    }
}

fn crc(part: &Part) -> Option<u32> {
    part.at.as_ref().map(|at| at.crc)
}

fn concat(dim: usize, mut nodes: Vec<Node>, axis: &Axis) -> Result<Node, LayoutError> {
    if nodes.len() == 1 {
        return Ok(nodes.remove(0));
    }
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
            return Err(LayoutError::Conflict(format!(
                "shapes {shape:?} and {other:?} do not go together on dimension {dim} along {}",
                axis.name
            )));
        }
        total = total
            .checked_add(other[dim])
            .ok_or_else(|| LayoutError::Conflict(format!("dimension {dim} along {} is too long", axis.name)))?;
    }
    shape[dim] = total;
    Ok(Node::Concat { dim, children: nodes, shape })
}

/// Bytes of a tensor; `None` on overflow.
pub fn byte_len(dtype: DType, shape: &[u64]) -> Option<u64> {
    shape.iter().try_fold(dtype.size() as u64, |n, &d| n.checked_mul(d))
}
