//! Messages on the unix socket between a rank and its agent.
//!
//! A message is a little-endian `u32` length and a body. Only this module knows that the body is bincode.
//! The rank's first message is [`ToAgent::Hello`]; its slab's memfd rides on its first byte as `SCM_RIGHTS`, and that of
//! each further slab on the first byte of a [`ToAgent::Slab`]. A process that has no slab may leave one
//! [`ToAgent::Notice`] or [`ToAgent::Lost`] instead and go.
//!
//! An agent may ask a rank that it has welcomed ([`FromAgent::Ask`]): a [`Question`] has a number, and the rank's
//! [`ToAgent::Answer`] has the same. The rank answers when it next looks at its socket; at most [`MAX_QUESTIONS`] are open on
//! a connection, and what is open when the connection ends will not be answered.
//!
//! # Adding a message
//!
//! From a rank: a variant of [`FromRank`], for which [`FromRank::keeping`] says how long a rank keeps it, and an arm where the
//! agent hears it (`agent/src/server/attach.rs`). A question to a rank: a variant of [`Question`] and one of [`Answer`], and
//! an arm where the rank answers it (`interposer/capture/src/answers.rs`). [`CONTROL_VERSION`] goes up with either.

use serde::{Deserialize, Serialize};

use crate::{
    env::OnFull,
    passes::{Pass, Run},
    revision::{MAX_PLAN, Moment, Plan, Proposal, Since},
    store::{Place, StoreOp},
};

/// Version of the messages; peers with another one are refused by name.
pub const CONTROL_VERSION: u32 = 10;
/// Largest body in bytes.
pub const MAX_BODY: usize = 16 << 20;
/// Most bytes of a [`FromAgent`] with its length prefix: a rank takes no longer one.
pub const MAX_FROM_AGENT: usize = MAX_PLAN + (16 << 10);
/// Most questions that are open on a connection.
pub const MAX_QUESTIONS: usize = 16;
/// Most notices that a rank keeps and a run takes.
pub const MAX_NOTICES: usize = 200;
/// Longest notice in bytes, see [`clip`].
pub const MAX_NOTICE: usize = 4096;
/// Most passes that a rank keeps for agents to come: the last ones.
pub const MAX_PASSES: usize = 1024;
/// Most models that a rank tells of and a run takes.
pub const MAX_MODELS: usize = 1024;

/// What is said once there are more.
pub fn too_many_models() -> String {
    format!(
        "there are more than {MAX_MODELS} models: run.json and the page list the modules of the first; what is captured of \
         others is stored"
    )
}
/// A [`JobSigns::launch`] that begins with this is of one process alone.
pub const ALONE: &str = "process ";

/// Who attaches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`CONTROL_VERSION`].
    pub version: u32,
    /// Global rank, 0 without torch.distributed.
    pub rank: u32,
    /// Number of ranks, 1 without torch.distributed.
    pub world: u32,
    /// Process id of the rank.
    pub pid: u32,
    /// Node name.
    pub node: String,
    /// `torch.__version__`.
    pub torch: String,
    /// Python version, such as `3.11.7`.
    pub python: String,
    /// The process's command line.
    pub command: Vec<String>,
    /// The hooks as the user wrote them.
    pub hooks: String,
    /// What happens when the slab is full.
    pub on_full: OnFull,
    /// How the job wraps its model, such as `FSDP2` or `DDP`; empty if unknown yet.
    pub wrapper: String,
    /// What tells its job from others.
    pub job: Box<JobSigns>,
}

/// What tells the job of a rank from other jobs, and an attempt of it from others, as far as there is anything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSigns {
    /// The number that the ranks of the default process group have drawn; 0 where there is no group, or it has no store
    /// to draw one in. All ranks of a group have the same, and no other group has.
    pub group: u64,
    /// What all ranks of the job have in common before they have a group. Another job may have the same, later or on other
    /// ranks.
    pub launch: String,
    /// Who started the ranks of this node, and starts them again where an attempt failed.
    pub launcher: String,
    /// How often it has started them again; `None` where it does not say.
    pub restarts: Option<u32>,
    /// The ranks of this node, where it says that.
    pub here: Option<Run>,
}

/// One module of a model, for the dashboard's tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleInfo {
    /// Canonical name; empty for the model itself.
    pub name: String,
    /// Class name.
    pub class: String,
    /// Mask of [`crate::hooks::Kind::bit`]s that are tapped; 0: not selected.
    pub kinds: u32,
}

/// From a rank to the agent.
pub type ToAgent = FromRank<Vec<ModuleInfo>, Vec<String>>;

/// The same, for whoever holds lists of modules (`M`) and of names (`N`) in another way: an agent does not keep all that a
/// job sends. Both come as sequences.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromRank<M, N> {
    /// First message. Later ones on the same connection are of the same rank and process, and say what has become known.
    Hello(Hello),
    /// A model was found, or has changed: all of its modules.
    Model {
        /// Model number.
        model: u32,
        /// Its modules in `named_modules` order.
        modules: M,
    },
    /// Something the user should read once (a selector without match, taps switched off, ...).
    Notice(String),
    /// The rank leaves in good order; the counters in its slab are final.
    Bye,
    /// A model of which this rank captures nothing: the names of its modules.
    Others {
        /// In `named_modules` order.
        modules: N,
    },
    /// Another slab of this rank, whose descriptor rides on this message's first byte. Those before are read on.
    Slab {
        /// [`crate::slab::Header::id`] of this slab.
        id: u64,
    },
    /// A slab of this rank that no agent can be given any more, since the job has closed its descriptor. What of it has
    /// no line in the manifest is lost, unless this agent has it.
    OutOfReach {
        /// [`crate::slab::Header::id`] of the slab.
        id: u64,
        /// Tensors begun in it.
        begun: u64,
    },
    /// Tensors that this rank was to capture and had no slab for that an agent took.
    Lost {
        /// Global rank.
        rank: u32,
        /// How many.
        count: u64,
    },
    /// What the agent asked.
    Answer {
        /// The number of the question.
        id: u64,
        /// The answer.
        answer: Answer<N>,
    },
    /// Records are of steps that ended by this rule.
    Steps(StepRule),
    /// A forward pass of which something was to be captured has ended.
    Passed(Pass),
}

/// By which rule steps are counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepRule {
    /// Each forward pass of a model is a step of its own: nothing trains yet.
    #[default]
    Inference,
    /// A step ends at the first forward pass after an optimizer stepped, or was skipped.
    Optimizer,
    /// A step ends at the first forward pass after a backward pass: the process has made no optimizer.
    Backward,
}

/// How long a rank keeps a message for agents to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keeping {
    /// Messages with the same subject and of the same variant replace each other.
    pub subject: Option<u32>,
    /// Most messages of this variant that are kept; those after are left out.
    pub most: usize,
    /// The last ones are kept instead.
    pub last: bool,
    /// The next agent hears it too. What is only for this one is forgotten once it is sent.
    pub for_next_agent: bool,
}

impl<M, N> FromRank<M, N> {
    /// How long a rank keeps this message.
    pub fn keeping(&self) -> Keeping {
        let forever = Keeping { subject: None, most: usize::MAX, last: false, for_next_agent: true };
        let once = Keeping { for_next_agent: false, ..forever };
        match self {
            // Each connection begins with a hello and slabs of its own.
            Self::Hello(_) => Keeping { subject: Some(0), ..once },
            Self::Bye | Self::Slab { .. } => once,
            Self::Answer { .. } => Keeping { most: MAX_QUESTIONS, ..once },
            Self::Model { model, .. } => Keeping { subject: Some(*model), most: MAX_MODELS, ..forever },
            Self::Others { .. } => Keeping { most: MAX_MODELS, ..forever },
            Self::Notice(_) | Self::OutOfReach { .. } => Keeping { most: MAX_NOTICES, ..forever },
            Self::Lost { .. } | Self::Steps(_) => forever,
            Self::Passed(_) => Keeping { most: MAX_PASSES, last: true, ..forever },
        }
    }
}

/// What an agent asks a rank. It is answered by the variant of the same name of [`Answer`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Question {
    /// Which hook plan is in force?
    Plan,
    /// Where is the rank?
    Moment,
    /// Does it take this proposal, whose register is there?
    Prepare(Proposal, Place),
    /// To be done in the job's store. It is answered when it is done, while others are.
    Store(StoreOp),
}

/// What a rank answers. `N` is a list of texts, as in [`FromRank`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer<N = Vec<String>> {
    /// The hook plan in force.
    Plan {
        /// Its revision; that of the environment is 0.
        revision: u64,
        /// When it began.
        since: Since,
        /// The highest revision that the rank has heard of.
        heard: u64,
        /// The one that is proposed, or has not begun yet.
        open: Option<u64>,
        /// Its clauses as they were written.
        clauses: N,
        /// The number of each.
        ids: Vec<u32>,
    },
    /// Where it is.
    Moment(Moment),
    /// Whether it confirms; if not, why.
    Prepare(Result<(), String>),
    /// The value that is there, if any; or why nobody can say.
    Store(Result<Option<Vec<u8>>, String>),
}

/// From the agent to a rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromAgent {
    /// The slab is mapped; captures flow.
    Welcome,
    /// The agent will not take this rank; the sentence, of at most [`MAX_NOTICE`] bytes, says why.
    Refused(String),
    /// The agent wants to know something.
    Ask {
        /// Number of the question on this connection.
        id: u64,
        /// The question.
        question: Question,
    },
    /// Before the welcome, to a rank of a job that has changed its hooks: the plan in force.
    InForce(Plan),
}

/// Why bytes are not a message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The body does not decode.
    #[error("a control message does not decode: {0}")]
    Malformed(String),
    /// The length prefix is over [`MAX_BODY`].
    #[error("a control message of {0} bytes is over the limit of {MAX_BODY}")]
    TooLong(usize),
}

/// The start of a notice that is too long.
pub fn clip(notice: &str) -> &str {
    let mut end = notice.len().min(MAX_NOTICE);
    while !notice.is_char_boundary(end) {
        end -= 1;
    }
    notice.get(..end).unwrap_or_default()
}

/// Encodes a message with its length prefix.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, ControlError> {
    let body = bincode::serde::encode_to_vec(message, config()).map_err(|e| ControlError::Malformed(e.to_string()))?;
    if body.len() > MAX_BODY {
        return Err(ControlError::TooLong(body.len()));
    }
    let mut out = Vec::with_capacity(body.len() + 4);
    out.extend_from_slice(&(body.len() as u32).to_le_bytes());
    out.extend_from_slice(&body);
    Ok(out)
}

/// Bytes of the message at the front of `buffer`, prefix included, once that is there: for whoever makes room for it.
pub fn announced(buffer: &[u8]) -> Option<usize> {
    Some(4 + u32::from_le_bytes(*buffer.first_chunk::<4>()?) as usize)
}

/// Takes one message off the front of `buffer`; `None` until it is there in full. Takes hostile bytes.
pub fn decode_next<T: for<'de> Deserialize<'de>>(buffer: &mut Vec<u8>) -> Result<Option<T>, ControlError> {
    let Some(prefix) = buffer.first_chunk::<4>() else { return Ok(None) };
    let len = u32::from_le_bytes(*prefix) as usize;
    if len > MAX_BODY {
        return Err(ControlError::TooLong(len));
    }
    let Some(body) = buffer.get(4..4 + len) else { return Ok(None) };
    let (message, used) = bincode::serde::decode_from_slice::<T, _>(body, config())
        .map_err(|e| ControlError::Malformed(e.to_string()))?;
    if used != len {
        return Err(ControlError::Malformed("trailing bytes".into()));
    }
    buffer.drain(..4 + len);
    Ok(Some(message))
}

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<MAX_BODY>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        passes::Group,
        revision::Clause,
        store::{MAX_KEY, MAX_VALUE},
    };
    use proptest::prelude::*;

    #[test]
    fn messages_arrive_whole_or_not_yet() {
        let message = ToAgent::Notice("no module matches".into());
        let bytes = encode(&message).unwrap();
        let mut buffer = Vec::new();
        for &b in &bytes[..bytes.len() - 1] {
            buffer.push(b);
            assert_eq!(decode_next::<ToAgent>(&mut buffer), Ok(None));
        }
        buffer.push(bytes[bytes.len() - 1]);
        assert_eq!(decode_next(&mut buffer), Ok(Some(message)));
        assert!(buffer.is_empty());
    }

    #[test]
    fn what_is_said_of_a_pass_arrives() {
        let group = |begin| Group { ranks: vec![Run { first: 0, by: 1, count: 2 }], begin, since: 3, together: true };
        let pass = Pass {
            model: 1,
            step: 2,
            micro: 3,
            train: true,
            inference: false,
            signature: 4,
            among: (0, 1),
            reduces: false,
            groups: vec![group(None), group(Some(5))],
        };
        let message = ToAgent::Passed(pass);
        assert_eq!(decode_next(&mut encode(&message).unwrap()), Ok(Some(message)));
    }

    #[test]
    fn an_oversized_prefix_is_refused_before_it_is_waited_for() {
        let mut buffer = u32::MAX.to_le_bytes().to_vec();
        assert!(matches!(decode_next::<ToAgent>(&mut buffer), Err(ControlError::TooLong(_))));
    }

    #[test]
    fn a_long_notice_is_cut_between_characters() {
        assert_eq!(clip("short"), "short");
        let long = "é".repeat(MAX_NOTICE) + "x";
        assert_eq!(clip(&long).len(), MAX_NOTICE);
        assert_eq!(clip(&format!("x{long}")).len(), MAX_NOTICE - 1);
    }

    #[test]
    fn a_question_and_its_answer_have_one_number() {
        let clauses = vec![Clause { id: u32::MAX, text: "x".repeat(MAX_PLAN) }];
        let plan = Plan { revision: u64::MAX, clauses, last_id: u32::MAX };
        let proposal = Proposal { plan, base: Some(u64::MAX), rule: StepRule::Optimizer, begins: Some(u64::MAX) };
        let mut all = 0;
        let place = Place::Store { key: "k".repeat(MAX_KEY), commit: vec![255; 32] };
        let wait = StoreOp::WaitFor { key: "k".repeat(MAX_KEY), limit_ms: u32::MAX };
        for question in [Question::Plan, Question::Moment, Question::Prepare(proposal, place), Question::Store(wait)] {
            let ask = FromAgent::Ask { id: u64::MAX, question };
            let mut bytes = encode(&ask).unwrap();
            all += bytes.len();
            assert_eq!(decode_next(&mut bytes), Ok(Some(ask)));
        }
        assert!(all < MAX_FROM_AGENT, "a plan and what is asked besides fit into one look");
        let settle = StoreOp::Settle { key: "k".repeat(MAX_KEY), value: vec![255; MAX_VALUE] };
        let ask = FromAgent::Ask { id: u64::MAX, question: Question::Store(settle) };
        assert!(encode(&ask).unwrap().len() < MAX_FROM_AGENT);
        let answer = Answer::Plan {
            revision: 3,
            since: Since { rule: StepRule::Optimizer, begins: Some(5) },
            heard: 4,
            open: Some(4),
            clauses: vec!["a".into()],
            ids: vec![7],
        };
        let answer = ToAgent::Answer { id: u64::MAX, answer };
        assert_eq!(decode_next(&mut encode(&answer).unwrap()), Ok(Some(answer)));
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode_next::<FromAgent>(&mut bytes.clone());
            let _ = decode_next::<ToAgent>(&mut bytes);
        }
    }
}
