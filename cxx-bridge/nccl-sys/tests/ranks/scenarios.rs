//! What a rank of a test does.

use std::{
    env,
    ffi::c_int,
    path::PathBuf,
    ptr,
    time::{Duration, Instant},
};

use libloading::os::unix::{Library, Symbol};
use nccl_sys::{Comm, Error, Nccl, Stream, UniqueId};

use crate::harness::{await_file, stand_in, write};

/// For what will be done, on any machine.
fn in_time() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

/// For what will not.
fn soon() -> Instant {
    Instant::now() + Duration::from_secs(1)
}

struct Rank {
    number: usize,
    size: usize,
    folder: PathBuf,
}

/// Runs the scenario that the environment names, and leaves what came of it in a file.
pub fn run() {
    let number = |name| env::var(name).unwrap().parse().unwrap();
    let rank =
        Rank { number: number("RANK"), size: number("WORLD_SIZE"), folder: env::var_os("FOLDER").unwrap().into() };
    let scenario = env::var("SCENARIO").unwrap();
    let said = match scenario.as_str() {
        "unloaded" => Nccl::loaded().map(|_| "loaded".into()),
        "nonsense" => Ok(nonsense(&rank)),
        _ => rank.scenario(&scenario),
    };
    write(&rank.folder.join(format!("said-{}", rank.number)), said.unwrap_or_else(|e| e.to_string()).as_bytes());
}

/// Loads the stand-in, as torch would have loaded NCCL, for as long as the process lives.
fn load() -> &'static Library {
    // SAFETY: the stand-in has no initialisers.
    Box::leak(Box::new(unsafe { Library::new(stand_in()).unwrap() }))
}

impl Rank {
    fn scenario(&self, name: &str) -> Result<String, Error> {
        let library = load();
        let whole = Ok("whole".to_string());
        match name {
            "transfers" => {
                let mut comm = self.join()?;
                self.transfers(&mut comm)?;
                whole
            }
            "lonely" => self.exchange(&mut self.join_as(self.size, soon())?).and(whole),
            "exchange" => self.exchange(&mut self.join()?).and(whole),
            "stream" => self.stream(library).and(whole),
            "absent" if self.number == 1 => Ok("nothing".into()),
            "absent" => self.join_as(self.size, soon()).map(|_| "joined".into()),
            "dies" => {
                let mut comm = self.join()?;
                if self.number == 1 {
                    // SAFETY: ends the process, as kill -9 would but for the exit code.
                    unsafe { libc::_exit(0) };
                }
                self.around(&mut comm, 1000, soon()).and(whole)
            }
            "sizes" => self.join_as(self.size + self.number, soon()).map(|_| "joined".into()),
            "swapped" => {
                let sizes = if self.number == 0 { [10, 20] } else { [20, 10] };
                let mut comm = self.join()?;
                self.pair(&mut comm, &sizes, soon()).and(whole)
            }
            "unreceived" => {
                let mut comm = self.join()?;
                self.pair(&mut comm, &[10], in_time())?;
                if self.number == 0 {
                    return self.pair(&mut comm, &[10], soon()).and(whole);
                }
                whole
            }
            "unsent" => {
                let mut comm = self.join()?;
                self.pair(&mut comm, &[10], in_time())?;
                if self.number == 1 {
                    return self.pair(&mut comm, &[10], soon()).and(whole);
                }
                whole
            }
            other => panic!("no scenario {other}"),
        }
    }

    fn join(&self) -> Result<Comm, Error> {
        self.join_as(self.size, in_time())
    }

    fn join_as(&self, size: usize, until: Instant) -> Result<Comm, Error> {
        let nccl = Nccl::loaded()?;
        let path = self.folder.join("id");
        let id = if self.number == 0 {
            let id = UniqueId::new(&nccl);
            // Nothing is what the others are told where there is none.
            write(&path, id.as_ref().map_or(&[], |id| &id.as_bytes()[..]));
            id?
        } else {
            UniqueId::try_from(&await_file(&path)[..])?
        };
        Comm::join(&nccl, id, size, self.number, until, || Ok(()))
    }

    /// Rings of several sizes, then all to rank 0, then two transfers of a pair and one to itself in one group.
    fn transfers(&self, comm: &mut Comm) -> Result<(), Error> {
        assert_eq!((comm.rank(), comm.size()), (self.number, self.size));
        for bytes in [1, 70_000, 200_003, 0] {
            self.around(comm, bytes, in_time())?;
        }
        let uneven = |rank: usize| 50_000 * (rank + 1) + rank;
        let mut parts: Vec<Vec<u8>> = (0..self.size).map(|rank| vec![0; uneven(rank)]).collect();
        let mine = bytes_of(self.number, uneven(self.number));
        comm.group(in_time(), |group| {
            if self.number == 0 {
                for (peer, part) in parts.iter_mut().enumerate().skip(1) {
                    // SAFETY: the vectors outlive the group.
                    unsafe { group.recv(part.as_mut_ptr(), part.len(), peer, STREAM) };
                }
            } else {
                // SAFETY: as above.
                unsafe { group.send(mine.as_ptr(), mine.len(), 0, STREAM) };
            }
        })?;
        if self.number == 0 {
            parts.iter().enumerate().skip(1).for_each(|(rank, part)| assert!(*part == bytes_of(rank, uneven(rank))));
        }
        let mut copy = vec![0; mine.len()];
        comm.group(in_time(), |group| {
            // SAFETY: as above.
            unsafe {
                group.send(mine.as_ptr(), mine.len(), self.number, STREAM);
                group.recv(copy.as_mut_ptr(), copy.len(), self.number, STREAM);
            }
        })?;
        assert!(copy == mine);
        self.pair(comm, &[3, 100_000, 7], in_time())
    }

    /// Every rank sends to the next.
    fn around(&self, comm: &mut Comm, bytes: usize, until: Instant) -> Result<(), Error> {
        let (next, prev) = ((self.number + 1) % self.size, (self.number + self.size - 1) % self.size);
        let (mine, mut theirs) = (bytes_of(self.number, bytes), vec![0; bytes]);
        comm.group(until, |group| {
            // SAFETY: the vectors outlive the group.
            unsafe {
                group.send(mine.as_ptr(), bytes, next, STREAM);
                group.recv(theirs.as_mut_ptr(), bytes, prev, STREAM);
            }
        })?;
        assert!(theirs == bytes_of(prev, bytes));
        Ok(())
    }

    /// Rank 0 sends several to rank 1, in one group.
    fn pair(&self, comm: &mut Comm, sizes: &[usize], until: Instant) -> Result<(), Error> {
        let sent: Vec<Vec<u8>> = sizes.iter().map(|&bytes| bytes_of(bytes, bytes)).collect();
        let mut got: Vec<Vec<u8>> = sizes.iter().map(|&bytes| vec![0; bytes]).collect();
        comm.group(until, |group| {
            for (out, back) in sent.iter().zip(&mut got) {
                // SAFETY: the vectors outlive the group.
                unsafe {
                    match self.number {
                        0 => group.send(out.as_ptr(), out.len(), 1, STREAM),
                        1 => group.recv(back.as_mut_ptr(), back.len(), 0, STREAM),
                        _ => {}
                    }
                }
            }
        })?;
        assert!(self.number != 1 || got == sent);
        Ok(())
    }

    /// One round. After an error, every other call gives the same.
    fn exchange(&self, comm: &mut Comm) -> Result<(), Error> {
        let late = env::var("FLEXMODEL_NCCL_STANDIN").unwrap().contains("late");
        let mut first = self.around_or_abandon(comm);
        if first.is_ok() && late {
            first = comm.wait(soon(), || Ok(false));
        }
        if let Err(error) = &first {
            let kept = comm.check().unwrap_err();
            // A call that is stuck says so itself, whatever it was stuck after.
            assert!(kept == *error || matches!(error, Error::Stuck { .. }), "{kept}");
            assert_eq!(comm.wait(soon(), || Ok(false)).unwrap_err(), kept);
            assert_eq!(self.around(comm, 1, soon()).unwrap_err(), kept);
            comm.abort();
            assert_eq!(comm.check().unwrap_err(), kept);
        }
        first
    }

    /// Buffers are left behind where the communicator's thread may still have them.
    fn around_or_abandon(&self, comm: &mut Comm) -> Result<(), Error> {
        let (next, prev) = ((self.number + 1) % self.size, (self.number + self.size - 1) % self.size);
        let (mine, theirs) = (bytes_of(self.number, 1000).leak(), vec![0; 1000].leak());
        comm.group(soon(), |group| {
            // SAFETY: both live as long as the process.
            unsafe {
                group.send(mine.as_ptr(), 1000, next, STREAM);
                group.recv(theirs.as_mut_ptr(), 1000, prev, STREAM);
            }
        })
    }

    /// Groups that return before they are done, and what an event would say.
    fn stream(&self, library: &Library) -> Result<(), Error> {
        let mut comm = self.join()?;
        // SAFETY: the stand-in's function.
        let pending: Symbol<unsafe extern "C" fn(Stream) -> c_int> =
            unsafe { library.get("ncclStandinPending").unwrap() };
        // SAFETY: takes any stream.
        let free = || unsafe { pending(STREAM) } == 0;
        let (next, prev) = ((self.number + 1) % self.size, (self.number + self.size - 1) % self.size);
        for bytes in [200_000, 300_000] {
            let (mine, theirs) = (bytes_of(self.number, bytes).leak(), vec![0; bytes].leak());
            comm.group(in_time(), |group| {
                // SAFETY: both live as long as the process.
                unsafe {
                    group.send(mine.as_ptr(), bytes, next, STREAM);
                    group.recv(theirs.as_mut_ptr(), bytes, prev, STREAM);
                }
            })?;
            comm.wait(soon(), || Ok(free())).map_err(|error| {
                let then = if free() { "and then the stream was free" } else { "and the stream was not free" };
                Error::Argument(format!("{error} {then}"))
            })?;
            assert!(*theirs == bytes_of(prev, bytes));
        }
        Ok(())
    }
}

const STREAM: Stream = ptr::without_provenance_mut(0x51);

/// Bytes that only this rank has.
fn bytes_of(rank: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| ((i * 31 + rank * 7 + 1) % 251) as u8).collect()
}

/// Each refusal, a line.
fn nonsense(rank: &Rank) -> String {
    load();
    let nccl = Nccl::loaded().unwrap();
    assert_eq!(nccl.version().to_string(), "2.28.9");
    assert_eq!(Nccl::loaded_as(stand_in().to_str().unwrap()).unwrap().version(), nccl.version());
    let id = UniqueId::new(&nccl).unwrap();
    assert_eq!(UniqueId::try_from(&id.as_bytes()[..]), Ok(id));
    let mut said = vec![
        Comm::join(&nccl, id, 2, 2, soon(), || Ok(())).err(),
        UniqueId::try_from(&[1, 2, 3][..]).err(),
        Comm::join(&nccl, id, 1, 0, soon(), || Err("no such device".into())).err(),
    ];
    let mut comm = Comm::join(&nccl, id, rank.size, 0, in_time(), || Ok(())).unwrap();
    comm.check().unwrap();
    // SAFETY: nothing is read: the rank is refused.
    said.push(unsafe { comm.send(ptr::null(), 1, 7, STREAM, soon()) }.err());
    said.push(comm.check().err());
    // SAFETY: the communicator's thread, the only other, reads no environment.
    unsafe { env::set_var("NCCL_COMM_ID", "127.0.0.1:1") };
    said.push(Nccl::loaded().err());
    said.into_iter().map(|error| error.unwrap().to_string()).collect::<Vec<_>>().join("\n")
}
