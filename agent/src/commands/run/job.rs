//! The command: its environment, the signals passed on to it, its end.

use std::{
    ffi::{OsStr, OsString},
    io,
    mem::MaybeUninit,
    os::unix::process::{CommandExt, ExitStatusExt},
    path::Path,
    process::{Child, Command, ExitStatus},
    sync::{Arc, Mutex, PoisonError, mpsc::Sender},
};

use wire::env as names;

use super::{
    prepare::Plan,
    sidecar::{Event, Sidecar},
};
use crate::umask;

/// Passed on to the command.
const FORWARDED: [libc::c_int; 6] =
    [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2];

/// Options of AddressSanitizer's runtime, of which the last counts.
const ASAN_OPTIONS: &str = "ASAN_OPTIONS";

/// How the command ended.
#[derive(Clone, Copy, Debug)]
pub struct Ended(ExitStatus);

impl Ended {
    /// As a shell tells it: 128 and the signal's number for a command that was killed.
    pub fn exit_code(self) -> u8 {
        match self.0.signal() {
            Some(signal) => 128u8.wrapping_add(signal as u8),
            None => self.0.code().unwrap_or(1) as u8,
        }
    }
}

/// Why the command did not start.
#[derive(Debug)]
pub struct NotStarted {
    /// For the user.
    pub text: String,
    /// 127 or 126, as shells have it.
    pub code: u8,
}

/// What signals were blocked before.
pub struct Signals {
    forwarded: libc::sigset_t,
    before: libc::sigset_t,
}

/// Blocks the signals that are passed on, so that a thread can wait for them. To be called while there is one thread.
pub fn block_signals() -> io::Result<Signals> {
    let mut forwarded = MaybeUninit::uninit();
    let mut before = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set, sigprocmask the other; the pointers are valid.
    unsafe {
        libc::sigemptyset(forwarded.as_mut_ptr());
        for signal in FORWARDED {
            libc::sigaddset(forwarded.as_mut_ptr(), signal);
        }
        if libc::sigprocmask(libc::SIG_BLOCK, forwarded.as_ptr(), before.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Signals { forwarded: forwarded.assume_init(), before: before.assume_init() })
    }
}

/// Where signals go.
#[derive(Clone, Copy, Debug)]
enum Target {
    /// To this process.
    Command(i32),
    /// The command is over: whoever sends one now wants `run` to end, with this exit code.
    Nobody(u8),
}

/// The command while it runs.
pub struct Job {
    pid: u32,
}

impl Job {
    /// Starts it. Its end is an event of the agent's.
    pub fn start(plan: &Plan, agent: &Sidecar, signals: &Signals) -> Result<Self, NotStarted> {
        let events = agent.sender();
        let child = spawn(plan, agent, signals).map_err(|e| NotStarted {
            text: format!("{}: {e}", plan.command.first().map_or(Path::new(""), Path::new).display()),
            code: if e.kind() == io::ErrorKind::NotFound { 127 } else { 126 },
        })?;
        let pid = child.id();
        let target = Arc::new(Mutex::new(Target::Command(pid as i32)));
        let (forwarded, to) = (signals.forwarded, target.clone());
        let thread = std::thread::Builder::new();
        let started = thread.name("signals".into()).spawn(move || forward(&forwarded, &to)).map(drop);
        let thread = std::thread::Builder::new();
        let started = started.and(thread.name("command".into()).spawn(move || wait(child, &target, &events)).map(drop));
        started.map_err(|e| NotStarted { text: format!("no thread to watch the command: {e}"), code: 126 })?;
        Ok(Self { pid })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.pid
    }
}

fn spawn(plan: &Plan, sidecar: &Sidecar, signals: &Signals) -> io::Result<Child> {
    let (program, arguments) = plan.command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut agent = OsString::from("unix:");
    agent.push(sidecar.socket());
    let counts = agent.to_str().and_then(|agent| sidecar.counts(agent));
    let mut command = Command::new(program);
    preload(&mut command, sidecar.library());
    command.args(arguments).env(names::HOOKS, &plan.hooks).env(names::AGENT, agent);
    command.env(names::ON_FULL, if plan.on_full == names::OnFull::Drop { "drop" } else { "wait" });
    match counts {
        Some(name) => command.env(names::COUNTS, name),
        None => command.env_remove(names::COUNTS),
    };
    // A run of its own, also when a rank of another run starts it.
    command.env_remove(names::RANK_PROCESS);
    // The agent's, and nobody's who only runs in the job.
    command.env_remove(names::KEY);
    if let Some(bridge) = &plan.bridge {
        command.env(names::BRIDGE, bridge);
    }
    umask::as_before(&mut command);
    let before = signals.before;
    // SAFETY: sigprocmask is async-signal-safe, and the set is a copy.
    unsafe {
        command.pre_exec(move || match libc::sigprocmask(libc::SIG_SETMASK, &before, std::ptr::null_mut()) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        });
    }
    command.spawn()
}

/// Behind what the user preloads: a sanitizer's runtime refuses to be second. Where a program is linked with one and
/// nothing but ours is preloaded, the runtime is told that this is all right.
fn preload(command: &mut Command, library: &Path) {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty());
    let behind = |before: Option<OsString>, last: &OsStr| match before {
        Some(mut all) => {
            all.push(":");
            all.push(last);
            all
        }
        None => last.to_owned(),
    };
    let others = set("LD_PRELOAD");
    if others.is_none() {
        command.env(ASAN_OPTIONS, behind(set(ASAN_OPTIONS), OsStr::new("verify_asan_link_order=0")));
    }
    command.env("LD_PRELOAD", behind(others, library.as_os_str()));
}

/// Waits for the command. Its process id is not reused before the signals thread is told.
fn wait(mut child: Child, target: &Mutex<Target>, events: &Sender<Event>) {
    let pid = child.id();
    loop {
        // SAFETY: siginfo is plain data and valid for the call.
        let waited = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            libc::waitid(libc::P_PID, pid, &mut info, libc::WEXITED | libc::WNOWAIT)
        };
        if waited == 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            break;
        }
    }
    let mut target = target.lock().unwrap_or_else(PoisonError::into_inner);
    let status = child.wait().unwrap_or_else(|_| ExitStatus::from_raw(1 << 8));
    let ended = Ended(status);
    *target = Target::Nobody(ended.exit_code());
    drop(target);
    // The receiver lives as long as the process.
    let _ = events.send(Event::JobEnded(ended));
}

/// Passes signals on, but for those that the terminal has sent to the command as well.
fn forward(signals: &libc::sigset_t, target: &Mutex<Target>) {
    loop {
        // SAFETY: siginfo is plain data; both pointers are valid for the call.
        let (signal, code) = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            (libc::sigwaitinfo(signals, &mut info), info.si_code)
        };
        if signal <= 0 {
            continue;
        }
        let target = target.lock().unwrap_or_else(PoisonError::into_inner);
        match *target {
            // The command is in our process group: a key on the terminal reaches it by itself.
            Target::Command(_) if code == libc::SI_KERNEL => {}
            // SAFETY: plain system call; the process is not reaped while the lock is held.
            Target::Command(pid) => unsafe {
                libc::kill(pid, signal);
            },
            Target::Nobody(code) => std::process::exit(i32::from(code)),
        }
    }
}
