//! What the NCCL at a path says, by hand:
//!
//! ```text
//! cargo run -p nccl-sys --example probe -- SITE_PACKAGES/nvidia/nccl/lib/libnccl.so.2
//! ```
//!
//! Loads it, as torch would; then asks for its version, an id, and a communicator of one rank, which without a GPU is
//! an error.

use std::time::{Duration, Instant};

use libloading::os::unix::Library;
use nccl_sys::{Comm, Nccl, UniqueId};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("which library? Give its path")?;
    println!("before it is loaded: {}", Nccl::loaded().map_or_else(|e| e.to_string(), |n| n.version().to_string()));
    // SAFETY: it is trusted as much as torch, which would load it.
    let _library = unsafe { Library::new(&path) }?;
    let nccl = Nccl::loaded()?;
    println!("NCCL {}", nccl.version());
    match UniqueId::new(&nccl) {
        Err(e) => println!("no id: {e}"),
        Ok(id) => {
            println!("an id");
            let until = Instant::now() + Duration::from_secs(20);
            match Comm::join(&nccl, id, 1, 0, until, || Ok(())).and_then(|mut comm| comm.check()) {
                Err(e) => println!("no communicator: {e}"),
                Ok(()) => println!("a communicator"),
            }
        }
    }
    Ok(())
}
