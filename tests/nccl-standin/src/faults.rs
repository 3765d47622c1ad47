//! What goes wrong on purpose.

use std::{collections::HashMap, ffi::c_int, sync::Mutex, sync::OnceLock, time::Duration};

use crate::log;

/// What the environment asks for.
#[derive(Debug)]
pub struct Faults {
    fail: Vec<(String, u32, c_int)>,
    hang: Vec<(String, u32)>,
    error: Vec<(u32, c_int)>,
    /// Success is said when a group is on its stream.
    pub late: bool,
    /// Transfers are written down.
    pub trace: bool,
    /// How long anything may stand still.
    pub bound: Duration,
}

impl Default for Faults {
    fn default() -> Self {
        let bound = Duration::from_secs(60);
        Self { fail: vec![], hang: vec![], error: vec![], late: false, trace: false, bound }
    }
}

/// What a call does.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    Go,
    Fail(c_int),
    Hang,
}

/// This process's faults.
pub fn get() -> &'static Faults {
    static FAULTS: OnceLock<Faults> = OnceLock::new();
    FAULTS.get_or_init(|| {
        let rank = std::env::var("RANK").unwrap_or_default();
        let text = std::env::var(crate::FAULTS).unwrap_or_default();
        // A test that asked for a fault and did not get it would pass: the log fails it.
        Faults::parse(&text, &rank).unwrap_or_else(|why| {
            log::violation(None, &why);
            Faults::default()
        })
    })
}

/// Counts a call, and says what becomes of it.
pub fn enter(name: &'static str) -> Verdict {
    static CALLS: Mutex<Option<HashMap<&'static str, u32>>> = Mutex::new(None);
    let Ok(mut calls) = CALLS.lock() else { return Verdict::Go };
    let count = calls.get_or_insert_default().entry(name).or_default();
    *count += 1;
    get().verdict(name, *count)
}

impl Faults {
    fn parse(text: &str, rank: &str) -> Result<Self, String> {
        let mut faults = Self::default();
        for clause in text.split(';').map(str::trim).filter(|c| !c.is_empty()) {
            let (clause, of) = clause.split_once('@').map_or((clause, None), |(c, of)| (c, Some(of)));
            if of.is_none_or(|of| of == rank) {
                faults.add(clause).ok_or_else(|| format!("{} has a bad clause: {clause}", crate::FAULTS))?;
            }
        }
        Ok(faults)
    }

    fn add(&mut self, clause: &str) -> Option<()> {
        let (word, value) = clause.split_once('=').unwrap_or((clause, ""));
        let mut values = value.split(':');
        let mut next = || values.next().filter(|v| !v.is_empty());
        match word {
            "fail" => self.fail.push((next()?.into(), next()?.parse().ok()?, next()?.parse().ok()?)),
            "hang" => self.hang.push((next()?.into(), next()?.parse().ok()?)),
            "error" => self.error.push((next()?.parse().ok()?, next()?.parse().ok()?)),
            "bound" => self.bound = Duration::from_millis(next()?.parse().ok()?),
            "late" => self.late = true,
            "trace" => self.trace = true,
            _ => return None,
        }
        next().is_none().then_some(())
    }

    fn verdict(&self, name: &str, count: u32) -> Verdict {
        if let Some((.., code)) = self.fail.iter().find(|(n, k, _)| n == name && *k == count) {
            Verdict::Fail(*code)
        } else if self.hang.iter().any(|(n, k)| n == name && *k == count) {
            Verdict::Hang
        } else {
            Verdict::Go
        }
    }

    /// The error that the process's `number`-th group meets once it is begun.
    pub fn error_of(&self, number: u32) -> Option<c_int> {
        self.error.iter().find(|(k, _)| *k == number).map(|(_, code)| *code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clauses_are_for_their_rank_call_and_count() {
        let faults = Faults::parse("fail=ncclSend:2:6@1; hang=ncclRecv:1; late@0; error=3:2; bound=7", "1").unwrap();
        assert_eq!(faults.verdict("ncclSend", 2), Verdict::Fail(6));
        assert_eq!(faults.verdict("ncclSend", 1), Verdict::Go);
        assert_eq!(faults.verdict("ncclRecv", 1), Verdict::Hang);
        assert_eq!((faults.error_of(3), faults.error_of(2)), (Some(2), None));
        assert_eq!((faults.late, faults.bound), (false, Duration::from_millis(7)));
        assert_eq!(Faults::parse("fail=ncclSend:2:6@1", "0").unwrap().verdict("ncclSend", 2), Verdict::Go);
    }

    #[test]
    fn a_clause_that_says_nothing_is_refused() {
        for text in ["fail=ncclSend", "fail=ncclSend:x:1", "hang=ncclSend:1:2", "lately", "bound=", "error=1"] {
            assert!(Faults::parse(text, "0").unwrap_err().ends_with(text), "{text}");
        }
    }
}
