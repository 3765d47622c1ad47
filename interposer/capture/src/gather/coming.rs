//! Parts that are yet to come on their device. The host asks whether they have: nothing waits for them there, where a transfer
//! behind such a wait would wait for whatever the job has queued, and other ranks' jobs for that.

use std::collections::{BTreeSet, VecDeque};

use wire::codes::CopyState;

use super::{Outgoing, Staged};

/// What this rank has, and cannot offer yet.
#[derive(Default)]
pub struct Coming {
    parts: VecDeque<Outgoing>,
}

impl Coming {
    /// Takes what was staged since; all that has come is taken out, in order.
    pub fn take(&mut self, more: VecDeque<Outgoing>) -> VecDeque<Outgoing> {
        self.parts.extend(more);
        let (come, yet) = std::mem::take(&mut self.parts).into_iter().partition(has_come);
        self.parts = yet;
        come
    }

    /// Whether something has come since. Of each device only the oldest is asked: on one stream the others come after it. What
    /// comes before it on another stream is seen when parts are taken.
    pub fn has_news(&self) -> bool {
        let mut asked = BTreeSet::new();
        let is_oldest = |part: &&Outgoing| asked.insert(part.staged.as_ref().map(Staged::device));
        self.parts.iter().filter(is_oldest).any(has_come)
    }

    /// Whether all has come.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// The step that this rank is in, as others may hear of it: all that it offers of earlier ones must have been told.
    pub fn step(&self, step: u64) -> u64 {
        self.parts.iter().map(|part| part.meta.step).fold(step, u64::min)
    }

    /// What will not be offered any more.
    pub fn give_up(&mut self) -> VecDeque<Outgoing> {
        std::mem::take(&mut self.parts)
    }
}

/// What fails does not come any more, and is dealt with as what has.
fn has_come(part: &Outgoing) -> bool {
    part.staged.as_ref().is_none_or(|staged| staged.state() != CopyState::Pending)
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Arc, atomic::Ordering},
        time::Instant,
    };

    use wire::{dtype::DType, record::RecordMeta};

    use super::*;
    use crate::{
        testing::{BRIDGE, Tensor},
        transport::Captured,
    };

    /// Staged of a tensor on a device, in a step.
    fn staged(tensor: &Tensor, step: u64) -> Outgoing {
        let meta = RecordMeta { step, ..RecordMeta::output("m", DType::Float32, vec![4]) };
        let captured = Captured {
            meta: meta.clone(),
            handle: std::ptr::from_ref(tensor).cast(),
            on_device: true,
            staged: false,
            collective: true,
            replicas_once: false,
            cut: None,
        };
        let staged = Staged::new(&captured, 1 << 20, &BRIDGE, &Arc::default());
        Outgoing { meta, staged, since: Instant::now() }
    }

    fn steps(parts: &VecDeque<Outgoing>) -> Vec<u64> {
        parts.iter().map(|part| part.meta.step).collect()
    }

    #[test]
    fn what_has_not_come_is_not_offered_and_its_step_is_not_over() {
        let (late, there) = (Tensor::of(4), Tensor::of(4));
        late.state.store(CopyState::Pending as u8, Ordering::Relaxed);
        let mut coming = Coming::default();
        let come = coming.take([staged(&late, 1), staged(&there, 2), staged(&there, 3)].into());
        assert_eq!(steps(&come), [2, 3]);
        assert_eq!((coming.step(3), coming.is_empty(), coming.has_news()), (1, false, false));
        late.state.store(CopyState::Done as u8, Ordering::Relaxed);
        assert!(coming.has_news());
        assert_eq!(steps(&coming.take([staged(&there, 3)].into())), [1, 3]);
        assert_eq!((coming.step(3), coming.is_empty()), (3, true));
    }

    #[test]
    fn only_the_oldest_part_of_each_device_is_asked() {
        let pending = |device| {
            let tensor = Tensor { device, ..Tensor::of(4) };
            tensor.state.store(CopyState::Pending as u8, Ordering::Relaxed);
            tensor
        };
        let (oldest, next, other) = (pending(0), pending(0), pending(1));
        let mut coming = Coming::default();
        coming.take([staged(&oldest, 1), staged(&next, 1), staged(&other, 1)].into());
        next.state.store(CopyState::Done as u8, Ordering::Relaxed);
        assert!(!coming.has_news());
        other.state.store(CopyState::Done as u8, Ordering::Relaxed);
        assert!(coming.has_news());
        assert_eq!(coming.take(VecDeque::new()).len(), 2, "all are asked");
    }

    #[test]
    fn what_fails_does_not_wait_for_ever() {
        let tensor = Tensor::of(4);
        tensor.state.store(CopyState::Failed as u8, Ordering::Relaxed);
        assert_eq!(steps(&Coming::default().take([staged(&tensor, 1)].into())), [1]);
    }
}
