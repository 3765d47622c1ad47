//! Compiles and links a bridge with the C++ compiler alone.

use std::{
    env,
    ffi::OsString,
    fs::{self, File},
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
};

use anyhow::{Context, bail};
use flexmodel_run::owner_only;
use wire::{
    bridge_marker::Marker,
    bridge_sources::{ARCHIVE, FOLDER, Sources, is_source},
};

use super::{
    cache,
    probe::{Python, Torch, on_path},
};
use crate::{memory, say};

/// What the bridge shows to the world; all else would clash with what torch has loaded.
const EXPORTS: &str = "{ global: flexmodel_bridge_open; flexmodel_bridge_marker; local: *; };\n";
/// Pulled out of the archive though no C++ mentions it.
const ENTRY: &str = "-Wl,-u,flexmodel_bridge_open";
/// Bytes for a compiler: torch's headers take each past a gigabyte.
const COMPILER: u64 = 2 << 30;
/// Compilers at once at most: a container may have less memory than its machine says.
const MOST: usize = 4;

/// The sources that this FlexModel was installed with.
pub fn installed() -> anyhow::Result<Sources> {
    let folder = crate::home::home()?.join(FOLDER);
    Sources::read(&folder)
        .with_context(|| format!("{}: the bridge's sources do not read; run scripts/setup", folder.display()))
}

/// The C++ compiler: `$CXX`, which may carry options, else g++.
pub fn compiler() -> anyhow::Result<Vec<OsString>> {
    match env::var("CXX").ok().filter(|v| !v.trim().is_empty()) {
        Some(set) => Ok(set.split_whitespace().map(OsString::from).collect()),
        None => on_path("g++")
            .map(|path| vec![path.into_os_string()])
            .context("no C++ compiler: g++ is not on PATH; install it (apt install g++) or set CXX"),
    }
}

/// What can be said before anything is compiled.
pub fn ready<'a>(python: &'a Python, name: &Path) -> anyhow::Result<&'a Torch> {
    let name = name.display();
    python.suits().map_err(|e| anyhow::anyhow!("{name}: {e}"))?;
    let Some(torch) = &python.torch else {
        bail!("{name}: has no torch; install it there, or give the Python that has it");
    };
    if !torch.headers {
        bail!(
            "{name}: torch {} at {} came without its C++ headers; install the wheel from PyPI",
            torch.version,
            torch.root.display()
        );
    }
    if !python.python_h {
        bail!(
            "{name}: Python.h is not in {}; install Python's headers (apt install python{}.{}-dev)",
            python.include.display(),
            python.version.0,
            python.version.1
        );
    }
    Ok(torch)
}

/// Builds the bridge for `python` into its place in the cache, where it appears whole or not at all.
pub fn build(python: &Python, torch: &Torch, key: &str, sources: &Sources) -> anyhow::Result<PathBuf> {
    let target = cache::place(key, &sources.digest)?;
    let folder = target.parent().context("the cache has no folder")?.to_owned();
    let work = folder.join(format!("build-{}", std::process::id()));
    // A process of the same number may have died in one.
    let _ = fs::remove_dir_all(&work);
    owner_only::make_folder(&work).with_context(|| {
        format!("{}: cannot be made; set {} to a folder of yours", work.display(), wire::env::BRIDGE_CACHE)
    })?;
    say::line(&format!("building the bridge for torch {} (about 1 minute) ...", torch.version));
    let job = Job { python, torch, key, sources, work: &work, log: folder.join("build.log") };
    let made = job.run().and_then(|library| {
        // The compiler makes it as it likes.
        fs::set_permissions(&library, fs::Permissions::from_mode(0o700))?;
        let marker = cache::marker(&library)?;
        if !marker.fits(key, &sources.digest) {
            bail!(
                "the bridge that was built says it is {marker:?}; its sources in {} are not this FlexModel's",
                sources.folder.display()
            );
        }
        fs::rename(&library, &target).with_context(|| target.display().to_string())
    });
    // Objects of a failed build are of no use either; the log lies beside them.
    let _ = fs::remove_dir_all(&work);
    made.map(|()| target)
}

struct Job<'a> {
    python: &'a Python,
    torch: &'a Torch,
    key: &'a str,
    sources: &'a Sources,
    work: &'a Path,
    log: PathBuf,
}

impl Job<'_> {
    fn run(&self) -> anyhow::Result<PathBuf> {
        let compiler = compiler()?;
        let log = owner_only::file().write(true).create(true).truncate(true).open(&self.log);
        log.with_context(|| self.log.display().to_string())?;
        let at_once = compilers(thread::available_parallelism().map_or(1, usize::from), memory::available());
        let mut objects = Vec::new();
        let mut running: Vec<(PathBuf, Child)> = Vec::new();
        for (number, source) in self.sources.files.iter().filter(|f| is_source(f)).enumerate() {
            if running.len() >= at_once {
                self.finish(running.remove(0), &mut running)?;
            }
            let object = self.work.join(format!("{number}.o"));
            let mut command = self.start(&compiler);
            command.args(self.flags()).arg("-c").arg(self.sources.folder.join(source)).arg("-o").arg(&object);
            running.push((source.clone(), self.spawn(command, &compiler)?));
            objects.push(object);
        }
        while !running.is_empty() {
            self.finish(running.remove(0), &mut running)?;
        }
        let library = self.work.join(cache::LIBRARY);
        let mut command = self.start(&compiler);
        command.args(self.link_flags()?).arg("-o").arg(&library).args(&objects).arg(self.sources.folder.join(ARCHIVE));
        command.arg(flag("-L", &self.torch.root.join("lib")));
        command.args(["-ltorch_python", "-ltorch_cpu", "-ltorch", "-lc10", "-lpthread", "-ldl"]);
        let child = self.spawn(command, &compiler)?;
        self.finish(("the link".into(), child), &mut [])?;
        Ok(library)
    }

    fn start(&self, compiler: &[OsString]) -> Command {
        let mut command = Command::new(compiler.first().map_or("g++".as_ref(), |c| c.as_os_str()));
        command.args(compiler.iter().skip(1)).env_remove("LD_PRELOAD").env("LC_ALL", "C");
        command
    }

    fn flags(&self) -> Vec<OsString> {
        let include = self.torch.root.join("include");
        let mut flags: Vec<OsString> = vec![
            standard(&self.torch.version).into(),
            "-O2".into(),
            "-fPIC".into(),
            "-fvisibility=hidden".into(),
            "-Wall".into(),
            format!("-D_GLIBCXX_USE_CXX11_ABI={}", self.torch.cxx11_abi).into(),
            format!("-DFLEXMODEL_BRIDGE_MARKER=\"{}\"", Marker::new(self.key, &self.sources.digest)).into(),
            flag("-I", &self.sources.folder.join("include")),
        ];
        // torch's headers are not ours to warn about.
        for folder in [include.clone(), include.join("torch/csrc/api/include"), self.python.include.clone()] {
            flags.push("-isystem".into());
            flags.push(folder.into_os_string());
        }
        flags
    }

    fn link_flags(&self) -> anyhow::Result<Vec<OsString>> {
        let exports = self.work.join("exports.map");
        fs::write(&exports, EXPORTS).with_context(|| exports.display().to_string())?;
        let mut flags: Vec<OsString> =
            ["-shared", ENTRY, "-Wl,--gc-sections", "-Wl,--strip-debug"].map(OsString::from).into();
        flags.push(flag("-Wl,--version-script=", &exports));
        Ok(flags)
    }

    fn spawn(&self, mut command: Command, compiler: &[OsString]) -> anyhow::Result<Child> {
        let mut log = File::options().append(true).open(&self.log)?;
        writeln!(log, "{command:?}")?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn().with_context(|| {
            let words: Vec<_> = compiler.iter().map(|word| word.to_string_lossy()).collect();
            format!("the C++ compiler ({}) cannot be started; install g++ or set CXX", words.join(" "))
        })
    }

    fn finish(&self, (what, mut child): (PathBuf, Child), others: &mut [(PathBuf, Child)]) -> anyhow::Result<()> {
        let status = child.wait()?;
        if status.success() {
            return Ok(());
        }
        for (_, other) in others.iter_mut() {
            // It may have ended by itself; either way it is waited for.
            let _ = other.kill();
            let _ = other.wait();
        }
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let errors: Vec<&str> = log.lines().filter(|l| is_error(l)).take(3).collect();
        bail!(
            "the bridge for {} does not build ({}: {status}); all of it is in {}\n{}",
            self.key,
            what.display(),
            self.log.display(),
            errors.join("\n")
        )
    }
}

/// How many compilers run at once, by cores and by bytes of free memory.
fn compilers(cores: usize, free: Option<u64>) -> usize {
    let fit = free.map_or(1, |free| usize::try_from(free / COMPILER).unwrap_or(MOST));
    cores.min(fit).clamp(1, MOST)
}

/// Whether a compiler's or linker's line says what is wrong.
fn is_error(line: &str) -> bool {
    ["error:", "undefined reference", "cannot find", "Killed"].iter().any(|word| line.contains(word))
}

fn flag(name: &str, path: &Path) -> OsString {
    let mut flag = OsString::from(name);
    flag.push(path);
    flag
}

/// The C++ that a torch's headers are written in.
fn standard(version: &str) -> &'static str {
    let mut numbers = version.split('.').map(|n| n.parse::<u32>().unwrap_or(0));
    let (major, minor) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if (major, minor) >= (2, 12) { "-std=c++20" } else { "-std=c++17" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compilers_run_together_as_cores_and_memory_allow() {
        let gib = |n: u64| Some(n << 30);
        assert_eq!(compilers(16, gib(128)), MOST);
        assert_eq!(compilers(2, gib(128)), 2);
        assert_eq!(compilers(16, gib(5)), 2);
        assert_eq!(compilers(16, gib(1)), 1);
        assert_eq!(compilers(16, None), 1);
    }

    #[test]
    fn newer_headers_want_a_newer_standard() {
        assert_eq!(standard("2.11.0+cu130"), "-std=c++17");
        assert_eq!(standard("2.12.0"), "-std=c++20");
        assert_eq!(standard("2.15.0a0+git1"), "-std=c++20");
    }
}
