//! Pages that watch a run, and how the agent takes leave of them.

use std::{
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use super::Live;

/// Longest wait for open pages at the end of a run.
pub const FAREWELL: Duration = Duration::from_millis(1500);
/// How long pages that have heard of the end may still ask.
const LAST_QUESTIONS: Duration = Duration::from_millis(500);

/// A page that watches, until it is dropped.
pub struct Watch(Option<Arc<Live>>);

impl Watch {
    /// A page begins to watch.
    pub fn new(live: Arc<Live>) -> Self {
        live.watching.fetch_add(1, Ordering::AcqRel);
        Self(Some(live))
    }

    /// The page has heard of the end: nobody needs to wait for it.
    pub fn heard_the_end(&mut self) {
        if let Some(live) = self.0.take() {
            live.watching.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.heard_the_end();
    }
}

impl Live {
    /// Waits until every open page has heard of the end, and a moment longer.
    pub(super) fn farewell(&self) {
        let end = Instant::now() + FAREWELL;
        if self.watching.load(Ordering::Acquire) == 0 {
            return;
        }
        while self.watching.load(Ordering::Acquire) > 0 && Instant::now() < end {
            thread::sleep(Duration::from_millis(10));
        }
        thread::sleep(LAST_QUESTIONS.min(end.saturating_duration_since(Instant::now())));
    }
}
