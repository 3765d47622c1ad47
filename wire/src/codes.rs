//! Codes: numbers that mean the same to the engine, the bridge and the shim.
//!
//! This is their one definition. C++ has the enums in a header that `cxx-bridge/build.rs` generates from this file; Python
//! has [`constants`], under the same names, in the bridge's module. Whoever gets a number from elsewhere asks
//! [`Code::from_code`]. Numbers are never reused: records and compiled graphs that outlive a process have them in them.

use std::fmt::Debug;

use bytemuck::CheckedBitPattern;
use serde::{Deserialize, Serialize};

use crate::placement::PlacementCode;

/// An enum whose values cross a boundary as a byte.
pub trait Code: CheckedBitPattern<Bits = u8> + Debug {
    /// The value with this code.
    fn from_code(code: u8) -> Option<Self> {
        bytemuck::checked::try_cast(code).ok()
    }

    /// Every value, in the order of their codes.
    fn all() -> impl Iterator<Item = Self> {
        (0..=u8::MAX).filter_map(Self::from_code)
    }
}

/// What of a module a hook taps. [`Kind::bit`] is the one in masks of kinds.
///
/// Whoever treats kinds differently asks for a property of theirs or for a mask ([`Kind::masks`]), and names no kind: a
/// new one is a variant here, and a line in [`Kind::about`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, CheckedBitPattern)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Kind {
    /// Outputs of the forward pass.
    Forward = 0,
    /// Inputs of the forward pass.
    ForwardPre = 1,
    /// Gradients of the inputs.
    Backward = 2,
    /// Gradients of the outputs.
    BackwardPre = 3,
    /// The parameter that the step's forward used.
    Param = 4,
    /// The gradient that the optimizer is about to use.
    Grad = 5,
    /// The gradient that the step's backward passes have left so far.
    GradUnclipped = 6,
}

/// Whose tensors a kind means, and so where a tap finds them; in the order in which a step has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// What a module is given, before its forward.
    Inputs,
    /// What it returns, after its forward.
    Outputs,
    /// Gradients of what it returned.
    OutputGradients,
    /// Gradients of what it was given. They are prepared before its forward.
    InputGradients,
    /// Parameters, at the first forward of a step.
    Parameters,
    /// Their gradients so far, after each backward pass.
    AccumulatedGradients,
    /// Their gradients, just before an optimizer's step.
    ParameterGradients,
}

/// What a mesh axis is there for, which says what to expect of tensors that say nothing themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, CheckedBitPattern)]
#[repr(u8)]
pub enum Role {
    /// Members have their own rows of the batch.
    Data = 0,
    /// Members share the work on the same rows: most tensors are the same on all, others are pieces.
    Tensor = 1,
    /// Members have their own piece of every sequence.
    Context = 2,
    /// Not known.
    #[default]
    Other = 3,
    /// As [`Role::Data`], but nothing says so: the job wraps the model in nothing and names no mesh.
    Assumed = 4,
    /// Members have modules of their own, so it is no axis of a tensor, and never reaches the engine.
    Pipeline = 5,
}

/// What a module says about where the batch is in its tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, CheckedBitPattern)]
#[repr(u8)]
pub enum Order {
    /// Nothing: it comes first, as nearly everywhere.
    #[default]
    Unstated = 0,
    /// `batch_first=False`: what it takes and gives is `[length, batch, ...]`.
    SequenceFirst = 1,
    /// It is part of a module that says so.
    InSequenceFirst = 2,
    /// `batch_first=True`.
    BatchFirst = 3,
    /// A recurrent network with `batch_first=True`. Its states are `[layers, batch, ...]` all the same.
    Recurrent = 4,
    /// Nothing, and other modules of the model say `batch_first=False`: which way round the model is given is not known.
    Mixed = 5,
    /// It is part of a model of megatron-core's layers, which is given `[batch, length]` and works on
    /// `[length, batch, ...]`.
    Turned = 6,
}

/// Why a tensor cannot be captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, CheckedBitPattern)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Refusal {
    None = 0,
    Sparse = 1,
    Meta = 2,
    Quantized = 3,
    Functorch = 4,
    DTensor = 5,
    Subclass = 6,
    Nested = 7,
    Dtype = 8,
    Device = 9,
    SharedInput = 10,
    Returned = 11,
    Split = 12,
    Raised = 13,
    Elsewhere = 14,
    Packed = 15,
    InGraph = 16,
}

/// A bit of the flags that a compiled graph passes to the operations `tap` and `forward_pass`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, CheckedBitPattern)]
#[repr(u8)]
pub enum Flag {
    /// Before the module's forward; otherwise after.
    Before = 1,
    /// Gradients are recorded.
    Gradients = 2,
    /// `module.training`.
    Training = 4,
}

/// How far a copy of a tensor has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, CheckedBitPattern)]
#[repr(u8)]
pub enum CopyState {
    /// The bytes are there.
    Done = 0,
    /// It is under way on a device.
    Pending = 1,
    /// There will be none.
    Failed = 2,
}

/// What became of moves between ranks, the same on all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, CheckedBitPattern)]
#[repr(u8)]
pub enum MoveState {
    /// All were carried out.
    Done = 0,
    /// A rank had no memory for what it was to receive: none was begun.
    NotReady = 1,
    /// The communicator is of no use any more.
    Failed = 2,
}

impl Code for Kind {}
impl Code for Role {}
impl Code for Order {}
impl Code for Refusal {}
impl Code for Flag {}
impl Code for CopyState {}
impl Code for MoveState {}

impl Kind {
    /// Every kind, in the order of their codes.
    pub const ALL: [Kind; 7] = [
        Kind::Forward,
        Kind::ForwardPre,
        Kind::Backward,
        Kind::BackwardPre,
        Kind::Param,
        Kind::Grad,
        Kind::GradUnclipped,
    ];
    /// Kinds for which a tap needs the hook before the forward, as a mask.
    pub const BEFORE: u32 = Kind::of(Subject::Inputs) | Kind::of(Subject::InputGradients);
    /// Kinds of parameters, as a mask; the others are of modules.
    pub const OF_PARAMETERS: u32 = Kind::ONCE_A_STEP | Kind::of(Subject::AccumulatedGradients);
    /// Kinds of parameters that a step has once, whatever passes it has, as a mask.
    pub const ONCE_A_STEP: u32 = Kind::of(Subject::Parameters) | Kind::of(Subject::ParameterGradients);
    /// Gradients of activations, as a mask.
    pub const GRADIENTS: u32 = Kind::of(Subject::InputGradients) | Kind::of(Subject::OutputGradients);
    /// Kinds that are taken while the scale of the loss is in them, as a mask.
    pub const SCALED: u32 = Kind::GRADIENTS | Kind::of(Subject::AccumulatedGradients);

    /// What each kind is: whose tensors, its word in a clause and in a record, and what that means.
    const fn about(self) -> (Subject, &'static str, &'static str) {
        match self {
            Kind::Forward => (Subject::Outputs, "forward", "outputs of the forward pass"),
            Kind::ForwardPre => (Subject::Inputs, "forward_pre", "inputs of the forward pass"),
            Kind::Backward => (Subject::InputGradients, "backward", "gradients of the inputs"),
            Kind::BackwardPre => (Subject::OutputGradients, "backward_pre", "gradients of the outputs"),
            Kind::Param => (Subject::Parameters, "param", "the parameter that the step's forward used"),
            Kind::Grad => (Subject::ParameterGradients, "grad", "the gradient that the optimizer uses"),
            Kind::GradUnclipped => {
                (Subject::AccumulatedGradients, "grad_unclipped", "the gradient that backward passes have left so far")
            }
        }
    }

    /// Whose tensors it means.
    pub const fn subject(self) -> Subject {
        self.about().0
    }

    /// The word in a clause and in a record.
    pub const fn name(self) -> &'static str {
        self.about().1
    }

    /// What it is, in a few words for people.
    pub const fn meaning(self) -> &'static str {
        self.about().2
    }

    /// Every kind, in the order in which a step has them.
    pub fn in_order() -> Vec<Self> {
        let mut all = Self::ALL.to_vec();
        all.sort_by_key(|kind| kind.subject());
        all
    }

    /// The kind with this word.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|k| k.name() == name)
    }

    /// This kind's bit in a mask of kinds.
    pub const fn bit(self) -> u32 {
        1 << (self as u32)
    }

    /// Whether it is one of a mask.
    pub const fn is_in(self, mask: u32) -> bool {
        self.bit() & mask != 0
    }

    /// Those of a mask.
    pub fn in_mask(mask: u32) -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(move |kind| kind.is_in(mask))
    }

    /// All kinds of a subject, as a mask.
    pub const fn of(subject: Subject) -> u32 {
        let (mut mask, mut i) = (0, 0);
        while i < Self::ALL.len() {
            if Self::ALL[i].subject() as u32 == subject as u32 {
                mask |= Self::ALL[i].bit();
            }
            i += 1;
        }
        mask
    }

    /// The masks that C++ and Python have, by name: `KINDS_OF_OUTPUTS`, ...
    pub fn masks() -> [(&'static str, u32); 10] {
        [
            ("KINDS_OF_OUTPUTS", Kind::of(Subject::Outputs)),
            ("KINDS_OF_INPUTS", Kind::of(Subject::Inputs)),
            ("KINDS_OF_INPUT_GRADIENTS", Kind::of(Subject::InputGradients)),
            ("KINDS_OF_OUTPUT_GRADIENTS", Kind::of(Subject::OutputGradients)),
            ("KINDS_OF_PARAMETER_VALUES", Kind::of(Subject::Parameters)),
            ("KINDS_OF_ACCUMULATED_GRADIENTS", Kind::of(Subject::AccumulatedGradients)),
            ("KINDS_OF_PARAMETER_GRADIENTS", Kind::of(Subject::ParameterGradients)),
            ("KINDS_OF_PARAMETERS", Kind::OF_PARAMETERS),
            ("KINDS_OF_GRADIENTS", Kind::GRADIENTS),
            ("KINDS_SCALED", Kind::SCALED),
        ]
    }
}

impl Refusal {
    /// The reason, as the user reads it.
    pub fn reason(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Sparse => "a sparse tensor (no dense bytes)",
            Self::Meta => "a meta or fake tensor (no data)",
            Self::Quantized => "a quantized tensor",
            Self::Functorch => "a tensor inside vmap or another functorch transform",
            Self::DTensor => "a DTensor whose part on this rank is not known",
            Self::Subclass => "a tensor subclass without storage of its own",
            Self::Nested => "a nested tensor",
            Self::Dtype => "an element type FlexModel does not know",
            Self::Device => "a device that is neither CPU nor CUDA",
            Self::SharedInput => "an input whose gradient through this module alone is not known",
            Self::Returned => "a parameter or another leaf of autograd that the module returns as it is",
            Self::Packed => {
                "a packed or quantized parameter: its elements are codes, and what they stand for is kept beside it; \
                 the module's output has what they make"
            }
            Self::Raised => "a tensor that raised when it was looked at; a notice says what",
            Self::Elsewhere => {
                "a gradient that the framework keeps in buffers of its own until the optimizer steps; kind grad has it then"
            }
            Self::InGraph => {
                "a tensor inside of a CUDA graph that the job captures: what is captured runs later, and replays of the graph \
                 call no tap"
            }
            Self::Split => {
                "an input of a module that torch.compile put into several graphs, as it does for DDP unless \
                 torch._dynamo.config.optimize_ddp is False"
            }
        }
    }
}

/// The masks that C++ and Python have, by name.
pub fn masks() -> Vec<(&'static str, u32)> {
    [&Kind::masks()[..], &[PlacementCode::pieces()]].concat()
}

/// The codes that Python has, by name: `KIND_FORWARD_PRE`, `PLACEMENT_SHARD`, ...; and [`masks`].
pub fn constants() -> Vec<(String, u32)> {
    let codes = [
        named::<Kind>("KIND"),
        named::<PlacementCode>("PLACEMENT"),
        named::<Role>("ROLE"),
        named::<Order>("ORDER"),
        named::<Refusal>("REFUSAL"),
        named::<Flag>("FLAG"),
        masks().into_iter().map(|(name, mask)| (name.to_owned(), mask)).collect(),
    ];
    codes.concat()
}

fn named<C: Code>(prefix: &str) -> Vec<(String, u32)> {
    let all = (0..=u8::MAX).filter_map(|code| Some((C::from_code(code)?, code)));
    all.map(|(value, code)| (format!("{prefix}{}", upper_snake(&format!("{value:?}"))), u32::from(code))).collect()
}

/// `HeadTail` as `_HEAD_TAIL`.
fn upper_snake(camel: &str) -> String {
    let mut out = String::new();
    for c in camel.chars() {
        if c.is_uppercase() {
            out.push('_');
        }
        out.push(c.to_ascii_uppercase());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_known_by_its_code_and_its_word() {
        assert_eq!(Kind::all().collect::<Vec<_>>(), Kind::ALL);
        for kind in Kind::ALL {
            assert_eq!(Kind::from_code(kind as u8), Some(kind));
            assert_eq!(Kind::from_name(kind.name()), Some(kind));
        }
        assert_eq!(Kind::from_code(Kind::ALL.len() as u8), None);
    }

    #[test]
    fn every_kind_has_one_subject() {
        let subjects = [
            Subject::Outputs,
            Subject::Inputs,
            Subject::InputGradients,
            Subject::OutputGradients,
            Subject::Parameters,
            Subject::AccumulatedGradients,
            Subject::ParameterGradients,
        ];
        let bits: u32 = subjects.map(|subject| Kind::of(subject).count_ones()).iter().sum();
        assert_eq!((bits as usize, Kind::in_mask(!0).count()), (Kind::ALL.len(), Kind::ALL.len()));
        let order = Kind::in_order().into_iter().map(Kind::name).collect::<Vec<_>>();
        assert_eq!(order, ["forward_pre", "forward", "backward_pre", "backward", "param", "grad_unclipped", "grad"]);
        assert_eq!((Kind::BEFORE, Kind::GRADIENTS, Kind::OF_PARAMETERS), (0b110, 0b1100, 0b111_0000));
    }

    #[test]
    fn a_gradient_lies_as_its_tensor_where_that_is_a_piece() {
        let pieces: Vec<_> = PlacementCode::all().filter(|placement| placement.is_piece()).collect();
        assert_eq!(pieces, [PlacementCode::Shard, PlacementCode::HeadTail]);
    }

    #[test]
    fn python_has_a_constant_for_every_code_and_no_name_twice() {
        let mut constants = constants();
        for expected in
            [("KIND_BACKWARD_PRE", 3), ("PLACEMENT_HEAD_TAIL", 6), ("FLAG_TRAINING", 4), ("PLACEMENTS_OF_PIECES", 66)]
        {
            assert!(constants.contains(&(expected.0.to_owned(), expected.1)), "{expected:?}");
        }
        let count = constants.len();
        constants.sort();
        constants.dedup_by(|a, b| a.0 == b.0);
        assert_eq!(constants.len(), count);
    }
}
