//! Text in messages. A run may hold any text, of any length: what of it goes into a message is cut short, and what a
//! terminal would obey is spelled out.

use std::fmt::{Display, Write as _};

use crate::limits::{MESSAGE, NAMED};

/// `1 record`, `2 records`.
pub fn count(n: u64, one: &str) -> String {
    format!("{n} {one}{}", if n == 1 { "" } else { "s" })
}

/// Text from a file or a job for one line: what is no printable character is spelled out.
pub fn safe(text: &str) -> String {
    spelled(text, false)
}

/// Text of several lines, as for one.
pub fn plain(text: &str) -> String {
    spelled(text, true)
}

fn spelled(text: &str, lines: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if is_hidden(c) && !(lines && c == '\n') {
            // Writing to a String cannot fail.
            let _ = write!(out, "{}", c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// Whether a terminal obeys a character, or shows nothing or something else for it: controls (C0 and C1), marks that
/// change the direction of text, separators of lines, and what has no width.
pub fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}')
        || matches!(c, '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e0fff}')
}

/// The start of a text that is too long for a message.
pub fn clip(text: &str) -> String {
    match text.char_indices().nth(MESSAGE) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// The first of many values, and how many more there are.
pub fn few<T: Display>(values: impl IntoIterator<Item = T>) -> String {
    let mut values = values.into_iter();
    let mut out = values.by_ref().take(NAMED).map(|v| v.to_string()).collect::<Vec<_>>().join(", ");
    let more = values.count();
    if more > 0 {
        out += &format!(" and {more} more");
    }
    out
}

/// A shape whose dimensions may vary: `[8, 16..32, 64]`.
pub fn range(low: &[u64], high: &[u64]) -> String {
    let dim = |(a, b): (&u64, &u64)| if a == b { a.to_string() } else { format!("{a}..{b}") };
    format!("[{}]", low.iter().zip(high).map(dim).collect::<Vec<_>>().join(", "))
}

/// The sum of numbers that a file may have made up.
pub fn total(numbers: impl IntoIterator<Item = u64>) -> u64 {
    numbers.into_iter().fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_obeys_is_spelled_out() {
        for c in ['\x1b', '\x07', '\r', '\u{7f}', '\u{85}', '\u{9b}', '\u{202e}', '\u{2066}', '\u{200f}', '\u{2028}'] {
            for out in [safe(&format!("a{c}b")), plain(&format!("a{c}b"))] {
                assert!(!out.contains(c) && out.starts_with("a\\"), "{out:?}");
            }
        }
        assert_eq!(safe("a\nb"), "a\\nb");
        assert_eq!(plain("a\nb é 層 😀"), "a\nb é 層 😀");
    }
}
