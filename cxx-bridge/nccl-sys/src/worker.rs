//! The communicator's thread: the only place that calls NCCL for it (NCCL-3).

use std::{
    ptr,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{
    Error, UniqueId,
    api::{Api, Config, IN_PROGRESS, RawComm, SUCCESS, UINT8},
    comm::Shared,
    group::{Transfer, Way},
};

/// What the owner wants, and where it waits for the answer.
pub(crate) struct Request {
    pub(crate) order: Order,
    pub(crate) reply: SyncSender<Result<(), Error>>,
}

/// What a communicator does.
pub(crate) enum Order {
    Group(Vec<Transfer>, Instant),
    Check,
    Abort,
    Finish(Instant),
}

/// This rank's place in its communicator.
pub(crate) struct Seat {
    pub(crate) id: UniqueId,
    pub(crate) size: i32,
    pub(crate) rank: i32,
    pub(crate) until: Instant,
}

/// A raw communicator, and its thread's state. `comm` is null before it is made and after it has ended.
pub(crate) struct Worker {
    api: Arc<Api>,
    shared: Arc<Shared>,
    comm: RawComm,
    /// The last call, by NCCL's name.
    last: &'static str,
}

// SAFETY: it goes to its thread before there is a communicator.
unsafe impl Send for Worker {}

impl Worker {
    pub(crate) fn new(api: Arc<Api>, shared: Arc<Shared>) -> Self {
        Self { api, shared, comm: ptr::null_mut(), last: "ncclCommInitRankConfig" }
    }

    /// Joins and waits for the others.
    pub(crate) fn join(&mut self, seat: Seat) -> Result<(), Error> {
        let mut config = Config::non_blocking();
        // SAFETY: `comm` lives on; NCCL copies the id and the config before it returns.
        let code =
            unsafe { (self.api.comm_init_rank_config)(&mut self.comm, seat.size, seat.id, seat.rank, &mut config) };
        let outcome = self.api.outcome(self.last, code).and_then(|()| self.settle(seat.until));
        outcome.map_err(|error| self.break_off(error))
    }

    /// Carries out jobs until there are no more.
    pub(crate) fn serve(mut self, inbox: &Receiver<Request>) {
        for Request { order, reply } in inbox {
            let outcome = self.obey(order).map_err(|error| self.break_off(error));
            // Who asked may have given up waiting.
            let _ = reply.send(outcome);
            if self.comm.is_null() {
                return;
            }
        }
        // The owner gave up while a call was stuck.
        self.break_off(Error::Aborted);
    }

    fn obey(&mut self, order: Order) -> Result<(), Error> {
        self.shared.sound()?;
        match order {
            Order::Group(transfers, until) => self.group(&transfers, until),
            Order::Check => match self.state()? {
                SUCCESS | IN_PROGRESS => Ok(()),
                code => Err(Error::Later { during: self.last, failure: self.api.failure(code) }),
            },
            Order::Abort => Err(Error::Aborted),
            Order::Finish(until) => self.finish(until),
        }
    }

    fn group(&mut self, transfers: &[Transfer], until: Instant) -> Result<(), Error> {
        self.last = "ncclGroupStart";
        // SAFETY: takes nothing.
        self.api.outcome(self.last, unsafe { (self.api.group_start)() })?;
        let added = transfers.iter().try_for_each(|transfer| self.add(transfer));
        // A group that failed must be ended too, which drops it.
        // SAFETY: a group of this thread is open.
        let code = unsafe { (self.api.group_end)() };
        added?;
        self.last = "ncclGroupEnd";
        self.api.outcome(self.last, code)?;
        self.settle(until)
    }

    fn add(&mut self, transfer: &Transfer) -> Result<(), Error> {
        let &Transfer { ref way, bytes, peer, stream } = transfer;
        let code = match *way {
            Way::Send(from) => {
                self.last = "ncclSend";
                // SAFETY: the communicator is ready; Group::send's caller vouched for the memory and the stream.
                unsafe { (self.api.send)(from, bytes, UINT8, peer, self.comm, stream) }
            }
            Way::Recv(to) => {
                self.last = "ncclRecv";
                // SAFETY: as above.
                unsafe { (self.api.recv)(to, bytes, UINT8, peer, self.comm, stream) }
            }
        };
        self.api.outcome(self.last, code)
    }

    fn finish(&mut self, until: Instant) -> Result<(), Error> {
        self.last = "ncclCommFinalize";
        // SAFETY: the communicator is ready, and this is called once.
        self.api.outcome(self.last, unsafe { (self.api.comm_finalize)(self.comm) })?;
        self.settle(until)?;
        self.last = "ncclCommDestroy";
        let comm = std::mem::replace(&mut self.comm, ptr::null_mut());
        // SAFETY: it was finalized, and is not used again.
        self.api.outcome(self.last, unsafe { (self.api.comm_destroy)(comm) })
    }

    /// Waits until what was called last goes on no more.
    fn settle(&self, until: Instant) -> Result<(), Error> {
        let begin = Instant::now();
        let mut nap = Nap::default();
        loop {
            match self.state()? {
                SUCCESS => return Ok(()),
                IN_PROGRESS => {}
                code => return Err(Error::Later { during: self.last, failure: self.api.failure(code) }),
            }
            self.shared.sound()?;
            if Instant::now() >= until {
                return Err(Error::Deadline { during: self.last, waited: begin.elapsed() });
            }
            nap.take();
        }
    }

    fn state(&self) -> Result<i32, Error> {
        let mut state = SUCCESS;
        // SAFETY: the communicator has not ended; writes one int.
        let code = unsafe { (self.api.comm_get_async_error)(self.comm, &mut state) };
        self.api.outcome("ncclCommGetAsyncError", code)?;
        Ok(state)
    }

    /// The end after an error: NCCL-2. Returns the first.
    fn break_off(&mut self, error: Error) -> Error {
        let error = self.shared.poison(error);
        let comm = std::mem::replace(&mut self.comm, ptr::null_mut());
        if !comm.is_null() {
            // The error stays what it was, whatever comes of this.
            // SAFETY: it has not ended, and is not used again.
            unsafe { (self.api.comm_abort)(comm) };
        }
        error
    }
}

/// Pauses that grow: what takes microseconds is noticed soon, what takes seconds costs nothing.
#[derive(Default)]
pub struct Nap {
    taken: u32,
}

impl Nap {
    /// The next one.
    pub fn take(&mut self) {
        self.taken = self.taken.saturating_add(1);
        match self.taken {
            ..=32 => thread::yield_now(),
            more => thread::sleep(Duration::from_micros(50 << ((more - 33) / 16).min(4))),
        }
    }
}
