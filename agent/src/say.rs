//! Lines for the user on stderr, which is often the terminal that the job prints to as well.
//!
//! A line is one `write`, so that nothing comes between its words, and is never written over. Where the cursor is nobody
//! can know but the terminal: a job may have left it behind the first half of a number, or behind a progress bar. So what
//! is said beside a job is rare (something is lost, the job is over), and begins with a line break on a terminal: an
//! empty line is better than `loss 4.19flexmodel: ...`. How far captures are is on the dashboard.

use std::{
    io::{IsTerminal, Write, stderr},
    sync::atomic::{AtomicBool, Ordering},
};

use crate::text::{plain, safe};

static BESIDE_A_JOB: AtomicBool = AtomicBool::new(false);

/// From now on a job may be printing to the same terminal.
pub fn beside_a_job() {
    BESIDE_A_JOB.store(true, Ordering::Relaxed);
}

/// `flexmodel: TEXT`, one line whatever is in it.
pub fn line(text: &str) {
    lines(&format!("flexmodel: {}\n", safe(text)));
}

/// Whole lines. What a terminal would obey in them is spelled out.
pub fn lines(text: &str) {
    let text = plain(text);
    let broken = BESIDE_A_JOB.load(Ordering::Relaxed) && stderr().is_terminal();
    let text = if broken { format!("\n{text}") } else { text };
    // A terminal that is gone is no reason to stop. Stderr has no buffer: this is one write.
    let _ = stderr().write_all(text.as_bytes());
}
