//! How numbers, shapes and tables read in a terminal.

use std::io::{self, Write};

/// Writes to stdout. A reader that went away (`| head`) is no error.
pub fn emit(text: &str) -> io::Result<()> {
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

/// A shape whose dimensions may vary: `[8, 16..32, 64]`.
pub fn shape_range(low: &[u64], high: &[u64]) -> String {
    let dim = |(a, b): (&u64, &u64)| if a == b { a.to_string() } else { format!("{a}..{b}") };
    format!("[{}]", low.iter().zip(high).map(dim).collect::<Vec<_>>().join(", "))
}

/// `1 record`, `2 records`.
pub fn count(n: u64, one: &str) -> String {
    format!("{n} {one}{}", if n == 1 { "" } else { "s" })
}

/// Rows under a header, columns as wide as their longest cell; those in `right` are aligned to the right.
pub fn table(header: &[&str], rows: &[Vec<String>], right: &[usize]) -> String {
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
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
    out
}

/// Text from a file or a job, safe to print: control characters are spelled out.
pub fn safe(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect::<Vec<_>>() } else { vec![c] }).collect()
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
    fn a_shape_shows_where_it_varies() {
        assert_eq!(shape_range(&[8, 16, 64], &[8, 32, 64]), "[8, 16..32, 64]");
        assert_eq!(shape_range(&[], &[]), "[]");
    }
}
