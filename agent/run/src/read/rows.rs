//! Rows of a batch that each rank padded to its own longest: pieces of dimension 0 that differ in other dimensions too.
//!
//! They make a whole once it is said what fills up the shorter ones, and on which side ([`Pad`]); or they are taken one by
//! one ([`pieces`]).

use wire::{dtype::DType, record::Axis};

use super::{
    assemble::{Bytes, assemble},
    layout::{self, LayoutError, byte_len},
    number,
    shards::ReadError,
    tree::Node,
};
use crate::{check::is_possible, format::Part, limits::PADDED, stats};

/// Bytes of the largest element.
const ELEMENT: usize = 16;

/// The side of a row that is filled up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Side {
    /// Behind it.
    #[default]
    Right,
    /// Before it.
    Left,
}

impl Side {
    /// Every side.
    pub const ALL: [Self; 2] = [Self::Right, Self::Left];

    /// Its word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Right => "right",
            Self::Left => "left",
        }
    }

    /// The side with this word.
    pub fn from_name(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|side| side.name() == word)
    }
}

/// A number as somebody wrote it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Number {
    /// Without a point; also `True` and `False`.
    Integer(i128),
    /// With one, infinite, or not a number.
    Real(f64),
    /// A real and an imaginary part.
    Complex(f64, f64),
}

impl Number {
    /// Of a command's argument.
    pub fn parse(text: &str) -> Option<Self> {
        text.parse().map(Self::Integer).or_else(|_| text.parse().map(Self::Real)).ok()
    }

    /// Both its parts; a large integer is rounded.
    fn parts(self) -> (f64, f64) {
        match self {
            Self::Integer(n) => (n as f64, 0.0),
            Self::Real(x) => (x, 0.0),
            Self::Complex(re, im) => (re, im),
        }
    }
}

impl std::fmt::Display for Number {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Integer(n) => n.fmt(f),
            Self::Real(x) => x.fmt(f),
            Self::Complex(re, im) => write!(f, "{re}{im:+}i"),
        }
    }
}

/// What fills up the shorter rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pad {
    /// Where.
    pub side: Side,
    /// An element's bytes, and zeros behind them.
    element: [u8; ELEMENT],
}

impl Pad {
    /// `number` as an element of `dtype`; in words why it is none.
    pub fn new(number: Number, dtype: DType, side: Side) -> Result<Self, String> {
        let bytes = encoded(number, dtype).ok_or_else(|| format!("{number} is no {}", dtype.name()))?;
        let mut element = [0; ELEMENT];
        element.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
        Ok(Self { side, element })
    }

    /// Zeros.
    pub fn zero(side: Side) -> Self {
        Self { side, ..Self::default() }
    }

    /// The bytes of one element.
    pub fn element(&self, dtype: DType) -> &[u8] {
        self.element.get(..dtype.size()).unwrap_or_default()
    }

    /// Whether it is what new memory is filled with.
    pub fn is_zero(&self) -> bool {
        self.element == [0; ELEMENT]
    }

    /// Where a piece begins along a dimension of the whole other than the first.
    pub fn offset(&self, whole: u64, piece: u64) -> u64 {
        match self.side {
            Side::Right => 0,
            Side::Left => whole.saturating_sub(piece),
        }
    }
}

fn encoded(number: Number, dtype: DType) -> Option<Vec<u8>> {
    if dtype.is_float() || dtype.is_complex() {
        let (re, im) = number.parts();
        let real = number::component(dtype);
        let mut out = float(re, real)?;
        match (dtype.is_complex(), im == 0.0) {
            (true, _) => out.extend(float(im, real)?),
            (false, false) => return None,
            (false, true) => {}
        }
        return Some(out);
    }
    let n = match number {
        Number::Integer(n) => n,
        Number::Real(x) if x.fract() == 0.0 && x.abs() < 2f64.powi(64) => x as i128,
        _ => return None,
    };
    let bits = 8 * dtype.size() as u32;
    let range = match dtype {
        DType::Bool => 0..=1,
        DType::UInt8 | DType::UInt16 | DType::UInt32 | DType::UInt64 => 0..=(1i128 << bits) - 1,
        _ => -(1i128 << (bits - 1))..=(1i128 << (bits - 1)) - 1,
    };
    range.contains(&n).then(|| n.to_le_bytes().into_iter().take(dtype.size()).collect())
}

/// The nearest of a floating type; `None` where it is beyond the type's numbers, or the type has no such thing.
fn float(x: f64, dtype: DType) -> Option<Vec<u8>> {
    if dtype == DType::Float8E8M0Fnu {
        // Powers of two, and one code for what is no number.
        return (0..=u8::MAX).map(|code| vec![code]).find(|code| same(stats::to_f64(dtype, code), x));
    }
    let mut out = Vec::new();
    number::encode(dtype, x, &mut out);
    let found = stats::to_f64(dtype, &out);
    let fits = if x.is_finite() { found.is_finite() } else { same(found, x) };
    fits.then_some(out)
}

fn same(a: f64, b: f64) -> bool {
    a == b || a.is_nan() && b.is_nan()
}

/// Whether pieces that follow each other on dimension 0 differ in another one, and in no more than sizes.
pub fn are_ragged(nodes: &[Node]) -> bool {
    let Some((first, rest)) = nodes.split_first() else { return false };
    let first = first.shape();
    rest.iter().all(|node| node.shape().len() == first.len())
        && rest.iter().any(|node| node.shape().iter().zip(first).skip(1).any(|(a, b)| a != b))
}

/// Rows of ragged pieces, as long as the longest.
pub fn join(nodes: Vec<Node>, axis: &Axis, pad: &Pad) -> Result<Node, LayoutError> {
    let mut shape = nodes.first().map(|node| node.shape().to_vec()).unwrap_or_default();
    let mut elements = 0u64;
    for (number, node) in nodes.iter().enumerate() {
        elements = elements.saturating_add(node.shape().iter().fold(1, |n, &d| n.saturating_mul(d)));
        for (dim, (whole, &own)) in shape.iter_mut().zip(node.shape()).enumerate() {
            match (dim, number) {
                (_, 0) => {}
                (0, _) => *whole = whole.saturating_add(own),
                _ => *whole = own.max(*whole),
            }
        }
    }
    let padded = shape.iter().fold(1u64, |n, &d| n.saturating_mul(d));
    // Few bytes must not make a whole of any size.
    if !is_possible(1, &shape) || padded > elements.saturating_mul(PADDED) {
        let name = &axis.name;
        return Err(LayoutError::Apart(format!("rows along {name} would be {shape:?} once they are padded")));
    }
    Ok(Node::Rows { children: nodes, shape, pad: *pad })
}

/// Smallest and largest size of each dimension of its rows, where these differ.
pub fn sizes(tree: &Node) -> Option<(Vec<u64>, Vec<u64>)> {
    let mut low = tree.shape().to_vec();
    for piece in pieces(tree) {
        low.iter_mut().zip(piece.shape()).skip(1).for_each(|(low, &own)| *low = own.min(*low));
    }
    (low != tree.shape()).then(|| (low, tree.shape().to_vec()))
}

/// The pieces of dimension 0, in order: each has rows of one size.
pub fn pieces(tree: &Node) -> Vec<&Node> {
    match tree {
        Node::Rows { children, .. } | Node::Concat { dim: 0, children, .. } => {
            children.iter().flat_map(pieces).collect()
        }
        other => vec![other],
    }
}

/// For each element of the whole that `pad`, zeros, fills up: 1 where a row has it, else 0.
pub fn filled(parts: &[Part], pad: &Pad) -> Result<Bytes, ReadError> {
    let tree = layout::padded(parts, pad).map_err(|e| ReadError::Layout(e.to_string()))?;
    assemble(&tree, DType::UInt8, &mut |part: usize| {
        let elements = parts.get(part).and_then(|part| byte_len(DType::UInt8, &part.what.shape));
        Ok(Bytes::Owned(vec![1; elements.unwrap_or_default() as usize]))
    })
}

#[cfg(test)]
mod tests;
