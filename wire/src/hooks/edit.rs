//! Edits: what a clause does to a tensor on its way.
//!
//! A built-in edit is a line in [`BUILT_IN`]: its word, whether it takes a number, and what it does, in terms of what every
//! executor can do ([`LeafEdit`]). Nothing else knows their names.

use super::Kind;
use super::error::{Fault, nearest_word, quote};
use crate::tap_abi::LeafEdit;

/// How an edit changes a tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Edit {
    /// A built-in one.
    BuiltIn(LeafEdit),
    /// `FILE.py:NAME`: call a Python function on the whole tensor.
    Python {
        /// The file as written.
        file: String,
        /// The function's name.
        function: String,
    },
}

struct BuiltIn {
    name: &'static str,
    /// The number in parentheses that it takes, as an example.
    argument: Option<&'static str>,
    /// What it does, with that number.
    effect: fn(f64) -> LeafEdit,
}

const BUILT_IN: [BuiltIn; 2] = [
    BuiltIn { name: "scale", argument: Some("0.5"), effect: |x| LeafEdit { factor: x, ..LeafEdit::NONE } },
    BuiltIn { name: "zero", argument: None, effect: |_| LeafEdit { zero: true, ..LeafEdit::NONE } },
];

impl BuiltIn {
    /// How it is written.
    fn form(&self) -> String {
        if self.argument.is_some() { format!("{}(x)", self.name) } else { self.name.to_owned() }
    }

    /// What it does, with what stands in the parentheses, if there are any.
    fn read<'a>(&self, text: &'a str, argument: Option<&'a str>) -> Result<LeafEdit, Fault<'a>> {
        let Some(example) = self.argument else {
            return match argument {
                None => Ok((self.effect)(0.0)),
                Some(_) => {
                    Err(Fault::new(text, format!("{} takes nothing in parentheses", self.name), "leave them out"))
                }
            };
        };
        let help = format!("write it like {}({example})", self.name);
        let Some(number) = argument.and_then(|argument| argument.strip_suffix(')')).map(str::trim) else {
            return Err(Fault::new(text, format!("{} has no number in parentheses", self.name), help));
        };
        match number.parse::<f64>() {
            Ok(x) if x.is_finite() => Ok((self.effect)(x)),
            _ => Err(Fault::new(number, format!("{} is not a finite number", quote(number)), help)),
        }
    }
}

/// An edit for a hook on `kinds`.
pub(super) fn edit<'a>(text: &'a str, kinds: &[Kind]) -> Result<Edit, Fault<'a>> {
    if let Some(kind) = kinds.iter().find(|kind| kind.is_in(Kind::OF_PARAMETERS)) {
        let editable: Vec<_> = Kind::in_mask(!Kind::OF_PARAMETERS).map(Kind::name).collect();
        let help = format!("an edit applies to {}; give '{}' a clause of its own", editable.join(", "), kind.name());
        return Err(Fault::new(text, format!("kind '{}' cannot be edited", kind.name()), help));
    }
    let (name, argument) = text.split_once('(').map_or((text, None), |(name, rest)| (name, Some(rest)));
    let name = name.trim();
    if let Some(found) = BUILT_IN.iter().find(|built_in| built_in.name == name) {
        return found.read(text, argument).map(Edit::BuiltIn);
    }
    if name.is_empty() {
        return Err(Fault::new(text, "an edit is missing", forms()));
    }
    if text.contains(".py") {
        return python(text);
    }
    let all = BUILT_IN.map(|built_in| built_in.form());
    let near = nearest_word(name, all.iter().map(String::as_str)).unwrap_or_default();
    let help = if near.is_empty() { forms() } else { format!("did you mean '{near}'? ({})", forms()) };
    Err(Fault::new(text, format!("{} is not an edit", quote(text)), help))
}

fn forms() -> String {
    format!("edits: {}, FILE.py:NAME", built_in_forms())
}

/// All built-in edits, as they are written.
pub(super) fn built_in_forms() -> String {
    BUILT_IN.map(|built_in| built_in.form()).join(", ")
}

/// `FILE.py:NAME`.
fn python(text: &str) -> Result<Edit, Fault<'_>> {
    let help = "write it like edits.py:double";
    let (file, function) = text.rsplit_once(':').unwrap_or((text, ""));
    let identifier = |name: &str| {
        name.starts_with(|c: char| c.is_alphabetic() || c == '_')
            && name.chars().all(|c| c.is_alphanumeric() || c == '_')
    };
    if file.len() <= ".py".len() || !file.ends_with(".py") {
        Err(Fault::new(text, format!("{} is not a Python file", quote(file)), help))
    } else if function.is_empty() {
        Err(Fault::new(text, format!("{} names no function", quote(text)), help))
    } else if !identifier(function) {
        Err(Fault::new(function, format!("{} is not a function's name", quote(function)), help))
    } else {
        Ok(Edit::Python { file: file.to_string(), function: function.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn edits_are_understood_or_refused_with_the_form() {
        let forward = [Kind::Forward];
        let read = |text| edit(text, &forward).map_err(|fault| fault.in_file("f", 1).to_string());
        assert_eq!(read("scale( 1e-3 )"), Ok(Edit::BuiltIn(LeafEdit { factor: 0.001, zero: false })));
        assert_eq!(read("zero"), Ok(Edit::BuiltIn(LeafEdit { factor: 1.0, zero: true })));
        let python = Edit::Python { file: "a/b:c/e.py".into(), function: "f_1".into() };
        assert_eq!(read("a/b:c/e.py:f_1"), Ok(python));
        for (text, reason) in [
            ("scale", "scale has no number"),
            ("scale(0.5", "scale has no number"),
            ("scale()", "'' is not a finite number"),
            ("scale(nan)", "'nan' is not a finite number"),
            ("scale(1e999)", "is not a finite number"),
            ("zero(1)", "zero takes nothing in parentheses"),
            ("zeros", "did you mean 'zero'?"),
            ("edits.py", "'edits.py' names no function"),
            ("edits.py:1x", "'1x' is not a function's name"),
            (".py:f", "'.py' is not a Python file"),
        ] {
            let message = read(text).expect_err(text);
            assert!(message.contains(reason), "{message}");
        }
        assert!(edit("zero", &Kind::ALL).is_err());
    }

    proptest! {
        #[test]
        fn hostile_edits_never_panic(text in any::<String>(), near in r"([\[\].@+-ä]|scale\(|zero|\)|\.py:|[0-9]{1,11}){0,6}") {
            let _ = edit(&text, &[Kind::Forward]);
            let _ = edit(&near, &[Kind::Forward]);
        }
    }
}
