//! The one capture engine of this process, and what it is given of the process.

use std::sync::OnceLock;

use capture::{Capture, process::Process};

use crate::{log, settings, state};

static CAPTURE: OnceLock<Capture> = OnceLock::new();

/// The capture engine, once the process is ready to be tapped.
pub fn get() -> Option<&'static Capture> {
    CAPTURE.get()
}

/// The capture engine is made; only the first one counts.
pub fn set(capture: Capture) {
    let _ = CAPTURE.set(capture);
}

/// This process.
pub struct ThisProcess;

impl Process for ThisProcess {
    fn line(&self, text: &str) {
        log::line(text);
    }

    fn set_rank(&self, rank: u32) {
        log::set_rank(rank);
    }

    fn who(&self) -> String {
        log::who()
    }

    fn ranks_of_node(&self) -> Option<u32> {
        settings::ranks_of_node()
    }

    fn is_on(&self) -> bool {
        state::is_on()
    }

    fn off(&self, why: &str) {
        state::off(why);
    }

    fn now_ns(&self) -> u64 {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(0, |d| d.as_nanos() as u64)
    }
}
