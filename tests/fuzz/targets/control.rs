//! Control messages in both directions; a decoded one encodes to something that decodes to it.
#![no_main]
use libfuzzer_sys::fuzz_target;
use wire::control::{FromAgent, ToAgent, decode_next, encode};

fuzz_target!(|bytes: &[u8]| {
    let mut buffer = bytes.to_vec();
    while let Ok(Some(message)) = decode_next::<ToAgent>(&mut buffer) {
        assert_eq!(decode_next(&mut encode(&message).unwrap()), Ok(Some(message)));
    }
    let mut buffer = bytes.to_vec();
    while let Ok(Some(message)) = decode_next::<FromAgent>(&mut buffer) {
        assert_eq!(decode_next(&mut encode(&message).unwrap()), Ok(Some(message)));
    }
});
