//! The one summary that a finished run prints.

use std::path::Path;

use crate::store::format::Totals;

/// What was captured, what was not, where it is, and how to look at it.
pub fn text(run: &Path, t: &Totals) -> String {
    let shown = relative(run);
    let mut out = format!("flexmodel: {} in {shown}\n", counts(t));
    if t.records > 0 {
        out += &format!("flexmodel: look at it with  flexmodel ls {shown}  or in Python  flexmodel.open({shown:?})\n");
    }
    out
}

/// `12 records, 3.4 MB`, and whatever else is not zero.
pub fn counts(t: &Totals) -> String {
    let mut out = format!("{} records, {}", t.records, bytes(t.bytes));
    for (n, what) in [(t.dropped, "dropped"), (t.refused, "refused"), (t.divergences, "divergences")] {
        out += &format!(", {n} {what}");
    }
    out
}

/// A number of bytes for people.
pub fn bytes(n: u64) -> String {
    let mut value = n as f64;
    for unit in ["bytes", "kB", "MB", "GB"] {
        if value < 1000.0 {
            return if unit == "bytes" { format!("{n} bytes") } else { format!("{value:.1} {unit}") };
        }
        value /= 1000.0;
    }
    format!("{value:.1} TB")
}

/// The path as a person here would write it.
pub fn relative(path: &Path) -> String {
    let here = std::env::current_dir().ok();
    let short = here.and_then(|here| path.strip_prefix(here).ok()).filter(|p| !p.as_os_str().is_empty());
    short.unwrap_or(path).display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_counts_are_short() {
        assert_eq!(bytes(999), "999 bytes");
        assert_eq!(bytes(16_800_000), "16.8 MB");
        assert_eq!(bytes(5_000_000_000_000), "5.0 TB");
    }

    #[test]
    fn what_was_lost_is_always_said() {
        let totals = Totals { records: 2, dropped: 3, ..Totals::default() };
        assert_eq!(counts(&totals), "2 records, 0 bytes, 3 dropped, 0 refused, 0 divergences");
    }
}
