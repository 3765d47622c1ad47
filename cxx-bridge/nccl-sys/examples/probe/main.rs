//! What one rank alone can see of the NCCL at a path:
//!
//! ```text
//! cargo run -p nccl-sys --example probe -- SITE_PACKAGES/nvidia/nccl/lib/libnccl.so.2 [--host]
//! ```
//!
//! Loads it, as torch would, and makes communicators of one rank on the first GPU: one that sends to itself and ends in good
//! order, some that are given what cannot complete, and one more after these. With `--host` the memory is this process's, for a
//! stand-in. Each line is what was seen; at the first that is not as it has to be it ends with 1.

mod device;

use std::{
    env, process,
    time::{Duration, Instant},
};

use libloading::os::unix::Library;
use nccl_sys::{Comm, Error, GRACE, Nccl, UniqueId};

use device::Place;

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// Bytes of the transfer whose content is looked at.
const BYTES: usize = 1 << 20;
/// What is waited for although it cannot come.
const SHORT: Duration = Duration::from_secs(1);
/// What has to come: NCCL's first communicator in a process looks for networks and topology.
const LONG: Duration = Duration::from_secs(20);
/// How late a thread of a busy machine may be.
const SLACK: Duration = Duration::from_secs(1);

fn main() -> Outcome {
    let mut arguments = env::args().skip(1);
    let path = arguments.next().ok_or("which library? Give its path")?;
    let host = arguments.next().is_some_and(|word| word == "--host");
    println!("before it is loaded: {}", Nccl::loaded().map_or_else(|e| e.to_string(), |n| n.version().to_string()));
    // SAFETY: it is trusted as much as torch, which would load it.
    let library = unsafe { Library::new(&path) }?;
    let nccl = Nccl::loaded()?;
    println!("NCCL {}", nccl.version());
    let place = if host { Place::host(&library, 2 * BYTES)? } else { Place::first_gpu(2 * BYTES)? };

    let mut comm = alone(&nccl, &place)?;
    to_itself(&mut comm, &place)?;
    many_groups(&mut comm, &place)?;
    let begin = Instant::now();
    drop(comm);
    println!("ended in good order in {} ms", begin.elapsed().as_millis());

    nobody_receives(alone(&nccl, &place)?, &place)?;
    nobody_else_joins(&nccl, &place)?;
    if place.is_gpu() {
        stream_stands_still(alone(&nccl, &place)?, &place)?;
    }

    let mut last = alone(&nccl, &place)?;
    to_itself(&mut last, &place)?;
    drop(last);
    println!("as it has to be");
    // A thread that an abort may have kept is not waited for.
    process::exit(0)
}

/// A communicator of one rank.
fn alone(nccl: &Nccl, place: &Place) -> Outcome<Comm> {
    let begin = Instant::now();
    let comm = Comm::join(nccl, UniqueId::new(nccl)?, 1, 0, begin + LONG, place.on_thread())?;
    println!("a communicator of one rank in {} ms", begin.elapsed().as_millis());
    Ok(comm)
}

/// A send and its receive in one group, an event behind them, and the same bytes.
fn to_itself(comm: &mut Comm, place: &Place) -> Outcome {
    let bytes: Vec<u8> = (0..BYTES).map(|n| (n % 251) as u8).collect();
    place.write(0, &bytes)?;
    place.write(BYTES, &vec![0; BYTES])?;
    pair(comm, place, BYTES)?;
    let event = place.record()?;
    comm.wait(Instant::now() + LONG, || event.has_come())?;
    if place.read(BYTES, BYTES)? != bytes {
        return Err("what came is not what was sent".into());
    }
    println!("{BYTES} bytes to itself in one group, and an event behind it");
    Ok(())
}

/// What a small group costs its thread.
fn many_groups(comm: &mut Comm, place: &Place) -> Outcome {
    const GROUPS: u32 = 100;
    let begin = Instant::now();
    for _ in 0..GROUPS {
        pair(comm, place, 256)?;
    }
    let put = begin.elapsed() / GROUPS;
    let event = place.record()?;
    comm.wait(Instant::now() + LONG, || event.has_come())?;
    println!("a group of 256 bytes takes {} us to be put on its stream", put.as_micros());
    Ok(())
}

fn pair(comm: &mut Comm, place: &Place, bytes: usize) -> Result<(), Error> {
    // SAFETY: both halves of the place are memory of its device, and it outlives all communicators.
    comm.group(Instant::now() + LONG, |group| unsafe {
        group.send(place.at(0), bytes, 0, place.stream());
        group.recv(place.at(BYTES), bytes, 0, place.stream());
    })
}

/// A send without its receive: an error at once or at the deadline, the same from then on (NCCL-1, NCCL-2).
fn nobody_receives(mut comm: Comm, place: &Place) -> Outcome {
    let begin = Instant::now();
    // SAFETY: as in `pair`.
    let group = comm.group(begin + SHORT, |group| unsafe { group.send(place.at(0), 64, 0, place.stream()) });
    let outcome = group.and_then(|()| {
        let event = place.record().map_err(Error::Device)?;
        comm.wait(begin + SHORT, || event.has_come())
    });
    let first = failed("a send that nobody receives", outcome, begin)?;
    if comm.check() != Err(first) {
        return Err("a call after the first error says something else".into());
    }
    Ok(())
}

/// A communicator of two ranks of which one never comes.
fn nobody_else_joins(nccl: &Nccl, place: &Place) -> Outcome {
    let begin = Instant::now();
    let joined = Comm::join(nccl, UniqueId::new(nccl)?, 2, 0, begin + SHORT, place.on_thread());
    failed("a rank that never comes", joined.map(drop), begin).map(drop)
}

/// A group on a stream on which something stands that does not end: given up by its deadline, and the stream goes on.
fn stream_stands_still(mut comm: Comm, place: &Place) -> Outcome {
    place.hold()?;
    let begin = Instant::now();
    let outcome = pair(&mut comm, place, 256).and_then(|()| {
        let event = place.record().map_err(Error::Device)?;
        comm.wait(begin + SHORT, || event.has_come())
    });
    let failed = failed("a group on a stream that stands still", outcome, begin);
    place.release()?;
    failed?;
    let event = place.record()?;
    while !event.has_come()? {
        if begin.elapsed() > LONG {
            return Err("the stream stands still after an abort".into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    println!("the stream goes on {} ms later", begin.elapsed().as_millis());
    Ok(())
}

/// The error, which has to be one, and in time.
fn failed(what: &str, outcome: Result<(), Error>, begin: Instant) -> Outcome<Error> {
    let took = begin.elapsed();
    let error = outcome.err().ok_or_else(|| format!("{what} is no error"))?;
    println!("{what}, after {} ms: {error}", took.as_millis());
    if took > SHORT + GRACE + SLACK {
        return Err(format!("{what} was waited for beyond its deadline").into());
    }
    Ok(error)
}
