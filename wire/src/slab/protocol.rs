//! The atomic steps of the slab's protocol, apart from memory so that loom can run them.
//!
//! Every acquire names the release it pairs with (SYNC POINT).

/// std's atomics, or loom's under `--cfg loom`.
pub mod sync {
    #[cfg(loom)]
    pub use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
    #[cfg(not(loom))]
    pub use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
}

use sync::{AtomicU32, AtomicU64, Ordering, fence};

use super::layout::State;

/// Job: how far the agent has released the ring. SYNC POINT A with [`release`]: what the agent read of the freed bytes, it
/// read before we overwrite them.
pub fn tail(tail: &AtomicU64) -> u64 {
    tail.load(Ordering::Acquire)
}

/// Job: free bytes of a ring of `ring_len` bytes between the job's own `head` and a [`tail`].
pub fn room(head: u64, tail: u64, ring_len: u64) -> u64 {
    ring_len.saturating_sub(head.wrapping_sub(tail))
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

/// Agent: gives bytes below `value` back to the job. SYNC POINT A with [`tail`].
pub fn release(tail: &AtomicU64, value: u64) {
    tail.store(value, Ordering::Release);
}

/// Job: how often the agent has released something, to be asked *before* [`tail`]: a release in between then changes
/// it, and whoever goes to sleep on the old number is up again at once. SYNC POINT D with [`released`].
pub fn releases(count: &AtomicU32) -> u32 {
    count.load(Ordering::Acquire)
}

/// Job: one more thread is about to sleep on the count of releases. SYNC POINT E with [`released`]: either the thread
/// sees the new count before it sleeps, or the agent sees the thread.
pub fn announce(waiters: &AtomicU32) {
    waiters.fetch_add(1, Ordering::Relaxed);
    fence(Ordering::SeqCst);
}

/// Job: that thread is up again.
pub fn retire(waiters: &AtomicU32) {
    waiters.fetch_sub(1, Ordering::Relaxed);
}

/// Agent: counts what [`release`] gave back; whether a thread of the job may sleep, so that all must be woken.
/// SYNC POINTS D with [`releases`] and E with [`announce`].
pub fn released(count: &AtomicU32, waiters: &AtomicU32) -> bool {
    count.fetch_add(1, Ordering::Release);
    fence(Ordering::SeqCst);
    waiters.load(Ordering::Relaxed) != 0
}

/// Job: nothing is written to this slab any more, neither frames nor counters. SYNC POINT F with [`completed`].
pub fn complete(flag: &AtomicU32) {
    flag.store(1, Ordering::Release);
}

/// Agent: whether what it sees *after* this of frames and counters is all there will be. SYNC POINT F with [`complete`].
pub fn completed(flag: &AtomicU32) -> bool {
    flag.load(Ordering::Acquire) != 0
}

/// Agent: it needs this slab no more. SYNC POINT G with [`settled`].
pub fn settle(flag: &AtomicU32) {
    flag.store(1, Ordering::Release);
}

/// Job: whether the agent has done with this slab. SYNC POINT G with [`settle`].
pub fn settled(flag: &AtomicU32) -> bool {
    flag.load(Ordering::Acquire) != 0
}

#[cfg(all(test, loom))]
mod model {
    use super::*;
    use loom::{
        cell::UnsafeCell,
        sync::{Arc, Condvar, Mutex},
        thread,
    };

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
                        while room(n, tail(&ring.tail), 2) == 0 {
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

    /// A full ring of two cells and two threads that want one each, while the agent releases both: nobody sleeps
    /// through the release that was meant for it (SLAB-6). Sleeping has no limit here, so loom reports a deadlock.
    #[test]
    fn nobody_sleeps_through_a_release() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            struct Ring {
                head: Mutex<u64>,
                tail: AtomicU64,
                count: AtomicU32,
                waiters: AtomicU32,
                /// The kernel's lock of a futex: comparing and going to sleep are one step.
                futex: Mutex<()>,
                wake: Condvar,
            }
            let ring = Arc::new(Ring {
                head: Mutex::new(2),
                tail: AtomicU64::new(0),
                count: AtomicU32::new(0),
                waiters: AtomicU32::new(0),
                futex: Mutex::new(()),
                wake: Condvar::new(),
            });
            let job = |ring: Arc<Ring>| {
                move || loop {
                    let seen = releases(&ring.count);
                    {
                        let mut head = ring.head.lock().unwrap();
                        if room(*head, tail(&ring.tail), 2) > 0 {
                            *head += 1;
                            return;
                        }
                    }
                    announce(&ring.waiters);
                    let asleep = ring.futex.lock().unwrap();
                    if ring.count.load(Ordering::Relaxed) == seen {
                        drop(ring.wake.wait(asleep).unwrap());
                    } else {
                        drop(asleep);
                    }
                    retire(&ring.waiters);
                }
            };
            let threads = [thread::spawn(job(ring.clone())), thread::spawn(job(ring.clone()))];
            for n in 1..=2 {
                release(&ring.tail, n);
                if released(&ring.count, &ring.waiters) {
                    let _futex = ring.futex.lock().unwrap();
                    ring.wake.notify_all();
                }
            }
            for thread in threads {
                thread.join().unwrap();
            }
        });
    }

    /// A slab that another one follows, while a thread of the job ends its tensor there: the agent sees the last frame and
    /// the last loss before it settles (SLAB-7), and the job gives the slab back after the agent has read it (SLAB-8).
    #[test]
    fn a_slab_is_given_back_when_everything_in_it_was_seen() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            struct Slab {
                head: AtomicU64,
                dropped: AtomicU64,
                complete: AtomicU32,
                settled: AtomicU32,
                memory: UnsafeCell<u64>,
            }
            // SAFETY: the protocol under test is what makes this sound; loom checks each access.
            unsafe impl Sync for Slab {}
            // SAFETY: as above.
            unsafe impl Send for Slab {}
            let slab = Arc::new(Slab {
                head: AtomicU64::new(0),
                dropped: AtomicU64::new(0),
                complete: AtomicU32::new(0),
                settled: AtomicU32::new(0),
                memory: UnsafeCell::new(0),
            });
            // Whoever has a tensor under way holds one of these, as tensors hold the mapping.
            let mut users = Arc::new(());
            let tensor = {
                let (slab, user) = (slab.clone(), users.clone());
                thread::spawn(move || {
                    // SAFETY: SLAB-3, the frame is reserved.
                    slab.memory.with_mut(|p| unsafe { *p = 7 });
                    publish(&slab.head, 1);
                    slab.dropped.fetch_add(1, Ordering::Relaxed);
                    drop(user);
                })
            };
            let agent = {
                let slab = slab.clone();
                thread::spawn(move || {
                    // Each side looks once: it may find any moment of the others.
                    if !completed(&slab.complete) {
                        return;
                    }
                    assert_eq!((published(&slab.head), slab.dropped.load(Ordering::Relaxed)), (1, 1));
                    // SAFETY: SLAB-2 and SLAB-7, nobody writes any more.
                    assert_eq!(slab.memory.with(|p| unsafe { *p }), 7);
                    settle(&slab.settled);
                })
            };
            if Arc::get_mut(&mut users).is_some() {
                complete(&slab.complete);
            }
            if settled(&slab.settled) {
                // SAFETY: SLAB-8, the agent has done with it.
                slab.memory.with_mut(|p| unsafe { *p = 0 });
            }
            tensor.join().unwrap();
            agent.join().unwrap();
        });
    }
}
