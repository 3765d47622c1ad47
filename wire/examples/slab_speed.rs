//! Bytes a second into a slab that a thread empties, against `memcpy` of the same bytes into memory of this process.
//!
//! ```text
//! cargo run --release -p flexmodel-wire --example slab_speed -- FRAME_BYTES ROUNDS
//! ```
//!
//! Prints a line a round, the two taking turns: gigabytes a second of the slab, of `memcpy`.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use flexmodel_wire::{
    env::DEFAULT_SLAB_BYTES,
    slab::{Fetched, SlabReader, SlabWriter},
};

/// Bytes moved in one measurement.
const ROUND: usize = 1 << 30;

fn main() {
    let mut args = std::env::args().skip(1).map(|a| a.parse::<usize>().expect("FRAME_BYTES ROUNDS"));
    let (frame, rounds) = (args.next().expect("FRAME_BYTES"), args.next().expect("ROUNDS"));
    let mut writer = SlabWriter::create(DEFAULT_SLAB_BYTES, 0).expect("a slab");
    let fd = writer.mapping().fd().try_clone_to_owned().expect("a descriptor");
    let over = AtomicBool::new(false);
    // As many bytes of memory on both sides, each page touched before.
    let source = vec![1u8; ROUND.min(64 << 20) / frame * frame];
    let mut plain = vec![2u8; DEFAULT_SLAB_BYTES as usize / frame * frame];
    std::thread::scope(|scope| {
        scope.spawn(|| release_all(SlabReader::attach(fd).expect("our own slab"), &over));
        for round in 0..rounds {
            let (mut slab, mut memcpy) = (0.0, 0.0);
            for turn in 0..2 {
                match (round + turn) % 2 {
                    0 => slab = timed(|| into_slab(&mut writer, &source, frame)),
                    _ => memcpy = timed(|| into_memory(&mut plain, &source, frame)),
                }
            }
            println!("{slab:.3} {memcpy:.3}");
        }
        over.store(true, Ordering::Relaxed);
    });
}

/// Gigabytes a second.
fn timed(move_all: impl FnOnce()) -> f64 {
    let start = Instant::now();
    move_all();
    ROUND as f64 / start.elapsed().as_secs_f64() / 1e9
}

fn into_slab(writer: &mut SlabWriter, source: &[u8], frame: usize) {
    for bytes in source.chunks_exact(frame).cycle().take(ROUND / frame) {
        let record = writer.begin_record();
        let slot = loop {
            match writer.try_reserve(
                record,
                b"metadata of about the usual length, which is some 150 bytes",
                0,
                frame as u64,
                frame as u64,
            ) {
                Some(slot) => break slot,
                None => SlabWriter::wait_for_room(writer.mapping(), Duration::from_millis(50)),
            }
        };
        // SAFETY: the reservation owns frame bytes, and nobody else writes to them.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), slot.payload(), frame) };
        slot.commit();
    }
}

fn into_memory(plain: &mut [u8], source: &[u8], frame: usize) {
    let mut at = 0;
    for bytes in source.chunks_exact(frame).cycle().take(ROUND / frame) {
        plain[at..at + frame].copy_from_slice(bytes);
        at = (at + frame) % plain.len();
    }
    std::hint::black_box(plain);
}

/// An agent that has nothing to do but to make room.
fn release_all(mut reader: SlabReader, over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        match reader.fetch() {
            Ok(Fetched::Frame(_)) => reader.release().expect("our own slab"),
            Ok(_) => reader.wait(Duration::from_millis(20)),
            Err(e) => panic!("{e}"),
        }
    }
}
