//! Two ranks, each with a device of its own, over the stand-ins for the driver and for NCCL.

mod standin;

use std::{
    sync::{
        Barrier,
        atomic::AtomicBool,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::Duration,
};

use devices::{Device, Event, Ranks, Transfer};
use nccl_sys::{Error, Nccl};
use standin::{Cuda, beside};

/// A bound for hangs; nothing is measured with it.
const HANG: Duration = Duration::from_secs(60);
const BYTES: usize = 100_000;

/// What two ranks tell each other.
struct Words {
    index: usize,
    to: Sender<Vec<u8>>,
    from: Receiver<Vec<u8>>,
}

impl Words {
    fn pair() -> [Self; 2] {
        let ((to_second, at_second), (to_first, at_first)) = (channel(), channel());
        [Self { index: 0, to: to_second, from: at_first }, Self { index: 1, to: to_first, from: at_second }]
    }

    fn exchange(&self, mine: &[u8]) -> Option<Vec<Vec<u8>>> {
        self.to.send(mine.to_vec()).ok()?;
        let mut heard = vec![self.from.recv_timeout(HANG).ok()?];
        heard.insert(self.index, mine.to_vec());
        Some(heard)
    }
}

fn nccl() -> Result<Nccl, Error> {
    let path = beside("libnccl.so");
    // SAFETY: the stand-in has no initialisers; it is never unloaded.
    std::mem::forget(unsafe { libloading::os::unix::Library::new(&path) }.unwrap());
    Nccl::loaded_as(path.to_str().unwrap())
}

/// The first rank receives what the second has.
fn move_one(ranks: &mut Ranks, index: usize, bytes: &mut [u8]) -> Result<(), Error> {
    let at = bytes.as_mut_ptr().expose_provenance();
    let one = Transfer { peer: 1 - index as u32, send: index == 1, at, bytes: bytes.len() };
    // SAFETY: the bytes live through the call.
    unsafe { ranks.transfer(&[one], &AtomicBool::new(false)) }
}

/// DEVICE-3. The first rank's job is ahead: it has queued a collective of the job's, and something is kept behind that. The
/// second waits for its device, as torch.cuda.synchronize and a full allocator do, before it queues the collective.
#[test]
fn a_transfer_passes_whatever_the_jobs_have_queued() {
    let (_alone, cuda) = Cuda::alone();
    let queued = Barrier::new(3);
    let rank = |words: Words, (tell, heard): (Sender<()>, Receiver<()>)| {
        let index = words.index;
        let stream = cuda.stream_on(index as i32);
        let device = Device::of(index as i32).unwrap();
        let (exchange, report) = (|mine: &[u8]| words.exchange(mine), |why: &Error| panic!("{why}"));
        let mut ranks = Ranks::join(nccl(), index as u32, 2, index as i32, exchange, report).unwrap();
        // A collective of the job's passes when both devices have come to it.
        let collective = move || {
            tell.send(()).unwrap();
            heard.recv_timeout(HANG).unwrap();
        };
        let kept = Event::record(device, stream).unwrap();
        let gathers = || {
            kept.wait().unwrap();
            queued.wait();
            let mut mine = vec![index as u8; BYTES];
            let outcome = move_one(&mut ranks, index, &mut mine);
            (outcome, mine)
        };
        thread::scope(|scope| {
            let gathers = scope.spawn(gathers);
            if index == 0 {
                cuda.queue(0, stream, collective);
                let behind = Event::record(device, stream).unwrap();
                queued.wait();
                behind.wait().unwrap();
            } else {
                while !gathers.is_finished() {
                    cuda.synchronize(1);
                }
                cuda.queue(1, stream, collective);
            }
            gathers.join().unwrap()
        })
    };
    let ([first, second], (tell_first, at_first), (tell_second, at_second)) = (Words::pair(), channel(), channel());
    let both = thread::scope(|scope| {
        let first = scope.spawn(|| rank(first, (tell_second, at_first)));
        let second = scope.spawn(|| rank(second, (tell_first, at_second)));
        [first, second].map(|rank| rank.join().unwrap())
    });
    for (outcome, bytes) in both {
        assert_eq!(outcome, Ok(()));
        assert!(bytes == vec![1; BYTES]);
    }
    cuda.expect_no_violation();
}

/// What a rank cannot have is known before the others count on it.
#[test]
fn ranks_that_have_joined_make_no_stream_any_more() {
    let (_alone, cuda) = Cuda::alone();
    let joined = Barrier::new(2);
    let rank = |words: Words| {
        let index = words.index;
        cuda.stream_on(index as i32 + 2);
        let (exchange, report) = (|mine: &[u8]| words.exchange(mine), |why: &Error| panic!("{why}"));
        let mut ranks = Ranks::join(nccl(), index as u32, 2, index as i32 + 2, exchange, report).unwrap();
        if joined.wait().is_leader() {
            cuda.fail(c"cuStreamCreateWithPriority", 1);
        }
        joined.wait();
        let mut mine = vec![index as u8; BYTES];
        (move_one(&mut ranks, index, &mut mine), mine)
    };
    let [first, second] = Words::pair();
    let both = thread::scope(|scope| {
        [scope.spawn(|| rank(first)), scope.spawn(|| rank(second))].map(|rank| rank.join().unwrap())
    });
    cuda.fail(c"cuStreamCreateWithPriority", 0);
    for (outcome, bytes) in both {
        assert_eq!(outcome, Ok(()));
        assert!(bytes == vec![1; BYTES]);
    }
    cuda.expect_no_violation();
}
