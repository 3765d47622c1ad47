//! Groups: what a thread collects between start and end, and how a communicator's thread makes it.

use std::{
    cell::RefCell,
    ffi::c_int,
    thread,
    time::{Duration, Instant},
};

use crate::{
    Outcome, code,
    comm::{self, Comm},
    faults, log,
    ring::Ring,
    room::{LEFT, Room},
};

/// `ncclUint8`.
const UINT8: c_int = 1;
/// What goes before the bytes of a transfer: their number.
const HEADER: usize = size_of::<u64>();

/// One send or receive.
pub struct Transfer {
    send: bool,
    at: usize,
    bytes: usize,
    peer: c_int,
    /// The stream it was given.
    pub stream: usize,
    /// It never completes.
    pub hangs: bool,
    /// Of header and bytes.
    moved: usize,
    done: bool,
}

impl Transfer {
    /// One that has not begun.
    pub fn new(send: bool, at: *mut u8, bytes: usize, peer: c_int, stream: usize) -> Self {
        Self { send, at: at.expose_provenance(), bytes, peer, stream, hangs: false, moved: 0, done: false }
    }

    fn what(&self) -> String {
        let Self { bytes, peer, .. } = self;
        if self.send {
            format!("send of {bytes} bytes to rank {peer}")
        } else {
            format!("receive of {bytes} bytes from rank {peer}")
        }
    }

    /// Moves what can be moved. Whether it moved anything.
    fn progress(&mut self, ring: Ring) -> Result<bool, String> {
        if self.hangs {
            return Ok(false);
        }
        let before = (self.moved, self.done);
        if self.moved == 0 && !self.header(ring)? {
            return Ok(false);
        }
        let (offset, at) = (self.moved - HEADER, std::ptr::with_exposed_provenance_mut::<u8>(self.at));
        // SAFETY: who called ncclSend or ncclRecv vouched for the bytes, until this communicator has aborted; its
        // thread alone is at this end of the ring.
        self.moved += unsafe {
            let (at, rest) = (at.add(offset), self.bytes - offset);
            if self.send { ring.put(at, rest) } else { ring.take(at, rest) }
        };
        // A send is done when all of it was taken: it is the last that was put.
        self.done = self.moved == HEADER + self.bytes && (!self.send || ring.taken_so_far() == ring.put_so_far());
        Ok(before != (self.moved, self.done))
    }

    /// Puts the number of bytes into the ring, which is empty when a send begins, or takes and compares it once it is
    /// there.
    fn header(&mut self, ring: Ring) -> Result<bool, String> {
        let mut header = (self.bytes as u64).to_ne_bytes();
        if self.send {
            // SAFETY: our own bytes; as above.
            self.moved = unsafe { ring.put(header.as_ptr(), HEADER) };
        } else if ring.put_so_far() - ring.taken_so_far() >= HEADER as u64 {
            // SAFETY: as above.
            self.moved = unsafe { ring.take(header.as_mut_ptr(), HEADER) };
        }
        let theirs = u64::from_ne_bytes(header);
        if theirs != self.bytes as u64 {
            return Err(format!("{} meets a send of {theirs} bytes: sizes, or their order, differ", self.what()));
        }
        Ok(self.moved > 0)
    }
}

/// Moves all transfers of a group. Returns NCCL's code where that failed; an abort is none.
pub fn run(comm: &Comm, room: &Room, number: u32, transfers: &mut [Transfer]) -> Result<(), c_int> {
    if faults::get().trace {
        transfers.iter().for_each(|t| log::trace(comm.rank, &format!("group {number}: {}", t.what())));
    }
    if let Some(code) = faults::get().error_of(number) {
        log::set_last("a group was told to fail once it was begun");
        return Err(code);
    }
    let mut moved_at = Instant::now();
    let mut idle = 0;
    while transfers.iter().any(|t| !t.done) {
        let mut moved = false;
        for i in 0..transfers.len() {
            let (before, rest) = transfers.split_at_mut(i);
            let transfer = &mut rest[0];
            let waits = |other: &Transfer| !other.done && other.peer == transfer.peer && other.send == transfer.send;
            if transfer.done || before.iter().any(waits) {
                continue;
            }
            let peer = transfer.peer as usize;
            // Looked at first: it may leave as soon as it has done its part.
            let left = room.state_of(peer) == LEFT;
            let ring = if transfer.send { room.ring(comm.rank, peer) } else { room.ring(peer, comm.rank) };
            let step = match transfer.progress(ring) {
                Ok(false) if left => Err(format!("{}, which has ended its communicator", transfer.what())),
                other => other,
            };
            moved |= step.map_err(|why| {
                room.break_up(&format!("group {number}: {why}"));
                code::USAGE
            })?;
        }
        if comm.is_aborted() {
            let cut: Vec<_> = transfers.iter().filter(|t| !t.done).map(Transfer::what).collect();
            if !cut.is_empty() {
                log::note(comm.rank, &format!("group {number}: aborted with {} under way", cut.join(", ")));
            }
            return Ok(());
        }
        if room.is_broken() {
            return Err(code::REMOTE);
        }
        if moved {
            (moved_at, idle) = (Instant::now(), 0);
        } else if moved_at.elapsed() > faults::get().bound {
            room.break_up(&format!("group {number}: nothing moved, and no one aborted it"));
            return Err(code::SYSTEM);
        } else {
            idle += 1;
            if idle < 50 { thread::yield_now() } else { thread::sleep(Duration::from_micros(100)) }
        }
    }
    Ok(())
}

/// A thread's open group.
#[derive(Default)]
struct Open {
    depth: u32,
    failed: Option<c_int>,
    transfers: Vec<(usize, Transfer)>,
}

thread_local! {
    static OPEN: RefCell<Open> = RefCell::default();
}

fn is_open() -> bool {
    OPEN.with_borrow(|open| open.depth > 0)
}

/// Refuses what an open group would put off until its end.
pub fn none_open(name: &str) -> Result<(), c_int> {
    if is_open() { Err(log::refuse(None, code::USAGE, &format!("{name} in a group"))) } else { Ok(()) }
}

/// `ncclGroupStart`.
pub fn start() -> Outcome {
    OPEN.with_borrow_mut(|open| {
        open.depth += 1;
        if open.depth > 1 {
            return Err(log::refuse(None, code::USAGE, "ncclGroupStart in a group"));
        }
        Ok(code::SUCCESS)
    })
}

/// `ncclSend` and `ncclRecv`.
pub fn add(name: &'static str, transfer: Transfer, datatype: c_int, handle: usize) -> Outcome {
    let comm = comm::ready(name, handle)?;
    let wrong = if !is_open() {
        Some((code::USAGE, format!("{name} outside of a group")))
    } else if datatype != UINT8 {
        Some((code::ARGUMENT, format!("{name} of datatype {datatype}, not bytes")))
    } else if transfer.peer < 0 || transfer.peer as usize >= comm.size {
        Some((code::ARGUMENT, format!("{name} with rank {} of {}", transfer.peer, comm.size)))
    } else if transfer.at == 0 || transfer.bytes == 0 {
        Some((code::ARGUMENT, format!("{name} of nothing")))
    } else {
        None
    };
    if let Some((code, why)) = wrong {
        return Err(log::refuse(Some(comm.rank), code, &why));
    }
    OPEN.with_borrow_mut(|open| open.transfers.push((handle, transfer)));
    Ok(code::SUCCESS)
}

/// The open group will fail with this code.
pub fn fail(code: c_int) {
    OPEN.with_borrow_mut(|open| _ = open.failed.get_or_insert(code));
}

/// `ncclGroupEnd`.
pub fn end() -> Outcome {
    let open = OPEN.take();
    if open.depth == 0 {
        return Err(log::refuse(None, code::USAGE, "ncclGroupEnd without ncclGroupStart"));
    }
    if let Some(code) = open.failed {
        return Err(code);
    }
    let mut handles: Vec<usize> = open.transfers.iter().map(|(handle, _)| *handle).collect();
    handles.dedup();
    if handles.len() > 1 {
        return Err(log::refuse(None, code::USAGE, "a group of several communicators"));
    }
    let Some(&handle) = handles.first() else { return Ok(code::SUCCESS) };
    comm::ready("ncclGroupEnd", handle)?.launch(open.transfers.into_iter().map(|(_, transfer)| transfer).collect())
}

/// Drops what is open.
pub fn forget() {
    OPEN.take();
}
