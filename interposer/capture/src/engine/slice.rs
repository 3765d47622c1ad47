//! What a slice leaves of a leaf: its shape, how it lies over the ranks, or why it cannot be taken.
//!
//! A slice is right where every rank can take its own part of it: along dimensions of which each rank has all, in addends as
//! in replicas. Positions in a dimension of which ranks hold pieces would be other ones than in the whole.

use wire::{
    hooks::Slice,
    record::{Axis, Placement, Sliced},
    tap_abi::Cut,
};

/// A slice of a leaf.
#[derive(Debug, PartialEq, Eq)]
pub struct Taken {
    /// For each dimension of the leaf.
    pub cuts: Vec<Cut>,
    /// What is left.
    pub shape: Vec<u64>,
    /// How it lies.
    pub axes: Vec<Axis>,
    /// What the record says of it.
    pub sliced: Sliced,
    /// Whether only the bytes of all parts tell how it lies. Then those of the leaves have to tell, not of the slices, which
    /// may be equal by chance: a first token, say.
    pub bytes_tell: bool,
}

/// What a slice takes of a leaf of this shape that lies so.
///
/// # Errors
/// The reason, as the user reads it.
pub fn take(slice: &Slice, shape: &[u64], mut axes: Vec<Axis>) -> Result<Taken, String> {
    let refused = |why: String| format!("slice={slice}: {why}");
    let run = axes.iter().find_map(|axis| axis.place.flattened().map(|whole| (&axis.name, whole)));
    let cuts = match run {
        None => slice.cuts(shape).map_err(refused)?,
        Some((name, whole)) if slice.cuts(whole).map_err(refused)?.iter().any(|cut| !cut.all) => {
            return Err(refused(format!("ranks hold runs of the flattened elements along {name}, and no dimensions")));
        }
        Some(_) => shape.iter().map(|&len| Cut { start: 0, len, step: 1, keeps: true, all: true }).collect(),
    };
    let is_cut = |dim: u32| cuts.get(dim as usize).is_some_and(|cut| !cut.all);
    // Dimensions before it that go.
    let gone = |dim: u32| cuts.iter().take(dim as usize).filter(|cut| !cut.keeps).count() as u32;
    for axis in &mut axes {
        match &mut axis.place {
            Placement::Shard { dim } | Placement::HeadTail { dim } if is_cut(*dim) => {
                return Err(refused(format!("ranks hold pieces of dimension {dim} along {}", axis.name)));
            }
            // It is one where all ranks have the same.
            place @ Placement::ReplicateOrShard { .. } if place.dim().is_some_and(is_cut) => {
                *place = Placement::Unknown
            }
            Placement::Shard { dim } | Placement::HeadTail { dim } | Placement::ReplicateOrShard { dim } => {
                *dim -= gone(*dim);
            }
            Placement::Replicate | Placement::Flat { .. } | Placement::Partial | Placement::Unknown => {}
        }
    }
    let tells = |axis: &Axis| matches!(axis.place, Placement::ReplicateOrShard { .. } | Placement::Unknown);
    let of = cuts.iter().zip(shape).filter(|(cut, _)| !cut.all).map(|(_, &size)| size).collect();
    Ok(Taken {
        shape: cuts.iter().filter(|cut| cut.keeps).map(|cut| cut.len).collect(),
        bytes_tell: axes.iter().any(tells),
        sliced: Sliced { by: slice.to_string(), of, crc: None },
        cuts,
        axes,
    })
}

/// The crc of a leaf could not be had: nothing tells how the slice lies along an axis where only that would.
pub fn without_crc(axes: &mut [Axis]) {
    for axis in axes {
        if matches!(axis.place, Placement::ReplicateOrShard { .. }) {
            axis.place = Placement::Unknown;
        }
    }
}

#[cfg(test)]
mod tests {
    use wire::hooks::parse_clauses;

    use super::*;

    const SHAPE: [u64; 3] = [4, 16, 8];

    fn axis(name: &str, place: Placement) -> Axis {
        Axis { name: name.into(), index: 0, size: 2, place, input_digest: None }
    }

    /// The places of the slice along the same axes, and its shape.
    fn taken(slice: &str, places: &[Placement]) -> Result<(Vec<Placement>, Vec<u64>, bool), String> {
        let slice = parse_clauses(&format!("a@slice={slice}")).unwrap().remove(0).options.slice.unwrap();
        let axes = places.iter().enumerate().map(|(n, place)| axis(&format!("axis{n}"), place.clone())).collect();
        let taken = take(&slice, &SHAPE, axes)?;
        Ok((taken.axes.into_iter().map(|axis| axis.place).collect(), taken.shape, taken.bytes_tell))
    }

    #[test]
    fn pieces_of_what_is_taken_whole_are_pieces_of_the_slice() {
        let [batch, hidden] = [0, 2].map(|dim| Placement::Shard { dim });
        assert_eq!(
            taken("[:,-1]", &[batch.clone(), hidden]),
            Ok((vec![batch, Placement::Shard { dim: 1 }], vec![4, 8], false))
        );
        let other = [Placement::Replicate, Placement::Partial];
        assert_eq!(taken("[0]", &other), Ok((other.to_vec(), vec![16, 8], false)));
        assert_eq!(
            taken("[0,1:3]", &[Placement::HeadTail { dim: 2 }]),
            Ok((vec![Placement::HeadTail { dim: 1 }], vec![2, 8], false))
        );
    }

    #[test]
    fn what_is_in_pieces_is_not_cut() {
        let why = taken("[:,-1]", &[Placement::Replicate, Placement::Shard { dim: 1 }]).unwrap_err();
        assert_eq!(why, "slice=[:,-1]: ranks hold pieces of dimension 1 along axis1");
        // It may be all of this rank's, and would not be of another's.
        assert!(taken("[0:4]", &[Placement::Shard { dim: 0 }]).is_err());
        assert!(taken("[...,0]", &[Placement::HeadTail { dim: 2 }]).is_err());
        let flat = Placement::Flat { shape: vec![9, 4] };
        assert!(
            taken("[0]", std::slice::from_ref(&flat))
                .unwrap_err()
                .contains("runs of the flattened elements along axis0")
        );
        // Whatever a rank has of it, which may be nothing.
        assert!(
            taken("[:,4]", std::slice::from_ref(&flat))
                .unwrap_err()
                .ends_with("dimension 1 has 4 elements, and none at 4")
        );
        assert_eq!(taken("[:,:]", std::slice::from_ref(&flat)), Ok((vec![flat], SHAPE.to_vec(), false)));
        assert!(taken("[:,:,8]", &[]).unwrap_err().ends_with("dimension 2 has 8 elements, and none at 8"));
    }

    #[test]
    fn where_bytes_tell_those_of_the_leaves_do() {
        let either = |dim| Placement::ReplicateOrShard { dim };
        assert_eq!(
            taken("[:,0]", &[either(0), Placement::Unknown]),
            Ok((vec![either(0), Placement::Unknown], vec![4, 8], true))
        );
        assert_eq!(taken("[:,0]", &[either(1)]), Ok((vec![Placement::Unknown], vec![4, 8], true)));
        assert_eq!(taken("[0]", &[either(2)]), Ok((vec![either(1)], vec![16, 8], true)));
        let mut axes = [axis("a", either(0)), axis("b", Placement::Shard { dim: 0 })];
        without_crc(&mut axes);
        assert_eq!(axes.map(|axis| axis.place), [Placement::Unknown, Placement::Shard { dim: 0 }]);
    }
}
