//! The one record that a call means, or in one line what there is instead.

use std::{
    collections::{BTreeSet, HashSet},
    fmt::Display,
};

use wire::hooks::Kind;

use super::{Run, display_module, natural, select};
use crate::{
    format::{Identity, JobId},
    text::{clip, few, safe},
};

/// Values of a field that a message lists one by one.
const SPELLED: usize = 6;

/// The fields of the record that is asked for, besides its module; `None`: any.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Job; `None`: the newest that has the module.
    pub job: Option<i128>,
    /// Attempt; `None`: the last of that job that has the module.
    pub attempt: Option<i128>,
    /// Kind, by its word.
    pub kind: Option<String>,
    /// Model number.
    pub model: Option<i128>,
    /// Training or evaluation.
    pub train: Option<bool>,
    /// Step.
    pub step: Option<i128>,
    /// Microbatch.
    pub micro: Option<i128>,
    /// Call.
    pub call: Option<i128>,
    /// Leaf.
    pub path: Option<String>,
    /// Backward pass over the same forward.
    pub repeat: Option<i128>,
    /// Of passes that not all ranks made: the lowest rank that did. `None`: that of all ranks, if there is one.
    pub apart: Option<i128>,
    /// Which of those that are called the same; `None`: the first.
    pub again: Option<i128>,
}

/// The value of one field.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Value {
    Number(i128),
    Flag(bool),
    Text(String),
    Nothing,
}

impl Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Value::Number(number) => number.fmt(f),
            Value::Flag(true) => f.write_str("True"),
            Value::Flag(false) => f.write_str("False"),
            Value::Text(text) => f.write_str(&clip(text)),
            Value::Nothing => f.write_str("None"),
        }
    }
}

impl Value {
    fn quoted(&self) -> String {
        if let Value::Text(text) = self { format!("'{}'", clip(text)) } else { self.to_string() }
    }
}

type Field = (&'static str, fn(&Identity) -> Value);

/// In the order in which they are looked at.
const FIELDS: [Field; 12] = [
    ("job", |id| Value::Number(id.job.job.into())),
    ("attempt", |id| Value::Number(id.job.attempt.into())),
    ("kind", |id| Value::Text(id.kind.name().into())),
    ("model", |id| Value::Number(id.model.into())),
    ("train", |id| Value::Flag(id.train)),
    ("step", |id| Value::Number(id.step.into())),
    ("micro", |id| Value::Number(id.micro.into())),
    ("call", |id| Value::Number(id.call.into())),
    ("path", |id| Value::Text(id.path.clone())),
    ("repeat", |id| Value::Number(id.repeat.into())),
    ("apart", |id| id.apart.map_or(Value::Nothing, |rank| Value::Number(rank.into()))),
    ("again", |id| Value::Number(id.again.into())),
];

/// Of a field that was not asked for: which of its values is meant where there are several; `None`: nobody knows.
fn meant(field: &str, values: impl Iterator<Item = Value>) -> Option<Value> {
    match field {
        "job" | "attempt" => values.max(),
        "again" => values.min(),
        _ => None,
    }
}

impl Wanted {
    fn values(&self) -> [Option<Value>; 12] {
        let number = |n: Option<i128>| n.map(Value::Number);
        let text = |text: &Option<String>| text.clone().map(Value::Text);
        [
            number(self.job),
            number(self.attempt),
            text(&self.kind),
            number(self.model),
            self.train.map(Value::Flag),
            number(self.step),
            number(self.micro),
            number(self.call),
            text(&self.path),
            number(self.repeat),
            number(self.apart),
            number(self.again),
        ]
    }
}

impl Run {
    /// The one of the records `candidates` (indexes, all of `module`, at least one) that is meant, or why none is.
    pub fn one(&self, module: &str, candidates: &[usize], wanted: &Wanted) -> Result<usize, String> {
        let mut values = wanted.values();
        let mut left: Vec<usize> = candidates.to_vec();
        let id = |&i: &usize| &self.records[i].id;
        for (at, (field, get)) in FIELDS.iter().enumerate() {
            if values[at].is_none() {
                values[at] = meant(field, left.iter().map(|i| get(id(i))));
            }
            let Some(value) = &values[at] else { continue };
            let kept: Vec<usize> = left.iter().copied().filter(|i| get(id(i)) == *value).collect();
            if kept.is_empty() {
                let there: Vec<&Identity> = left.iter().map(id).collect();
                let why = self.none(module, (field, *get), value, &there, &values);
                return Err(why + &self.elsewhere(candidates, wanted));
            }
            left = kept;
        }
        let of_all = |i: &usize| id(i).apart.is_none() && !id(i).own && !id(i).pending;
        if left.iter().any(of_all) {
            left.retain(of_all);
        }
        if let [one] = left[..] {
            return Ok(one);
        }
        let varying: Vec<(&str, Vec<Value>)> = FIELDS
            .iter()
            .map(|(field, get)| (*field, left.iter().map(|i| get(id(i))).collect::<Vec<_>>()))
            .filter(|(_, all)| all.iter().any(|value| *value != all[0]))
            .collect();
        let kind = match left.first().map(id) {
            Some(id) if varying.iter().all(|(field, _)| *field != "kind") => id.kind.name(),
            _ => "of several kinds",
        };
        let count = left.len();
        let choices: Vec<String> =
            varying.into_iter().map(|(field, all)| format!("{field}= ({})", spell(all))).collect();
        Err(format!("{} has {count} records {kind}; say which: {}", shown(module), choices.join(", ")))
    }

    /// Which jobs and attempts have what is asked for, where the newest has not and nobody said which.
    fn elsewhere(&self, candidates: &[usize], wanted: &Wanted) -> String {
        let values = wanted.values();
        if values[0].is_some() || values[1].is_some() {
            return String::new();
        }
        let asked = |id: &&Identity| {
            FIELDS.iter().zip(&values).all(|((_, get), value)| value.as_ref().is_none_or(|value| get(id) == *value))
        };
        let found: BTreeSet<JobId> =
            candidates.iter().map(|&i| &self.records[i].id).filter(asked).map(|id| id.job).collect();
        match found.is_empty() {
            true => String::new(),
            false => format!(" in the newest; {}", few(found.iter().map(|id| id.words()))),
        }
    }

    fn none(
        &self,
        module: &str,
        (field, get): (&str, fn(&Identity) -> Value),
        value: &Value,
        left: &[&Identity],
        wanted: &[Option<Value>; 12],
    ) -> String {
        let there = spell(left.iter().map(|id| get(id)).collect());
        let name = shown(module);
        let meant = |id: &Identity| {
            id.module == module
                && FIELDS.iter().zip(wanted).all(|((_, get), v)| v.as_ref().is_none_or(|v| get(id) == *v))
        };
        let reasons: Vec<&str> =
            self.lost.refused.iter().filter(|(what, _)| meant(&what.id)).map(|(_, why)| why.as_str()).collect();
        if let Some(first) = reasons.first() {
            return format!("{name} was refused there {} times: {first}", reasons.len());
        }
        let Value::Text(text) = value else {
            return format!("{name} has no {} with {field}={value}; {field} is {there}", first_kind(left));
        };
        if field == "kind" {
            return if Kind::from_name(text).is_none() {
                let kinds = Kind::ALL.map(Kind::name).join(", ");
                format!("there is no kind {}; kinds are {kinds}; {name} has {there}", value.quoted())
            } else {
                format!("{name} has nothing of kind {value}; it has {there}")
            };
        }
        let root = text.split(['[', '.']).next().unwrap_or_default();
        let hint = match (&wanted[2], root) {
            (Some(Value::Text(kind)), "out") if kind == Kind::Backward.name() => {
                "; kind 'backward' is the gradient of the inputs, that of the outputs is kind 'backward_pre'"
            }
            (Some(Value::Text(kind)), "in") if kind == Kind::BackwardPre.name() => {
                "; kind 'backward_pre' is the gradient of the outputs, that of the inputs is kind 'backward'"
            }
            _ => "",
        };
        format!("{name} has no {} with {field}={}; {field} is {there}{hint}", first_kind(left), value.quoted())
    }

    /// Why there is nothing of a module; `names` are those of which there is something.
    pub fn no_such_module(&self, module: &str, names: &[&str]) -> String {
        let name = shown(module);
        let reasons: Vec<&str> = self
            .lost
            .refused
            .iter()
            .filter(|(what, _)| what.id.module == module)
            .map(|(_, why)| why.as_str())
            .collect();
        if let Some(first) = reasons.first() {
            return format!("{name} was refused {} times: {first}", reasons.len());
        }
        if names.is_empty() {
            return format!("{name} is not captured: the run holds no records");
        }
        let known = self.info.models.iter().flat_map(|model| model.modules.iter()).any(|m| *m.name == *module);
        let why = if known { "is in the model, but nothing of it is captured" } else { "is not captured" };
        let near: Vec<String> = select::close(module, names, 3).into_iter().map(shown).collect();
        if near.is_empty() {
            let all = names.iter().map(|name| Value::Text(display_module(name).to_owned())).collect();
            return format!("{name} {why}; captured are {}", spell(all));
        }
        format!("{name} {why}; the nearest are {}", near.join(", "))
    }

    /// Modules that have records, in the model's order; a parameter comes with its module.
    pub fn modules_in_model_order(&self) -> Vec<&str> {
        let mut position = std::collections::HashMap::new();
        for module in self.info.models.iter().flat_map(|model| model.modules.iter()) {
            let next = position.len();
            position.entry(&*module.name).or_insert(next);
        }
        let place = |name: &str| {
            let mut owner = name;
            for _ in 0..crate::limits::DEPTH {
                if owner.is_empty() || position.contains_key(owner) {
                    break;
                }
                owner = owner.rsplit_once('.').map_or("", |(owner, _)| owner);
            }
            position.get(owner).map_or(0, |at| at + 1)
        };
        let unique: HashSet<&str> = self.records.iter().map(|r| r.id.module.as_str()).collect();
        let mut names: Vec<&str> = unique.into_iter().collect();
        names.sort_by_cached_key(|name| (place(name), natural(name), *name));
        names
    }
}

fn first_kind(left: &[&Identity]) -> &'static str {
    left.first().map_or("record", |id| id.kind.name())
}

/// A module's name for people.
pub fn shown(module: &str) -> String {
    safe(&clip(display_module(module)))
}

/// Distinct values for a message: all of a few, and the ends of many.
fn spell(values: Vec<Value>) -> String {
    let mut seen = HashSet::new();
    let mut distinct: Vec<Value> = values.into_iter().filter(|value| seen.insert(value.clone())).collect();
    if distinct.iter().all(|value| !matches!(value, Value::Text(_))) {
        distinct.sort();
        if let [Value::Number(first), .., Value::Number(last)] = distinct[..] {
            if distinct.len() > 2 && last - first == distinct.len() as i128 - 1 {
                return format!("{first} to {last}");
            }
            if distinct.len() > SPELLED {
                let some: Vec<String> = distinct.iter().take(3).map(Value::to_string).collect();
                return format!("{} values from {first} to {last}: {}, ...", distinct.len(), some.join(", "));
            }
        }
    }
    let listed: Vec<String> = distinct.iter().take(SPELLED).map(Value::to_string).collect();
    let more = distinct.len().saturating_sub(SPELLED);
    listed.join(", ") + &if more > 0 { format!(" and {more} more") } else { String::new() }
}

#[cfg(test)]
mod tests {
    use wire::dtype::DType;

    use super::*;
    use crate::testing::fixture::*;

    #[test]
    fn a_field_may_be_left_out_where_it_has_one_value() {
        let mut f = Fixture::default();
        for step in 0..3 {
            f.part(id("layers.2", step), DType::UInt8, &[1], 0, Vec::new(), &[1]);
        }
        let run = Run::open(f.finish().path()).unwrap();
        let one = |wanted: Wanted| run.one("layers.2", &[0, 1, 2], &wanted);
        assert_eq!(one(Wanted { step: Some(1), ..Wanted::default() }), Ok(1));
        let many = one(Wanted::default()).unwrap_err();
        assert_eq!(many, "layers.2 has 3 records forward; say which: step= (0 to 2)");
        let none = one(Wanted { step: Some(-1), ..Wanted::default() }).unwrap_err();
        assert_eq!(none, "layers.2 has no forward with step=-1; step is 0 to 2");
        let kind = one(Wanted { kind: Some("grad".into()), ..Wanted::default() }).unwrap_err();
        assert_eq!(kind, "layers.2 has nothing of kind grad; it has forward");
        assert!(run.no_such_module("layers.22", &["layers.2"]).ends_with("the nearest are layers.2"));
        assert!(run.no_such_module("zzz", &["", "layers.2"]).ends_with("captured are (root), layers.2"));
    }

    #[test]
    fn many_values_are_told_by_their_ends() {
        let numbers = |all: &[i128]| spell(all.iter().copied().map(Value::Number).collect());
        assert_eq!(numbers(&[3, 1, 3]), "1, 3");
        assert_eq!(numbers(&[1, 2, 3, 4]), "1 to 4");
        assert_eq!(numbers(&[1, 3, 5, 7, 9, 11, 13]), "7 values from 1 to 13: 1, 3, 5, ...");
        let names = (0..8).map(|n| Value::Text(n.to_string())).collect();
        assert_eq!(spell(names), "0, 1, 2, 3, 4, 5 and 2 more");
    }
}
