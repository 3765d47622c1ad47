//! A job that changes its slab while it is read, before any look that the reader takes (SLAB-4).
//!
//! The input is a schedule of steps of eight bytes. What the job does may come between steps of the reader, or within one,
//! so many looks later: after a value was checked and before it is used.
#![no_main]
use std::{cell::RefCell, collections::VecDeque, mem::offset_of, rc::Rc, time::Duration};

use libfuzzer_sys::fuzz_target;
use wire::{
    record::RecordMeta,
    slab::{Fetched, FrameHeader, HEADER_LEN, Header, SlabReader, SlabWriter, meddle},
};

const RING: u64 = 4096;
/// Numbers that are worth trying, to set or to add.
#[rustfmt::skip]
const NUMBERS: [u64; 16] =
    [0, 1, 56, 63, 64, 128, 960, RING - 64, RING, RING + 64, 1 << 16, 1 << 32, 1 << 63, u64::MAX - 63, u64::MAX - 4095, u64::MAX];
/// Where the header's fields are.
const FIELDS: [usize; 14] = [
    offset_of!(Header, magic),
    offset_of!(Header, version),
    offset_of!(Header, ring_len),
    offset_of!(Header, head),
    offset_of!(Header, head),
    offset_of!(Header, doorbell),
    offset_of!(Header, dropped),
    offset_of!(Header, tail),
    offset_of!(Header, room),
    offset_of!(Header, complete),
    offset_of!(Header, begun),
    offset_of!(Header, settled),
    offset_of!(Header, waiters),
    offset_of!(Header, agent_waits),
];

/// One step: what, how many looks later, and what about.
#[derive(Clone, Copy)]
struct Step {
    op: u8,
    later: u8,
    at: u16,
    which: u8,
    value: u8,
    more: u16,
}

impl Step {
    fn of(b: &[u8; 8]) -> Self {
        let [op, later, at0, at1, which, value, more0, more1] = *b;
        Self { op, later, at: u16::from_le_bytes([at0, at1]), which, value, more: u16::from_le_bytes([more0, more1]) }
    }

    /// Done by the job to memory, within a step of the reader.
    fn is_within(self) -> bool {
        self.op % 8 >= 5 && self.later > 0
    }

    fn number(self, before: u64) -> u64 {
        let number = NUMBERS[usize::from(self.value) % NUMBERS.len()];
        if self.value & 0x80 == 0 { number } else { before.wrapping_add(number) }
    }
}

/// The job's mapping of the slab.
#[derive(Clone, Copy)]
struct Memory(*mut u8, usize);

impl Memory {
    /// Eight bytes at `at`, or as near to it as there are eight.
    fn word(self, at: usize) -> *mut u64 {
        // SAFETY: eight bytes from there are inside the mapping.
        unsafe { self.0.add(at.min(self.1 - 8)).cast() }
    }

    /// Where the ring's `n`-th possible frame starts.
    fn frame(n: u16) -> usize {
        HEADER_LEN as usize + usize::from(n) % (RING as usize / 64) * 64
    }

    fn meddle(self, step: Step) {
        // SAFETY: every place is inside the mapping, which the writer holds; nobody has a reference into it.
        unsafe {
            match step.op % 8 {
                5 => {
                    let at = FIELDS.get(usize::from(step.which) % 16).copied().unwrap_or(usize::from(step.at) % self.1);
                    let word = self.word(at);
                    word.write_unaligned(step.number(word.read_unaligned()));
                }
                6 => self.forge(step),
                _ => self.word(Self::frame(step.at)).cast::<u32>().write(u32::from(step.value) % 6),
            }
        }
    }

    /// Changes a field of a frame's header, and makes the checksum right.
    unsafe fn forge(self, step: Step) {
        let at = Self::frame(step.at);
        // SAFETY: a frame's header lies behind its state word, inside the mapping.
        unsafe {
            let place = self.0.add(at + 8).cast::<FrameHeader>();
            let mut header = place.read_unaligned();
            match step.which % 8 {
                0 => header.generation = step.number(header.generation.into()) as u32,
                1 => header.meta_len = step.number(header.meta_len.into()) as u32,
                2 => header.frame_len = step.number(header.frame_len),
                3 => header.piece_offset = step.number(header.piece_offset),
                4 => header.payload_len = step.number(header.payload_len),
                5 => header.total_len = step.number(header.total_len),
                6 => (header.frame_len, header.payload_len) = (u64::from(step.more) * 64, step.number(0)),
                _ => (header.generation, header.frame_len) = (1, u64::from(step.more % 64) * 64),
            }
            let meta =
                std::slice::from_raw_parts(self.0.add(at + 64), (header.meta_len as usize).min(self.1 - at - 64));
            header.crc = header.checksum(meta);
            place.write_unaligned(header);
        }
    }
}

/// What the job does within the reader's next step.
type Within = Rc<RefCell<VecDeque<Step>>>;

fuzz_target!(|bytes: &[u8]| {
    let mut writer = SlabWriter::create(RING, 0).unwrap();
    let (base, len) = writer.mapping().whole();
    let memory = Memory(base, len);
    let fd = writer.mapping().fd().unwrap().try_clone_to_owned().unwrap();
    let attach = || SlabReader::attach(fd.try_clone().unwrap()).ok();
    let within = Within::default();
    let mut meta = Vec::new();
    RecordMeta::output("a", wire::dtype::DType::UInt8, vec![300]).encode(&mut meta);
    writer.try_reserve(1, &meta, 0, 300, 300).unwrap().commit();
    let mut reader = None;
    let steps: Vec<Step> = bytes.as_chunks().0.iter().map(Step::of).collect();
    let mut rest = &steps[..];
    while let Some((step, after)) = rest.split_first() {
        let count = after.iter().take_while(|step| step.is_within()).count();
        let (now, after) = after.split_at(count);
        rest = after;
        within.borrow_mut().extend(now);
        let queue = within.clone();
        meddle::set(Some(Box::new(move || {
            let mut queue = queue.borrow_mut();
            match queue.front_mut() {
                Some(step) if step.later > 1 => step.later -= 1,
                Some(_) => queue.pop_front().into_iter().for_each(|step| memory.meddle(step)),
                None => {}
            }
        })));
        match (step.op % 8, &mut reader) {
            (0, Some(reader)) => look(reader),
            (1, Some(reader)) => _ = reader.release(),
            (2, Some(reader)) => reader.wait(Duration::from_nanos(1)),
            (0..4, reader) => *reader = attach(),
            (4, _) => {
                meddle::set(None);
                let payload = u64::from(step.more) % 700;
                let meta = &meta[..if step.which & 1 == 0 { meta.len() } else { 0 }];
                if let Some(slot) = writer.try_reserve(u64::from(step.value), meta, 0, payload, payload)
                    && step.which & 2 == 0
                {
                    slot.commit();
                }
            }
            _ => memory.meddle(*step),
        }
        meddle::set(None);
        within.borrow_mut().clear();
    }
});

/// Does with a frame what the agent does.
fn look(reader: &mut SlabReader) {
    let (base, len) = reader.mapping().whole();
    let mapped = base.addr()..=base.addr() + len;
    if let Ok(Fetched::Frame(frame)) = reader.fetch() {
        let bytes = frame.payload.as_ptr_range();
        assert!(
            mapped.contains(&bytes.start.addr()) && mapped.contains(&bytes.end.addr()),
            "a payload outside of the slab"
        );
        assert!(frame.piece_offset.checked_add(frame.payload.len() as u64).is_some_and(|end| end <= frame.total_len));
        std::hint::black_box(frame.payload.iter().fold(0u8, |a, b| a ^ b));
        let _ = RecordMeta::decode(&frame.meta).map(|meta| meta.payload_len());
    }
}
