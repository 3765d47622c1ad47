//! Plays the ranks of a training job without torch: makes run directories for tests, demonstrations and measurements.
//!
//! ```text
//! flexmodel agent --socket runs/a.sock --out runs/demo &
//! cargo run --example produce -- --socket runs/a.sock --ranks 2 --steps 20 --elements 65536
//! ```
//!
//! Each rank captures `layers.N.mlp` (forward and backward, laid along the batch), `lm_head` (forward) and
//! `layers.0.attn` (a tuple with a replicated leaf) at every step.

use std::{
    io::{IoSlice, Write},
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::PathBuf,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use clap::Parser;
use wire::{
    control::{self, CONTROL_VERSION, Hello, JobSigns, ModuleInfo, ToAgent},
    dtype::DType,
    env::OnFull,
    hooks::Kind,
    passes::{Group, Pass, Run},
    record::{Axis, Placement, RecordMeta},
    slab::{Mapping, SlabWriter},
};

/// Plays the ranks of a training job without torch.
#[derive(Clone, Debug, Parser)]
struct Args {
    /// The agent's socket
    #[arg(long)]
    socket: PathBuf,
    /// Ranks, one thread each
    #[arg(long, default_value_t = 2)]
    ranks: u32,
    /// Ranks of the whole job, where others of them ship to other agents
    #[arg(long)]
    world: Option<u32>,
    /// The first of the ranks
    #[arg(long, default_value_t = 0)]
    first_rank: u32,
    /// Training steps
    #[arg(long, default_value_t = 10)]
    steps: u64,
    /// Elements of each tensor on each rank
    #[arg(long, default_value_t = 4096)]
    elements: u64,
    /// Layers
    #[arg(long, default_value_t = 4)]
    layers: u32,
    /// Bytes of each slab, such as 64M
    #[arg(long, value_parser = wire::env::parse_bytes, default_value = "64M")]
    slab: u64,
    /// Milliseconds between steps
    #[arg(long, default_value_t = 0)]
    pause: u64,
}

impl Args {
    fn world(&self) -> u32 {
        self.world.unwrap_or(self.ranks)
    }
}

fn main() {
    let args = Args::parse();
    let ranks: Vec<_> = (args.first_rank..args.first_rank + args.ranks)
        .map(|rank| {
            let args = args.clone();
            std::thread::spawn(move || Rank::attach(&args, rank).and_then(|mut rank| rank.train()))
        })
        .collect();
    for rank in ranks {
        match rank.join() {
            Ok(Ok(())) => {}
            Ok(Err(e)) => eprintln!("produce: {e}"),
            Err(_) => std::process::exit(1),
        }
    }
}

struct Rank {
    args: Args,
    rank: u32,
    slab: SlabWriter,
    stream: UnixStream,
    values: Vec<f32>,
}

impl Rank {
    fn attach(args: &Args, rank: u32) -> std::io::Result<Self> {
        let slab = SlabWriter::create(args.slab, rank).map_err(std::io::Error::other)?;
        let mut stream = UnixStream::connect(&args.socket)?;
        let hello = Hello {
            version: CONTROL_VERSION,
            rank,
            world: args.world(),
            // Threads play processes.
            pid: std::process::id() + rank,
            node: "produce".into(),
            torch: "none".into(),
            python: "none".into(),
            command: std::env::args().collect(),
            hooks: "layers.*.mlp:forward,backward;layers.0.attn;lm_head".into(),
            on_full: OnFull::Wait,
            wrapper: "DDP".into(),
            job: Box::new(JobSigns {
                group: 1,
                here: Some(Run { first: args.first_rank, by: 1, count: args.ranks }),
                ..JobSigns::default()
            }),
        };
        send_with_fd(&stream, &encode(&ToAgent::Hello(hello)), slab.mapping())?;
        stream.write_all(&encode(&ToAgent::Model { model: 0, modules: modules(args.layers) }))?;
        Ok(Self { args: args.clone(), rank, slab, stream, values: noise(args.elements, rank) })
    }

    fn train(&mut self) -> std::io::Result<()> {
        for step in 0..self.args.steps {
            for layer in 0..self.args.layers {
                self.capture(
                    step,
                    &format!("layers.{layer}.mlp"),
                    "MLP",
                    Kind::Forward,
                    "out",
                    Placement::Shard { dim: 0 },
                );
            }
            self.capture(step, "layers.0.attn", "Attention", Kind::Forward, "out[0]", Placement::Shard { dim: 0 });
            self.capture(step, "layers.0.attn", "Attention", Kind::Forward, "out[1]", Placement::Replicate);
            self.capture(step, "lm_head", "Linear", Kind::Forward, "out", Placement::Shard { dim: 0 });
            for layer in (0..self.args.layers).rev() {
                self.capture(
                    step,
                    &format!("layers.{layer}.mlp"),
                    "MLP",
                    Kind::Backward,
                    "in[0]",
                    Placement::Shard { dim: 0 },
                );
            }
            self.tell_of_pass(step)?;
            std::thread::sleep(Duration::from_millis(self.args.pause));
        }
        let end = Instant::now() + Duration::from_secs(60);
        while self.slab.in_flight() > 0 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.stream.write_all(&encode(&ToAgent::Bye))
    }

    /// All ranks have made it together.
    fn tell_of_pass(&mut self, step: u64) -> std::io::Result<()> {
        let ranks = vec![Run { first: 0, by: 1, count: self.args.world() }];
        let pass = Pass {
            model: 0,
            step,
            micro: 0,
            train: true,
            inference: false,
            signature: 1,
            among: (0, 1),
            reduces: true,
            groups: vec![Group { ranks, begin: Some(step), since: 0, together: true }],
        };
        self.stream.write_all(&encode(&ToAgent::Passed(pass)))
    }

    fn capture(&mut self, step: u64, module: &str, class: &str, kind: Kind, path: &str, place: Placement) {
        let replicated = place == Placement::Replicate;
        let rows = 8.min(self.args.elements.max(1));
        let shape = vec![rows, self.args.elements / rows];
        let elements = shape.iter().product::<u64>() as usize;
        // Something to see over the steps; replicas are equal on every rank.
        let scale = if replicated { 1.0 } else { 1.0 / (1.0 + step as f32) + self.rank as f32 };
        let values: Vec<f32> = match replicated {
            true => vec![step as f32; elements],
            false => self.values.iter().take(elements).map(|x| x * scale).collect(),
        };
        let axes = match self.args.world() {
            1 => Vec::new(),
            size => vec![Axis { name: "dp".into(), index: self.rank, size, place, input_digest: None }],
        };
        let meta = RecordMeta {
            class: class.into(),
            kind,
            path: path.into(),
            step,
            rank: self.rank,
            axes,
            dp_size: self.args.world(),
            time_ns: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64),
            ..RecordMeta::output(module, DType::Float32, shape)
        };
        self.ship(&meta, bytes_of(&values));
    }

    /// In pieces, waiting for room, as a tap does.
    fn ship(&mut self, meta: &RecordMeta, bytes: &[u8]) {
        let mut encoded = Vec::new();
        meta.encode(&mut encoded);
        let record = self.slab.begin_record();
        let piece = self.slab.max_piece() as usize;
        let mut at = 0;
        loop {
            let end = bytes.len().min(at + piece);
            let head: &[u8] = if at == 0 { &encoded } else { &[] };
            let slot = loop {
                let len = (end - at) as u64;
                match self.slab.try_reserve(record, head, at as u64, len, bytes.len() as u64) {
                    Some(slot) => break slot,
                    None => {
                        let seen = self.slab.room_seen();
                        SlabWriter::wait_for_room(self.slab.mapping(), seen, Duration::from_millis(20));
                    }
                }
            };
            // SAFETY: the reservation owns end - at bytes.
            unsafe { std::ptr::copy_nonoverlapping(bytes[at..].as_ptr(), slot.payload(), end - at) };
            slot.commit();
            at = end;
            if at == bytes.len() {
                break;
            }
        }
    }
}

fn encode(message: &ToAgent) -> Vec<u8> {
    control::encode(message).unwrap_or_default()
}

fn bytes_of(values: &[f32]) -> &[u8] {
    // SAFETY: f32 has no padding and any byte of it may be read.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

fn modules(layers: u32) -> Vec<ModuleInfo> {
    let entry = |name: String, class: &str, kinds| ModuleInfo { name, class: class.into(), kinds };
    let mut all = vec![entry(String::new(), "Model", 0), entry("layers".into(), "ModuleList", 0)];
    for n in 0..layers {
        let attention = if n == 0 { Kind::Forward.bit() } else { 0 };
        all.push(entry(format!("layers.{n}"), "Block", 0));
        all.push(entry(format!("layers.{n}.attn"), "Attention", attention));
        all.push(entry(format!("layers.{n}.mlp"), "MLP", Kind::Forward.bit() | Kind::Backward.bit()));
    }
    all.push(entry("lm_head".into(), "Linear", Kind::Forward.bit()));
    all
}

/// Roughly normal values, the same in every run.
fn noise(n: u64, seed: u32) -> Vec<f32> {
    let mut state = u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..n).map(|_| (0..6).map(|_| uniform()).sum::<f32>() - 3.0).collect()
}

/// Sends `bytes` with the slab's descriptor on the first of them (SCM_RIGHTS).
fn send_with_fd(mut stream: &UnixStream, bytes: &[u8], map: &Mapping) -> std::io::Result<()> {
    #[repr(align(8))]
    struct Ancillary([u8; 24]);
    let mut ancillary = Ancillary([0; 24]);
    let slices = [IoSlice::new(bytes)];
    let fd = map.fd()?;
    // SAFETY: msghdr is plain data; every pointer in it outlives the call; the buffer has room for one descriptor.
    let sent = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        (message.msg_iov, message.msg_iovlen) = (slices.as_ptr().cast_mut().cast(), 1);
        message.msg_control = ancillary.0.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(size_of::<i32>() as u32) as usize;
        let header = libc::CMSG_FIRSTHDR(&message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(size_of::<i32>() as u32) as usize;
        libc::CMSG_DATA(header).cast::<i32>().write_unaligned(fd.as_raw_fd());
        libc::sendmsg(stream.as_raw_fd(), &message, 0)
    };
    let sent = usize::try_from(sent).map_err(|_| std::io::Error::last_os_error())?;
    stream.write_all(&bytes[sent..])
}
