//! Errors that tests ask for.

use std::{collections::BTreeMap, sync::Mutex};

use crate::{Outcome, code, lock};

/// Which call from now on fails, by its name.
static ASKED: Mutex<BTreeMap<String, usize>> = Mutex::new(BTreeMap::new());

/// The `nth` call of this name fails, counted from 1; 0: none does.
pub fn ask(call: String, nth: usize) {
    lock(&ASKED).insert(call, nth);
}

/// An error if it is this call's turn.
pub fn passes(call: &str) -> Outcome<()> {
    match lock(&ASKED).get_mut(call) {
        Some(left) if *left > 0 => {
            *left -= 1;
            if *left == 0 { Err(code::LAUNCH_FAILED) } else { Ok(()) }
        }
        _ => Ok(()),
    }
}
