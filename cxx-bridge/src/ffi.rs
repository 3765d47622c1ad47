//! The one bridge between Rust and C++: what each side offers the other.
//!
//! *Mutability.* Tensors are only read. *Aliasing.* A `&Tensor` borrows what a tap holds on its stack and never
//! outlives the call; what has to live longer is a [`bridge::Ticket`], which owns its own reference.

use crate::host::{
    active, apart, capture, constants, dtype_code, due, edit, fault, finish, fire, forget, joined, loss_scale,
    microbatches, notice, plan, resolved, scope, select, stepped, taken, wants,
};
use crate::pin::{capture_mode, is_capturing};

#[cxx::bridge(namespace = "flexmodel")]
#[allow(missing_docs)]
pub mod bridge {
    /// `wire::tap_abi::Firing`.
    #[derive(Clone, Copy)]
    struct Firing {
        pre: bool,
        replay: bool,
        grad_enabled: bool,
        train: bool,
        recomputes: bool,
        split: bool,
        first: [i64; 3],
        given: u32,
    }

    /// `wire::tap_abi::Call`.
    #[derive(Clone, Copy)]
    struct Call {
        tap: u32,
        step: u64,
        micro: u32,
        call: u32,
        pass: u64,
        train: bool,
        recompute: bool,
        capture: u32,
        edit: u32,
        first: [i64; 3],
        ask: bool,
    }

    /// A module as the shim found it.
    struct Module {
        name: String,
        class_name: String,
        qualified: String,
        order: u8,
    }

    /// `wire::tap_abi::Selected`.
    #[derive(Clone, Copy)]
    struct Selected {
        index: u32,
        tap: u32,
        kinds: u32,
        edits: u32,
    }

    /// A code by the name that Python has for it.
    struct Constant {
        name: String,
        value: u32,
    }

    /// `wire::tap_abi::LeafEdit`.
    #[derive(Clone, Copy)]
    struct LeafEdit {
        op: u8,
        factor: f64,
    }

    /// `wire::tap_abi::MeshAxis`.
    struct MeshAxis {
        name: String,
        index: u32,
        size: u32,
        role: u8,
    }

    /// `wire::tap_abi::LeafAxis`.
    #[derive(Clone)]
    struct LeafAxis {
        name: String,
        index: u32,
        size: u32,
        placement: u8,
        dim: u32,
        shape: Vec<u64>,
    }

    /// A tensor's description; sizes and axes go beside it.
    struct Leaf {
        dtype: u8,
        refusal: u8,
    }

    /// What a member of a communicator told.
    struct Words {
        bytes: Vec<u8>,
    }

    /// A tensor, by its address, on its way to another rank or from it.
    struct Move {
        peer: u32,
        send: bool,
        tensor: usize,
    }

    extern "Rust" {
        fn select(
            serial: u64,
            modules: &Vec<Module>,
            parameters: &Vec<String>,
            wrapper: &str,
            mesh: &Vec<MeshAxis>,
            rank: u32,
            world: u32,
        ) -> Vec<Selected>;
        fn wants(kinds: u32) -> bool;
        fn resolved();
        fn scope(serial: u64, part: u64, enter: bool, firing: &Firing);
        fn forget(serial: u64);
        fn microbatches(serial: u64, count: u32, batch: i64, length: i64);
        fn loss_scale(scale: f64);
        fn stepped();
        fn fire(tap: u32, firing: &Firing, call: &mut Call) -> bool;
        fn due(tap: u32, kind: u8) -> bool;
        fn taken(tap: u32, kind: u8, call: &mut Call) -> bool;
        #[allow(clippy::too_many_arguments)]
        fn capture(
            call: &Call,
            kind: u8,
            path: &str,
            repeat: u32,
            leaf: &Leaf,
            sizes: &[i64],
            axes: &Vec<LeafAxis>,
            tensor: &Tensor,
        );
        fn edit(call: &Call, kind: u8, path: &str) -> LeafEdit;
        fn notice(text: &str);
        fn fault(text: &str);
        fn plan() -> String;
        fn joined(words: UniquePtr<Communicator>, index: u32, size: u32, device: i32);
        fn apart(why: &str);
        fn finish();
        fn active() -> bool;
        fn constants() -> Vec<Constant>;
        /// Of the element type with this name, without the `torch.`; 0 where it has none.
        fn dtype_code(name: &str) -> u8;
        fn is_capturing(stream: usize) -> bool;
        fn capture_mode(mode: u32) -> u32;
    }

    unsafe extern "C++" {
        include!("flexmodel/tensor.h");
        include!("flexmodel/module.h");
        include!("flexmodel/communicator.h");
        include!("flexmodel/kept.h");

        #[namespace = "at"]
        type Tensor;

        /// A copy from a device that is under way.
        type Ticket;

        /// Copies elements `first .. first + count` of `tensor`, row-major and as `dtype`, to `destination`. Null: the
        /// bytes are there. What is `kept` nobody changes, and it is ready on the side stream.
        ///
        /// # Safety
        /// `destination` must take `count` elements of `dtype`, until the ticket was waited for.
        unsafe fn copy_out(
            tensor: &Tensor,
            kept: bool,
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
        fn keep(tensor: &Tensor, dtype: u8) -> Result<UniquePtr<Tensor>>;

        /// Whether it is on a device, not the CPU.
        fn is_on_device(tensor: &Tensor) -> bool;

        /// Whether its bytes lie in memory as they are wanted: on the CPU, row-major, as `dtype`.
        fn is_plain(tensor: &Tensor, dtype: u8) -> bool;
        fn elements_of(tensor: &Tensor) -> usize;

        /// The address of its first element, and its bytes.
        fn address_of(tensor: &Tensor) -> usize;
        fn bytes_of(tensor: &Tensor) -> usize;

        /// Another reference to it.
        fn share(tensor: &Tensor) -> UniquePtr<Tensor>;

        /// Room for what is received, on a device (on the CPU: -1), to be used on its side stream alone.
        fn receiver(dtype: u8, sizes: &[u64], device: i32) -> Result<UniquePtr<Tensor>>;

        /// Makes the device and its side stream, on which tensors that are kept come and go, those of this thread; the
        /// stream.
        fn go_aside(device: i32) -> Result<usize>;

        /// Comes when the side stream has done what it has to do now.
        fn mark(device: i32) -> Result<UniquePtr<Ticket>>;

        /// Ranks that can tell each other words and send each other tensors.
        type Communicator;

        /// Tells all members `mine`; what each of them told, in order.
        fn exchange(self: &Communicator, mine: &[u8]) -> Result<Vec<Words>>;

        /// Carries out moves between tensors of the CPU.
        fn transfer(self: &Communicator, moves: &Vec<Move>) -> Result<()>;

        /// Makes what is under way fail.
        fn cut(self: &Communicator) -> Result<()>;

        /// The address of a new reference to the Python module; 0 with a Python error set.
        fn python_module() -> usize;
    }
}
