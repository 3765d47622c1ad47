//! Which records of a run a command is about: options that `export` and `certify` share.

use flexmodel_run::{format::What, read::rows::Side};
use wire::hooks::{Kind, Selector};

use super::show::parse_kind;

/// Options that choose records; without any, all of them.
#[derive(clap::Args, Debug)]
pub struct Selection {
    /// Only modules that this selector means, written as in FLEXMODEL_HOOKS (`layers.*.mlp`); may be repeated.
    #[arg(long, value_parser = parse_selector)]
    pub module: Vec<Selector>,
    /// Only this kind.
    #[arg(long, value_parser = parse_kind)]
    pub kind: Option<Kind>,
    /// Only this job, where several wrote into the run.
    #[arg(long)]
    pub job: Option<u32>,
    /// Only this attempt.
    #[arg(long)]
    pub attempt: Option<u32>,
    /// Only this step, or steps `a..b` (both included).
    #[arg(long, value_parser = parse_steps)]
    pub step: Option<(u64, u64)>,
}

impl Selection {
    /// Whether a tensor is among the chosen.
    pub fn wants(&self, what: &What) -> bool {
        (self.module.is_empty() || self.module.iter().any(|s| s.matches(&what.id.module, &what.class, &what.class)))
            && self.kind.is_none_or(|kind| kind == what.id.kind)
            && self.job.is_none_or(|job| job == what.id.job.job)
            && self.attempt.is_none_or(|attempt| attempt == what.id.job.attempt)
            && self.step.is_none_or(|(first, last)| (first..=last).contains(&what.id.step))
    }
}

fn parse_selector(word: &str) -> Result<Selector, String> {
    if word == "(root)" {
        return Ok(Selector::Glob(Vec::new()));
    }
    let mut hooks = wire::hooks::parse_clauses(word).map_err(|e| e.to_string())?;
    match (hooks.pop(), hooks.is_empty()) {
        (Some(hook), true) if hook.text.trim() == hook.selector.to_string() => Ok(hook.selector),
        _ => Err("a selector alone, such as layers.*.mlp; kinds have --kind".into()),
    }
}

/// The side on which rows are filled up, of an option of the command itself.
pub fn parse_side(word: &str) -> Result<Side, String> {
    Side::from_name(word).ok_or_else(|| format!("'{word}' is neither right nor left"))
}

fn parse_steps(word: &str) -> Result<(u64, u64), String> {
    let wrong = || format!("'{word}' is not a step such as 4, or steps such as 4..8");
    let number = |s: &str, open: u64| if s.is_empty() { Ok(open) } else { s.parse().map_err(|_| wrong()) };
    match word.split_once("..") {
        Some((a, b)) => Ok((number(a, 0)?, number(b, u64::MAX)?)),
        None => word.parse().map(|n| (n, n)).map_err(|_| wrong()),
    }
}
