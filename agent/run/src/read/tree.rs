//! The tree of an [`AssemblyPlan`](super::AssemblyPlan): what goes where in a whole, for whatever carries it out.

use super::rows::Pad;

/// The tree of a plan: what makes the whole tensor.
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
    /// Rows of children one after the other on dimension 0. What a child is shorter on other dimensions is filled up.
    Rows {
        /// In order, with as many dimensions as the result.
        children: Vec<Node>,
        /// Of the result: as long as the longest child.
        shape: Vec<u64>,
        /// With what.
        pad: Pad,
    },
    /// The first halves of the children on `dim` in order, then their second halves in the opposite order.
    HeadTail {
        /// The dimension.
        dim: usize,
        /// Of one shape.
        children: Vec<Node>,
        /// Of the result.
        shape: Vec<u64>,
    },
    /// The elements of a vector in another shape.
    Flat {
        /// The vector.
        child: Box<Node>,
        /// Of the result, with as many elements.
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
            Node::Leaf { shape, .. }
            | Node::Concat { shape, .. }
            | Node::Rows { shape, .. }
            | Node::HeadTail { shape, .. }
            | Node::Flat { shape, .. }
            | Node::Sum { shape, .. } => shape,
        }
    }

    /// The parts that it is made of.
    pub fn leaves(&self) -> Vec<usize> {
        match self {
            Node::Leaf { part, .. } => vec![*part],
            Node::Flat { child, .. } => child.leaves(),
            Node::Concat { children, .. }
            | Node::Rows { children, .. }
            | Node::HeadTail { children, .. }
            | Node::Sum { children, .. } => children.iter().flat_map(Node::leaves).collect(),
        }
    }
}

/// `len` of `node` from `start` on, along one dimension.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// Of what.
    pub node: &'a Node,
    /// From where.
    pub start: u64,
    /// How much.
    pub len: u64,
}

/// The pieces on `dim` of a [`Node::Concat`], or of a [`Node::HeadTail`], in the order of the whole.
pub fn pieces(children: &[Node], dim: usize, halves: bool) -> Vec<Piece<'_>> {
    let len = |node: &Node| node.shape().get(dim).copied().unwrap_or(1);
    if !halves {
        return children.iter().map(|node| Piece { node, start: 0, len: len(node) }).collect();
    }
    let heads = children.iter().map(|node| Piece { node, start: 0, len: len(node) / 2 });
    let tails = children.iter().rev().map(|node| Piece { node, start: len(node) / 2, len: len(node) / 2 });
    heads.chain(tails).collect()
}
