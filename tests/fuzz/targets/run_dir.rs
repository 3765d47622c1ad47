//! A run directory with a hostile manifest: it is recovered, read, and recovered again to the same.
#![no_main]
use flexmodel_fuzz::manifest;
use flexmodel_run::{Run, write::recover::recover};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    std::fs::write(dir.path().join("manifest.jsonl"), manifest(text)).unwrap();
    std::fs::write(dir.path().join("shard-00000.open"), vec![1; (1 << 20) + 4096]).unwrap();
    for _ in 0..2 {
        recover(dir.path(), dir.path(), false).expect("recovery takes anything");
        let run = Run::open(dir.path()).expect("it is a run");
        for record in &run.records {
            let _ = (record.shape(), record.stored_bytes(), run.whole(record).map_err(|e| e.to_string()));
        }
    }
});
