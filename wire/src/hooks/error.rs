//! Why a hook text is refused: the place, the reason and the way out, in one line.

use std::fmt;

use crate::env;

/// Longest piece of the user's text that a message repeats, in characters.
const QUOTE: usize = 120;
/// Words are compared on this many characters: a bound on the cost of hostile input.
const COMPARED: usize = 24;

/// Where in the user's text the fault lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Position {
    /// The text as a whole.
    Whole,
    /// A clause.
    Clause {
        /// Which clause, from 1; empty ones are not counted.
        number: usize,
        /// Byte offset of the fault in the whole text.
        offset: usize,
        /// The same place in characters, from 1.
        column: usize,
        /// The clause as written.
        text: String,
    },
    /// A TOML file.
    File {
        /// The file as the user named it.
        file: String,
        /// Line from 1; `None` when the file as a whole is at fault.
        line: Option<usize>,
    },
}

/// A refused hook text. Displays as one line, whatever the text held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HookError {
    /// Where.
    pub position: Position,
    /// What is wrong there.
    pub reason: String,
    /// The way out, with the nearest valid word where there is one.
    pub help: String,
    /// What the text was given as: a variable, or an option.
    pub given_as: &'static str,
}

impl std::error::Error for HookError {}

impl fmt::Display for HookError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let position = match &self.position {
            Position::Whole => self.given_as.to_string(),
            Position::Clause { number, column, text, .. } => {
                format!("{} clause {number}, column {column} ({})", self.given_as, quote(text))
            }
            Position::File { file, line: Some(line) } => format!("{file} line {line}"),
            Position::File { file, line: None } => file.clone(),
        };
        // The user's text may hold line breaks or terminal escapes; a log line must not.
        for c in format!("{position}: {}; {}", self.reason, self.help).chars() {
            match c {
                '\u{2028}' | '\u{2029}' => write!(f, "{}", c.escape_unicode())?,
                c if c.is_control() => write!(f, "{}", c.escape_default())?,
                c => write!(f, "{c}")?,
            }
        }
        Ok(())
    }
}

/// A fault in one part of a value, before it is known where that value stands.
///
/// The parsers of single values return it, so that clauses and TOML share them.
#[derive(Debug)]
pub(super) struct Fault<'a> {
    /// The subslice at fault; its address gives the column.
    part: &'a str,
    reason: String,
    help: String,
}

impl<'a> Fault<'a> {
    /// `reason` at `part`, which is a subslice of the text that the caller parses.
    pub(super) fn new(part: &'a str, reason: impl Into<String>, help: impl Into<String>) -> Self {
        Self { part, reason: reason.into(), help: help.into() }
    }

    /// `word` is none of `words`, which together are called `plural`, one of them `singular`.
    pub(super) fn unknown(word: &'a str, singular: &str, plural: &str, words: &[&str]) -> Self {
        let reason = format!("{} is not {singular}", quote(word));
        let list = words.join(", ");
        // A word with hardly a letter in common is no help; the list is.
        let is_near = |near: &&str| word_cost(word, near) <= word.len().max(near.len());
        let help = match nearest_word(word, words.iter().copied()).filter(is_near) {
            Some(near) => format!("did you mean '{near}'? ({plural}: {list})"),
            None => format!("{plural}: {list}"),
        };
        Self { part: word, reason, help }
    }

    /// The same fault with another way out.
    pub(super) fn with_help(self, help: impl Into<String>) -> Self {
        Self { help: help.into(), ..self }
    }

    /// Places the fault in clause `number`, whose text is `clause`, of the whole text.
    pub(super) fn in_clause(self, whole: &str, number: usize, clause: &str) -> HookError {
        let offset = offset_in(whole, self.part);
        let column = 1 + whole.char_indices().take_while(|(at, _)| *at < offset).count();
        let position = Position::Clause { number, offset, column, text: clause.to_string() };
        HookError { position, reason: self.reason, help: self.help, given_as: env::HOOKS }
    }

    /// Places the fault on a line of a TOML file.
    pub(super) fn in_file(self, file: &str, line: usize) -> HookError {
        let position = Position::File { file: file.to_string(), line: Some(line) };
        HookError { position, reason: self.reason, help: self.help, given_as: env::HOOKS }
    }
}

/// Byte offset of `part` in `whole`, of which it is a subslice.
pub(super) fn offset_in(whole: &str, part: &str) -> usize {
    (part.as_ptr() as usize).saturating_sub(whole.as_ptr() as usize).min(whole.len())
}

/// `text` between quotes, shortened when it is long.
pub(super) fn quote(text: &str) -> String {
    match text.char_indices().nth(QUOTE) {
        Some((end, _)) => format!("'{}…'", text.get(..end).unwrap_or_default()),
        None => format!("'{text}'"),
    }
}

/// The word most like `word`; the first of equals.
pub(super) fn nearest_word<'w>(word: &str, words: impl Iterator<Item = &'w str>) -> Option<&'w str> {
    words.min_by_key(|candidate| word_cost(word, candidate))
}

/// How far `meant` lies from what was `written`, without regard to case.
///
/// An edit distance in which a letter left out, or two exchanged, cost 1 and anything else 2:
/// people abbreviate (`fwd`, `bf16`) more than they invent.
pub(super) fn word_cost(written: &str, meant: &str) -> usize {
    let letters = |s: &str| -> Vec<char> { s.chars().take(COMPARED).map(|c| c.to_ascii_lowercase()).collect() };
    let (written, meant) = (letters(written), letters(meant));
    let mut before: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=meant.len()).collect();
    for (i, a) in written.iter().enumerate() {
        let mut row = vec![2 * (i + 1)];
        for (j, b) in meant.iter().enumerate() {
            let kept = above[j] + if a == b { 0 } else { 2 };
            let mut cost = kept.min(above[j + 1] + 2).min(row[j] + 1);
            if i > 0 && j > 0 && *a == meant[j - 1] && written[i - 1] == *b {
                cost = cost.min(before[j - 1] + 1);
            }
            row.push(cost);
        }
        before = std::mem::replace(&mut above, row);
    }
    above.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_clause_error_names_place_reason_and_way_out() {
        let whole = "ä.b; mlp:foward";
        let part = &whole[whole.find("foward").unwrap()..];
        let error =
            Fault::unknown(part, "a kind", "kinds", &["forward", "forward_pre"]).in_clause(whole, 2, "mlp:foward");
        assert_eq!(
            error.to_string(),
            "FLEXMODEL_HOOKS clause 2, column 10 ('mlp:foward'): 'foward' is not a kind; \
             did you mean 'forward'? (kinds: forward, forward_pre)"
        );
        assert!(matches!(error.position, Position::Clause { offset: 10, .. }));
        let error = HookError { given_as: "--hooks", ..error };
        assert!(error.to_string().starts_with("--hooks clause 2, column 10"), "{error}");
    }

    #[test]
    fn a_file_error_names_its_line() {
        let error = Fault::new("x", "it is bad", "make it good").in_file("hooks.toml", 7);
        assert_eq!(error.to_string(), "hooks.toml line 7: it is bad; make it good");
    }

    #[test]
    fn abbreviations_and_typos_find_their_word() {
        let words = ["forward", "forward_pre", "backward", "backward_pre", "param", "grad"];
        for (written, meant) in [
            ("fwd", "forward"),
            ("bwd", "backward"),
            ("foward", "forward"),
            ("forwrad", "forward"),
            ("Forward", "forward"),
            ("backwards", "backward"),
            ("params", "param"),
            ("gradient", "grad"),
            ("forward-pre", "forward_pre"),
        ] {
            assert_eq!(nearest_word(written, words.into_iter()), Some(meant), "{written}");
        }
        assert_eq!(nearest_word("x", std::iter::empty()), None);
        let far = Fault::unknown("half", "a dtype", "dtypes", &["bool", "int8"]).in_file("f", 1);
        assert_eq!(far.help, "dtypes: bool, int8");
    }

    proptest! {
        #[test]
        fn a_message_is_one_line(text in any::<String>(), reason in any::<String>()) {
            let error = Fault::new(&text, reason, "h").in_clause(&text, 1, &text);
            let line = error.to_string();
            let breaks = |c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}');
            prop_assert!(!line.chars().any(breaks));
        }

        #[test]
        fn a_word_costs_nothing_only_against_itself(a in "[a-z]{0,12}", b in "[a-z]{0,12}") {
            prop_assert_eq!(word_cost(&a, &b) == 0, a == b);
        }
    }
}
