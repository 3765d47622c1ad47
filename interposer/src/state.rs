//! The one switch of this process, and the ways into off.

use std::panic::{AssertUnwindSafe, catch_unwind};

use capture::switch::Switch;

use crate::{instance, log, settings};

static SWITCH: Switch = Switch::new();

/// torch is about to be loaded.
pub fn on() {
    SWITCH.turn_on();
}

/// Whether taps may be triggered.
pub fn is_on() -> bool {
    SWITCH.is_on()
}

/// Turns everything off for good, with one line that says why, here and in the run (OPEN-1). Later calls say nothing.
pub fn off(why: &str) {
    if SWITCH.turn_off() {
        log::line(&format!("taps are off in this process: {why}"));
        // A panic here would be one in the handling of a panic.
        let _ = catch_unwind(AssertUnwindSafe(|| last_words(&format!("{}: taps are off: {why}", log::who()))));
    }
}

/// Best effort, also before there is a capture engine.
fn last_words(text: &str) {
    match (instance::get(), settings::agent_socket()) {
        (Some(capture), _) => capture.transport().last_words(text),
        (None, Some(socket)) => capture::transport::leave_word(&socket, text),
        (None, None) => {}
    }
}

/// Turns everything off in silence.
pub fn quiet_off() {
    SWITCH.turn_off();
}

/// Makes forked children go off (FORK-1).
pub fn watch_forks() {
    extern "C" fn child() {
        quiet_off();
    }
    // SAFETY: the handler only stores an atomic.
    unsafe { libc::pthread_atfork(None, None, Some(child)) };
}
