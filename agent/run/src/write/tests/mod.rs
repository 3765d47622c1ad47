//! The store as a whole: what is written is what the manifest says, and what any safetensors reader finds.

mod crash;
mod layout;
mod refuse;

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{Arc, Mutex},
};

use safetensors::SafeTensors;
use wire::record::RecordMeta;

use super::{
    writer::{Options, Store},
    *,
};
use crate::{
    format::{JobId, Line, Location, MANIFEST_FILE, Part},
    joining::Told,
    manifest::Reader,
};

/// A store in `dir` and what it wanted the user to read.
fn store_with(dir: &Path, shard_bytes: u64) -> (Arc<Store>, Arc<Mutex<Vec<String>>>) {
    let notices = Arc::new(Mutex::new(Vec::new()));
    let told = notices.clone();
    let notify = Box::new(move |text: &str| told.lock().unwrap().push(text.to_owned()));
    let (store, ..) = Store::open(dir, Options { shard_bytes, notify }).unwrap();
    (store, notices)
}

fn store(dir: &Path) -> Arc<Store> {
    store_with(dir, writer::DEFAULT_SHARD_BYTES).0
}

/// Bytes that tell where they come from.
fn bytes_of(meta: &RecordMeta, seed: u8) -> Vec<u8> {
    (0..meta.payload_len().unwrap()).map(|n| (n as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

/// What is told of when a part is written.
#[track_caller]
fn put_untold(store: &Arc<Store>, meta: &RecordMeta, bytes: &[u8]) -> Outcome {
    let mut part = store.begin(JobId::default(), meta.clone());
    part.write(0, bytes);
    part.finish()
}

#[track_caller]
fn put(store: &Arc<Store>, meta: &RecordMeta, bytes: &[u8]) -> (Part, Option<u32>) {
    match put_untold(store, meta, bytes) {
        Outcome::Stored(told) => {
            let differs = told
                .iter()
                .find_map(|told| if let Told::Differs { against, .. } = told { Some(*against) } else { None });
            (part_of(told), differs)
        }
        other => panic!("{other:?}"),
    }
}

/// The part that is told of.
fn part_of(told: Vec<Told>) -> Part {
    told.into_iter().find_map(|told| if let Told::Part { part, .. } = told { Some(*part) } else { None }).unwrap()
}

fn lines(dir: &Path) -> Vec<Line> {
    let manifest = fs::File::open(dir.join(MANIFEST_FILE)).unwrap();
    Reader::new(std::io::BufReader::new(manifest)).map(|e| e.unwrap().line.unwrap()).collect()
}

fn parts(dir: &Path) -> Vec<Part> {
    lines(dir).into_iter().filter_map(|l| if let Line::Part(part) = l { Some(part) } else { None }).collect()
}

/// The bytes at a location, from whichever file the shard is in now.
fn at(dir: &Path, place: &Location) -> Vec<u8> {
    let file =
        ["safetensors", "open"].iter().map(|e| dir.join(&place.shard).with_extension(e)).find(|p| p.exists()).unwrap();
    let all = fs::read(file).unwrap();
    all[place.offset as usize..(place.offset + place.len) as usize].to_vec()
}

/// Every part's bytes have the crc of its line.
#[track_caller]
fn assert_sound(dir: &Path) {
    for part in parts(dir) {
        if let Some(place) = &part.at {
            assert_eq!(crc32c::crc32c(&at(dir, place)), place.crc, "{}", part.what.id);
        }
    }
}

/// Names, types, shapes and bytes of a sealed shard, by the safetensors crate, without filler.
fn sealed(dir: &Path, stem: &str) -> BTreeMap<String, (String, Vec<usize>, Vec<u8>)> {
    let file = fs::read(dir.join(stem).with_extension("safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    tensors
        .tensors()
        .into_iter()
        .filter(|(name, _)| !name.starts_with(crate::format::FILLER))
        .map(|(name, t)| (name, (format!("{:?}", t.dtype()), t.shape().to_vec(), t.data().to_vec())))
        .collect()
}
