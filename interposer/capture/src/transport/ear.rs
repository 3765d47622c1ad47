//! The thread that hears what an agent says, from when this process attaches first.
//!
//! It sleeps in the kernel while the agent says nothing.

use std::{
    os::fd::RawFd,
    sync::{
        Weak,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use super::{Transport, link::LOOK};
use crate::{process::Process, threads};

/// Between two looks, whatever the socket says: its number may be a file of the job's by now.
const PAUSE: Duration = Duration::from_millis(5);

/// Whether the thread is there, and whether it is to be.
#[derive(Debug, Default)]
pub struct Ear {
    started: AtomicBool,
    stopped: AtomicBool,
}

impl Ear {
    /// Begins to listen, once. Without a thread agents are answered when tensors are sent, if at all.
    pub fn listen(&self, to: &Weak<Transport>, process: &dyn Process) {
        if self.started.swap(true, Ordering::AcqRel) {
            return;
        }
        let to = to.clone();
        if let Err(e) = threads::begin("flexmodel-ear", move || run(&to)) {
            process.line(&format!("no thread listens to the agent, and hooks cannot be changed: {e}"));
        }
    }

    /// It hears nothing more.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
    }
}

fn run(transport: &Weak<Transport>) {
    loop {
        let Some(transport) = transport.upgrade() else { return };
        if transport.ear.stopped.load(Ordering::Acquire) || !transport.process.is_on() {
            return;
        }
        transport.hear();
        let state = transport.lock();
        let (socket, sends) = (state.link.number(), state.link.wants_to_send());
        drop(state);
        drop(transport);
        thread::sleep(PAUSE);
        wait(socket, sends);
    }
}

/// Until something came on the socket, or can be sent, or it is time to look all the same.
fn wait(socket: Option<RawFd>, sends: bool) {
    let events = libc::POLLIN | if sends { libc::POLLOUT } else { 0 };
    // poll() leaves negative numbers out.
    let mut poll = libc::pollfd { fd: socket.unwrap_or(-1), events, revents: 0 };
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&raw mut poll, 1, i32::try_from(LOOK.as_millis()).unwrap_or(i32::MAX)) };
}
