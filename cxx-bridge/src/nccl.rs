//! Transfers between devices, over a communicator of our own of the NCCL that torch has loaded.

use std::{
    ffi::c_void,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use nccl_sys::{Comm, Error, Nccl, UniqueId};
use wire::env;

use crate::{
    ffi::bridge::{self, Communicator, Tensor},
    host,
};

/// How long the ranks wait for each other to join.
const JOINING: Duration = Duration::from_secs(10);
/// How long NCCL may take to put transfers on the stream: both ends of each have said that they are ready for it.
const BEGIN: Duration = Duration::from_secs(8);
/// How long the stream may take to get there: it has to pass what the job had put on it before.
const PASS: Duration = Duration::from_secs(60);

/// This rank's end of it.
pub struct Devices {
    comm: Comm,
    /// -1 for the CPU, in tests.
    device: i32,
}

/// A tensor on its way to another rank or from it.
pub struct Transfer<'a> {
    pub peer: u32,
    pub send: bool,
    pub tensor: &'a Tensor,
}

impl Devices {
    /// Joins all ranks, who exchange through `words` whether they can, and the first one's id. `None`, on all of
    /// them, where one cannot.
    pub fn join(words: &Communicator, index: u32, size: u32, device: i32) -> Option<Self> {
        let stand_in = std::env::var(env::TEST_NCCL).ok().filter(|path| !path.is_empty());
        let nccl = match &stand_in {
            Some(path) => Nccl::loaded_as(path),
            None if device < 0 => return Self::without(words),
            None => Nccl::loaded(),
        };
        let ready = nccl.as_ref().map_err(Clone::clone).and_then(|nccl| match index {
            0 => UniqueId::new(nccl).map(|id| id.as_bytes().to_vec()),
            _ => Ok(vec![1]),
        });
        // Nothing is the word of a rank that cannot.
        let mine = ready.inspect_err(report).unwrap_or_default();
        let heard = words.exchange(&mine).ok()?;
        let first: [u8; 128] = heard.first()?.bytes.as_slice().try_into().ok()?;
        if heard.iter().any(|words| words.bytes.is_empty()) {
            return None;
        }
        let until = Instant::now() + JOINING;
        let on_device = move || bridge::go_aside(device).map(drop).map_err(|e| e.what().to_owned());
        let comm = Comm::join(&nccl.ok()?, first.into(), size as usize, index as usize, until, on_device);
        let comm = comm.inspect_err(report).ok();
        // Some may have joined and others not.
        let all = words.exchange(&[u8::from(comm.is_some())]).ok()?;
        let all = all.iter().all(|words| words.bytes == [1]);
        comm.filter(|_| all).map(|comm| Self { comm, device })
    }

    /// Tells the others that this rank cannot.
    fn without(words: &Communicator) -> Option<Self> {
        let _ = words.exchange(&[]);
        None
    }

    /// Where what is received has to be.
    pub fn device(&self) -> i32 {
        self.device
    }

    /// Carries out transfers, together, unless they are `cut`. After an error none is carried out any more.
    pub fn transfer(&mut self, transfers: &[Transfer<'_>], cut: &AtomicBool) -> Result<(), Error> {
        let aside = |e: cxx::Exception| Error::Device(e.what().to_owned());
        let stream = bridge::go_aside(self.device).map_err(aside)? as *mut c_void;
        let outcome = self.comm.group(Instant::now() + BEGIN, |group| {
            for one in transfers {
                let (at, bytes) = (bridge::address_of(one.tensor), bridge::bytes_of(one.tensor));
                // SAFETY: the caller's tensors live through this call, which waits for the stream, or are shared below.
                unsafe {
                    if one.send {
                        group.send(at as *const u8, bytes, one.peer as usize, stream);
                    } else {
                        group.recv(at as *mut u8, bytes, one.peer as usize, stream);
                    }
                }
            }
        });
        let outcome = outcome.and_then(|()| {
            let mark = bridge::mark(self.device).map_err(aside)?;
            let come = || match () {
                () if mark.is_null() => Ok(true),
                () if cut.load(Ordering::Acquire) => Err("the process ends".to_owned()),
                () => mark.has_come().map_err(|e| e.what().to_owned()),
            };
            self.comm.wait(Instant::now() + PASS, come)
        });
        if matches!(outcome, Err(Error::Stuck { .. })) {
            // NCCL may use them as long as the process lives.
            transfers.iter().for_each(|one| std::mem::forget(bridge::share(one.tensor)));
        }
        outcome
    }
}

fn report(why: &Error) {
    host::notice(&format!("tensors on devices are not gathered: {why}"));
}
