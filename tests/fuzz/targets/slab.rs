//! A job that scribbles over its slab, with and without the right checksums (SLAB-4).
#![no_main]
use libfuzzer_sys::fuzz_target;
use wire::slab::{Fetched, FrameHeader, HEADER_LEN, SlabReader, SlabWriter};

const RING: u64 = 8192;

fuzz_target!(|bytes: &[u8]| {
    let mut writer = SlabWriter::create(RING, 0).unwrap();
    for n in 0..3 {
        writer.try_reserve(n, b"meta", 0, 300, 300).unwrap().commit();
    }
    let (base, len) = writer.mapping().whole();
    let [flags, scribbles @ ..] = bytes else { return };
    for s in scribbles.chunks_exact(3) {
        // SAFETY: inside the mapping; no reader is attached yet.
        unsafe { base.add(usize::from(u16::from_le_bytes([s[0], s[1]])) % len).write(s[2]) };
    }
    if flags & 1 == 1 {
        // SAFETY: the first frame's header lies behind its state word, inside the mapping; no reader is attached yet.
        unsafe {
            let at = base.add(HEADER_LEN as usize + 8).cast::<FrameHeader>();
            let mut header = at.read_unaligned();
            let meta = std::slice::from_raw_parts(at.add(1).cast::<u8>(), (header.meta_len as usize).min(4096));
            header.crc = header.checksum(meta);
            at.write_unaligned(header);
        }
    }
    let Ok(mut reader) = SlabReader::attach(writer.mapping().fd().unwrap().try_clone_to_owned().unwrap()) else { return };
    for _ in 0..8 {
        let Ok(Fetched::Frame(frame)) = reader.fetch() else { return };
        assert!(frame.payload.len() as u64 <= RING);
        std::hint::black_box(frame.payload.iter().fold(0u8, |a, b| a ^ b));
        if reader.release().is_err() {
            return;
        }
    }
});
