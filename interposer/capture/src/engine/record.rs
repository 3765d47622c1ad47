//! What a captured leaf is: its record, and how it lies over the ranks.

use wire::{
    codes::{Code, Refusal},
    dtype::DType,
    hooks::{Assemble, Kind, Reduce},
    loss_scale::LossScale,
    record::{MICRO, RecordMeta},
    tap_abi::{self, Call},
};

use super::{Engine, slice};
use crate::{
    layout::{self, Known, Leaf},
    transport::{Captured, Cutting},
};

impl Engine {
    /// Describes a leaf for its way to the agent, once for each of its kinds for which somebody asked.
    ///
    /// # Safety
    /// The arrays of `tensor` are as long as it says, and live through the call, as its path does.
    pub unsafe fn describe(&mut self, call: &Call, tensor: &tap_abi::Leaf<'_>) -> Vec<Captured> {
        // SAFETY: the caller vouches for it.
        Kind::in_mask(tensor.kinds).filter_map(|kind| unsafe { self.describe_as(kind, call, tensor) }).collect()
    }

    /// # Safety
    /// As for [`Engine::describe`].
    unsafe fn describe_as(&mut self, kind: Kind, call: &Call, tensor: &tap_abi::Leaf<'_>) -> Option<Captured> {
        let (tap, model) = self.taps.get(call.tap)?;
        // SAFETY: the string lives through the call (caller).
        let path = unsafe { tensor.path.get() };
        let clause = tap.captures(call, kind, path)?;
        // SAFETY: the caller vouches for sizes and ndim.
        let sizes = unsafe { tap_abi::array(tensor.sizes, tensor.ndim) };
        let shape: Vec<u64> = sizes.iter().map(|&n| n.max(0) as u64).collect();
        let own = DType::from_code(tensor.dtype);
        let refusal = match Refusal::from_code(tensor.refusal).unwrap_or(Refusal::Subclass) {
            Refusal::None if own.is_none() => Refusal::Dtype,
            refusal => refusal,
        };
        let own = own.unwrap_or(DType::UInt8);
        let dtype = clause.options.dtype.unwrap_or(own);
        let input = self.clock.input(tap.model, call.pass);
        let known = Known {
            batch: match model.microbatch {
                [batch, length] if batch >= 0 => [batch, length, -1],
                _ => input.sizes,
            },
            input_digest: input.digest,
            own: call.first,
            order: tap.order,
            kind,
            micro: (call.micro % model.microbatches, model.microbatches),
        };
        // SAFETY: the caller vouches for the axes.
        let from_torch = unsafe { layout::from_torch(tensor) };
        let leaf = Leaf { shape: &shape, module: &tap.name, path };
        let axes = match &clause.options.ranks {
            // Torch says all of a parameter; nothing about it is inferred from a batch.
            _ if kind.is_in(Kind::OF_PARAMETERS) => from_torch,
            None => layout::infer(leaf, known, clause.options.shard.as_ref(), &model.mesh, from_torch),
            Some(ranks) => {
                layout::of_some(leaf, known, clause.options.shard.as_ref(), (&model.mesh, from_torch), self.rank, ranks)
            }
        };
        if refusal == Refusal::InGraph {
            self.in_graphs.refuse(clause, &tap.name, &*self.reports);
        }
        // What a pipeline cuts comes out as one.
        let is_cut = axes.iter().any(|axis| axis.name == MICRO);
        let taken = match &clause.options.slice {
            // What cannot be read says nothing of its dimensions.
            Some(by) if refusal == Refusal::None => slice::take(by, &shape, axes.clone()).map(Some),
            _ => Ok(None),
        };
        let (taken, refused) = match taken {
            Ok(taken) => (taken, refusal.reason().to_owned()),
            Err(why) => (None, why),
        };
        let (shape, axes, slice, cut) = match taken {
            Some(taken) => {
                let cut = Some(Cutting { cuts: taken.cuts, bytes_tell: taken.bytes_tell });
                (taken.shape, taken.axes, Some(taken.sliced), cut)
            }
            None => (shape, axes, None, None),
        };
        let meta = RecordMeta {
            module: tap.name.clone(),
            class: tap.class.clone(),
            kind,
            path: path.to_owned(),
            group: clause.options.group.clone().unwrap_or_default(),
            model: model.number,
            step: call.step,
            micro: if is_cut { call.micro / model.microbatches } else { call.micro },
            call: call.call,
            repeat: tensor.repeat,
            revision: tap.plan.revision(),
            train: call.train,
            skipped: tensor.skipped,
            stats_only: clause.options.reduce == Reduce::Stats,
            dtype,
            shape,
            slice,
            rank: self.rank.rank,
            axes,
            dp_size: layout::data_size(&model.mesh),
            loss_scale: LossScale(if kind.is_in(Kind::GRADIENTS) { self.loss_scale } else { 1.0 }),
            same: None,
            time_ns: self.process.now_ns(),
            refused,
        };
        let collective = clause.options.assemble == Assemble::Collective;
        // Where some ranks alone capture, the one that would send a replica may not be among them.
        let replicas_once = tap.plan.is_for_all_ranks();
        let tap_abi::Leaf { handle, on_device, .. } = *tensor;
        Some(Captured { meta, handle, on_device, staged: false, collective, replicas_once, cut })
    }
}
