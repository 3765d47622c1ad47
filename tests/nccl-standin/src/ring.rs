//! Bytes from one rank to another, in order.

use std::{
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

/// Bytes that a ring holds.
const HOLDS: usize = 64 << 10;
/// Bytes that a ring takes.
pub const BYTES: usize = HOLDS + 64;

/// Counts of all bytes that were ever put in, and taken out.
#[repr(C)]
struct Counts {
    put: AtomicU64,
    taken: AtomicU64,
}

/// A ring in shared memory. One thread puts, one takes.
#[derive(Clone, Copy)]
pub struct Ring {
    counts: NonNull<Counts>,
    data: NonNull<u8>,
}

impl Ring {
    /// # Safety
    /// `at` is 64-aligned, has [`BYTES`] bytes which were zero at first, and they outlive the ring.
    pub unsafe fn at(at: NonNull<u8>) -> Self {
        // SAFETY: within these bytes.
        Self { counts: at.cast(), data: unsafe { at.add(64) } }
    }

    /// Bytes put in so far.
    pub fn put_so_far(&self) -> u64 {
        self.counts().put.load(Ordering::Acquire)
    }

    /// Bytes taken out so far.
    pub fn taken_so_far(&self) -> u64 {
        self.counts().taken.load(Ordering::Acquire)
    }

    /// Puts in at most `len` bytes; returns how many.
    ///
    /// # Safety
    /// `from` has `len` bytes; the calling thread is the ring's only giver.
    pub unsafe fn put(&self, from: *const u8, len: usize) -> usize {
        let put = self.counts().put.load(Ordering::Relaxed);
        // SYNC with the store in `take`: what was taken may be written over.
        let room = HOLDS - (put - self.taken_so_far()) as usize;
        let now = len.min(room);
        let (at, first) = split(put, now);
        // SAFETY: both parts lie in the ring, and no one reads them before the count says so.
        unsafe {
            from.copy_to_nonoverlapping(self.data.add(at).as_ptr(), first);
            from.add(first).copy_to_nonoverlapping(self.data.as_ptr(), now - first);
        }
        // SYNC with the load in `take`: the bytes are there.
        self.counts().put.store(put + now as u64, Ordering::Release);
        now
    }

    /// Takes out at most `len` bytes; returns how many.
    ///
    /// # Safety
    /// `to` has room for `len` bytes; the calling thread is the ring's only taker.
    pub unsafe fn take(&self, to: *mut u8, len: usize) -> usize {
        let taken = self.counts().taken.load(Ordering::Relaxed);
        let held = (self.put_so_far() - taken) as usize;
        let now = len.min(held);
        let (at, first) = split(taken, now);
        // SAFETY: both parts lie in the ring and were put, and no one writes them before the count says so.
        unsafe {
            to.copy_from_nonoverlapping(self.data.add(at).as_ptr(), first);
            to.add(first).copy_from_nonoverlapping(self.data.as_ptr(), now - first);
        }
        self.counts().taken.store(taken + now as u64, Ordering::Release);
        now
    }

    fn counts(&self) -> &Counts {
        // SAFETY: `at`'s promise; atomics may be shared.
        unsafe { self.counts.as_ref() }
    }
}

/// Where a run of `len` bytes begins, and how many of them come before the ring's end.
fn split(count: u64, len: usize) -> (usize, usize) {
    let at = (count % HOLDS as u64) as usize;
    (at, len.min(HOLDS - at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(align(64))]
    struct Memory([u8; BYTES]);

    #[test]
    fn bytes_come_out_as_they_went_in_across_the_end_of_the_ring() {
        let mut memory = Box::new(Memory([0; BYTES]));
        // SAFETY: zero, aligned, and lives on.
        let ring = unsafe { Ring::at(NonNull::from(&mut memory.0).cast()) };
        let bytes: Vec<u8> = (0..3 * HOLDS).map(|i| (i % 251) as u8).collect();
        let (mut out, mut put, mut taken) = (vec![0; bytes.len()], 0, 0);
        while taken < bytes.len() {
            // SAFETY: within both vectors; one thread does both.
            unsafe {
                put += ring.put(bytes.as_ptr().add(put), (bytes.len() - put).min(40_000));
                taken += ring.take(out.as_mut_ptr().add(taken), (bytes.len() - taken).min(30_000));
            }
            assert!(put - taken <= HOLDS);
        }
        assert_eq!(out, bytes);
        assert_eq!((ring.put_so_far(), ring.taken_so_far()), (bytes.len() as u64, bytes.len() as u64));
    }
}
