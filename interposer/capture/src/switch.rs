//! Whether taps are on in a process, and the ways into off.

use std::sync::atomic::{AtomicBool, Ordering};

/// On once torch is there, until something turns it off for good.
#[derive(Debug, Default)]
pub struct Switch(AtomicBool);

impl Switch {
    /// Off: torch is not there.
    pub const fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// torch is about to be loaded.
    pub fn turn_on(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether taps may be triggered.
    pub fn is_on(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// Turns taps off. Whether they were on: whoever turned them off says why, and nobody after.
    pub fn turn_off(&self) -> bool {
        self.0.swap(false, Ordering::AcqRel)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_turns_it_off_is_known_once() {
        let switch = Switch::new();
        assert!(!switch.is_on() && !switch.turn_off());
        switch.turn_on();
        assert!(switch.is_on());
        assert_eq!([switch.turn_off(), switch.turn_off(), switch.is_on()], [true, false, false]);
    }
}
