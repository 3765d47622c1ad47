//! Lines of the manifest, raw and under the right checksum; what decodes, encodes to something that decodes to it.
#![no_main]
use flexmodel_fuzz::manifest;
use flexmodel_run::manifest::{Reader, decode_line, encode_line};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let _ = Reader::new(text.as_bytes()).filter_map(Result::ok).count();
    for entry in Reader::new(manifest(text).as_bytes()) {
        if let Ok(line) = entry.expect("memory does not fail").line {
            assert_eq!(decode_line(&encode_line(&line)).expect("its own encoding"), line);
        }
    }
});
