//! The kernel, the memory and the GPU.

use std::{
    env, fs,
    io::{IoSlice, IoSliceMut},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use wire::env::DEFAULT_SLAB_BYTES;

use super::Check;
use crate::{memory, text};

/// Everything about the machine.
pub fn checks() -> Vec<Check> {
    vec![system(), shared_memory(), descriptors(), memory(), disk(), gpu()]
}

fn system() -> Check {
    let (os, arch) = (env::consts::OS, env::consts::ARCH);
    match (os, arch) {
        ("linux", "x86_64") => {
            let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
            Check::ok("system", format!("Linux {} on x86_64", release.trim()))
        }
        _ => Check::no("system", format!("{os} on {arch}"), "taps need Linux on x86_64; reading runs works here"),
    }
}

/// A memfd that is allocated in full and sealed, as every rank makes one.
fn shared_memory() -> Check {
    let name = "shared memory";
    // SAFETY: the name is a C string; the new descriptor is owned by nobody else.
    let fd = unsafe {
        let fd = libc::memfd_create(c"flexmodel-doctor".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
        if fd < 0 {
            let e = std::io::Error::last_os_error();
            return Check::no(
                name,
                format!("memfd_create: {e}"),
                "a container's seccomp profile may forbid it; allow it",
            );
        }
        OwnedFd::from_raw_fd(fd)
    };
    // SAFETY: plain system calls on a descriptor that lives.
    let (allocated, sealed) = unsafe {
        (
            libc::fallocate(fd.as_raw_fd(), 0, 0, 1 << 20) == 0,
            libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW) == 0,
        )
    };
    match (allocated, sealed) {
        (true, true) => Check::ok(name, "memfd, fallocate and seals"),
        (false, _) => Check::no(name, "fallocate on a memfd is refused", "raise the container's memory limit"),
        (true, false) => Check::no(name, "a memfd cannot be sealed", "use a kernel of version 3.17 or newer"),
    }
}

/// A descriptor sent over a unix socket, as ranks hand over their slabs.
fn descriptors() -> Check {
    let name = "unix sockets";
    match pass_descriptor() {
        Ok(true) => Check::ok(name, "descriptors pass (SCM_RIGHTS)"),
        Ok(false) => {
            Check::no(name, "a descriptor that was sent did not arrive", "a sandbox may strip it; run outside of it")
        }
        Err(e) => Check::no(name, e.to_string(), "allow unix sockets in the container's seccomp profile"),
    }
}

fn pass_descriptor() -> std::io::Result<bool> {
    const SPACE: usize = 64;
    #[repr(align(8))]
    struct Control([u8; SPACE]);
    let (from, to) = UnixStream::pair()?;
    let byte = [1u8];
    let (out, mut arrived) = (IoSlice::new(&byte), [0u8]);
    let mut input = IoSliceMut::new(&mut arrived);
    let (mut sent, mut got) = (Control([0; SPACE]), Control([0; SPACE]));
    // SAFETY: IoSlice and IoSliceMut are iovecs by their documentation; both control buffers are larger than one
    // descriptor's message and aligned for it; every pointer outlives the two calls.
    unsafe {
        let space = libc::CMSG_SPACE(size_of::<i32>() as u32) as usize;
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = (&raw const out) as *mut libc::iovec;
        message.msg_iovlen = 1;
        message.msg_control = sent.0.as_mut_ptr().cast();
        message.msg_controllen = space;
        let header = libc::CMSG_FIRSTHDR(&message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(size_of::<i32>() as u32) as usize;
        libc::CMSG_DATA(header).cast::<i32>().write_unaligned(from.as_raw_fd());
        if libc::sendmsg(from.as_raw_fd(), &message, libc::MSG_NOSIGNAL) != 1 {
            return Err(std::io::Error::last_os_error());
        }
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = (&raw mut input).cast();
        message.msg_iovlen = 1;
        message.msg_control = got.0.as_mut_ptr().cast();
        message.msg_controllen = space;
        if libc::recvmsg(to.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC) != 1 {
            return Err(std::io::Error::last_os_error());
        }
        let header = libc::CMSG_FIRSTHDR(&message);
        if header.is_null() || (*header).cmsg_type != libc::SCM_RIGHTS {
            return Ok(false);
        }
        let fd = libc::CMSG_DATA(header).cast::<i32>().read_unaligned();
        drop(OwnedFd::from_raw_fd(fd));
        Ok(fd >= 0)
    }
}

fn memory() -> Check {
    let name = "memory";
    let slab = text::bytes(DEFAULT_SLAB_BYTES);
    match memory::available() {
        None => Check::absent(name, "free memory cannot be told (/proc/meminfo)"),
        Some(free) if free < DEFAULT_SLAB_BYTES => Check::no(
            name,
            format!("{} free, and a rank's slab takes {slab}", text::bytes(free)),
            format!("set {}=64M or less", wire::env::SLAB),
        ),
        Some(free) => Check::ok(
            name,
            format!("{} free: room for {} slabs of {slab}, one a rank", text::bytes(free), free / DEFAULT_SLAB_BYTES),
        ),
    }
}

fn disk() -> Check {
    let name = "disk";
    // SAFETY: statvfs writes one struct, for which zeroes are a value.
    let free = unsafe {
        let mut stat: libc::statvfs = std::mem::zeroed();
        (libc::statvfs(c".".as_ptr(), &mut stat) == 0).then(|| stat.f_bavail.saturating_mul(stat.f_frsize))
    };
    match free {
        None => Check::absent(name, "free space here cannot be told"),
        Some(free) if free < DEFAULT_SLAB_BYTES => {
            Check::no(name, format!("{} free in this folder", text::bytes(free)), "give --out a folder with more")
        }
        Some(free) => Check::ok(name, format!("{} free in this folder", text::bytes(free))),
    }
}

fn gpu() -> Check {
    let name = "GPU";
    // SAFETY: the CUDA driver's initialisers have no precondition; the handle is kept, as drivers may not be unloaded.
    let there = unsafe { !libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL).is_null() };
    match there {
        true => Check::ok(name, "a CUDA driver is installed"),
        false => Check::absent(name, "no CUDA driver: fine, jobs on the CPU are tapped all the same"),
    }
}
