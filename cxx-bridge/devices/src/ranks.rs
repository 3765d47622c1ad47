//! Transfers between the devices of ranks, over a communicator of our own of the NCCL that torch has loaded.

use std::{
    ffi::c_void,
    ptr,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use nccl_sys::{Comm, Error, Nccl, UniqueId};

use crate::{Device, Event, Stream};

/// How long the ranks wait for each other to join.
const JOINING: Duration = Duration::from_secs(10);
/// How long NCCL may take to put transfers on the stream: both ends of each have said that they are ready for it.
const BEGIN: Duration = Duration::from_secs(8);
/// How long the bytes may take: nothing else is on the stream.
const PASS: Duration = Duration::from_secs(10);

/// This rank's end of it.
pub struct Ranks {
    comm: Comm,
    /// `None`: the CPU, in tests.
    device: Option<&'static Device>,
    /// What transfers are on.
    stream: Stream,
}

/// Bytes on their way to another rank or from it.
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    /// The other rank.
    pub peer: u32,
    /// To it; otherwise from it.
    pub send: bool,
    /// Their address, on this rank's device.
    pub at: usize,
    /// How many.
    pub bytes: usize,
}

impl Ranks {
    /// Joins `size` ranks as rank `index`, with this device, or -1 for the CPU. By `exchange` the ranks tell each other
    /// whether they can, and the first one's id: it sends some bytes to all and returns what each sent, in order. `None`, on
    /// all of them, where one cannot; `report` hears why this one could not.
    pub fn join(
        nccl: Result<Nccl, Error>,
        index: u32,
        size: u32,
        device: i32,
        exchange: impl Fn(&[u8]) -> Option<Vec<Vec<u8>>>,
        report: impl Fn(&Error),
    ) -> Option<Self> {
        let ready = nccl.and_then(|nccl| Ok((nccl, place_of(device)?)));
        let mine = ready.as_ref().map_err(Clone::clone).and_then(|(nccl, _)| match index {
            0 => UniqueId::new(nccl).map(|id| id.as_bytes().to_vec()),
            _ => Ok(vec![1]),
        });
        // Nothing is the word of a rank that cannot.
        let mine = mine.inspect_err(&report).unwrap_or_default();
        let heard = exchange(&mine)?;
        let first: [u8; UniqueId::BYTES] = heard.first()?.as_slice().try_into().ok()?;
        if heard.iter().any(Vec::is_empty) {
            return None;
        }
        let (nccl, (device, stream)) = ready.ok()?;
        let until = Instant::now() + JOINING;
        let on_device = move || device.map_or(Ok(()), |device| device.settle().map_err(|why| why.to_string()));
        let comm = Comm::join(&nccl, first.into(), size as usize, index as usize, until, on_device);
        let comm = comm.inspect_err(report).ok();
        // Some may have joined and others not.
        let all = exchange(&[u8::from(comm.is_some())])?;
        let all = all.iter().all(|words| words == &[1]);
        comm.filter(|_| all).map(|comm| Self { comm, device, stream })
    }

    /// Carries out transfers, together, unless they are `cut`. After an error none is carried out any more.
    ///
    /// # Safety
    /// The memory can be read, or written, on this rank's device until this returns; for as long as the process lives after
    /// an error: the stream may not have passed it. What is in it has come: nothing waits for it on the device (DEVICE-3).
    pub unsafe fn transfer(&mut self, transfers: &[Transfer], cut: &AtomicBool) -> Result<(), Error> {
        let handle = ptr::with_exposed_provenance_mut::<c_void>(self.stream);
        self.comm.group(Instant::now() + BEGIN, |group| {
            for &Transfer { peer, send, at, bytes } in transfers {
                let at = ptr::with_exposed_provenance_mut::<u8>(at);
                // SAFETY: the caller's; this waits for the stream.
                unsafe {
                    if send {
                        group.send(at, bytes, peer as usize, handle);
                    } else {
                        group.recv(at, bytes, peer as usize, handle);
                    }
                }
            }
        })?;
        let Some(device) = self.device else { return Ok(()) };
        let passed = Event::record(device, self.stream);
        let come = || match &passed {
            _ if cut.load(Ordering::Acquire) => Err("the process ends".to_owned()),
            // It is aborted then: nobody could say when the memory is free.
            passed => passed.as_ref().map_err(Clone::clone).and_then(Event::has_come).map_err(|why| why.to_string()),
        };
        self.comm.wait(Instant::now() + PASS, come)
    }
}

/// A device and the stream of transfers there. It is made before the ranks join: a rank that could not make one later would
/// leave the others' transfers without their other end.
fn place_of(index: i32) -> Result<(Option<&'static Device>, Stream), Error> {
    if index < 0 {
        return Ok((None, 0));
    }
    let place = Device::of(index).and_then(|device| Ok((Some(device), device.transfers()?)));
    place.map_err(|why| Error::Device(why.to_string()))
}
