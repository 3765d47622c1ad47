//! What unit tests share.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
};

use crate::process::Process;

/// A folder that goes with the test.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("flexmodel-capture-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A process that is on, and has nobody to tell.
pub struct Quiet;

impl Process for Quiet {
    fn line(&self, _: &str) {}

    fn set_rank(&self, _: u32) {}

    fn who(&self) -> String {
        "rank 0".into()
    }

    fn ranks_of_node(&self) -> Option<u32> {
        None
    }

    fn is_on(&self) -> bool {
        true
    }

    fn off(&self, _: &str) {}

    fn now_ns(&self) -> u64 {
        1
    }
}
