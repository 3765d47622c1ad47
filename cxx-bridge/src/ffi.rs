//! The one bridge between Rust and C++: what each side offers the other.
//!
//! *Mutability.* Tensors are only read. *Aliasing.* A `&Tensor` borrows what a tap holds on its stack and never
//! outlives the call; what has to live longer is a [`bridge::Ticket`], which owns its own reference.

use crate::codes::{constants, dtype_code};
use crate::gather::joined;
use crate::pin::{capture_mode, is_capturing};
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

    extern "Rust" {
        fn constants() -> Vec<Constant>;
        /// Of the element type with this name, without the `torch.`; 0 where it has none.
        fn dtype_code(name: &str) -> u8;
        fn joined(words: UniquePtr<Communicator>, index: u32, size: u32, device: i32);
        fn opened(store: UniquePtr<Store>);
        fn is_capturing(stream: usize) -> bool;
        fn capture_mode(mode: u32) -> u32;
    }

    unsafe extern "C++" {
        include!("flexmodel/tensor.h");
        include!("flexmodel/module.h");
        include!("flexmodel/communicator.h");
        include!("flexmodel/staging.h");
        include!("flexmodel/store.h");

        #[namespace = "at"]
        type Tensor;

        /// A copy from a device that is under way.
        type Ticket;

        /// Copies elements `first .. first + count` of `tensor`, row-major and as `dtype`, to `destination`. Null: the
        /// bytes are there. What is `staged` nobody changes, and it is ready on the side stream.
        ///
        /// # Safety
        /// `destination` must take `count` elements of `dtype`, until the ticket was waited for.
        unsafe fn copy_out(
            tensor: &Tensor,
            staged: bool,
            dtype: u8,
            first: u64,
            count: u64,
            destination: *mut u8,
        ) -> Result<UniquePtr<Ticket>>;

        /// Waits until the copy is done.
        fn wait(self: &Ticket) -> Result<()>;

        /// Whether it is.
        fn has_come(self: &Ticket) -> Result<bool>;

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

        /// Room for what is received, on a device (on the CPU: -1), to be used on its side stream alone.
        fn receiver(dtype: u8, sizes: &[u64], device: i32) -> Result<UniquePtr<Tensor>>;

        /// Makes the device and its side stream, on which staged tensors come and go, those of this thread; the
        /// stream.
        fn go_aside(device: i32) -> Result<usize>;

        /// Comes when the side stream has done what it has to do now.
        fn mark(device: i32) -> Result<UniquePtr<Ticket>>;

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
