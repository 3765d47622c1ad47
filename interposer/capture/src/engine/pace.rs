//! How long the steps of a job take, so that whoever changes its hooks knows how many make up a second.

/// Steps that are remembered: of these the quickest counts, since one that writes a checkpoint says nothing of the others.
const REMEMBERED: usize = 4;

/// The pace of the last steps.
#[derive(Debug, Default)]
pub struct Pace {
    /// The number of the next step, and when it became that, in nanoseconds.
    last: Option<(u64, u64)>,
    /// Nanoseconds of each; 0: not seen.
    steps: [u64; REMEMBERED],
    at: usize,
}

impl Pace {
    /// The next step to begin has this number.
    pub fn reach(&mut self, next: u64, now_ns: impl FnOnce() -> u64) {
        if self.last.is_some_and(|(number, _)| number == next) {
            return;
        }
        let now = now_ns();
        if let Some((number, since)) = self.last.replace((next, now))
            && next > number
            && let Some(step) = self.steps.get_mut(self.at)
        {
            *step = (now.saturating_sub(since) / (next - number)).max(1);
            self.at = (self.at + 1) % REMEMBERED;
        }
    }

    /// Nanoseconds of the quickest step; 0: none was seen.
    pub fn fastest(&self) -> u64 {
        self.steps.iter().copied().filter(|step| *step > 0).min().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quickest_of_the_last_steps_counts() {
        let mut pace = Pace::default();
        let mut seen = Vec::new();
        for (next, now) in [(0, 100), (0, 900), (1, 400), (2, 9_400), (2, 9_500), (3, 9_600), (5, 10_600), (1, 10_700)]
        {
            pace.reach(next, || now);
            seen.push(pace.fastest());
        }
        assert_eq!(seen, [0, 0, 300, 300, 300, 200, 200, 200], "a rule that changes begins anew");
        for next in 2..6 {
            pace.reach(next, || 20_000 + 5_000 * next);
        }
        assert_eq!(pace.fastest(), 5_000, "what is long ago is forgotten");
    }
}
