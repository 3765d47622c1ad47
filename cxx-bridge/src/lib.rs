//! The half of FlexModel that knows tensors.
//!
//! This archive holds the Rust side, which gives the interposer the bridge's table ([`wire::tap_abi`]). The C++ side
//! (`cpp/`) is compiled against one torch, and calls the interposer's table itself. Together they are
//! `libflexmodel_torch.so`, which decides nothing: taps ask the interposer what to do.
//!
//! | file | does |
//! |---|---|
//! | [`ffi`] | the cxx bridge |
//! | [`host`] | the interposer's table, where Rust calls it |
//! | [`codes`] | codes for those who know them by name |
//! | [`table`] | what the interposer calls: the bridge's table |
//! | [`gather`] | a communicator as the interposer sees it |
//! | [`nccl`] | its way between devices, over NCCL |
//! | [`store`] | the job's store as the interposer sees it |
//! | [`staging`] | tensors of our own: staged for other ranks, or on their way from a device |
//! | `build.rs` | generates the header of what is shared: `wire.h`, with structs, tables and codes |
//! | `cpp/tensor.cc` | describes tensors and copies them out |
//! | `cpp/faults.cc` | what one leaf, container or gradient costs that raises |
//! | `cpp/leaves.cc` | walks tuples, lists, dicts and dataclasses |
//! | `cpp/gradients.cc` | identity nodes, gradient hooks, edits |
//! | `cpp/compiled.cc` | what is put into a graph while torch.compile traces it |
//! | `cpp/operations.cc` | the operations in these graphs, as they run |
//! | `cpp/tap.cc` | the Python callable that a hook is |
//! | `cpp/staging.cc` | makes tensors of our own |
//! | `cpp/communicator.cc` | a communicator of our own, over c10d's Gloo |
//! | `cpp/store.cc` | the store of the job's process group |
//! | `cpp/module.cc` | the Python module for the shim |

mod codes;
mod ffi;
mod gather;
mod host;
mod nccl;
mod staging;
mod store;
mod table;

pub use table::flexmodel_bridge_open;
