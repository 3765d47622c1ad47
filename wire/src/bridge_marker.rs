//! What distinguishes a bridge from others: what it says of itself in its bytes, its key, and where it lies. Nothing here
//! does I/O: bytes and names go in.

use std::{ffi::OsString, fmt, path::PathBuf};

use serde::Serialize;

use crate::{
    env,
    tap_abi::{MARKER_PREFIX, TAP_ABI},
};

/// Oldest Python whose C API and import machinery taps rely on.
pub const OLDEST_PYTHON: (u32, u32) = (3, 10);
/// A bridge's file name, in a folder of its own, see [`folder_name`].
pub const LIBRARY: &str = "libflexmodel_torch.so";
/// Longest marker in bytes.
const MAX_MARKER: usize = 512;

/// What a bridge says it is: `FLEXMODEL-BRIDGE key=<key> digest=<hex> abi=<n>;` somewhere in its bytes. The compiler is
/// given it as it is displayed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Marker {
    /// The torch that it was built for, see [`key`].
    pub key: String,
    /// The sources that it was built from.
    pub digest: String,
    /// Version of the tables between it and the interposer.
    pub abi: u32,
}

impl fmt::Display for Marker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{MARKER_PREFIX} key={} digest={} abi={};", self.key, self.digest, self.abi)
    }
}

impl Marker {
    /// Of a bridge that meets this version's interposer.
    pub fn new(key: &str, digest: &str) -> Self {
        Self { key: key.into(), digest: digest.into(), abi: TAP_ABI }
    }

    /// The marker in a library's bytes. Takes hostile bytes.
    pub fn find(bytes: &[u8]) -> Option<Self> {
        let mut rest = bytes;
        // From one first letter to the next: libraries are some megabytes long.
        while let Some(at) = rest.iter().position(|b| Some(b) == MARKER_PREFIX.as_bytes().first()) {
            rest = rest.get(at..)?;
            if let Some(marker) = rest.strip_prefix(MARKER_PREFIX.as_bytes()).and_then(Self::parse) {
                return Some(marker);
            }
            rest = rest.get(1..)?;
        }
        None
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let end = bytes.iter().take(MAX_MARKER).position(|&b| b == b';')?;
        let text = std::str::from_utf8(bytes.get(..end)?).ok()?;
        let (key, rest) = text.strip_prefix(" key=")?.split_once(" digest=")?;
        let (digest, abi) = rest.split_once(" abi=")?;
        Some(Self { key: key.into(), digest: digest.into(), abi: abi.parse().ok()? })
    }

    /// Whether it may be loaded by the FlexModel of these sources beside the torch that `key` names.
    pub fn fits(&self, key: &str, digest: &str) -> bool {
        self.key == key && self.is_current() && self.digest == digest
    }

    /// Whether it meets an interposer in the tables of this version.
    fn is_current(&self) -> bool {
        self.abi == TAP_ABI
    }
}

/// The name of the bridge for a torch: what must be equal for one to be loaded.
pub fn key(torch: &str, cuda: Option<&str>, cxx11_abi: u8, (major, minor): (u32, u32)) -> String {
    format!("torch{torch}-cuda{}-cxx11abi{cxx11_abi}-cp{major}{minor}", cuda.unwrap_or("none"))
}

/// The keys that may be a running torch's, which does not tell its C++ ABI.
pub fn keys_of(torch: &str, cuda: Option<&str>, python: (u32, u32)) -> [String; 2] {
    [1, 0].map(|abi| key(torch, cuda, abi, python))
}

/// The folder in the cache of the bridge with this key, of the sources with this digest: those of several FlexModels lie
/// side by side.
pub fn folder_name(key: &str, digest: &str) -> String {
    format!("{key}-{digest}")
}

/// The folder of all bridges, in an environment that `variable` looks up.
pub fn cache_folder(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name: &str| variable(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set(env::BRIDGE_CACHE)
        .or_else(|| set("XDG_CACHE_HOME").map(|c| c.join("flexmodel/bridges")))
        .or_else(|| set("HOME").map(|h| h.join(".cache/flexmodel/bridges")))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_marker_is_found_among_other_bytes() {
        let mut bytes = b"FLEXMODEL-BRIDG\0FFLEX FLEXMODEL-BRIDGE key= no marker;".to_vec();
        bytes.extend_from_slice(b"FLEXMODEL-BRIDGE key=torch2.11.0+cu130 digest=0a1b2c3d abi=2;rest");
        let marker = Marker { key: "torch2.11.0+cu130".into(), digest: "0a1b2c3d".into(), abi: 2 };
        assert_eq!(Marker::find(&bytes), Some(marker));
    }

    #[test]
    fn no_marker_or_half_of_one_is_none() {
        for bytes in [
            &b"nothing here"[..],
            b"FLEXMODEL-BRIDGE key=torch2 digest=0",
            b"FLEXMODEL-BRIDGE key=torch2;",
            b"FLEXMODEL-BRIDGE key=torch2 digest=0 abi=x;",
        ] {
            assert_eq!(Marker::find(bytes), None);
        }
    }

    #[test]
    fn a_key_is_of_one_torch_whatever_its_cxx_abi() {
        let key = key("2.11.0+cu130", Some("13.0"), 1, (3, 11));
        assert_eq!(key, "torch2.11.0+cu130-cuda13.0-cxx11abi1-cp311");
        assert!(keys_of("2.11.0+cu130", Some("13.0"), (3, 11)).contains(&key));
        assert!(!keys_of("2.11.0+cu130", None, (3, 11)).contains(&key));
        assert!(!keys_of("2.11.0", Some("13.0"), (3, 11)).contains(&key));
        assert!(!keys_of("2.11.0+cu130", Some("13.0"), (3, 1)).contains(&key));
    }

    #[test]
    fn a_bridge_of_other_sources_does_not_fit() {
        let marker = Marker { key: "torch2".into(), digest: "0a1b2c3d".into(), abi: TAP_ABI };
        assert!(marker.fits("torch2", "0a1b2c3d"));
        assert!(!marker.fits("torch2", "0a1b2c3e") && !marker.fits("torch3", "0a1b2c3d"));
        assert!(!Marker { abi: TAP_ABI + 1, ..marker }.fits("torch2", "0a1b2c3d"));
    }

    #[test]
    fn the_cache_is_where_the_first_set_variable_says() {
        let with = |set: &[(&str, &str)]| {
            cache_folder(|name| set.iter().find(|(n, _)| *n == name).map(|(_, value)| value.into()))
        };
        let all = [("HOME", "/h"), ("XDG_CACHE_HOME", "/x"), (env::BRIDGE_CACHE, "/b")];
        assert_eq!(with(&all), Some("/b".into()));
        assert_eq!(with(&all[..2]), Some("/x/flexmodel/bridges".into()));
        assert_eq!(with(&[("HOME", "/h"), ("XDG_CACHE_HOME", "")]), Some("/h/.cache/flexmodel/bridges".into()));
        assert_eq!(with(&[]), None);
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut in 0usize..60) {
            let mut all = b"FLEXMODEL-BRIDGE key=torch2 digest=00 abi=1".to_vec();
            all.truncate(cut);
            all.extend(bytes);
            let _ = Marker::find(&all);
        }
    }
}
