//! A communicator, as its owner sees it: orders to its thread, each with a bound.

use std::{
    sync::{
        Arc, OnceLock,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{
    Error, Group, Nccl, Stream, UniqueId,
    worker::{Nap, Order, Request, Seat, Worker},
};

/// How long NCCL may take to abort, once a deadline has passed.
pub const GRACE: Duration = Duration::from_secs(2);
/// How long a communicator that is dropped may take to end in good order.
const ENDING: Duration = Duration::from_secs(2);
/// How often NCCL is asked whether all is well while a stream is waited for.
const ASK: Duration = Duration::from_millis(5);

/// One rank's end of a communicator. Dropping it ends it, in good order where it is whole.
pub struct Comm {
    requests: Sender<Request>,
    shared: Arc<Shared>,
    rank: usize,
    size: usize,
}

/// What a communicator's owner and its thread both see.
#[derive(Default)]
pub(crate) struct Shared {
    /// The first error: every further call returns it (NCCL-2), and the thread aborts as soon as it can.
    broken: OnceLock<Error>,
}

impl Shared {
    /// Keeps the first error, and returns it.
    pub(crate) fn poison(&self, error: Error) -> Error {
        self.broken.get_or_init(|| error).clone()
    }

    pub(crate) fn sound(&self) -> Result<(), Error> {
        self.broken.get().map_or(Ok(()), |error| Err(error.clone()))
    }
}

impl Comm {
    /// Joins the communicator `id` of `size` ranks as rank `rank`, and returns when all have.
    ///
    /// `on_device` is called first, on the communicator's thread: it makes the device of this rank current there.
    /// What it returns as an error becomes [`Error::Device`].
    pub fn join(
        nccl: &Nccl,
        id: UniqueId,
        size: usize,
        rank: usize,
        until: Instant,
        on_device: impl FnOnce() -> Result<(), String> + Send + 'static,
    ) -> Result<Self, Error> {
        let (Ok(ranks), Ok(number)) = (i32::try_from(size), i32::try_from(rank)) else {
            return Err(Error::Argument(format!("rank {rank} of {size} is more than NCCL counts")));
        };
        if rank >= size {
            return Err(Error::Argument(format!("rank {rank} is not below the number of ranks, {size}")));
        }
        let shared = Arc::new(Shared::default());
        let (requests, inbox) = channel();
        let seat = Seat { id, size: ranks, rank: number, until };
        let mut worker = Worker::new(nccl.api().clone(), shared.clone());
        let (reply, joined) = sync_channel(1);
        thread::Builder::new()
            .name("flexmodel-nccl".into())
            .spawn(move || {
                let outcome = on_device().map_err(Error::Device).and_then(|()| worker.join(seat));
                let alive = outcome.is_ok();
                // The owner may have left meanwhile: the inbox is closed then.
                let _ = reply.send(outcome);
                if alive {
                    worker.serve(&inbox);
                }
            })
            .map_err(|e| Error::Thread(e.to_string()))?;
        let comm = Self { requests, shared, rank, size };
        comm.answer(&joined, "ncclCommInitRankConfig", until)?;
        Ok(comm)
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of ranks.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Makes the transfers that `fill` asks for, together. Returns when NCCL has put them on their streams.
    pub fn group(&mut self, until: Instant, fill: impl FnOnce(&mut Group)) -> Result<(), Error> {
        self.shared.sound()?;
        let mut group = Group::new(self.size);
        fill(&mut group);
        if let Some(wrong) = group.wrong {
            // The others make this group, and we cannot: neither can we make the next with them.
            return Err(self.break_off(wrong));
        }
        if group.transfers.is_empty() {
            return Ok(());
        }
        self.call(Order::Group(group.transfers, until), "ncclGroupEnd", until)
    }

    /// A group of one [`Group::send`].
    ///
    /// # Safety
    /// As there.
    pub unsafe fn send(
        &mut self,
        from: *const u8,
        bytes: usize,
        peer: usize,
        stream: Stream,
        until: Instant,
    ) -> Result<(), Error> {
        // SAFETY: the caller's.
        self.group(until, |group| unsafe { group.send(from, bytes, peer, stream) })
    }

    /// A group of one [`Group::recv`].
    ///
    /// # Safety
    /// As there.
    pub unsafe fn recv(
        &mut self,
        to: *mut u8,
        bytes: usize,
        peer: usize,
        stream: Stream,
        until: Instant,
    ) -> Result<(), Error> {
        // SAFETY: the caller's.
        self.group(until, |group| unsafe { group.recv(to, bytes, peer, stream) })
    }

    /// Asks NCCL whether anything failed since.
    pub fn check(&mut self) -> Result<(), Error> {
        self.call(Order::Check, "ncclCommGetAsyncError", Instant::now())
    }

    /// Waits until `done` says that the stream has passed what it was given, such as by an event recorded behind it.
    /// Looks after NCCL meanwhile. A deadline that passes, or an error of `done`'s, aborts the communicator, which lets
    /// the stream go on.
    pub fn wait(&mut self, until: Instant, mut done: impl FnMut() -> Result<bool, String>) -> Result<(), Error> {
        let begin = Instant::now();
        let mut asked = begin;
        let mut nap = Nap::default();
        loop {
            match done() {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(why) => return Err(self.break_off(Error::Device(why))),
            }
            let now = Instant::now();
            if now >= until {
                return Err(self.break_off(Error::Deadline { during: "the stream", waited: now - begin }));
            }
            if now - asked >= ASK {
                self.check()?;
                asked = now;
            }
            nap.take();
        }
    }

    /// Ends the communicator at once. The other ranks may learn of it only by their deadlines.
    pub fn abort(&mut self) {
        self.break_off(Error::Aborted);
    }

    /// Aborts because of `error`, unless one before has done so. Returns the first, or that the abort did not return.
    fn break_off(&self, error: Error) -> Error {
        if let Err(first) = self.shared.sound() {
            return first;
        }
        let error = self.shared.poison(error);
        match self.ask(Order::Abort, "ncclCommAbort", Instant::now()) {
            Err(stuck @ Error::Stuck { .. }) => stuck,
            // The thread answers an abort with the first error, and ends.
            _ => error,
        }
    }

    fn call(&self, order: Order, during: &'static str, until: Instant) -> Result<(), Error> {
        self.shared.sound()?;
        self.ask(order, during, until)
    }

    fn ask(&self, order: Order, during: &'static str, until: Instant) -> Result<(), Error> {
        let (reply, answer) = sync_channel(1);
        if self.requests.send(Request { order, reply }).is_err() {
            return Err(self.shared.poison(Error::Thread("it has ended".into())));
        }
        self.answer(&answer, during, until)
    }

    /// Waits for the thread's answer until its deadline, and while it aborts (NCCL-1).
    fn answer(&self, answer: &Receiver<Result<(), Error>>, during: &'static str, until: Instant) -> Result<(), Error> {
        let begin = Instant::now();
        match answer.recv_timeout(until.saturating_duration_since(begin) + GRACE) {
            Ok(outcome) => outcome,
            Err(RecvTimeoutError::Timeout) => {
                let stuck = Error::Stuck { during, waited: begin.elapsed() };
                self.shared.poison(stuck.clone());
                // Whatever came first: this says that memory may still be in use.
                Err(stuck)
            }
            Err(RecvTimeoutError::Disconnected) => Err(self.shared.poison(Error::Thread("it has ended".into()))),
        }
    }
}

impl Drop for Comm {
    fn drop(&mut self) {
        if self.shared.sound().is_ok() {
            let until = Instant::now() + ENDING;
            // What failed has been aborted, and nobody is left who could hear of it.
            let _ = self.ask(Order::Finish(until), "ncclCommFinalize", until);
        }
    }
}
