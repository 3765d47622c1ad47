//! Starts ranks as processes, and reads what they and the stand-in say.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// A bound for hangs; nothing is measured with it.
const HANG: Duration = Duration::from_secs(60);

/// A job that is not started.
pub struct Job {
    scenario: &'static str,
    size: usize,
    faults: String,
    findable: bool,
}

/// Its processes. They are killed when it is dropped.
pub struct Started {
    ranks: Vec<Child>,
    folder: tempfile::TempDir,
}

/// What is left of it.
pub struct Ended {
    /// By each rank, "nothing" where it did not say anything.
    pub said: Vec<String>,
    log: Vec<String>,
}

impl Job {
    pub fn new(scenario: &'static str, size: usize) -> Self {
        Self { scenario, size, faults: String::new(), findable: false }
    }

    pub fn faults(mut self, faults: &str) -> Self {
        self.faults = faults.into();
        self
    }

    /// The dynamic linker would find the stand-in by its name.
    pub fn findable(mut self) -> Self {
        self.findable = true;
        self
    }

    pub fn start(self) -> Started {
        let folder = tempfile::tempdir().unwrap();
        if self.findable {
            std::os::unix::fs::symlink(stand_in(), folder.path().join("libnccl.so.2")).unwrap();
        }
        let rank = |rank: usize| {
            Command::new(env::current_exe().unwrap())
                .args(["one_rank", "--exact", "--ignored"])
                .env("SCENARIO", self.scenario)
                .env("RANK", rank.to_string())
                .env("WORLD_SIZE", self.size.to_string())
                .env("FOLDER", folder.path())
                .env("FLEXMODEL_NCCL_STANDIN", &self.faults)
                .env("FLEXMODEL_NCCL_STANDIN_LOG", folder.path().join("log"))
                .env("LD_LIBRARY_PATH", folder.path())
                .env_remove("NCCL_COMM_ID")
                .stdout(Stdio::null())
                .spawn()
                .unwrap()
        };
        Started { ranks: (0..self.size).map(rank).collect(), folder }
    }
}

impl Started {
    #[track_caller]
    pub fn end(mut self) -> Ended {
        let begin = Instant::now();
        for (rank, child) in self.ranks.iter_mut().enumerate() {
            let status = loop {
                if let Some(status) = child.try_wait().unwrap() {
                    break status;
                }
                assert!(begin.elapsed() < HANG, "rank {rank} hangs");
                thread::sleep(Duration::from_millis(5));
            };
            assert!(status.success(), "rank {rank} ended with {status}: see its output above");
        }
        let read = |name: &str| fs::read_to_string(self.folder.path().join(name));
        let said =
            (0..self.ranks.len()).map(|rank| read(&format!("said-{rank}")).unwrap_or("nothing".into())).collect();
        let mut log: Vec<String> = read("log").unwrap_or_default().lines().map(Into::into).collect();
        // By rank; what one rank wrote stays in order.
        log.sort_by_key(|line| line.split(':').next().map(String::from));
        Ended { said, log }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        for child in &mut self.ranks {
            // Most have ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Ended {
    /// The lines of one kind in the stand-in's log.
    pub fn lines(&self, kind: &str) -> Vec<String> {
        self.log.iter().filter(|line| line.contains(&format!(": {kind}: "))).cloned().collect()
    }
}

#[track_caller]
pub fn one_line(text: &str) -> &str {
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

/// The stand-in, which cargo builds beside the tests that depend on it.
pub fn stand_in() -> PathBuf {
    let tests = env::current_exe().unwrap();
    tests
        .parent()
        .map(|deps| deps.join("libnccl.so"))
        .filter(|path| path.is_file())
        .expect("the stand-in, beside this test")
}

/// Writes a file whole or not at all.
pub fn write(path: &Path, bytes: &[u8]) {
    let half = path.with_extension("half");
    fs::write(&half, bytes).unwrap();
    fs::rename(half, path).unwrap();
}

/// Reads a file that another rank writes.
pub fn await_file(path: &Path) -> Vec<u8> {
    let begin = Instant::now();
    loop {
        if let Ok(bytes) = fs::read(path) {
            return bytes;
        }
        assert!(begin.elapsed() < HANG, "{} never came", path.display());
        thread::sleep(Duration::from_millis(1));
    }
}
