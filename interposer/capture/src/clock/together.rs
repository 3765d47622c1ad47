//! What a rank says of its passes, so that it is known which of them several ranks made together: see [`wire::passes`].

use wire::{passes::MAX_GROUPS, tap_abi::Trigger};

/// Collectives that the members of each axis have called together; -1 where that is not known.
type Collectives = [i64; MAX_GROUPS];

/// A pass, as this rank counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Made {
    /// Step.
    pub step: u64,
    /// Pass of its kind within the step.
    pub micro: u32,
    /// It trains.
    pub train: bool,
    /// It is one of inference.
    pub inference: bool,
}

/// A pass that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Which.
    pub made: Made,
    /// Its model was called through a wrapper that reduces gradients.
    pub reduces: bool,
    /// When it began.
    pub begin: Collectives,
    /// Passes of its kind since the last of the collectives, for each axis.
    pub since: [u32; MAX_GROUPS],
    /// For each axis, whether more were called in it.
    pub together: [bool; MAX_GROUPS],
}

/// Passes of a kind since the last collectives.
#[derive(Clone, Copy, Debug, Default)]
struct Since {
    last: Option<i64>,
    /// That train or not, and reduce or not.
    counted: [u32; 4],
}

/// The passes of one model.
#[derive(Debug, Default)]
pub struct Together {
    since: [Since; MAX_GROUPS],
    /// The one under way, and whether anybody has to know of it.
    open: Option<(Ended, bool)>,
    /// Somebody has to know of the next one too: it shows that those before have ended.
    follows: bool,
    /// Collectives were called since the pass before the last began, or within the last.
    together: bool,
    ended: Vec<Ended>,
}

impl Together {
    /// A pass begins, which may be known to be one of several ranks; one that is under way has ended, nobody knows when.
    pub fn begin(&mut self, made: Made, is_together: bool, trigger: &Trigger) {
        self.end(None);
        let mut since = [made.micro; MAX_GROUPS];
        let mut grew = false;
        for ((known, now), since) in self.since.iter_mut().zip(trigger.collectives).zip(&mut since) {
            if now < 0 {
                continue;
            }
            grew |= known.last.is_some_and(|last| now > last);
            if known.last != Some(now) {
                *known = Since { last: Some(now), counted: [0; 4] };
            }
            let kind = usize::from(made.train) + 2 * usize::from(trigger.reduces);
            if let Some(counted) = known.counted.get_mut(kind) {
                *since = *counted;
                *counted += 1;
            }
        }
        self.together = grew || is_together;
        let begin = trigger.collectives;
        let pass = Ended { made, reduces: trigger.reduces, begin, since, together: [false; MAX_GROUPS] };
        self.open = Some((pass, std::mem::take(&mut self.follows)));
    }

    /// Somebody has to know of the pass under way. Which it is.
    pub fn keep(&mut self) {
        if let Some((_, keep)) = &mut self.open {
            (*keep, self.follows) = (true, true);
        }
    }

    /// The pass under way, if there is one.
    pub fn open(&self) -> Option<Made> {
        self.open.map(|(pass, _)| pass.made)
    }

    /// The pass under way ends, and if that is seen, as the trigger says.
    pub fn end(&mut self, trigger: Option<&Trigger>) {
        let Some((mut pass, keep)) = self.open.take() else { return };
        if let Some(trigger) = trigger {
            for ((together, begin), now) in pass.together.iter_mut().zip(pass.begin).zip(trigger.collectives) {
                *together = begin >= 0 && now > begin;
            }
            self.together |= pass.together.contains(&true);
        }
        if keep {
            self.ended.push(pass);
        }
    }

    /// Whether the last pass was one of several ranks: so it was said to be, or collectives were called in it, or between it and
    /// the one before.
    pub fn was_together(&self) -> bool {
        self.together
    }

    /// Those that have ended and were not taken yet.
    pub fn take(&mut self) -> Vec<Ended> {
        std::mem::take(&mut self.ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(collectives: i64) -> Trigger {
        let mut all = [-1; MAX_GROUPS];
        all[0] = collectives;
        Trigger { collectives: all, ..Trigger::default() }
    }

    fn made(micro: u32, train: bool) -> Made {
        Made { step: 0, micro, train, inference: false }
    }

    #[test]
    fn passes_are_counted_between_collectives_and_apart_by_kind() {
        let mut passes = Together::default();
        let mut seen = Vec::new();
        for (micro, train, begin, end) in
            [(0, true, 3, 3), (0, false, 3, 3), (1, true, 3, 3), (2, true, 4, 6), (1, false, 6, 6)]
        {
            passes.begin(made(micro, train), false, &at(begin));
            passes.keep();
            passes.end(Some(&at(end)));
            let [ended] = passes.take().try_into().unwrap();
            seen.push((ended.begin[0], ended.since[0], ended.together[0]));
            assert_eq!((ended.since[1], ended.together[1]), (micro, false), "of an axis without a clock: the number");
        }
        assert_eq!(seen, [(3, 0, false), (3, 0, false), (3, 1, false), (4, 0, true), (6, 0, false)]);
    }

    #[test]
    fn a_pass_whose_end_was_not_seen_ends_when_the_next_begins() {
        let mut passes = Together::default();
        passes.begin(made(0, true), false, &at(3));
        passes.keep();
        passes.begin(made(1, true), false, &at(9));
        assert_eq!(passes.open(), Some(made(1, true)));
        let ended: Vec<_> = passes.take().iter().map(|pass| (pass.made.micro, pass.together[0])).collect();
        assert_eq!(ended, [(0, false)]);
        passes.end(None);
        assert_eq!(passes.take().len(), 1, "it shows that the one before has ended");
        passes.begin(made(2, true), false, &at(9));
        passes.end(None);
        assert!(passes.take().is_empty(), "nobody has to know of it");
    }
}
