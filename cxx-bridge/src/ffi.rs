//! The one bridge between Rust and C++: what each side offers the other.
//!
//! *Mutability.* Tensors are only read. *Aliasing.* A `&Tensor` borrows what a tap holds on its stack and never
//! outlives the call; what has to live longer is in a [`Ticket`](crate::staging::Ticket) or
//! [`Staged`](crate::staging::Staged), which own a reference.

use crate::codes::{constants, dtype_code};
use crate::gather::joined;
use crate::staging::{Apart, Mark, aside, is_capturing, recorded};
use crate::store::opened;

#[cxx::bridge(namespace = "flexmodel")]
#[allow(missing_docs)]
pub mod bridge {
    /// A code by the name that Python has for it.
    struct Constant {
        name: String,
        value: u32,
    }

    /// From a member of a communicator, or out of a store.
    struct Message {
        bytes: Vec<u8>,
    }

    /// A tensor, by its address, on its way to another rank or from it.
    struct Move {
        peer: u32,
        send: bool,
        tensor: usize,
    }

    /// What a slice takes of a dimension.
    struct Cut {
        start: u64,
        len: u64,
        step: u64,
        keeps: bool,
    }

    /// Where a tensor is, and a stream there.
    struct Place {
        /// -1 for the CPU.
        device: i32,
        stream: usize,
    }

    extern "Rust" {
        fn constants() -> Vec<Constant>;
        /// Of the element type with this name, without the `torch.`; 0 where it has none.
        fn dtype_code(name: &str) -> u8;
        fn joined(words: UniquePtr<Communicator>, index: u32, size: u32, device: i32);
        fn opened(store: UniquePtr<Store>);
        /// Whether work on this stream of a device goes into a CUDA graph instead of being run, or nobody can say.
        fn is_capturing(device: i32, stream: usize) -> bool;

        /// Until it is dropped this thread is aside from what other threads capture (DEVICE-2).
        type Apart;
        fn aside(device: i32) -> Result<Box<Apart>>;

        /// What a stream had to do when it was recorded: C++ has no other events (DEVICE-1).
        type Mark;
        fn recorded(device: i32, stream: usize) -> Result<Box<Mark>>;
        /// Has another stream of the same device wait for it.
        fn hold(self: &Mark, stream: usize) -> Result<()>;
        /// Waits until it has come.
        fn wait(self: &Mark) -> Result<()>;
    }

    unsafe extern "C++" {
        include!("flexmodel/tensor.h");
        include!("flexmodel/module.h");
        include!("flexmodel/communicator.h");
        include!("flexmodel/staging.h");
        include!("flexmodel/store.h");

        #[namespace = "at"]
        type Tensor;

        /// Where a tensor is, and this thread's stream there.
        fn place_of(tensor: &Tensor) -> Place;

        /// Copies elements `first .. first + count` of a tensor of the CPU, row-major and as `dtype`, to `destination`.
        ///
        /// # Safety
        /// `destination` must take `count` elements of `dtype`.
        unsafe fn copy_out(tensor: &Tensor, dtype: u8, first: u64, count: u64, destination: *mut u8) -> Result<()>;

        /// A copy of elements `first .. first + count`, row-major and as `dtype`, on the tensor's device and by this thread's
        /// stream there.
        fn snapshot(tensor: &Tensor, dtype: u8, first: u64, count: u64) -> Result<UniquePtr<Tensor>>;

        /// A row-major copy of `tensor` as `dtype`, on its device.
        fn stage(tensor: &Tensor, dtype: u8) -> Result<UniquePtr<Tensor>>;

        /// Whether it is on a device, not the CPU.
        fn is_on_device(tensor: &Tensor) -> bool;

        /// Whether its bytes lie in memory as they are wanted: on the CPU, row-major, as `dtype`.
        fn is_plain(tensor: &Tensor, dtype: u8) -> bool;
        fn elements_of(tensor: &Tensor) -> usize;

        /// The address of its first element, and its bytes.
        fn address_of(tensor: &Tensor) -> usize;
        fn bytes_of(tensor: &Tensor) -> usize;

        /// A view of what slices take of its dimensions, of which there are as many.
        fn view_of(tensor: &Tensor, cuts: &[Cut]) -> Result<UniquePtr<Tensor>>;

        /// Another reference to it.
        fn share(tensor: &Tensor) -> UniquePtr<Tensor>;

        /// Room for what is received, to be used on this stream alone. This thread is aside.
        fn receiver(dtype: u8, sizes: &[u64], place: Place) -> Result<UniquePtr<Tensor>>;

        /// Ranks that can send each other messages and tensors.
        type Communicator;

        /// Sends `mine` to all members; the message of each, in order.
        fn exchange(self: &Communicator, mine: &[u8]) -> Result<Vec<Message>>;

        /// Carries out moves between tensors of the CPU.
        fn transfer(self: &Communicator, moves: &Vec<Move>) -> Result<()>;

        /// Makes what is under way fail.
        fn cut(self: &Communicator) -> Result<()>;

        /// The store of the job's process group, over a connection of ours.
        type Store;

        /// Gives a key this value if it has none; the value that it has.
        fn settle(self: &Store, key: &str, value: &[u8]) -> Result<Message>;

        /// The value of a key; nothing if it has none.
        fn look(self: &Store, key: &str) -> Result<Vec<Message>>;

        /// Keeps the host's table for C++, by its address. Whether it is as C++ knows it.
        fn set_host(table: usize) -> bool;

        /// The address of a new reference to the Python module; 0 with a Python error set.
        fn python_module() -> usize;
    }
}
