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

/// Bytes moved by each side in its turn.
const TURN: usize = 64 << 20;
/// Turns of each side in a round.
const TURNS: usize = 16;

fn main() {
    let mut args = std::env::args().skip(1).map(|a| a.parse::<usize>().expect("FRAME_BYTES ROUNDS"));
    let (frame, rounds) = (args.next().expect("FRAME_BYTES"), args.next().expect("ROUNDS"));
    let mut writer = SlabWriter::create(DEFAULT_SLAB_BYTES, 0).expect("a slab");
    let fd = writer.mapping().fd().and_then(|fd| fd.try_clone_to_owned()).expect("a descriptor");
    let over = AtomicBool::new(false);
    // As many bytes of memory on both sides, each page touched before.
    let source = vec![1u8; TURN / frame * frame];
    let mut plain = vec![2u8; DEFAULT_SLAB_BYTES as usize / frame * frame];
    std::thread::scope(|scope| {
        scope.spawn(|| release_all(SlabReader::attach(fd).expect("our own slab"), &over));
        let mut at = 0;
        for _ in 0..rounds {
            let (mut slab, mut memcpy) = (0.0, 0.0);
            for turn in 0..2 * TURNS {
                // slab memcpy memcpy slab: neither always comes first
                match turn % 4 {
                    0 | 3 => slab += seconds(|| into_slab(&mut writer, &source, frame)),
                    _ => memcpy += seconds(|| at = into_memory(&mut plain, &source, frame, at)),
                }
            }
            let speed = |seconds: f64| (source.len() * TURNS) as f64 / seconds / 1e9;
            println!("{:.3} {:.3}", speed(slab), speed(memcpy));
        }
        over.store(true, Ordering::Relaxed);
    });
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

fn into_slab(writer: &mut SlabWriter, source: &[u8], frame: usize) {
    for bytes in source.chunks_exact(frame) {
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
                None => {
                    SlabWriter::wait_for_room(writer.mapping(), writer.room_seen(), Duration::from_millis(50));
                }
            }
        };
        // SAFETY: the reservation owns frame bytes, and nobody else writes to them.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), slot.payload(), frame) };
        slot.commit();
    }
}

/// Goes round as the slab does; returns where it stopped.
fn into_memory(plain: &mut [u8], source: &[u8], frame: usize, mut at: usize) -> usize {
    for bytes in source.chunks_exact(frame) {
        plain[at..at + frame].copy_from_slice(bytes);
        at = (at + frame) % plain.len();
    }
    std::hint::black_box(plain);
    at
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
