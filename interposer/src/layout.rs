//! How a leaf lies over the data-parallel ranks, inferred from its shape and the batch the model was called with.
//!
//! Nothing here is sure, so the rules prefer saying "unknown" to a wrong whole. [`Place::Unknown`] still becomes
//! whole when all ranks turn out to hold the same bytes.

use wire::{
    hooks::ShardHint,
    record::{Axis, Place},
};

/// What is known about a tap's tensors.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    /// First two sizes of the model's first input; -1 where there is none.
    pub batch: [i64; 2],
    /// The dimension that is the batch for this module, or -1.
    pub batch_dim: i32,
    /// The wrapper shards the batch over all ranks.
    pub data_parallel: bool,
}

/// Axes of a leaf with this shape, on member `index` of `size`.
pub fn infer(shape: &[u64], known: Known, hint: Option<&ShardHint>, index: u32, size: u32) -> Vec<Axis> {
    if size <= 1 {
        return Vec::new();
    }
    let (name, place) = match hint {
        Some(hint) => (hint.axis.clone(), hinted(shape.len(), hint.dim)),
        None => ("dp".to_owned(), place(shape, known)),
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

fn place(shape: &[u64], known: Known) -> Place {
    let shard = |dim| Place::Shard { dim, offset: None };
    let [batch, length] = known.batch.map(|n| u64::try_from(n).ok());
    if !known.data_parallel {
        return Place::Unknown;
    }
    if let Ok(dim) = u32::try_from(known.batch_dim)
        && (dim as usize) < shape.len()
    {
        return shard(dim);
    }
    let (Some(batch), Some(&first)) = (batch, shape.first()) else { return Place::Unknown };
    let tokens = length.and_then(|n| batch.checked_mul(n));
    if first == batch {
        // A batch of one looks like a tensor that has no batch at all.
        if batch == 1 { Place::ReplicateOrShard0 } else { shard(0) }
    } else if shape.len() >= 2 && Some(first) == tokens && batch > 1 {
        shard(0)
    } else if shape.len() >= 3 && batch > 1 && shape.get(1) == Some(&batch) {
        shard(1)
    } else {
        Place::Unknown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DP: Known = Known { batch: [4, 16], batch_dim: -1, data_parallel: true };

    #[test]
    fn a_leaf_that_starts_with_the_batch_is_sharded_there() {
        assert_eq!(place(&[4, 16, 8], DP), Place::Shard { dim: 0, offset: None });
        assert_eq!(place(&[64, 8], DP), Place::Shard { dim: 0, offset: None });
        assert_eq!(place(&[16, 4, 8], DP), Place::Shard { dim: 1, offset: None });
    }

    #[test]
    fn a_leaf_without_batch_is_not_guessed() {
        assert_eq!(place(&[], DP), Place::Unknown);
        assert_eq!(place(&[16, 8], DP), Place::Unknown);
        assert_eq!(place(&[1, 16, 8], DP), Place::Unknown);
        assert_eq!(place(&[4, 8], Known { data_parallel: false, ..DP }), Place::Unknown);
    }

    #[test]
    fn a_batch_of_one_is_told_apart_by_its_bytes() {
        assert_eq!(place(&[1, 16], Known { batch: [1, 16], ..DP }), Place::ReplicateOrShard0);
    }

    #[test]
    fn what_the_user_says_goes() {
        let hint = ShardHint { dim: -1, axis: "tp".into() };
        let axes = infer(&[2, 3], DP, Some(&hint), 1, 2);
        assert_eq!(axes[0].place, Place::Shard { dim: 1, offset: None });
        assert_eq!(axes[0].name, "tp");
    }

    #[test]
    fn one_process_has_no_axes() {
        assert!(infer(&[4], DP, None, 0, 1).is_empty());
    }
}
