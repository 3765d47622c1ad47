//! Finding records: filters, the order people expect of names, and the nearest names to a mistyped one.

use wire::hooks::Kind;

use super::Record;
use crate::format::Identity;

/// Which records are meant; what is `None` is not asked.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Module, by its full name.
    pub module: Option<String>,
    /// Kind.
    pub kind: Option<Kind>,
    /// Leaf.
    pub path: Option<String>,
    /// Model number.
    pub model: Option<u32>,
    /// Job.
    pub job: Option<u32>,
    /// Attempt of it.
    pub attempt: Option<u32>,
    /// Step.
    pub step: Option<u64>,
    /// Microbatch.
    pub micro: Option<u32>,
    /// Call.
    pub call: Option<u32>,
    /// Training or evaluation.
    pub train: Option<bool>,
    /// Captured by this rank.
    pub rank: Option<u32>,
}

impl Filter {
    /// Whether a record passes.
    pub fn wants(&self, record: &Record) -> bool {
        fn fits<T: PartialEq>(asked: &Option<T>, is: &T) -> bool {
            asked.as_ref().is_none_or(|a| a == is)
        }
        let id = &record.id;
        fits(&self.module, &id.module)
            && fits(&self.kind, &id.kind)
            && fits(&self.path, &id.path)
            && fits(&self.model, &id.model)
            && fits(&self.job, &id.job.job)
            && fits(&self.attempt, &id.job.attempt)
            && fits(&self.step, &id.step)
            && fits(&self.micro, &id.micro)
            && fits(&self.call, &id.call)
            && fits(&self.train, &id.train)
            && self.rank.is_none_or(|rank| record.parts.iter().any(|p| p.what.rank == rank))
    }
}

/// A module's name as shown: the model itself has the empty one.
pub fn display_module(name: &str) -> &str {
    if name.is_empty() { "(root)" } else { name }
}

/// A run of digits, by value, or other text.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Piece<'a> {
    /// Digits: leading zeros off, so that length and then text compare as numbers do.
    Number(usize, &'a str),
    /// Text.
    Text(&'a str),
}

/// Pieces of a name that are told apart when names are ordered.
const MAX_PIECES: usize = 128;

/// The key by which `layers.2` comes before `layers.10`.
pub fn natural(name: &str) -> Vec<Piece<'_>> {
    let mut pieces = Vec::new();
    let mut rest = name;
    while let Some(first) = rest.chars().next() {
        if pieces.len() == MAX_PIECES {
            pieces.push(Piece::Text(rest));
            break;
        }
        let digits = first.is_ascii_digit();
        let end = rest.find(|c: char| c.is_ascii_digit() != digits).unwrap_or(rest.len());
        let (piece, tail) = rest.split_at(end);
        pieces.push(if digits {
            let value = piece.trim_start_matches('0');
            Piece::Number(value.len(), value)
        } else {
            Piece::Text(piece)
        });
        rest = tail;
    }
    pieces
}

/// The key of the order in which people look through records: by name, then by time.
#[allow(clippy::type_complexity)]
pub fn in_order(id: &Identity) -> (u32, Vec<Piece<'_>>, Kind, &str, u64, u32, u32, &Identity) {
    (id.model, natural(&id.module), id.kind, &id.path, id.step, id.micro, id.call, id)
}

/// At most `count` of `names` that are likest to `wanted`, best first.
pub fn nearest<'a>(wanted: &str, names: &[&'a str], count: usize) -> Vec<&'a str> {
    let mut ranked: Vec<(usize, Vec<Piece<'a>>, &'a str)> = names
        .iter()
        .take(10_000)
        .map(|name| {
            // Who leaves out a prefix (`model.`) or types only the end means that name.
            let part = !wanted.is_empty() && name.contains(wanted);
            let cost = if part { 1 } else { 2 + distance(wanted, name) };
            (cost, natural(name), *name)
        })
        .collect();
    ranked.sort();
    ranked.into_iter().map(|(_, _, name)| name).take(count).collect()
}

/// At most `count` of `names` that are like `wanted`: those that contain it, or have at least half of it.
pub fn close<'a>(wanted: &str, names: &[&'a str], count: usize) -> Vec<&'a str> {
    let long = |text: &str| text.chars().take(100).count();
    let is_close = |name: &&'a str| {
        !wanted.is_empty() && name.contains(wanted) || 2 * distance(wanted, name) <= long(wanted).max(long(name))
    };
    nearest(wanted, names, count).into_iter().filter(is_close).collect()
}

/// Levenshtein's distance over the first hundred characters.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().take(100).collect(), b.chars().take(100).collect());
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, &x) in a.iter().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, &y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_names_order_as_numbers() {
        let mut names = vec!["layers.10.mlp", "layers.2.mlp", "layers.2", "", "head"];
        names.sort_by_key(|n| natural(n));
        assert_eq!(names, ["", "head", "layers.2", "layers.2.mlp", "layers.10.mlp"]);
    }

    #[test]
    fn nearest_prefers_names_that_contain_what_was_typed() {
        let names = ["model.layers.0.mlp", "model.layers.0.attn", "lm_head"];
        assert_eq!(nearest("layers.0.mlp", &names, 1), ["model.layers.0.mlp"]);
        assert_eq!(nearest("lm_haed", &names, 1), ["lm_head"]);
    }
}
