//! How much memory there is for slabs. A memfd is limited by nothing but the machine and the cgroup, and both answer
//! with the death of some process, so what would not fit is not asked for.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Where the kernel tells of memory, and for how many ranks.
#[derive(Debug)]
pub struct Memory {
    proc: PathBuf,
    ranks: u64,
}

/// What there was at a look.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    ranks: u64,
    free: Option<u64>,
}

/// A slab that does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// Bytes of the slab.
    pub bytes: u64,
    /// Ranks of this node that would each have one.
    pub ranks: u64,
    /// Bytes that are free.
    pub free: u64,
}

impl Memory {
    /// Of this machine, for this number of ranks of the job on it.
    pub fn new(ranks: u32) -> Self {
        Self { proc: "/proc".into(), ranks: u64::from(ranks.max(1)) }
    }

    /// What there is now. It reads some files: once for each slab that is to be made.
    pub fn look(&self) -> Look {
        Look { ranks: self.ranks, free: free(&self.proc) }
    }
}

impl Look {
    /// Whether every rank of the node may have a slab of `bytes` more. Together they take no more than half of what is
    /// free: the rest is the job's. Where nothing tells what is free, everything fits.
    ///
    /// # Errors
    /// It does not fit.
    pub fn fits(&self, bytes: u64) -> Result<(), Shortage> {
        match self.free {
            Some(free) if bytes.saturating_mul(self.ranks) > free / 2 => {
                Err(Shortage { bytes, ranks: self.ranks, free })
            }
            _ => Ok(()),
        }
    }
}

impl std::fmt::Display for Shortage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { bytes, ranks, free } = *self;
        write!(f, "a slab of {} ", Bytes(bytes))?;
        if ranks > 1 {
            write!(f, "for each of {ranks} ranks ")?;
        }
        write!(f, "would take more than half of the {} of memory that are free here", Bytes(free))
    }
}

/// A number of bytes, as people write it.
pub struct Bytes(pub u64);

impl std::fmt::Display for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
        match units.into_iter().find(|(shift, _)| self.0 >> shift > 0) {
            // A tenth more or less says nothing; 1023.96 KiB are not 1024.0 KiB.
            Some((shift, unit)) => {
                let tenths = (u128::from(self.0) * 10) >> shift;
                let (whole, tenth) = (tenths / 10, tenths % 10);
                if tenth == 0 { write!(f, "{whole} {unit}") } else { write!(f, "{whole}.{tenth} {unit}") }
            }
            None => write!(f, "{} bytes", self.0),
        }
    }
}

/// Bytes that a process of this machine and cgroup can have; `None` if nothing tells.
fn free(proc: &Path) -> Option<u64> {
    let machine = meminfo(&read(&proc.join("meminfo")));
    let group = hierarchies(proc).iter().filter_map(free_in).min();
    machine.into_iter().chain(group).min()
}

/// MemAvailable: what can be had without swapping.
fn meminfo(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// A cgroup of this process that has to do with memory.
struct Group {
    /// Where its hierarchy is mounted.
    mount: PathBuf,
    /// Below that.
    path: PathBuf,
    names: &'static Names,
}

/// What the files of a version of cgroups are called.
struct Names {
    limit: &'static str,
    used: &'static str,
    /// In `memory.stat`: file pages that were not used lately. They count as used, and are given up when need be.
    idle: &'static str,
}

const V1: Names = Names { limit: "memory.limit_in_bytes", used: "memory.usage_in_bytes", idle: "total_inactive_file" };
const V2: Names = Names { limit: "memory.max", used: "memory.current", idle: "inactive_file" };

/// The cgroups that `/proc/self/cgroup` names, where `/proc/self/mountinfo` says that they are.
fn hierarchies(proc: &Path) -> Vec<Group> {
    let mounts = read(&proc.join("self/mountinfo"));
    let groups = read(&proc.join("self/cgroup"));
    let group = |line: &str| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let names = match controllers {
            "" => &V2,
            _ if controllers.split(',').any(|c| c == "memory") => &V1,
            _ => return None,
        };
        let (mount, root) = mounts.lines().find_map(|line| mounted(line, names))?;
        // In a container the mount shows a part of the hierarchy: what is above it is out of sight.
        let path = Path::new(path).strip_prefix(&root).unwrap_or(Path::new(""));
        Some(Group { mount, path: path.strip_prefix("/").unwrap_or(path).to_owned(), names })
    };
    groups.lines().filter_map(group).collect()
}

/// The mount point of a line of mountinfo and which part of the file system it shows, if it is the hierarchy sought.
fn mounted(line: &str, names: &Names) -> Option<(PathBuf, PathBuf)> {
    let (left, right) = line.split_once(" - ")?;
    let mut right = right.split(' ');
    let (kind, options) = (right.next()?, right.nth(1).unwrap_or_default());
    let is_it = match kind {
        "cgroup2" => names.limit == V2.limit,
        "cgroup" => names.limit == V1.limit && options.split(',').any(|o| o == "memory"),
        _ => false,
    };
    let mut left = left.split(' ').skip(3);
    let (root, mount) = (left.next()?, left.next()?);
    is_it.then(|| (mount.into(), root.into()))
}

/// Bytes left under the tightest limit of a cgroup and those above it; `None` if none is limited.
fn free_in(group: &Group) -> Option<u64> {
    let number = |text: &str| text.trim().parse::<u64>().ok();
    let left = |folder: &Path| {
        let limit = number(&read(&folder.join(group.names.limit)))?;
        let used = number(&read(&folder.join(group.names.used)))?;
        let stat = read(&folder.join("memory.stat"));
        let idle = stat.lines().find_map(|line| number(line.strip_prefix(group.names.idle)?.strip_prefix(' ')?));
        Some(limit.saturating_sub(used.saturating_sub(idle.unwrap_or(0))))
    };
    group.path.ancestors().filter_map(|path| left(&group.mount.join(path))).min()
}

/// What a file says; nothing where there is none.
fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Folder;

    const MIB: u64 = 1 << 20;

    /// A machine with 1000 MiB available, and the files given. `MOUNT` stands for where its cgroups are.
    fn machine(files: &[(&str, &str)]) -> Folder {
        let folder = Folder::new();
        let mount = folder.path("fs").display().to_string();
        let meminfo = ("proc/meminfo", "MemTotal:  4096000 kB\nMemFree:   10 kB\nMemAvailable:   1024000 kB\n");
        for (name, text) in [meminfo].iter().chain(files) {
            let path = folder.path(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text.replace("MOUNT", &mount)).unwrap();
        }
        folder
    }

    fn free_on(files: &[(&str, &str)]) -> Option<u64> {
        free(&machine(files).path("proc"))
    }

    const MOUNT_V2: (&str, &str) = (
        "proc/self/mountinfo",
        "25 1 0:5 / /proc rw - proc proc rw\n30 25 0:26 / MOUNT rw,nosuid shared:4 - cgroup2 cgroup2 rw\n",
    );
    const MOUNT_V1: (&str, &str) = (
        "proc/self/mountinfo",
        "31 25 0:27 / MOUNT/cpu rw - cgroup cgroup rw,cpu,cpuacct\n32 25 0:28 / MOUNT/memory rw - cgroup cgroup rw,memory\n",
    );

    #[test]
    fn without_a_cgroup_it_is_what_the_machine_has() {
        assert_eq!(free_on(&[]), Some(1000 * MIB));
        assert_eq!(free_on(&[("proc/meminfo", "")]), None);
        assert_eq!(free_on(&[("proc/meminfo", "MemAvailable: many kB\n")]), None);
    }

    #[test]
    fn the_tightest_limit_above_a_process_counts() {
        let files = |outer, inner| {
            free_on(&[
                MOUNT_V2,
                ("proc/self/cgroup", "0::/outer/inner\n"),
                ("fs/memory.max", "garbage"),
                ("fs/outer/memory.max", outer),
                ("fs/outer/memory.current", "104857600\n"),
                ("fs/outer/inner/memory.max", inner),
                ("fs/outer/inner/memory.current", "52428800\n"),
                ("fs/outer/inner/memory.stat", "anon 1\ninactive_file 20971520\n"),
            ])
        };
        assert_eq!(files("max\n", "max\n"), Some(1000 * MIB));
        assert_eq!(files("314572800\n", "max\n"), Some(200 * MIB));
        // Of 50 MiB used 20 are file pages that can go.
        assert_eq!(files("max\n", "209715200\n"), Some(170 * MIB));
        assert_eq!(files("209715200\n", "209715200\n"), Some(100 * MIB));
        assert_eq!(files("1048576\n", "max\n"), Some(0), "more is used than was allowed later");
    }

    #[test]
    fn version_one_has_a_hierarchy_of_its_own_for_memory() {
        let files = |limit| {
            free_on(&[
                MOUNT_V1,
                ("proc/self/cgroup", "5:cpu,cpuacct:/elsewhere\n4:memory:/a/b\n0::/\n"),
                ("fs/memory/a/memory.limit_in_bytes", limit),
                ("fs/memory/a/memory.usage_in_bytes", "104857600\n"),
                ("fs/memory/a/memory.stat", "inactive_file 1\ntotal_inactive_file 10485760\n"),
                ("fs/memory/a/b/memory.limit_in_bytes", "9223372036854771712\n"),
                ("fs/memory/a/b/memory.usage_in_bytes", "104857600\n"),
            ])
        };
        assert_eq!(files("209715200\n"), Some(110 * MIB));
        assert_eq!(files("9223372036854771712\n"), Some(1000 * MIB));
    }

    /// In a container the mount is the container's part, and the process's path may be the host's or begin there.
    #[test]
    fn a_part_of_the_hierarchy_is_read_where_it_is_mounted() {
        let mount = ("proc/self/mountinfo", "30 25 0:26 /docker/x MOUNT rw - cgroup2 cgroup2 rw\n");
        for (path, folder) in [("/docker/x", "fs"), ("/docker/x/job", "fs/job"), ("/", "fs")] {
            let group = format!("0::{path}\n");
            let (limit, used) = (format!("{folder}/memory.max"), format!("{folder}/memory.current"));
            let files = [mount, ("proc/self/cgroup", &group), (&limit, "104857600"), (&used, "0")];
            assert_eq!(free_on(&files), Some(100 * MIB), "{path}");
        }
    }

    #[test]
    fn garbage_limits_nothing() {
        for cgroup in ["", ":", "::", "0:", "0::", "0::/../..", "x:y:z", "\u{0}\n\n0::/\u{fffd}"] {
            assert_eq!(free_on(&[MOUNT_V2, ("proc/self/cgroup", cgroup)]), Some(1000 * MIB), "{cgroup:?}");
        }
        for mounts in ["", " - ", "1 2 3 - cgroup2", "- cgroup2 cgroup2 rw"] {
            let files = [("proc/self/mountinfo", mounts), ("proc/self/cgroup", "0::/\n")];
            assert_eq!(free_on(&files), Some(1000 * MIB), "{mounts:?}");
        }
    }

    #[test]
    fn all_ranks_of_the_node_have_to_fit_into_half_of_it() {
        let folder = machine(&[]);
        let memory = |ranks| Memory { proc: folder.path("proc"), ranks }.look();
        assert_eq!(memory(1).fits(500 * MIB), Ok(()));
        let shortage = memory(1).fits(500 * MIB + 1).unwrap_err();
        assert_eq!(shortage, Shortage { bytes: 500 * MIB + 1, ranks: 1, free: 1000 * MIB });
        assert_eq!(memory(8).fits(62 * MIB), Ok(()));
        let text = memory(8).fits(64 * MIB).unwrap_err().to_string();
        assert!(text.contains("64 MiB for each of 8 ranks") && text.contains("1000 MiB"), "{text}");
        assert!(memory(8).fits(u64::MAX).is_err());
        assert_eq!(Memory { proc: folder.path("none"), ranks: 8 }.look().fits(u64::MAX), Ok(()));
        // This machine has something.
        assert!(Memory::new(0).look().fits(1 << 20).is_ok() && Memory::new(1).look().fits(1 << 60).is_err());
    }

    #[test]
    fn bytes_read_as_people_write_them() {
        for (bytes, text) in [(0, "0 bytes"), (1 << 20, "1 MiB"), (3 << 29, "1.5 GiB"), ((1 << 20) - 1, "1023.9 KiB")] {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
    }
}
