//! The six atomic steps of the slab's protocol, apart from memory so that loom can run them.
//!
//! Every acquire names the release it pairs with (SYNC POINT).

/// std's atomics, or loom's under `--cfg loom`.
pub mod sync {
    #[cfg(loom)]
    pub use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};
    #[cfg(not(loom))]
    pub use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
}

use sync::{AtomicU32, AtomicU64, Ordering};

use super::layout::State;

/// Job: free bytes of a ring of `ring_len` bytes with the job's own `head`. SYNC POINT A with [`release`]:
/// what the agent read of the freed bytes, it read before we overwrite them.
pub fn room(head: u64, tail: &AtomicU64, ring_len: u64) -> u64 {
    let used = head.wrapping_sub(tail.load(Ordering::Acquire));
    ring_len.saturating_sub(used)
}

/// Job: lets the agent see the frame headers written below `head`. SYNC POINT B with [`published`].
pub fn publish(head: &AtomicU64, value: u64) {
    head.store(value, Ordering::Release);
}

/// Agent: how far frame headers may be read. SYNC POINT B with [`publish`].
pub fn published(head: &AtomicU64) -> u64 {
    head.load(Ordering::Acquire)
}

/// Job: hands a written frame to the agent. SYNC POINT C with [`state`].
pub fn commit(word: &AtomicU32, state: State) {
    word.store(state as u32, Ordering::Release);
}

/// Agent: who owns the frame; `None` for a word that is no state. SYNC POINT C with [`commit`].
pub fn state(word: &AtomicU32) -> Option<State> {
    State::from_code(word.load(Ordering::Acquire))
}

/// Agent: gives bytes below `value` back to the job. SYNC POINT A with [`room`].
pub fn release(tail: &AtomicU64, value: u64) {
    tail.store(value, Ordering::Release);
}

#[cfg(all(test, loom))]
mod model {
    use super::*;
    use loom::{cell::UnsafeCell, sync::Arc, thread};

    /// Two cells of ring, three frames of one cell each: every interleaving of reserve, write, commit, read and
    /// release. loom fails if the agent can read a cell the job is writing (SLAB-2) or the job can overwrite one
    /// the agent is reading (SLAB-3).
    #[test]
    fn frames_are_never_read_while_written() {
        // Three preemptions show every bug of this size within a second; without a bound it takes minutes.
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            struct Ring {
                head: AtomicU64,
                tail: AtomicU64,
                state: [AtomicU32; 2],
                cell: [UnsafeCell<u64>; 2],
            }
            // SAFETY: the protocol under test is what makes this sound; loom checks each access.
            unsafe impl Sync for Ring {}
            // SAFETY: as above.
            unsafe impl Send for Ring {}
            let ring = Arc::new(Ring {
                head: AtomicU64::new(0),
                tail: AtomicU64::new(0),
                state: [AtomicU32::new(0), AtomicU32::new(0)],
                cell: [UnsafeCell::new(0), UnsafeCell::new(0)],
            });
            let job = {
                let ring = ring.clone();
                thread::spawn(move || {
                    for n in 0..3u64 {
                        while room(n, &ring.tail, 2) == 0 {
                            thread::yield_now();
                        }
                        let at = (n % 2) as usize;
                        commit(&ring.state[at], State::Writing);
                        publish(&ring.head, n + 1);
                        // SAFETY: SLAB-3, between reserve and commit the cell is the job's.
                        ring.cell[at].with_mut(|p| unsafe { *p = n + 1 });
                        commit(&ring.state[at], State::Ready);
                    }
                })
            };
            for n in 0..3u64 {
                let at = (n % 2) as usize;
                while published(&ring.head) <= n || state(&ring.state[at]) != Some(State::Ready) {
                    thread::yield_now();
                }
                // SAFETY: SLAB-2, the cell is Ready.
                let seen = ring.cell[at].with(|p| unsafe { *p });
                assert_eq!(seen, n + 1);
                release(&ring.tail, n + 1);
            }
            job.join().unwrap();
        });
    }
}
