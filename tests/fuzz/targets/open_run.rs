//! A hostile folder, opened as a run: listed, put together and verified within bounds. Nothing is written to it.
//!
//! With `FLEXMODEL_FUZZ_KEEP` set to a folder, each input, its folder and what the commands find in that are kept in there
//! for a comparison with other readers instead.
#![no_main]
use std::path::{Path, PathBuf};

use flexmodel_fuzz::{
    answers::answers,
    mutate::{cross, mutate},
    tree::lay_out,
};
use flexmodel_run::{
    Run,
    read::{in_order, rows::Pad, sealed},
    text,
};
use libfuzzer_sys::{Corpus, fuzz_crossover, fuzz_mutator, fuzz_target};

fuzz_target!(|input: &[u8]| -> Corpus {
    let Ok(tree) = serde_json::from_slice(input) else { return Corpus::Reject };
    match std::env::var_os("FLEXMODEL_FUZZ_KEEP") {
        Some(folder) => {
            let path = PathBuf::from(folder).join(format!("{:08x}-{}", crc32c::crc32c(input), input.len()));
            std::fs::create_dir_all(&path).unwrap();
            std::fs::write(path.with_extension("json"), input).unwrap();
            lay_out(&tree, &path).unwrap();
            std::fs::write(path.with_extension("answers"), answers(&path).to_string()).unwrap();
        }
        None => {
            let folder = tempfile::tempdir_in("/dev/shm").unwrap();
            lay_out(&tree, folder.path()).expect("there is room");
            open(folder.path());
        }
    }
    Corpus::Keep
});
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| { mutate(data, size, max_size, seed) });
fuzz_crossover!(|data1: &[u8], data2: &[u8], out: &mut [u8], seed: u32| { cross(data1, data2, out, seed) });

fn open(path: &Path) {
    let Ok(run) = Run::open(path).map_err(|e| e.to_string()) else { return };
    let _ = (run.modules().len(), run.finished());
    let mut records: Vec<_> = run.records.iter().collect();
    records.sort_by_key(|record| in_order(&record.id));
    for record in records {
        let _ =
            (record.shape().map_err(|e| run.explain(&e)), record.stats(), record.stats_only(), record.stored_bytes());
        let _ = run.whole(record).map_err(|e| text::safe(&e.to_string()));
        if record.padded_shape().is_some_and(|shape| shape.iter().product::<u64>() < 1 << 20) {
            let _ = run.padded(record, &Pad::default()).map_err(|e| e.to_string());
        }
        let _ = run.part(record, record.what().rank).map_err(|e| e.to_string());
    }
    for part in run.records.iter().flat_map(|record| &record.parts) {
        let _ = run.shards().part(part).map_err(|e| e.to_string());
    }
    let mut problems = Vec::new();
    for (_, folder) in run.folders() {
        if let Ok(run) = Run::open_one(&folder) {
            sealed::check(&run, &mut problems);
        }
    }
    let _ = problems.iter().map(|problem| text::safe(&problem.to_string())).count();
}
