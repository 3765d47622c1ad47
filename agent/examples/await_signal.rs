//! A command that tells how often SIGINT, SIGTERM, SIGHUP or SIGUSR1 reaches it: plays the job in tests of `flexmodel run`.
//!
//! ```text
//! await_signal FOLDER
//! ```
//!
//! Makes `FOLDER/ready`, adds the number of each signal as a line to `FOLDER/caught`, and exits with 4 half a second after
//! the first, or with 1 when none came in 30 seconds. A shell will not do: what it does with a signal depends on the moment.

use std::{env, fs::File, io::Write, path::PathBuf, process::exit, ptr::null_mut};

fn main() {
    let folder = PathBuf::from(env::args_os().nth(1).expect("a folder"));
    // SAFETY: the set is written by sigemptyset before anything reads it.
    let signals = unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGUSR1] {
            libc::sigaddset(&mut set, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, null_mut());
        set
    };
    let mut caught = File::create(folder.join("caught")).expect("a folder to write to");
    File::create(folder.join("ready")).expect("a folder to write to");
    let mut wait = libc::timespec { tv_sec: 30, tv_nsec: 0 };
    let mut code = 1;
    loop {
        // SAFETY: both are valid for the call; nothing is asked about the signal but its number.
        let signal = unsafe { libc::sigtimedwait(&signals, null_mut(), &wait) };
        if signal > 0 {
            writeln!(caught, "{signal}").expect("a file to write to");
            wait = libc::timespec { tv_sec: 0, tv_nsec: 500_000_000 };
            code = 4;
        } else if std::io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            exit(code);
        }
    }
}
