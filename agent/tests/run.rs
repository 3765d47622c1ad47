//! `flexmodel run` around commands that are no Python, with a rank played by the `produce` example.

mod rank;

use std::{
    fs,
    io::Read,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use rank::{info, total, verify, wait_until};

/// A home with a preload library that the dynamic linker refuses with a line and goes on without, unless there is one.
fn home(folder: &Path) -> PathBuf {
    let home = folder.join("home");
    fs::create_dir_all(&home).unwrap();
    for name in ["libflexmodel.so", "libflexmodel_engine.so"] {
        if !home.join(name).exists() {
            fs::write(home.join(name), "").unwrap();
        }
    }
    home
}

fn example(name: &str) -> PathBuf {
    let example = Path::new(env!("CARGO_BIN_EXE_flexmodel")).with_file_name("examples").join(name);
    assert!(example.is_file(), "cargo test builds examples too");
    example
}

/// A rank that captures until `folder/stop` is there or `steps` are over.
fn produce(steps: u32) -> String {
    format!(
        "{} --socket ${{FLEXMODEL_AGENT#unix:}} --steps {steps} --elements 64 --pause 2 --slab 16M",
        example("produce").display()
    )
}

/// The numbers of the signals that reached `await_signal`.
fn caught(folder: &Path) -> Vec<i32> {
    let lines = fs::read_to_string(folder.join("caught")).unwrap_or_default();
    lines.lines().map(|number| number.parse().unwrap()).collect()
}

struct Run {
    child: Child,
    out: PathBuf,
}

impl Run {
    fn start(folder: &Path, script: &str) -> Self {
        Self::with(folder, script, |_| {})
    }

    fn with(folder: &Path, script: &str, change: impl FnOnce(&mut Command)) -> Self {
        let out = folder.join("run");
        let mut command = Command::new(env!("CARGO_BIN_EXE_flexmodel"));
        command.args(["run", "--hooks", "layers.*.mlp", "--out"]).arg(&out).args(["--", "bash", "-c", script]);
        command.env("FLEXMODEL_HOME", home(folder)).env_remove("FLEXMODEL_HOOKS").env_remove("FLEXMODEL_DISABLE");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        unignore_signals(&mut command);
        change(&mut command);
        Self { child: command.spawn().unwrap(), out }
    }

    /// Exit code, stdout, stderr.
    fn wait(mut self) -> (Option<i32>, String, String) {
        let (mut out, mut err) = (String::new(), String::new());
        self.child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        self.child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        (self.child.wait().unwrap().code(), out, err)
    }

    /// The agent's process.
    fn agent(&self) -> i32 {
        let children = format!("/proc/{0}/task/{0}/children", self.child.id());
        let mut found = None;
        wait_until("the agent", || {
            let all = fs::read_to_string(&children).unwrap_or_default();
            found = all.split_whitespace().map(|pid| pid.parse().unwrap()).find(|pid: &i32| {
                fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|c| c.windows(6).any(|w| w == b"\0agent"))
            });
            found.is_some()
        });
        found.unwrap()
    }

    fn parts(&self) -> usize {
        rank::parts(&self.out).len()
    }
}

/// Lets signals end what the command starts, also where the tests themselves run with some ignored (as under nohup).
fn unignore_signals(command: &mut Command) {
    // SAFETY: signal is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGUSR1] {
                libc::signal(signal, libc::SIG_DFL);
            }
            Ok(())
        })
    };
}

fn kill(pid: i32, signal: i32) {
    // SAFETY: a signal to a process that this test started.
    unsafe { libc::kill(pid, signal) };
}

fn is_alive(pid: i32) -> bool {
    // A zombie whose parent is gone or busy counts as dead.
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| !s.contains(") Z "))
}

#[test]
fn the_summary_says_what_was_captured_and_stdout_is_the_jobs() {
    let dir = tempfile::tempdir().unwrap();
    let run = Run::start(dir.path(), &format!("echo mine; {}; exit 3", produce(5)));
    let out = run.out.clone();
    let (code, stdout, stderr) = run.wait();
    assert_eq!((code, stdout.as_str()), (Some(3), "mine\n"), "{stderr}");
    let shown = out.to_str().unwrap();
    assert!(stderr.contains("55 records") && stderr.contains(shown) && stderr.contains("flexmodel show"), "{stderr}");
    verify(&out);
    assert_eq!(info(&out)["exit_code"], 3);
    assert_eq!(info(&out)["command"][0], "bash");
    assert_eq!(info(&out)["hooks"], "layers.*.mlp");
}

#[test]
fn an_agent_that_is_killed_costs_captures_and_is_said_once() {
    let dir = tempfile::tempdir().unwrap();
    let stop = dir.path().join("stop");
    let run = Run::start(dir.path(), &until(&stop));
    let out = run.out.clone();
    wait_until("some parts", || run.parts() > 30);
    kill(run.agent(), libc::SIGKILL);
    fs::write(&stop, "").unwrap();
    let (code, _, stderr) = run.wait();
    assert_eq!(code, Some(7), "{stderr}");
    assert_eq!(stderr.matches("was killed by signal 9").count(), 1, "{stderr}");
    assert!(stderr.contains(" records, "), "{stderr}");
    verify(&out);
    assert_eq!(total(&out, "parts") as usize, rank::parts(&out).len());
    assert_eq!(info(&out)["exit_code"], 7);
    assert!(!rank::lines(&out, "sealed").is_empty());
}

/// A rank that captures until `stop` is there; then the command ends with 7.
fn until(stop: &Path) -> String {
    format!("{} & while ! [ -e {} ]; do sleep 0.02; done; kill $!; exit 7", produce(100_000), stop.display())
}

#[test]
fn an_agent_that_is_stopped_goes_on_at_the_end_and_takes_in_what_came_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let stop = dir.path().join("stop");
    let run = Run::start(dir.path(), &until(&stop));
    let out = run.out.clone();
    wait_until("some parts", || run.parts() > 30);
    let agent = run.agent();
    kill(agent, libc::SIGSTOP);
    wait_until("the stop", || fs::read_to_string(format!("/proc/{agent}/stat")).unwrap().contains(") T "));
    let before = run.parts();
    // There is room for some thousand tensors more, and nobody who reads them.
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(run.parts(), before);
    fs::write(&stop, "").unwrap();
    let (code, _, stderr) = run.wait();
    assert_eq!(code, Some(7), "{stderr}");
    assert!(!stderr.contains("does not get on"), "{stderr}");
    assert!(rank::parts(&out).len() > before + 20, "{stderr}");
    verify(&out);
    assert_eq!(info(&out)["exit_code"], 7);
}

#[test]
fn an_agent_that_does_not_go_on_is_left_and_what_is_lost_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let stop = dir.path().join("stop");
    let err = dir.path().join("err");
    // Not a pipe, which the agent would keep open.
    let run = Run::with(dir.path(), &until(&stop), |command| _ = command.stderr(fs::File::create(&err).unwrap()));
    wait_until("some parts", || run.parts() > 30);
    let agent = run.agent();
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Whoever stops it does so again and again.
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                kill(agent, libc::SIGSTOP);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        fs::write(&stop, "").unwrap();
        let mut child = run.child;
        let code = child.wait().unwrap().code();
        ended.store(true, Ordering::Relaxed);
        let stderr = fs::read_to_string(&err).unwrap();
        assert_eq!(code, Some(7), "{stderr}");
        let said = format!("the agent (process {agent}) does not get on with writing to ");
        assert!(stderr.contains(&said) && stderr.contains(" records, "), "{stderr}");
    });
    kill(agent, libc::SIGCONT);
    wait_until("the agent's end", || !is_alive(agent));
}

/// Root could open what its own umask closes.
fn as_an_ordinary_user(command: &mut Command, umask: libc::mode_t, folder: &Path) {
    // SAFETY: geteuid has no effects.
    let root = unsafe { libc::geteuid() } == 0;
    if root {
        std::os::unix::fs::chown(folder, Some(65534), None).unwrap();
    }
    // SAFETY: these calls are async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            libc::umask(umask);
            if root && (libc::setgid(65534) != 0 || libc::setuid(65534) != 0) {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        })
    };
}

#[test]
fn a_run_is_its_owners_alone_under_any_umask_and_the_command_keeps_its_own() {
    for mask in [0o000, 0o022, 0o777] {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let group = dir.path().join("group");
        home(&group);
        fs::set_permissions(&group, fs::Permissions::from_mode(0o777)).unwrap();
        let script = format!(
            "umask; {} > /dev/null; socket=${{FLEXMODEL_AGENT#unix:}}; find $(dirname $socket) {}/run -perm /077; exit 5",
            produce(5),
            group.display()
        );
        let run = Run::with(&group, &script, |command| as_an_ordinary_user(command, mask, &group));
        let out = run.out.clone();
        let (code, stdout, stderr) = run.wait();
        assert_eq!((code, stdout), (Some(5), format!("{mask:04o}\n")), "{stderr}");
        assert!(stderr.contains("55 records"), "{stderr}");
        let found =
            Command::new("find").arg(&out).args(["-perm", "/077", "-o", "!", "-perm", "-600"]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&found.stdout), "", "umask {mask:o}");
        assert!(out.join("shard-00000.safetensors").is_file());
        verify(&out);
    }
}

#[test]
fn a_folder_that_others_may_write_to_or_own_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let refused = |way_out: &str| {
        let (code, stdout, stderr) = Run::start(dir.path(), "echo ran").wait();
        assert_eq!((code, stdout.as_str()), (Some(1), ""), "{stderr}");
        assert!(stderr.lines().count() == 1 && stderr.contains(way_out), "{stderr}");
        let mut agent = Command::new(env!("CARGO_BIN_EXE_flexmodel"));
        agent.args(["agent", "--socket"]).arg(dir.path().join("s")).arg("--out").arg(&out);
        let done = agent.output().unwrap();
        assert!(!done.status.success() && String::from_utf8_lossy(&done.stderr).contains(way_out), "{done:?}");
    };
    fs::create_dir(&out).unwrap();
    for mode in [0o770, 0o707, 0o1777] {
        fs::set_permissions(&out, fs::Permissions::from_mode(mode)).unwrap();
        refused(&format!("may be written to by others (mode {mode:o})"));
    }
    fs::set_permissions(&out, fs::Permissions::from_mode(0o755)).unwrap();
    // SAFETY: geteuid has no effects.
    if unsafe { libc::geteuid() } == 0 {
        std::os::unix::fs::chown(&out, Some(65534), None).unwrap();
        refused("belongs to user 65534");
        fs::rename(&out, dir.path().join("theirs")).unwrap();
        std::os::unix::fs::symlink("theirs", &out).unwrap();
        refused("belongs to user 65534");
        fs::remove_file(&out).unwrap();
        fs::create_dir(&out).unwrap();
    } else {
        eprintln!("NOT TESTED without root: a folder that belongs to another user");
    }
    assert_eq!(Run::start(dir.path(), "exit 3").wait().0, Some(3));
}

#[test]
fn when_run_is_killed_the_agent_stays_for_the_job_and_then_ends() {
    let dir = tempfile::tempdir().unwrap();
    // The library is preloaded by a link where ld.so would not take its path.
    let folder = dir.path().join("a b");
    fs::create_dir_all(&folder).unwrap();
    let stop = dir.path().join("stop");
    let script = format!("{} & while ! [ -e {} ]; do sleep 0.02; done; kill $!", produce(100_000), stop.display());
    let mut run =
        Run::start(&folder, &format!("echo ${{FLEXMODEL_AGENT#unix:}} > {}.socket; {script}", stop.display()));
    let out = run.out.clone();
    wait_until("some parts", || run.parts() > 30);
    let agent = run.agent();
    run.child.kill().unwrap();
    run.child.wait().unwrap();
    let before = run.parts();
    wait_until("more parts", || run.parts() > before + 20);
    fs::write(&stop, "").unwrap();
    wait_until("the agent's end", || !is_alive(agent));
    let socket = fs::read_to_string(dir.path().join("stop.socket")).unwrap();
    let private = Path::new(socket.trim_end()).parent().unwrap();
    assert!(!private.exists(), "{} is left behind", private.display());
    verify(&out);
    assert!(info(&out)["finished_ns"].is_u64());
}

#[test]
fn a_key_on_the_terminal_reaches_the_command_once() {
    let dir = tempfile::tempdir().unwrap();
    // A terminal of its own for run and what it starts; `script` types Ctrl-C into it. Its shell is the user's, or one
    // that dies of the key, so it has to make room.
    let folder = dir.path().display();
    let typed = format!("while ! [ -e {folder}/ready ]; do sleep 0.05; done; sleep 0.2; printf '\\003'; sleep 3");
    let line = format!(
        "exec {} run --hooks a --out {folder}/run -- {} {folder}",
        env!("CARGO_BIN_EXE_flexmodel"),
        example("await_signal").display()
    );
    let mut terminal = Command::new("bash");
    terminal.args(["-c", &format!("( {typed} ) | script -qec '{line}' /dev/null")]);
    unignore_signals(terminal.env("FLEXMODEL_HOME", home(dir.path())));
    let done = terminal.output().unwrap();
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    assert_eq!(caught(dir.path()), [libc::SIGINT], "{text}");
    assert_eq!(done.status.code(), Some(4), "{text}");
    assert!(text.contains("records"), "{text}");
}

#[test]
fn signals_from_elsewhere_reach_the_command() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGUSR1] {
        let dir = tempfile::tempdir().unwrap();
        let command = format!("exec {} {}", example("await_signal").display(), dir.path().display());
        let run = Run::start(dir.path(), &command);
        wait_until("the command", || dir.path().join("ready").exists());
        kill(run.child.id() as i32, signal);
        let (code, _, stderr) = run.wait();
        assert_eq!(code, Some(4), "signal {signal}: {stderr}");
        assert_eq!(caught(dir.path()), [signal], "{stderr}");
    }
}

#[test]
fn bad_use_is_one_line_and_nothing_runs() {
    let dir = tempfile::tempdir().unwrap();
    let full = dir.path().join("run");
    fs::create_dir_all(&full).unwrap();
    fs::write(full.join("mine"), "").unwrap();
    let (code, stdout, stderr) = Run::start(dir.path(), "echo ran").wait();
    assert_eq!((code, stdout.as_str()), (Some(1), ""));
    assert!(stderr.lines().count() == 1 && stderr.contains("run-2"), "{stderr}");
    for (arguments, code, word) in [
        (&["run", "--hooks", "a:forwrd", "--", "echo", "ran"][..], 2, "forward"),
        (&["run", "--hooks", "w:param|zero", "--", "echo", "ran"], 2, "param"),
        (&["run", "--", "echo", "ran"], 2, "--hooks"),
        (&["run", "--hooks", "a"], 2, "COMMAND"),
        (&["run", "--hooks", "a", "--on-full", "maybe", "--", "echo", "ran"], 2, "maybe"),
        (&["run", "--hooks", "a", "--", "no-such-command-here"], 127, "no-such-command-here"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_flexmodel"));
        command
            .args(arguments)
            .current_dir(dir.path())
            .env_remove("FLEXMODEL_HOOKS")
            .env("FLEXMODEL_HOME", home(dir.path()));
        let done = command.output().unwrap();
        let stderr = String::from_utf8(done.stderr).unwrap();
        assert_eq!(done.status.code(), Some(code), "{stderr}");
        assert!(stderr.lines().count() == 1 && stderr.starts_with("flexmodel: ") && stderr.contains(word), "{stderr}");
        assert!(done.stdout.is_empty() && !dir.path().join("runs").exists());
    }
}

#[test]
fn a_folder_that_cannot_be_written_is_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    for out in [Path::new("/proc/nowhere/run"), &file.join("run"), &file] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_flexmodel"));
        command.args(["run", "--hooks", "a", "--out"]).arg(out).args(["--", "echo", "ran"]);
        let done = command.env("FLEXMODEL_HOME", home(dir.path())).output().unwrap();
        let stderr = String::from_utf8(done.stderr).unwrap();
        assert_eq!((done.status.code(), done.stdout.as_slice()), (Some(1), &b""[..]), "{stderr}");
        let said = format!("flexmodel: cannot write to {}: ", out.display());
        assert!(stderr.lines().count() == 1 && stderr.starts_with(&said) && stderr.contains("--out"), "{stderr}");
    }
}

#[test]
fn what_fails_before_the_command_starts_leaves_no_folder() {
    let dir = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let mut command = Command::new(env!("CARGO_BIN_EXE_flexmodel"));
    command.current_dir(dir.path()).args(["run", "--hooks", "a", "--out", "runs/first", "--port", &port]);
    let done = command.args(["--", "echo", "ran"]).env("FLEXMODEL_HOME", home(dir.path())).output().unwrap();
    let stderr = String::from_utf8(done.stderr).unwrap();
    assert!(done.status.code() == Some(1) && stderr.contains("is in use") && done.stdout.is_empty(), "{stderr}");
    assert!(!dir.path().join("runs").exists());
}

#[test]
fn an_install_below_a_folder_with_spaces_and_colons_is_preloaded() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("my work: it's $HERE");
    let source = dir.path().join("library.c");
    fs::create_dir_all(&folder).unwrap();
    fs::write(&source, "const char *flexmodel_is_here(void) { return \"here\"; }\n").unwrap();
    let library = home(&folder).join("libflexmodel.so");
    let built = Command::new("gcc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status().unwrap();
    assert!(built.success());
    let run = Run::start(&folder, "grep -c libflexmodel.so /proc/self/maps > /dev/null && echo \"$LD_PRELOAD\"");
    let (code, stdout, stderr) = run.wait();
    assert_eq!(code, Some(0), "not loaded: {stderr}");
    assert!(!stderr.contains("ld.so"), "{stderr}");
    let link = Path::new(stdout.trim_end());
    assert!(!link.parent().unwrap().exists(), "{} is left behind", link.display());
}

#[test]
fn switched_off_it_is_the_command_alone() {
    let dir = tempfile::tempdir().unwrap();
    let run = Run::with(dir.path(), "echo \"[$LD_PRELOAD$FLEXMODEL_AGENT]\"; exit 6", |command| {
        command.env("FLEXMODEL_DISABLE", "1");
    });
    let out = run.out.clone();
    assert_eq!(run.wait(), (Some(6), "[]\n".into(), String::new()));
    assert!(!out.exists());
}

#[test]
fn secrets_reach_the_job_and_not_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let argv = dir.path().join("argv");
    let script = format!("printf '%s ' \"$@\" > {}; {}", argv.display(), produce(2));
    let given = ["--api-key", "SECRET123", "--db.password=SECRET123", "HF_TOKEN=SECRET123", "--max-tokens", "5"];
    let run = Run::with(dir.path(), &script, |command| {
        command.arg("bash").args(given);
    });
    let out = run.out.clone();
    let (code, said, errors) = run.wait();
    assert_eq!(code, Some(0), "{said}{errors}");
    assert_eq!(fs::read_to_string(argv).unwrap().trim(), given.join(" "));
    assert!(!said.contains("SECRET123") && !errors.contains("SECRET123"), "{said}{errors}");
    for entry in fs::read_dir(&out).unwrap() {
        let bytes = fs::read(entry.unwrap().path()).unwrap();
        assert!(!bytes.windows(9).any(|w| w == b"SECRET123"));
    }
    let shown = ["--api-key", "***", "--db.password=***", "HF_TOKEN=***", "--max-tokens", "5"];
    assert_eq!(info(&out)["command"].as_array().unwrap()[4..], shown);
    assert_eq!(total(&out, "dropped"), 0);
}
