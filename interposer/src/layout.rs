//! How a leaf lies over the data-parallel ranks, inferred from its shape and the batch the model was called with.
//!
//! Nothing here is sure, so the rules prefer saying "unknown" to a wrong whole. [`Place::Unknown`] still becomes
//! whole when all ranks turn out to hold the same bytes.

use wire::{
    hooks::{Kind, ShardHint},
    record::{Axis, Place},
    tap_abi::Order,
};

/// What is known about a tap's tensors.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    /// First sizes of the model's first input; -1 where there is none.
    pub batch: [i64; 3],
    /// First sizes of the module's own first input.
    pub own: [i64; 3],
    /// What the module says.
    pub order: Order,
    /// The wrapper shards the batch over all ranks.
    pub data_parallel: bool,
    /// What is captured.
    pub kind: Kind,
}

/// What a packed sequence is made of: steps of all its sequences, the longest first, and how a rank has packed them.
const PACKED: [&str; 4] = [".data", ".batch_sizes", ".sorted_indices", ".unsorted_indices"];

/// Axes of the leaf at `path` of `module` with this shape, on member `index` of `size`.
pub fn infer(
    shape: &[u64],
    module: &str,
    path: &str,
    known: Known,
    hint: Option<&ShardHint>,
    index: u32,
    size: u32,
) -> Vec<Axis> {
    if size <= 1 {
        return Vec::new();
    }
    let (name, place) = match hint {
        Some(hint) => (hint.axis.clone(), hinted(shape.len(), hint.dim)),
        None if has_no_batch(module, path) => ("dp".to_owned(), Place::Unknown),
        None => ("dp".to_owned(), place(shape, path, known)),
    };
    vec![Axis { name, index, size, place }]
}

fn hinted(ndim: usize, dim: i32) -> Place {
    let dim = if dim < 0 { dim + ndim as i32 } else { dim };
    match u32::try_from(dim) {
        Ok(dim) if (dim as usize) < ndim => Place::Shard { dim, offset: None },
        _ => Place::Unknown,
    }
}

/// What no size tells: modules inside a parametrization compute weights, and pieces of packed sequences are a rank's own.
fn has_no_batch(module: &str, path: &str) -> bool {
    module.split('.').any(|segment| segment == "parametrizations") || PACKED.iter().any(|end| path.ends_with(end))
}

fn place(shape: &[u64], path: &str, known: Known) -> Place {
    match by_order(shape, path, known) {
        // A module that was given no tensor knows nothing of the batch: it has a table.
        _ if !known.data_parallel || known.own[0] < 0 => Place::Unknown,
        // Each rank has its own share of the gradient of a table. A batch of one is likelier than a table with one row.
        Place::ReplicateOrShard0 if is_gradient(known.kind) && shape.first() != Some(&1) => Place::Unknown,
        place => place,
    }
}

fn is_gradient(kind: Kind) -> bool {
    matches!(kind, Kind::Backward | Kind::BackwardPre)
}

fn by_order(shape: &[u64], path: &str, known: Known) -> Place {
    let own = known.own.map(|n| u64::try_from(n).ok());
    match known.order {
        Order::SequenceFirst if own[2].is_some() && shape.len() >= 3 => sequence_first(shape, path, own[0], own[1]),
        // Which of the model's first sizes is the batch is not known, but that these two are length and batch.
        Order::SequenceFirst | Order::InSequenceFirst => match (shape, known.batch.map(|n| n.cast_unsigned())) {
            (&[a, b, ..], [x, y, _]) if (a, b) == (x, y) || (a, b) == (y, x) => shard(1),
            _ => Place::Unknown,
        },
        Order::Recurrent if path.starts_with("out[1]") || path.starts_with("in[1]") => match shape {
            &[_, batch, _] if Some(batch) == own[0] => shard(1),
            _ => Place::Unknown,
        },
        Order::BatchFirst | Order::Recurrent => batch_first(shape, own),
        Order::Mixed => match (shape, known.batch.map(|n| n.cast_unsigned())) {
            (&[a, b, ..], [x, y, _]) if (a, b) == (x, y) || (a, b) == (y, x) => Place::Unknown,
            // A row for each of the batch, or a table with a row for each position.
            (&[a, ..], [x, y, _]) if a == x || a == y => Place::ReplicateOrShard0,
            _ => Place::Unknown,
        },
        Order::Unstated => batch_first(shape, known.batch.map(|n| u64::try_from(n).ok())),
    }
}

fn shard(dim: u32) -> Place {
    Place::Shard { dim, offset: None }
}

/// A module that was given `[length, batch, ...]`.
fn sequence_first(shape: &[u64], path: &str, length: Option<u64>, batch: Option<u64>) -> Place {
    let is = |dim: usize, size: Option<u64>| shape.get(dim).copied() == size;
    match (is(0, batch), is(1, batch)) {
        (false, true) => shard(1),
        // Attention's weights are [batch, length, ...] also here.
        (true, false) if is(1, length) => shard(0),
        // Length and batch are the same number; what a module mainly takes and gives is as it says.
        (true, true) if path == "out" || path == "out[0]" || path.starts_with("in") => shard(1),
        _ => Place::Unknown,
    }
}

/// A model that was given `[batch, length, ...]` or `[batch, ...]`.
fn batch_first(shape: &[u64], [batch, length, _]: [Option<u64>; 3]) -> Place {
    let (Some(batch), Some(&first)) = (batch, shape.first()) else { return Place::Unknown };
    let second = shape.get(1).copied();
    let tokens = length.and_then(|n| batch.checked_mul(n));
    if first == batch {
        // A batch of one looks like a tensor that has no batch at all, and one as long as its sequences like a table with
        // a row for each position.
        let looks_alike = batch == 1 || Some(batch) == length && second != length;
        if looks_alike { Place::ReplicateOrShard0 } else { shard(0) }
    } else if shape.len() >= 2 && Some(first) == tokens && batch > 1 {
        shard(0)
    } else if shape.len() >= 3 && batch > 1 && Some(first) == length && second == Some(batch) {
        shard(1)
    } else {
        Place::Unknown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DP: Known =
        Known { batch: [4, 16, -1], own: [4, 16, 8], order: Order::Unstated, data_parallel: true, kind: Kind::Forward };

    fn sequence_first(own: [i64; 3]) -> Known {
        Known { batch: own, own, order: Order::SequenceFirst, ..DP }
    }

    #[test]
    fn a_leaf_that_starts_with_the_batch_is_sharded_there() {
        assert_eq!(place(&[4, 16, 8], "out", DP), shard(0));
        assert_eq!(place(&[64, 8], "out", DP), shard(0));
        assert_eq!(place(&[16, 4, 8], "out", DP), shard(1));
    }

    #[test]
    fn a_leaf_without_batch_is_not_guessed() {
        assert_eq!(place(&[], "out", DP), Place::Unknown);
        assert_eq!(place(&[16, 8], "out", DP), Place::Unknown);
        assert_eq!(place(&[1, 16, 8], "out", DP), Place::Unknown);
        // So many experts, with room for as many tokens as there are rows.
        assert_eq!(place(&[3, 4, 8], "out", DP), Place::Unknown);
        assert_eq!(place(&[4, 8], "out", Known { data_parallel: false, ..DP }), Place::Unknown);
    }

    #[test]
    fn a_module_that_was_given_no_tensor_has_a_table() {
        assert_eq!(place(&[4, 8], "out", Known { own: [-1; 3], ..DP }), Place::Unknown);
    }

    #[test]
    fn weights_that_a_parametrization_computes_and_pieces_of_packed_sequences_have_no_batch() {
        let place = |module: &str, path: &str| infer(&[4, 8], module, path, DP, None, 0, 2)[0].place.clone();
        assert_eq!(place("stem.parametrizations.weight.0", "out"), Place::Unknown);
        assert_eq!(place("stem", "out"), shard(0));
        for path in ["in[0].data", "out[0].batch_sizes", "in[0].sorted_indices", "in[0].unsorted_indices"] {
            assert_eq!(place("rnn", path), Place::Unknown, "{path}");
        }
        assert_eq!(place("rnn", "out.data_of_all"), shard(0));
    }

    #[test]
    fn gradients_of_what_may_be_the_same_on_all_ranks_are_not_joined() {
        let square = Known { batch: [16, 16, -1], ..DP };
        assert_eq!(place(&[16, 8], "out", square), Place::ReplicateOrShard0);
        for kind in [Kind::Backward, Kind::BackwardPre] {
            assert_eq!(place(&[16, 8], "out", Known { kind, ..square }), Place::Unknown);
            assert_eq!(place(&[4, 16], "out", Known { kind, ..DP }), shard(0));
            let one = Known { batch: [1, 16, -1], kind, ..DP };
            assert_eq!(place(&[1, 16], "out", one), Place::ReplicateOrShard0);
        }
    }

    #[test]
    fn what_a_batch_looks_like_is_told_apart_by_its_bytes() {
        assert_eq!(place(&[1, 16], "out", Known { batch: [1, 16, -1], ..DP }), Place::ReplicateOrShard0);
        let square = Known { batch: [16, 16, -1], ..DP };
        assert_eq!(place(&[16, 8], "out", square), Place::ReplicateOrShard0);
        assert_eq!(place(&[16, 16, 8], "out", square), shard(0));
    }

    #[test]
    fn attention_with_the_sequence_first_has_weights_with_the_batch_first() {
        let known = sequence_first([7, 5, 8]);
        assert_eq!(place(&[7, 5, 8], "out[0]", known), shard(1));
        assert_eq!(place(&[5, 7, 7], "out[1]", known), shard(0));
        let square = sequence_first([5, 5, 8]);
        assert_eq!(place(&[5, 5, 8], "out[0]", square), shard(1));
        assert_eq!(place(&[5, 5, 5], "out[1]", square), Place::Unknown);
    }

    #[test]
    fn inside_of_a_module_with_the_sequence_first_so_is_all() {
        for batch in [[7, 5, -1], [5, 7, -1]] {
            let known = Known { batch, order: Order::InSequenceFirst, ..DP };
            assert_eq!(place(&[7, 5, 8], "out", known), shard(1));
            assert_eq!(place(&[35, 8], "out", known), Place::Unknown);
        }
    }

    #[test]
    fn beside_modules_with_the_sequence_first_the_order_is_not_guessed() {
        let known = Known { order: Order::Mixed, ..DP };
        assert_eq!(place(&[4, 16, 8], "out", known), Place::Unknown);
        assert_eq!(place(&[16, 4, 8], "out", known), Place::Unknown);
        assert_eq!(place(&[16, 8], "out", known), Place::ReplicateOrShard0);
        assert_eq!(place(&[4, 16, 8], "out", Known { order: Order::BatchFirst, ..known }), shard(0));
    }

    #[test]
    fn states_of_a_recurrent_network_have_the_batch_second() {
        let known = Known { batch: [16, 4, 8], order: Order::Recurrent, ..DP };
        assert_eq!(place(&[2, 4, 8], "out[1][0]", known), shard(1));
        assert_eq!(place(&[4, 16, 8], "out[0]", known), shard(0));
        let known = sequence_first([16, 4, 8]);
        assert_eq!(place(&[2, 4, 8], "out[1]", known), shard(1));
    }

    #[test]
    fn what_the_user_says_goes() {
        let hint = ShardHint { dim: -1, axis: "tp".into() };
        let axes = infer(&[2, 3], "m", "out", DP, Some(&hint), 1, 2);
        assert_eq!(axes[0].place, shard(1));
        assert_eq!(axes[0].name, "tp");
    }

    #[test]
    fn one_process_has_no_axes() {
        assert!(infer(&[4], "m", "out", DP, None, 0, 1).is_empty());
    }
}
