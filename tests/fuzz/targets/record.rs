//! Record metadata as it lies in shared memory: what decodes is the one encoding of what it says.
#![no_main]
use libfuzzer_sys::fuzz_target;
use wire::record::RecordMeta;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(meta) = RecordMeta::decode(bytes) {
        let _ = meta.payload_len();
        let mut again = Vec::new();
        meta.encode(&mut again);
        assert_eq!(RecordMeta::decode(&again), Ok(meta));
    }
});
