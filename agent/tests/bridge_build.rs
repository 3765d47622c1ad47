//! Bridges built with the real C++ compiler, for an interpreter and a torch that are stand-ins.

use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use tempfile::TempDir;

/// Source of a bridge: the marker, and something from a header of the stand-in torch.
const SOURCE: &str = r#"
#include <torch/extension.h>
extern "C" __attribute__((visibility("default"), used)) const char flexmodel_bridge_marker[] = FLEXMODEL_BRIDGE_MARKER;
extern "C" int hidden() { return TORCH_ANSWER; }
"#;

struct Site {
    dir: TempDir,
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn done(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", text(&output.stderr));
}

impl Site {
    fn new() -> Self {
        let site = Self { dir: tempfile::tempdir().unwrap() };
        let lib = site.path("torch/lib");
        for folder in ["home/bridge/include", "torch/include/torch/csrc/api/include", "torch/lib", "python"] {
            fs::create_dir_all(site.path(folder)).unwrap();
        }
        site.write("home/bridge/a.cc", SOURCE);
        site.write("home/bridge/include/own.h", "#pragma once\n");
        site.write("torch/include/torch/extension.h", "#define TORCH_ANSWER 42\n");
        site.write("rust.c", "int flexmodel_bridge_open(void) { return 1; }\n");
        site.write("empty.c", "");
        done(Command::new("gcc").args(["-fPIC", "-c", "-o"]).arg(site.path("rust.o")).arg(site.path("rust.c")));
        let archive = site.path("home/bridge/libflexmodel_bridge.a");
        done(Command::new("ar").arg("rcs").arg(archive).arg(site.path("rust.o")));
        for name in ["torch_python", "torch_cpu", "torch", "c10"] {
            let library = lib.join(format!("lib{name}.so"));
            done(Command::new("gcc").args(["-shared", "-o"]).arg(library).arg(site.path("empty.c")));
        }
        site.python("2.11.0");
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    /// An interpreter that answers for a torch of this version.
    fn python(&self, version: &str) {
        let answer = serde_json::json!({
            "python": [3, 11, 7], "executable": "python", "implementation": "cpython", "free_threaded": false,
            "include": self.path("python"), "python_h": true,
            "torch": {"root": self.path("torch"), "version": version, "cuda": null, "cxx11_abi": 1, "headers": true},
        });
        self.interpreter(&format!("/bin/cat <<'END'\nhello from a site customisation\n{answer}\nEND\n"));
    }

    fn interpreter(&self, script: &str) {
        self.write("python3", &format!("#!/bin/sh\n{script}"));
        fs::set_permissions(self.path("python3"), fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_flexmodel"));
        command.args(args).env("FLEXMODEL_HOME", self.path("home")).env("FLEXMODEL_BRIDGE_CACHE", self.path("cache"));
        command.env_remove("CXX").env_remove("FLEXMODEL_BRIDGE").stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn build(&self, more: &[&str]) -> Output {
        let python = self.path("python3");
        self.command(&[&["bridge", "build", "--python", python.to_str().unwrap()], more].concat()).output().unwrap()
    }

    /// The bridge of the sources as they are.
    fn built(&self) -> PathBuf {
        let sources = wire::bridge_sources::Sources::read(&self.path("home/bridge")).unwrap();
        let folder = format!("cache/torch2.11.0-cudanone-cxx11abi1-cp311-{}", sources.digest);
        self.path(&folder).join("libflexmodel_torch.so")
    }
}

fn refused(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stdout));
    text(&output.stderr)
}

fn exports(library: &Path) -> Vec<String> {
    let output =
        Command::new("nm").args(["-D", "--defined-only", "--format=just-symbols"]).arg(library).output().unwrap();
    text(&output.stdout).lines().map(str::to_owned).collect()
}

#[test]
fn a_bridge_is_built_once_and_again_when_its_sources_change() {
    let site = Site::new();
    let first = site.build(&[]);
    assert!(first.status.success(), "{}", text(&first.stderr));
    assert!(text(&first.stderr).contains("building the bridge for torch 2.11.0"));
    assert!(text(&first.stdout).starts_with("built: torch2.11.0-cudanone-cxx11abi1-cp311\n"));
    assert_eq!(exports(&site.built()), ["flexmodel_bridge_marker", "flexmodel_bridge_open"]);
    let second = site.build(&["--json"]);
    assert!(text(&second.stderr).is_empty(), "{}", text(&second.stderr));
    assert_eq!(serde_json::from_slice::<serde_json::Value>(&second.stdout).unwrap()["built"], false);
    let before = site.built();
    site.write("home/bridge/include/own.h", "#pragma once\n// changed\n");
    assert!(text(&site.build(&[]).stdout).starts_with("built:"));
    assert!(before.exists() && site.built().exists() && before != site.built());
    let list = text(&site.command(&["bridge", "list"]).output().unwrap().stdout);
    assert!(list.contains("current") && list.contains("torch2.11.0-cudanone-cxx11abi1-cp311"), "{list}");
    assert!(list.contains("from other sources"), "{list}");
    let left: Vec<_> = fs::read_dir(site.built().parent().unwrap()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().starts_with("build-")), "{left:?}");
}

#[test]
fn flexmodels_of_different_sources_share_a_cache_without_building_again() {
    let site = Site::new();
    let (mine, theirs) = ("#pragma once\n", "#pragma once\n// theirs\n");
    let stamps: Vec<_> = [mine, theirs, mine, theirs]
        .iter()
        .map(|header| {
            site.write("home/bridge/include/own.h", header);
            assert!(site.build(&[]).status.success());
            fs::metadata(site.built()).unwrap().modified().unwrap()
        })
        .collect();
    assert_eq!((stamps[0], stamps[1]), (stamps[2], stamps[3]));
}

#[test]
fn what_a_build_makes_is_its_owners_alone_under_any_umask_also_while_it_compiles() {
    for mask in [0o000, 0o022, 0o777] {
        let site = Site::new();
        // What is there while the compiler runs, and what it made before.
        let seen = site.path("seen");
        site.write(
            "compiler",
            &format!(
                "#!/bin/sh\nfind {} -perm /077 -printf '%m %p\\n' >> {}\ng++ \"$@\"\n",
                site.path("cache").display(),
                seen.display()
            ),
        );
        fs::set_permissions(site.path("compiler"), fs::Permissions::from_mode(0o755)).unwrap();
        let python = site.path("python3");
        let mut command = site.command(&["bridge", "build", "--python", python.to_str().unwrap()]);
        command.env("CXX", site.path("compiler"));
        // SAFETY: umask is async-signal-safe.
        unsafe {
            command.pre_exec(move || {
                libc::umask(mask);
                Ok(())
            })
        };
        done(&mut command);
        assert_eq!(fs::read_to_string(seen).unwrap(), "", "umask {mask:o}");
        let left = Command::new("find").arg(site.path("cache")).args(["-perm", "/077"]).output().unwrap();
        assert_eq!(text(&left.stdout), "", "umask {mask:o}");
        assert!(site.built().is_file());
    }
}

#[test]
fn a_cache_that_others_may_write_to_is_refused_at_every_step_by_every_command() {
    let site = Site::new();
    site.write("home/libflexmodel.so", "");
    site.write("home/libflexmodel_engine.so", "");
    assert!(site.build(&[]).status.success());
    let (library, cache) = (site.built(), site.path("cache"));
    let mode = |path: &Path, mode: u32| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    let refused_for = |step: &Path, why: &str| {
        let said = format!("{} {why}", step.display());
        let line = refused(&site.build(&[]));
        assert!(line.lines().count() == 1 && line.contains(&said), "{line}");
        assert!(line.contains("FLEXMODEL_BRIDGE_CACHE"), "{line}");
        let (python, out) = (site.path("python3"), site.path("run"));
        for program in ["python3", "launcher"].map(|name| site.path(name)) {
            site.write("launcher", &format!("#!{}\n", python.display()));
            mode(&site.path("launcher"), 0o755);
            let mut command = site.command(&["run", "--hooks", "a", "--out", out.to_str().unwrap(), "--"]);
            let output = command.arg(program).env_remove("FLEXMODEL_DISABLE").output().unwrap();
            let line = refused(&output);
            assert!(line.contains(&said) && !out.exists(), "{line}");
        }
        let list = text(&site.command(&["bridge", "list"]).output().unwrap().stdout);
        assert!(list.contains("not trusted") && list.contains(&said), "{list}");
        let mut named = site.command(&["bridge", "build", "--python", python.to_str().unwrap()]);
        let line = refused(&named.env("FLEXMODEL_BRIDGE", &library).output().unwrap());
        assert!(line.contains(&said), "{line}");
    };
    for (step, private) in
        [(site.dir.path(), 0o700), (&cache, 0o700), (library.parent().unwrap(), 0o700), (&library, 0o700)]
    {
        for others in [0o020, 0o002] {
            mode(step, private | others);
            refused_for(step, "may be written to by others");
        }
        mode(step, private);
    }
    // SAFETY: geteuid has no effects.
    if unsafe { libc::geteuid() } == 0 {
        for step in [&cache, &library] {
            std::os::unix::fs::chown(step, Some(65534), None).unwrap();
            refused_for(step, "belongs to user 65534");
            std::os::unix::fs::chown(step, Some(0), None).unwrap();
        }
    } else {
        eprintln!("NOT TESTED without root: a cache that belongs to another user");
    }
    mode(site.dir.path(), 0o1777);
    let again = site.build(&[]);
    assert!(again.status.success(), "a folder like /tmp above it: {}", text(&again.stderr));
}

#[test]
fn an_error_of_the_compiler_is_shown_with_where_the_rest_is() {
    let site = Site::new();
    site.write("home/bridge/b.cc", "int x = nonsense;\n");
    let line = refused(&site.build(&[]));
    assert!(
        line.contains("b.cc") && line.contains("'nonsense' was not declared") && line.contains("build.log"),
        "{line}"
    );
    assert!(!site.built().exists());
    fs::remove_file(site.path("home/bridge/b.cc")).unwrap();
    site.write(
        "home/bridge/a.cc",
        &SOURCE.replace("FLEXMODEL_BRIDGE_MARKER", "\"FLEXMODEL-BRIDGE key=x digest=0 abi=2;\""),
    );
    assert!(refused(&site.build(&[])).contains("not this FlexModel's"), "a bridge that lies was kept");
    assert!(!site.built().exists());
}

#[test]
fn processes_that_want_the_same_bridge_at_once_build_it_once() {
    let site = Site::new();
    let python = site.path("python3");
    let args = ["bridge", "build", "--json", "--python", python.to_str().unwrap()];
    let running: Vec<_> = (0..4).map(|_| site.command(&args).spawn().unwrap()).collect();
    let answers: Vec<String> = running.into_iter().map(|c| text(&c.wait_with_output().unwrap().stdout)).collect();
    assert_eq!(answers.iter().filter(|a| a.contains("\"built\":true")).count(), 1, "{answers:?}");
    assert_eq!(answers.iter().filter(|a| a.contains("\"built\":false")).count(), 3, "{answers:?}");
}

#[test]
fn a_bridge_named_by_hand_must_fit_the_torch() {
    let site = Site::new();
    assert!(site.build(&[]).status.success());
    let named = |path: &Path| {
        let python = site.path("python3");
        let args = ["bridge", "build", "--python", python.to_str().unwrap()];
        site.command(&args).env("FLEXMODEL_BRIDGE", path).output().unwrap()
    };
    assert!(named(&site.built()).status.success());
    assert!(refused(&named(&site.path("rust.o"))).contains("not a bridge of ours"));
    assert!(refused(&named(&site.path("nothing.so"))).contains("nothing.so"));
    let built = site.built();
    site.write("home/bridge/include/own.h", "#pragma once\n// changed\n");
    assert!(refused(&named(&built)).contains("from other sources"));
    site.python("2.15.0");
    let line = refused(&named(&built));
    assert!(line.contains("torch2.11.0-") && line.contains("torch2.15.0-"), "{line}");
}

#[test]
fn what_is_missing_is_named_with_the_way_out() {
    let site = Site::new();
    let with = |change: &str, instead: &str| {
        site.python("2.11.0");
        let script = fs::read_to_string(site.path("python3")).unwrap();
        assert!(script.contains(change), "{script}");
        site.write("python3", &script.replace(change, instead));
        refused(&site.build(&[]))
    };
    assert!(with("\"python\":[3,11,7]", "\"python\":[3,9,2]").contains("Python 3.9.2 is too old"));
    assert!(with("\"python_h\":true", "\"python_h\":false").contains("python3.11-dev"));
    assert!(with("\"headers\":true", "\"headers\":false").contains("C++ headers"));
    site.interpreter(
        "echo '{\"python\":[3,11,7],\"executable\":\"p\",\"implementation\":\"cpython\",\"torch\":null}'\n",
    );
    assert!(refused(&site.build(&[])).contains("has no torch"));
    site.interpreter("echo oh no >&2; exit 3\n");
    assert!(refused(&site.build(&[])).contains("oh no"));
    site.python("2.11.0");
    let python = site.path("python3");
    let args = ["bridge", "build", "--python", python.to_str().unwrap()];
    let without = site.command(&args).env("PATH", "/nonexistent").output().unwrap();
    assert!(refused(&without).contains("apt install g++"), "the interpreter itself needs /bin/sh alone");
}

#[test]
fn a_python_that_taps_cannot_work_in_is_one_line_with_the_way_out_and_leaves_nothing() {
    let site = Site::new();
    site.write("home/libflexmodel.so", "");
    site.write("home/libflexmodel_engine.so", "");
    let run = |change: &dyn Fn(&mut Command)| {
        let (python, out) = (site.path("python3"), site.path("runs/first"));
        let (python, shown) = (python.to_str().unwrap(), out.to_str().unwrap());
        let mut command = site.command(&["run", "--hooks", "a", "--out", shown, "--", python, "train.py"]);
        change(command.env_remove("FLEXMODEL_HOOKS").env_remove("FLEXMODEL_DISABLE"));
        let output = command.output().unwrap();
        let line = refused(&output);
        assert!(line.starts_with("flexmodel: ") && line.lines().count() == 1, "{line}");
        assert!(output.stdout.is_empty() && !site.path("runs").exists(), "{line}");
        line
    };
    site.interpreter("echo '{\"python\":[3,9,2],\"executable\":\"p\"}'\n");
    let old = run(&|_| {});
    assert!(old.contains("python3: Python 3.9.2 is too old; use 3.10 or newer"), "{old}");
    site.interpreter(
        "echo '{\"python\":[3,11,7],\"executable\":\"p\",\"implementation\":\"cpython\",\"torch\":null}'\n",
    );
    let bare = run(&|_| {});
    assert!(bare.contains("python3: has no torch; install it there, or give the Python that has it"), "{bare}");
    site.python("2.11.0");
    let other = site.path("rust.o");
    let refused = run(&|command| _ = command.env("FLEXMODEL_BRIDGE", &other));
    assert!(refused.contains("rust.o") && refused.contains("not a bridge of ours"), "{refused}");
}

#[test]
fn doctor_says_what_is_missing_and_ends_with_1() {
    let site = Site::new();
    let python = site.path("python3");
    let output = site.command(&["doctor", "--json", "--python", python.to_str().unwrap()]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "there is no preload library in this home");
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let check = |name: &str| {
        answer["checks"]
            .as_array()
            .unwrap()
            .iter()
            .find(|c| c["name"] == name)
            .unwrap_or_else(|| panic!("{answer}"))
            .clone()
    };
    assert_eq!(check("preload library")["state"], "no");
    assert_eq!(check("preload library")["fix"], "run scripts/setup");
    assert_eq!(check("torch")["state"], "ok");
    assert_eq!(check("bridge")["state"], "absent");
    assert_eq!(check("unix sockets")["state"], "ok");
    let lines = text(&site.command(&["doctor", "--python", "/nonexistent/python"]).output().unwrap().stdout);
    assert!(lines.contains("no  python"), "{lines}");
}
