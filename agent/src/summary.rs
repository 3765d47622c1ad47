//! The one summary that a finished run prints.

use std::path::Path;

use flexmodel_run::{
    format::{Line, MANIFEST_FILE, Totals},
    manifest,
    read::display_module,
};

use crate::text::{bytes, clip, count, safe};

/// Divergences that are named.
const NAMED: usize = 5;
/// Lines of the manifest that are looked at for what is named: the summary does not wait for a long run to be read.
const LOOKED_AT: usize = 100_000;

/// What was captured, what was not, where it is, and how to look at it.
pub fn text(run: &Path, t: &Totals) -> String {
    let shown = safe(&relative(run));
    let mut out = format!("flexmodel: {} in {shown}\n", counts(t));
    out += &divergences(run, t.divergences);
    if let Some(module) = some_module(run) {
        let show = format!("flexmodel show {} {}", quoted(&shown), quoted(&safe(&module)));
        out += &format!("flexmodel: look at it with: {show}, or in Python: flexmodel.open({shown:?})\n");
    }
    out
}

/// `12 records, 3.4 MB`, and what was lost.
pub fn counts(t: &Totals) -> String {
    format!(
        "{}, {}, {} dropped, {} refused, {}",
        count(t.records, "record"),
        bytes(t.bytes),
        t.dropped,
        t.refused,
        count(t.divergences, "divergence")
    )
}

/// Replicas that differ, the first of them by name.
fn divergences(run: &Path, found: u64) -> String {
    if found == 0 {
        return String::new();
    }
    let mut out = String::new();
    let mut named = 0;
    let some = lines(run).filter_map(|line| match line {
        Line::Divergence { what, against } => Some((what, against)),
        _ => None,
    });
    for (what, against) in some.take(NAMED) {
        named += 1;
        let (module, kind) = (safe(&clip(display_module(&what.id.module))), what.id.kind.name());
        out += &format!(
            "flexmodel: rank {}'s {module} {kind} {} at step {} should be rank {against}'s and differs\n",
            what.rank,
            safe(&clip(&what.id.path)),
            what.id.step
        );
    }
    if found > named {
        let more = if named == 0 { count(found, "divergence") } else { format!("and {} more", found - named) };
        out += &format!("flexmodel: {more}, all in the run and on the dashboard\n");
    }
    out
}

/// The module of the first part in a run.
fn some_module(run: &Path) -> Option<String> {
    lines(run).find_map(|line| match line {
        Line::Part(part) => Some(display_module(&part.what.id.module).to_owned()),
        _ => None,
    })
}

/// The first lines of the manifest that read.
fn lines(run: &Path) -> impl Iterator<Item = Line> {
    let manifest = manifest::open(&run.join(MANIFEST_FILE)).ok();
    manifest.into_iter().flatten().take(LOOKED_AT).flatten().filter_map(|entry| entry.line.ok())
}

/// A word for a shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%,".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
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
    fn what_was_lost_is_always_said() {
        let totals = Totals { records: 1, bytes: 3 << 20, dropped: 3, ..Totals::default() };
        assert_eq!(counts(&totals), "1 record, 3.1 MB, 3 dropped, 0 refused, 0 divergences");
    }

    #[test]
    fn words_survive_a_shell() {
        assert_eq!(quoted("layers.0.mlp"), "layers.0.mlp");
        assert_eq!(quoted("(root)"), "'(root)'");
        assert_eq!(quoted("it's"), "'it'\\''s'");
    }
}
