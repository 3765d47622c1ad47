//! How numbers, shapes and tables read in a terminal.
//!
//! A run may hold any text, and a terminal obeys some of it. Whatever the commands write goes through [`emit`] and
//! [`complain`], and neither lets a character through that a terminal would obey, but for the colours of [`paint`].

use std::{
    collections::BTreeSet,
    fmt::{Display, Write as _},
    io::{self, Write},
};

use serde::Serialize;

pub use flexmodel_run::text::{clip, count, few, is_hidden, plain, range, safe, total};

use crate::say;

/// `rank 0 is`, `ranks 1, 2, 3 and 5 more are`, with the verb for one and for several.
pub fn named_ranks(ranks: &BTreeSet<u32>, [one, several]: [&str; 2]) -> String {
    let (noun, verb) = if ranks.len() == 1 { ("rank", one) } else { ("ranks", several) };
    format!("{noun} {} {verb}", few(ranks))
}

/// Writes lines to stdout. A reader that went away (`| head`) is no error.
pub fn emit(text: &str) -> io::Result<()> {
    paint(&plain(text))
}

/// Writes JSON to stdout. It escapes C0 alone by itself.
pub fn emit_json(value: &impl Serialize) -> io::Result<()> {
    paint(&(json(&serde_json::to_string_pretty(value)?) + "\n"))
}

/// Hidden characters are in strings only, but for line breaks.
fn json(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if is_hidden(c) && c != '\n' {
            // Writing to a String cannot fail.
            c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| _ = write!(out, "\\u{unit:04x}"));
        } else {
            out.push(c);
        }
    }
    out
}

/// Writes what is safe already to stdout, colours with it.
pub fn paint(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// Bytes with a unit, powers of 1000 as in the summary of a run: `512 B`, `1.5 MB`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["kB", "MB", "GB", "TB", "PB"];
    if n < 1000 {
        return format!("{n} B");
    }
    let mut value = n as f64 / 1000.0;
    let mut unit = 0;
    while value >= 999.95 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// A number in about five significant digits.
pub fn number(x: f64) -> String {
    if x == 0.0 {
        return "0".into();
    }
    let a = x.abs();
    if !(1e-4..1e6).contains(&a) {
        return format!("{x:.3e}");
    }
    let decimals = (4 - a.log10().floor() as i32).max(0) as usize;
    let text = format!("{x:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// The same for a statistic that may not exist.
pub fn optional(x: Option<f64>) -> String {
    x.map_or_else(|| "-".into(), number)
}

/// Rows under a header, columns as wide as their longest cell; those in `right` are aligned to the right.
pub fn table(header: &[&str], rows: &[Vec<String>], right: &[usize]) -> String {
    // A line break in a name would make a line of its own.
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(|cell| safe(cell)).collect()).collect();
    let width = |column: usize| {
        let cells = rows.iter().map(|r| r.get(column).map_or(0, |c| c.chars().count()));
        cells.chain([header[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let mut out = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (column, (cell, &width)) in cells.zip(&widths).enumerate() {
            let gap = if column == 0 { "" } else { "  " };
            if right.contains(&column) {
                text += &format!("{gap}{cell:>width$}");
            } else {
                text += &format!("{gap}{cell:<width$}");
            }
        }
        out.push_str(text.trim_end());
        out.push('\n');
    };
    line(&mut header.iter().copied());
    for row in &rows {
        line(&mut row.iter().map(String::as_str));
    }
    out
}

/// Writes one line to stderr: what it is (`note`, `problem`, `flexmodel`), and what is to be said.
pub fn complain(kind: &str, what: impl Display) {
    complain_in_lines(safe(&format!("{kind}: {what}")));
}

/// Writes what may have several lines of its own, such as a compiler's, to stderr.
pub fn complain_in_lines(what: impl Display) {
    say::lines(&format!("{what}\n"));
}

/// The same for the first `count` of several, and how many more there are.
pub fn complain_of<T: Display>(kind: &str, all: &[T], count: usize, more: &str) {
    all.iter().take(count).for_each(|what| complain(kind, what));
    if all.len() > count {
        complain(kind, format!("and {} more{more}", all.len() - count));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_and_digits() {
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1536), "1.5 kB");
        assert_eq!(bytes(999_999), "1.0 MB");
        assert_eq!(bytes(16 << 20), "16.8 MB");
        assert_eq!(number(0.012345678), "0.012346");
        assert_eq!(number(-1234.5), "-1234.5");
        assert_eq!(number(3.0), "3");
        assert_eq!(number(120000.0), "120000");
        assert_eq!(number(1e-9), "1.000e-9");
        assert_eq!(number(f64::INFINITY), "inf");
    }

    #[test]
    fn json_has_no_hidden_characters() {
        assert_eq!(json("\"\u{9b}\u{e0001}\"\n"), "\"\\u009b\\udb40\\udc01\"\n");
    }

    #[test]
    fn a_shape_shows_where_it_varies() {
        assert_eq!(range(&[8, 16, 64], &[8, 32, 64]), "[8, 16..32, 64]");
        assert_eq!(range(&[], &[]), "[]");
    }
}
