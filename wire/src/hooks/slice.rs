//! `slice=[...]`: which elements of a tensor are recorded, in the words of Python's basic indexing.

use std::fmt;

use super::error::{Fault, quote};
use crate::{record::MAX_DIMS, tap_abi::Cut};

const FORM: &str = "write it like slice=[:,-1]; in it are integers, ranges a:b or a:b:c with c above 0, and ...";

/// One index of a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Index {
    /// One position, which takes the dimension away; negative ones count from the end.
    At(i64),
    /// `start:stop:step`, as Python has it.
    Range {
        /// The first position.
        start: Option<i64>,
        /// The one behind the last.
        stop: Option<i64>,
        /// How far it is to the next; at least 1.
        step: u64,
    },
    /// `...`: all of as many dimensions as the others leave.
    Rest,
}

impl Index {
    /// What it takes of a dimension of `size`, and which dimension that is, for the reason that it cannot.
    fn cut(self, dim: usize, size: u64) -> Result<Cut, String> {
        // A tensor's sizes fit.
        let size = i64::try_from(size).unwrap_or(i64::MAX);
        let from_end = |at: i64| if at < 0 { at.saturating_add(size) } else { at };
        match self {
            Self::At(at) => {
                let start = from_end(at);
                if start < 0 || start >= size {
                    return Err(format!("dimension {dim} has {size} elements, and none at {at}"));
                }
                Ok(Cut { start: start as u64, len: 1, step: 1, keeps: false, all: false })
            }
            Self::Range { start, stop, step } => {
                let bound = |at: Option<i64>, otherwise: i64| at.map_or(otherwise, from_end).clamp(0, size);
                let (first, end) = (bound(start, 0), bound(stop, size));
                let len = (end.saturating_sub(first).max(0) as u64).div_ceil(step);
                let all = matches!((start, stop, step), (None | Some(0), None, 1));
                Ok(Cut { start: first as u64, len, step, keeps: true, all })
            }
            Self::Rest => Ok(Cut { start: 0, len: size as u64, step: 1, keeps: true, all: true }),
        }
    }
}

/// A slice: one index for each dimension, from the first on; dimensions behind the last are taken whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice(Vec<Index>);

impl Slice {
    /// What it takes of a tensor of this shape, for each dimension.
    ///
    /// # Errors
    /// The reason, as the user reads it: a position outside of its dimension, or more indices than dimensions.
    pub fn cuts(&self, shape: &[u64]) -> Result<Vec<Cut>, String> {
        let named = self.0.iter().filter(|index| **index != Index::Rest).count();
        let Some(left) = shape.len().checked_sub(named) else {
            return Err(format!("it names {named} dimensions, and the tensor has {}", shape.len()));
        };
        let (before, after) = match self.0.iter().position(|index| *index == Index::Rest) {
            Some(at) => (&self.0[..at], &self.0[at + 1..]),
            None => (&self.0[..], &[][..]),
        };
        let rest = std::iter::repeat_n(&Index::Rest, left);
        let each = before.iter().chain(rest).chain(after).zip(shape).enumerate();
        each.map(|(dim, (index, &size))| index.cut(dim, size)).collect()
    }
}

/// As it is written; two that read alike are alike.
impl fmt::Display for Slice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (n, index) in self.0.iter().enumerate() {
            f.write_str(if n > 0 { "," } else { "" })?;
            match index {
                Index::At(at) => write!(f, "{at}")?,
                Index::Range { start, stop, step } => {
                    start.map_or(Ok(()), |at| write!(f, "{at}"))?;
                    f.write_str(":")?;
                    stop.map_or(Ok(()), |at| write!(f, "{at}"))?;
                    if *step != 1 {
                        write!(f, ":{step}")?;
                    }
                }
                Index::Rest => f.write_str("...")?,
            }
        }
        f.write_str("]")
    }
}

/// Reads `[index,index...]`.
pub(super) fn slice(text: &str) -> Result<Slice, Fault<'_>> {
    let Some(inside) = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) else {
        return Err(Fault::new(text, format!("{} is not in brackets", quote(text)), FORM));
    };
    let indices = inside.split(',').map(|each| index(each.trim())).collect::<Result<Vec<_>, _>>()?;
    if indices.iter().filter(|index| **index == Index::Rest).count() > 1 {
        return Err(Fault::new(text, "there are several '...'", "keep one of them"));
    }
    if indices.len() > MAX_DIMS {
        return Err(Fault::new(text, format!("there are more than {MAX_DIMS} indices"), "no tensor has as many"));
    }
    Ok(Slice(indices))
}

fn index(text: &str) -> Result<Index, Fault<'_>> {
    let fault = |reason: String, help: &'static str| Err(Fault::new(text, reason, help));
    match text {
        "" => return fault("an index is missing".into(), FORM),
        "..." => return Ok(Index::Rest),
        "None" | "newaxis" | "np.newaxis" | "torch.newaxis" => {
            return fault(
                format!("{} adds a dimension", quote(text)),
                "a record is what the job has; reshape what you read",
            );
        }
        _ if text.contains(['[', ']']) => {
            return fault(
                format!("{} is a list of positions", quote(text)),
                "give a range, or record all and index what you read",
            );
        }
        _ => {}
    }
    let mut parts = text.split(':').map(str::trim);
    let (Some(first), second, third, None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
        return fault(format!("{} has more than two ':'", quote(text)), FORM);
    };
    let Some(second) = second else { return integer(first).map(Index::At) };
    let optional = |part| if str::is_empty(part) { Ok(None) } else { integer(part).map(Some) };
    let step = match third.map(optional).transpose()?.flatten() {
        None => 1,
        Some(step @ 1..) => step as u64,
        Some(0) => return fault(format!("{} does not move on", quote(text)), "give a step of 1 or more"),
        Some(_) => {
            return fault(
                format!("{} steps backwards", quote(text)),
                "give a step of 1 or more, and flip what you read",
            );
        }
    };
    Ok(Index::Range { start: optional(first)?, stop: optional(second)?, step })
}

/// Digits, and a sign only if it is `-`.
fn integer(text: &str) -> Result<i64, Fault<'_>> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|_| plain).ok_or_else(|| {
        let reason = if plain { "is too large" } else { "is no index" };
        Fault::new(text, format!("{} {reason}", quote(text)), FORM)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(text: &str) -> Result<Slice, String> {
        slice(text).map_err(|fault| fault.in_file("f", 1).to_string())
    }

    /// The shape of what a slice takes of a tensor, and where its elements begin.
    fn taken(text: &str, shape: &[u64]) -> Result<(Vec<u64>, Vec<u64>), String> {
        let cuts = read(text)?.cuts(shape)?;
        let kept = cuts.iter().filter(|cut| cut.keeps).map(|cut| cut.len).collect();
        Ok((kept, cuts.iter().map(|cut| cut.start).collect()))
    }

    #[test]
    fn indices_mean_what_they_mean_in_python() {
        for (text, shape, starts) in [
            ("[:,-1]", vec![4, 8], vec![0, 15, 0]),
            ("[...,0]", vec![4, 16], vec![0, 0, 0]),
            ("[1:3, ... ,-2:]", vec![2, 16, 2], vec![1, 0, 6]),
            ("[0,...]", vec![16, 8], vec![0, 0, 0]),
            ("[...]", vec![4, 16, 8], vec![0, 0, 0]),
            ("[::3]", vec![2, 16, 8], vec![0, 0, 0]),
            ("[1::2,-100:100:5]", vec![2, 4, 8], vec![1, 0, 0]),
            ("[3:1]", vec![0, 16, 8], vec![3, 0, 0]),
            ("[:,:,:]", vec![4, 16, 8], vec![0, 0, 0]),
            ("[-1,-16,7]", vec![], vec![3, 0, 7]),
        ] {
            assert_eq!(taken(text, &[4, 16, 8]), Ok((shape, starts)), "{text}");
        }
        assert_eq!(taken("[4]", &[4]).unwrap_err(), "dimension 0 has 4 elements, and none at 4");
        assert_eq!(taken("[:,-5]", &[2, 4]).unwrap_err(), "dimension 1 has 4 elements, and none at -5");
        assert_eq!(taken("[:,0]", &[4]).unwrap_err(), "it names 2 dimensions, and the tensor has 1");
        assert_eq!(taken("[...,0]", &[]).unwrap_err(), "it names 1 dimensions, and the tensor has 0");
        assert_eq!(taken("[...]", &[]), Ok((vec![], vec![])));
    }

    #[test]
    fn what_is_taken_whole_by_its_words_is_told_from_what_happens_to_be() {
        let all = |text| read(text).unwrap().cuts(&[4, 16]).unwrap().iter().map(|cut| cut.all).collect::<Vec<_>>();
        assert_eq!(all("[:,0:]"), [true, true]);
        assert_eq!(all("[0:4,:16]"), [false, false]);
        assert_eq!(all("[...,-1]"), [true, false]);
        assert_eq!(all("[::1]"), [true, true]);
    }

    #[test]
    fn what_is_refused_names_the_reason_and_the_way_out() {
        for (text, reason) in [
            (":,-1", "':,-1' is not in brackets"),
            ("[", "'[' is not in brackets"),
            ("[]", "an index is missing"),
            ("[1,]", "an index is missing"),
            ("[None,0]", "'None' adds a dimension"),
            ("[[0,1]]", "'[0' is a list of positions"),
            ("[::-1]", "'::-1' steps backwards"),
            ("[::0]", "'::0' does not move on"),
            ("[1:2:3:4]", "'1:2:3:4' has more than two ':'"),
            ("[...,...]", "there are several '...'"),
            ("[a]", "'a' is no index"),
            ("[+1]", "'+1' is no index"),
            ("[True]", "'True' is no index"),
            ("[1.0]", "'1.0' is no index"),
            ("[99999999999999999999]", "is too large"),
        ] {
            let message = read(text).expect_err(text);
            assert!(message.contains(reason), "{message}");
        }
        assert!(read(&format!("[{}]", [":"; 65].join(","))).unwrap_err().contains("more than 64 indices"));
    }

    #[test]
    fn it_is_written_as_it_reads() {
        for (text, written) in
            [("[ : , -1 ]", "[:,-1]"), ("[0:,::1]", "[0:,:]"), ("[a]", ""), ("[...,1:2:3]", "[...,1:2:3]")]
        {
            let slice = read(text);
            assert_eq!(slice.as_ref().map(ToString::to_string).unwrap_or_default(), written);
            assert!(slice.is_err() || read(written) == slice);
        }
    }

    proptest! {
        #[test]
        fn hostile_slices_never_panic(text in any::<String>(), near in r"[\[\]:,.0-9\-]{0,12}", shape in proptest::collection::vec(any::<u64>(), 0..5)) {
            for text in [text, format!("[{near}]")] {
                if let Ok(slice) = slice(&text) {
                    let _ = slice.cuts(&shape);
                }
            }
        }

        /// A cut never leaves its dimension.
        #[test]
        fn a_cut_is_inside(at in -9i64..9, start in -9i64..9, stop in -9i64..9, step in 1u64..9, size in 0u64..7) {
            for index in [Index::At(at), Index::Range { start: Some(start), stop: Some(stop), step }] {
                if let Ok(cut) = index.cut(0, size) {
                    prop_assert!(cut.len == 0 || cut.start + (cut.len - 1) * cut.step < size, "{index:?} {cut:?}");
                }
            }
        }
    }
}
