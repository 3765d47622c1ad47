//! Values of options.
//!
//! Each has one parser, from its text; the TOML form brings its values to the same parsers.

use std::collections::BTreeSet;

use super::error::{Fault, nearest_word, quote};
use super::slice::slice;
use super::{Assemble, Kind, Mode, Options, Reduce, ShardHint};
use crate::dtype::DType;

/// Options by name, each with an example for messages.
pub(super) const OPTIONS: [(&str, &str); 12] = [
    ("every", "every=10"),
    ("steps", "steps=100..200"),
    ("micro", "micro=0..3"),
    ("mode", "mode=train"),
    ("ranks", "ranks=0+2"),
    ("dtype", "dtype=float32"),
    ("reduce", "reduce=stats"),
    ("group", "group=NAME"),
    ("assemble", "assemble=agent"),
    ("shard", "shard=0@tp"),
    ("path", "path=out[0]"),
    ("slice", "slice=[:,-1]"),
];
/// Mesh axes that `shard` may name.
const AXES: [&str; 5] = ["dp", "tp", "cp", "pp", "ep"];
const PATHS: &str = "paths are out, out[0], out.logits, out[2].k, in[0], in.states";
/// More ranks than any job has; a range is written out, so it must have an end.
const MOST_RANKS: u64 = 1 << 20;

/// The known option with this name.
pub(super) fn option_name(name: &str) -> Result<&'static str, Fault<'_>> {
    let names = OPTIONS.map(|(option, _)| option);
    names.into_iter().find(|option| *option == name).ok_or_else(|| match name {
        "" => Fault::new(name, "an option is missing", format!("options: {}", names.join(", "))),
        _ if Kind::from_name(name).is_some() => Fault::unknown(name, "an option", "options", &names)
            .with_help(format!("'{name}' is a kind; kinds follow ':'")),
        _ => Fault::unknown(name, "an option", "options", &names),
    })
}

/// How an option is written, as a way out.
pub(super) fn example(name: &str) -> String {
    let written = OPTIONS.iter().find(|(option, _)| *option == name).map_or(name, |(_, example)| example);
    format!("write it like {written}")
}

/// Reads the value of option `name`, which [`option_name`] gave.
pub(super) fn set_option<'a>(options: &mut Options, name: &'static str, value: &'a str) -> Result<(), Fault<'a>> {
    if value.is_empty() {
        return Err(Fault::new(value, format!("option '{name}' has no value"), example(name)));
    }
    let marks: &[char] = match name {
        "shard" => &[],
        "slice" => &['@'],
        _ => &['@', ':'],
    };
    if value.contains(marks) {
        let reason = format!("{} is not a value of option '{name}'", quote(value));
        return Err(Fault::new(value, reason, "separate options with ','; kinds stand before '@'"));
    }
    match name {
        "every" => match number(value)? {
            0 => return Err(Fault::new(value, "every=0 would capture nothing", "give 1 or more")),
            every => options.every = Some(every),
        },
        "steps" => options.steps = Some(range(value, "step")?),
        "micro" => options.micro = Some(range(value, "microbatch")?),
        "mode" => match value {
            "train" => options.mode = Some(Mode::Train),
            "eval" => options.mode = Some(Mode::Eval),
            _ => return Err(Fault::unknown(value, "a mode", "modes", &["train", "eval"])),
        },
        "ranks" => options.ranks = Some(ranks(value)?),
        "dtype" => {
            let known = || DType::ALL.iter().map(|dtype| dtype.name()).collect::<Vec<_>>();
            let unknown = || Fault::unknown(value, "a dtype", "dtypes", &known());
            options.dtype = Some(DType::from_name(value).ok_or_else(unknown)?);
        }
        "reduce" if value == "stats" => options.reduce = Reduce::Stats,
        "reduce" => return Err(Fault::unknown(value, "a reduction", "reductions", &["stats"])),
        "group" => match value.chars().find(|c| !c.is_alphanumeric() && !"_-.".contains(*c)) {
            Some(c) => {
                let reason = format!("{} cannot be in a group's name", quote(c.encode_utf8(&mut [0; 4])));
                return Err(Fault::new(value, reason, "use letters, digits, '_', '-' and '.'"));
            }
            None => options.group = Some(value.to_string()),
        },
        "assemble" => match value {
            "agent" => options.assemble = Assemble::Agent,
            "collective" => options.assemble = Assemble::Collective,
            _ => return Err(Fault::unknown(value, "a place to assemble", "places", &["agent", "collective"])),
        },
        "shard" => options.shard = Some(shard(value)?),
        "slice" => options.slice = Some(slice(value)?),
        _ => options.path = Some(path(value)?.to_string()),
    }
    Ok(())
}

/// A plain decimal number; no sign, so that what is accepted is also canonical.
fn number<T: std::str::FromStr>(text: &str) -> Result<T, Fault<'_>> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|_| digits).ok_or_else(|| {
        let reason = if digits { "is too large" } else { "is not a whole number" };
        Fault::new(text, format!("{} {reason}", quote(text)), "write digits only, such as 10")
    })
}

/// `first` and `last` as they are, or the fault that they are not in order.
fn ascending<T: PartialOrd>(text: &str, first: T, last: T) -> Result<(T, T), Fault<'_>> {
    if first > last {
        return Err(Fault::new(
            text,
            format!("{} ends before it starts", quote(text)),
            "write the smaller number first",
        ));
    }
    Ok((first, last))
}

/// `a..b`, `a..`, `..b` or `a`, the last included.
fn range<'a>(text: &'a str, of: &str) -> Result<(u64, u64), Fault<'a>> {
    let (first, last) = match text.split_once("..") {
        None => (number(text)?, number(text)?),
        Some(("", "")) => {
            return Err(Fault::new(text, format!("'..' names no {of}"), "give a side of it, such as 100.."));
        }
        Some((first, "")) => (number(first)?, u64::MAX),
        Some(("", last)) => (0, number(last)?),
        Some((first, last)) => (number(first)?, number(last)?),
    };
    ascending(text, first, last)
}

/// Numbers and ranges `a..b` joined by `+`; ascending and unique in the result.
fn ranks(text: &str) -> Result<Vec<u32>, Fault<'_>> {
    let mut ranks = BTreeSet::new();
    let mut room = MOST_RANKS;
    for item in text.split('+') {
        let (first, last): (u32, u32) = match item.split_once("..") {
            Some((first, last)) => ascending(item, number(first)?, number(last)?)?,
            None => (number(item)?, number(item)?),
        };
        // Counted before anything is written out: a range is a few letters, whatever its length.
        room = room.checked_sub(u64::from(last - first) + 1).ok_or_else(|| {
            Fault::new(item, format!("{} is more than {MOST_RANKS} ranks", quote(text)), "leave ranks out for all")
        })?;
        ranks.extend(first..=last);
    }
    Ok(ranks.into_iter().collect())
}

/// `DIM@AXIS`.
fn shard(text: &str) -> Result<ShardHint, Fault<'_>> {
    let Some((dim, axis)) = text.split_once('@') else {
        return Err(Fault::new(text, format!("{} is not DIM@AXIS", quote(text)), example("shard")));
    };
    let Ok(dim) = dim.parse() else {
        return Err(Fault::new(dim, format!("{} is not a dimension", quote(dim)), "give a number; -1 is the last one"));
    };
    if !AXES.contains(&axis) {
        return Err(Fault::unknown(axis, "a mesh axis", "axes", &AXES));
    }
    Ok(ShardHint { dim, axis: axis.to_string() })
}

/// `out` or `in`, then any of `[NUMBER]` and `.NAME`. Paths are compared as text, so numbers are canonical.
fn path(text: &str) -> Result<&str, Fault<'_>> {
    let root = &text[..text.find(['[', '.']).unwrap_or(text.len())];
    if root != "out" && root != "in" {
        let near = nearest_word(root, ["out", "in"].into_iter()).unwrap_or("out");
        let reason = format!("{} starts with neither 'out' nor 'in'", quote(text));
        return Err(Fault::new(text, reason, format!("did you mean '{near}'? ({PATHS})")));
    }
    let mut rest = &text[root.len()..];
    while !rest.is_empty() {
        let step = match rest.strip_prefix('[') {
            Some(inner) => inner
                .split_once(']')
                .filter(|(index, _)| number::<u32>(index).is_ok_and(|parsed| parsed.to_string() == *index)),
            None => rest.strip_prefix('.').map(|name| name.split_at(name.find(['[', '.']).unwrap_or(name.len()))),
        };
        let step = step.filter(|(name, _)| name.chars().all(|c| c.is_alphanumeric() || c == '_' || c == '-'));
        let Some((_, after)) = step.filter(|(name, _)| !name.is_empty()) else {
            return Err(Fault::new(rest, format!("{} is neither [NUMBER] nor .NAME", quote(rest)), PATHS));
        };
        rest = after;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The options that one value gives, or what its refusal says.
    fn read(name: &str, value: &str) -> Result<Options, String> {
        let mut options = Options::default();
        let place = |fault: Fault<'_>| fault.in_file("f", 1).to_string();
        let name = option_name(name).map_err(place)?;
        set_option(&mut options, name, value).map_err(place).map(|()| options)
    }

    fn refused(name: &str, value: &str, reason: &str) {
        let message = read(name, value).expect_err(value);
        assert!(message.contains(reason), "{message}");
    }

    #[test]
    fn steps_have_either_side_or_both_or_are_one() {
        let steps = |value| read("steps", value).unwrap().steps.unwrap();
        assert_eq!(steps("3..7"), (3, 7));
        assert_eq!(steps("3.."), (3, u64::MAX));
        assert_eq!(steps("..7"), (0, 7));
        assert_eq!(steps("5"), (5, 5));
        refused("steps", "7..3", "'7..3' ends before it starts");
        refused("steps", "..", "'..' names no step");
        refused("steps", "1..=2", "'=2' is not a whole number");
        refused("every", "0", "every=0 would capture nothing");
        refused("every", "+1", "'+1' is not a whole number");
        refused("every", "99999999999999999999", "is too large");
    }

    #[test]
    fn ranks_are_ascending_unique_and_bounded() {
        let ranks = |value| read("ranks", value).unwrap().ranks.unwrap();
        assert_eq!(ranks("0"), [0]);
        assert_eq!(ranks("5+0+2..3+2"), [0, 2, 3, 5]);
        refused("ranks", "0..4294967295", "is more than 1048576 ranks");
        refused("ranks", "3..1", "ends before it starts");
        refused("ranks", "0,", "'0,' is not a whole number");
    }

    #[test]
    fn words_are_refused_with_the_nearest() {
        refused("dtype", "bf16", "did you mean 'bfloat16'?");
        refused("dtype", "fp32", "did you mean 'float32'?");
        refused("reduce", "stat", "did you mean 'stats'?");
        refused("assemble", "agnet", "did you mean 'agent'?");
        refused("shard", "0@tpp", "did you mean 'tp'?");
        refused("shard", "x@tp", "'x' is not a dimension");
        refused("shard", "0", "'0' is not DIM@AXIS");
        refused("group", "a b", "' ' cannot be in a group's name");
        refused("dtpe", "float32", "did you mean 'dtype'?");
        assert_eq!(read("dtype", "torch.bfloat16").unwrap().dtype, Some(DType::BFloat16));
        assert_eq!(read("reduce", "stats").unwrap().reduce, Reduce::Stats);
        assert_eq!(read("assemble", "collective").unwrap().assemble, Assemble::Collective);
        assert_eq!(read("group", "probe-1").unwrap().group.as_deref(), Some("probe-1"));
    }

    #[test]
    fn paths_have_the_shape_of_structures() {
        for good in ["out", "in", "out[0]", "out.logits", "out[2].k", "in[0]", "in.states", "out[0][1]"] {
            assert_eq!(read("path", good).unwrap().path.as_deref(), Some(good));
        }
        for bad in [
            "outt",
            "output[0]",
            "[0]",
            "out[",
            "out[]",
            "out[a]",
            "out[-1]",
            "out[01]",
            "out.",
            "out..a",
            "out0",
            "out[0]a",
        ] {
            assert!(read("path", bad).is_err(), "{bad}");
        }
        refused("path", "output[0]", "starts with neither 'out' nor 'in'; did you mean 'out'?");
    }

    proptest! {
        #[test]
        fn hostile_values_never_panic(name in 0..OPTIONS.len(), value in any::<String>()) {
            let _ = set_option(&mut Options::default(), OPTIONS[name].0, &value);
        }

        #[test]
        fn values_near_the_grammar_never_panic(
            name in 0..OPTIONS.len(),
            value in r"([\[\].@+-ä]|\.\.|out|in|tp|scale\(|\)|\.py:|[0-9]{1,11}){0,6}"
        ) {
            let _ = set_option(&mut Options::default(), OPTIONS[name].0, &value);
        }
    }
}
