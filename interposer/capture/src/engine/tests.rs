//! What the engine decides, with a stand-in for the transport.

use std::sync::Arc;

use wire::{
    codes::Refusal,
    record::{Axis, Placement, RecordMeta},
    register::SharedRegister,
    revision::{Clause, Verdict},
};

use super::*;
use crate::testing::{Model, StandInProcess, StandInTransport, Tensor, mask, training};

struct World {
    engine: Engine,
    reports: Arc<StandInTransport>,
}

/// In a job that trains.
fn engine(hooks: &str) -> World {
    let plans = Arc::new(PlanInForce::new(HookPlan::parse(0, hooks).unwrap()));
    let reports = Arc::new(StandInTransport::default());
    let mut engine = Engine::new(plans, StandInProcess::on(), reports.clone());
    engine.optimizer_made();
    World { engine, reports }
}

impl World {
    /// Taps of a model in a process alone, by the index of the module or parameter.
    fn taps(&mut self, model: &Model) -> Vec<(u32, u32)> {
        model.select_in(&mut self.engine, 0, 1).iter().map(|s| (s.index, s.tap)).collect()
    }

    /// A forward pass of a model in which its taps are triggered after their modules: the kinds that each captures.
    fn pass(&mut self, serial: u64, taps: &[(u32, u32)], trigger: &Trigger) -> Vec<u32> {
        self.calls(serial, taps, trigger).iter().map(|call| call.map_or(0, |call| call.capture)).collect()
    }

    fn calls(&mut self, serial: u64, taps: &[(u32, u32)], trigger: &Trigger) -> Vec<Option<Call>> {
        self.engine.pass(serial, 0, true, trigger);
        let calls = taps.iter().map(|(_, tap)| self.engine.triggered(*tap, trigger)).collect();
        self.engine.pass(serial, 0, false, trigger);
        calls
    }

    /// The record of a leaf of 4 x 8, if it is captured.
    fn record(&mut self, call: &Call, kind: Kind, path: &str) -> Option<RecordMeta> {
        let tensor = Tensor::of(32);
        let described = tensor.described(kind, path, &[4, 8], Refusal::None);
        // SAFETY: sizes and path live through the call.
        unsafe { self.engine.describe(call, &described) }.pop().map(|captured| captured.meta)
    }
}

const FORWARD: u32 = 1 << Kind::Forward as u32;

#[test]
fn clauses_choose_their_steps() {
    let mut w = engine("a@every=2; b@steps=1..2");
    let model = Model::of(1, &["", "a", "b", "c"]);
    let taps = w.taps(&model);
    assert_eq!(taps, [(1, 0), (2, 1)]);
    let mut seen = Vec::new();
    for _ in 0..4 {
        seen.push(w.pass(1, &taps, &training()));
        w.engine.stepped(0);
    }
    assert_eq!(seen, [[FORWARD, 0], [0, FORWARD], [FORWARD, FORWARD], [0, 0]]);
}

#[test]
fn a_clause_for_other_ranks_selects_nothing_here() {
    let hooks = "a@ranks=1; b@ranks=0+1";
    let selected = |rank| {
        let mut w = engine(hooks);
        let taps = Model::of(1, &["", "a", "b"]).select_in(&mut w.engine, rank, 2);
        (taps.iter().map(|s| s.index).collect::<Vec<_>>(), w.reports.news())
    };
    assert_eq!(selected(0), (vec![2], vec![]));
    assert_eq!(selected(1), (vec![1, 2], vec![]));
}

#[test]
fn ranks_that_there_are_not_and_modules_that_there_are_not_are_said_once_by_rank_0() {
    let mut w = engine("a@ranks=5; layers.0.mpl");
    let model = Model::of(1, &["", "a", "layers.0.mlp"]);
    for _ in 0..2 {
        w.taps(&model);
        w.engine.resolved();
    }
    let news = w.reports.news();
    assert_eq!(news.len(), 2, "{news:?}");
    assert_eq!(news[0], "'a@ranks=5' selects no rank of this job, which has 1 rank");
    assert!(news[1].contains("'layers.0.mpl' matches no module; nearest: layers.*.mlp"), "{news:?}");
    let mut other = engine("nothing");
    model.select_in(&mut other.engine, 1, 2);
    other.engine.resolved();
    assert!(other.reports.news().is_empty());
}

#[test]
fn a_rank_that_captures_nothing_of_a_model_says_which_modules_it_has() {
    let mut w = engine("elsewhere");
    Model::of(1, &["", "a"]).select_in(&mut w.engine, 0, 2);
    assert_eq!(*w.reports.said.lock().unwrap(), [ToAgent::Others { modules: vec!["".into(), "a".into()] }]);
}

#[test]
fn gradients_are_captured_where_gradients_are_recorded() {
    let mut w = engine("a:forward,forward_pre,backward,backward_pre");
    let model = Model::of(1, &["", "a"]);
    let taps = w.taps(&model);
    let [before, after] = [true, false].map(|pre| Trigger { pre, ..training() });
    w.engine.pass(1, 0, true, &before);
    let call = |w: &mut World, trigger: Trigger| w.engine.triggered(taps[0].1, &trigger).map_or(0, |c| c.capture);
    assert_eq!(call(&mut w, before), mask(&[Kind::ForwardPre, Kind::Backward]));
    assert_eq!(call(&mut w, after), mask(&[Kind::Forward, Kind::BackwardPre]));
    let inference = Trigger { grad_enabled: false, train: false, ..training() };
    assert_eq!(call(&mut w, Trigger { pre: true, ..inference }), mask(&[Kind::ForwardPre]));
    assert_eq!(call(&mut w, inference), mask(&[Kind::Forward]));
}

#[test]
fn a_clause_may_mean_some_passes_of_a_step() {
    let mut w = engine("a@mode=train; b@mode=eval; c@micro=1..2");
    let model = Model::of(1, &["", "a", "b", "c"]);
    let taps = w.taps(&model);
    let sampler = Trigger { grad_enabled: false, ..training() };
    assert_eq!(w.pass(1, &taps, &sampler), [0, FORWARD, 0]);
    for third in [0, FORWARD, FORWARD, 0] {
        assert_eq!(w.pass(1, &taps, &training()), [FORWARD, 0, third]);
    }
}

#[test]
fn parameters_are_those_of_the_pass_that_trains() {
    let mut w = engine("a:param");
    w.taps(&Model { parameters: vec!["a.weight"], ..Model::of(1, &["", "a"]) });
    let sampler = Trigger { grad_enabled: false, ..training() };
    let mut has = |trigger: &Trigger| {
        let has = w.engine.pass(1, 0, true, trigger);
        w.engine.pass(1, 0, false, trigger);
        has
    };
    // Of a model that never trains, any are.
    assert_eq!([&sampler, &training(), &sampler, &training()].map(&mut has), [true, true, false, true]);
}

#[test]
fn a_parameter_is_due_once_in_a_step_that_its_clause_wants() {
    let mut w = engine("a.weight:grad@every=2");
    let model = Model { parameters: vec!["a.weight"], ..Model::of(1, &["", "a"]) };
    let taps = w.taps(&model);
    assert_eq!(taps, [(2, 0)]);
    let mut seen = Vec::new();
    for _ in 0..3 {
        w.engine.pass(1, 0, true, &training());
        let due = [Kind::Grad, Kind::Param].map(|kind| w.engine.parameter_due(0, kind));
        let begun = [(); 2].map(|()| w.engine.begin_parameter(0, Kind::Grad, 0).map(|call| call.step));
        seen.push((due, begun));
        w.engine.pass(1, 0, false, &training());
        w.engine.stepped(0);
    }
    let nothing = ([false, false], [None, None]);
    assert_eq!(seen, [([true, false], [Some(0), None]), nothing, ([true, false], [Some(2), None])]);
}

#[test]
fn gradients_so_far_are_due_after_each_backward_pass_of_a_microbatch_that_a_clause_wants() {
    let mut w = engine("a.weight:grad_unclipped,grad@micro=1..2,mode=train");
    w.taps(&Model { parameters: vec!["a.weight"], ..Model::of(1, &["", "a"]) });
    let mut begun = Vec::new();
    let eval = Trigger { train: false, ..training() };
    for (trigger, versions) in
        [(training(), [1, 1]), (training(), [2, 2]), (eval, [3, 4]), (training(), [5, 6]), (training(), [0, 0])]
    {
        w.engine.pass(1, 0, true, &trigger);
        w.engine.pass(1, 0, false, &trigger);
        for version in versions {
            let call = w.engine.begin_parameter(0, Kind::GradUnclipped, version);
            begun.push(call.map(|call| (call.micro, call.repeat)));
        }
    }
    let none = None;
    // The second backward pass of the second microbatch changed nothing; an evaluation's is not wanted.
    let expected = [none, none, Some((1, 0)), none, none, none, Some((2, 0)), Some((2, 1)), none, none];
    assert_eq!(begun, expected);
    assert!(w.engine.parameter_due(0, Kind::Grad), "what a step has once has no microbatch");
}

#[test]
fn edits_multiply_and_zero_wins() {
    let mut w = engine("a|scale(2); a@steps=0..0|scale(3); b|scale(5); b|zero");
    let taps = w.taps(&Model::of(1, &["", "a", "b"]));
    let first: Vec<Call> = w.calls(1, &taps, &training()).into_iter().flatten().collect();
    assert_eq!(w.engine.edit(&first[0], Kind::Forward.bit(), "out", false), LeafEdit { factor: 6.0, zero: false });
    assert!(w.engine.edit(&first[1], Kind::Forward.bit(), "out", false).zero);
    w.engine.stepped(0);
    let second: Vec<Call> = w.calls(1, &taps, &training()).into_iter().flatten().collect();
    assert_eq!(w.engine.edit(&second[0], Kind::Forward.bit(), "out", false), LeafEdit { factor: 2.0, zero: false });
    assert_eq!(w.engine.edit(&second[0], Kind::ForwardPre.bit(), "in[0]", false), LeafEdit::NONE);
}

#[test]
fn inside_of_a_cuda_graph_leaves_are_refused_and_not_edited_and_each_clause_says_so_once() {
    let mut w = engine("a|scale(2); b:forward");
    let taps = w.taps(&Model::of(1, &["", "a", "b"]));
    let calls: Vec<Call> = w.calls(1, &taps, &training()).into_iter().flatten().collect();
    for _ in 0..2 {
        for call in &calls {
            let tensor = Tensor::of(32);
            let described = tensor.described(Kind::Forward, "out", &[4, 8], Refusal::InGraph);
            // SAFETY: sizes and path live through the call.
            let captured = unsafe { w.engine.describe(call, &described) };
            assert_eq!(captured[0].meta.refused, Refusal::InGraph.reason());
            assert_eq!(w.engine.edit(call, Kind::Forward.bit(), "out", true), LeafEdit::NONE);
        }
    }
    let news = w.reports.news();
    let starts =
        ["'a|scale(2)' taps a inside of a CUDA graph", "'a|scale(2)' edits nothing of a", "'b:forward' taps b"];
    assert_eq!(news.len(), starts.len(), "{news:?}");
    assert!(news.iter().zip(starts).all(|(line, start)| line.starts_with(start)), "{news:?}");
    assert_eq!(w.engine.edit(&calls[0], Kind::Forward.bit(), "out", false), LeafEdit { factor: 2.0, zero: false });
}

#[test]
fn the_first_clause_that_keeps_bytes_captures_a_leaf_and_a_disagreement_is_said() {
    let mut w = engine("a@reduce=stats; a@path=out[1],group=x; a@group=y");
    let taps = w.taps(&Model::of(1, &["", "a"]));
    let call = w.calls(1, &taps, &training())[0].unwrap();
    let mut group = |path| w.record(&call, Kind::Forward, path).map(|meta| (meta.group, meta.stats_only));
    assert_eq!(group("out[1]"), Some(("x".into(), false)));
    assert_eq!(group("out[0]"), Some(("y".into(), false)));
    assert!(w.record(&call, Kind::Backward, "in[0]").is_none());
    assert!(w.reports.news().iter().all(|text| text.contains("the first decides")));
}

#[test]
fn a_record_says_where_it_is_of() {
    let mut w = engine("a:forward,backward");
    w.engine.loss_scale(1024.0);
    let model = Model { mesh: vec![("dp", 1, 2, Role::Data)], ..Model::of(1, &["", "a"]) };
    let taps: Vec<_> = model.select_in(&mut w.engine, 1, 2).iter().map(|s| (s.index, s.tap)).collect();
    assert_eq!(*w.reports.described.lock().unwrap(), [(1, 2, "DDP".into())]);
    w.pass(1, &taps, &training());
    w.engine.stepped(0);
    w.pass(1, &taps, &training());
    let call = w.calls(1, &taps, &training())[0].unwrap();
    let forward = w.record(&call, Kind::Forward, "out").unwrap();
    let place = Placement::Shard { dim: 0 };
    let axis = Axis { name: "dp".into(), index: 1, size: 2, place, input_digest: None };
    assert_eq!((forward.module.as_str(), forward.class.as_str(), forward.path.as_str()), ("a", "Linear", "out"));
    assert_eq!((forward.step, forward.micro, forward.call, forward.rank), (1, 1, 0, 1));
    assert_eq!((forward.axes, forward.dp_size, forward.shape), (vec![axis], 2, vec![4, 8]));
    assert_eq!(forward.loss_scale.0, 1.0);
    assert_eq!(w.record(&call, Kind::Backward, "in[0]").unwrap().loss_scale.0, 1024.0);
}

#[test]
fn microbatches_of_a_pipeline_are_pieces_of_one_record() {
    let mut w = engine("a");
    let taps = w.taps(&Model::of(1, &["", "a"]));
    w.engine.microbatches(1, false, 2, [4, 8]);
    let records: Vec<RecordMeta> = (0..4)
        .map(|_| {
            let call = w.calls(1, &taps, &training())[0].unwrap();
            w.record(&call, Kind::Forward, "out").unwrap()
        })
        .collect();
    let piece = |meta: &RecordMeta| (meta.micro, meta.axes[0].index, meta.axes[0].size);
    assert_eq!(records.iter().map(piece).collect::<Vec<_>>(), [(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2)]);
}

#[test]
fn gradients_of_a_destroyed_model_are_still_described() {
    let mut w = engine("a:backward");
    let taps = w.taps(&Model::of(1, &["", "a"]));
    let call = w.calls(1, &taps, &Trigger { pre: true, ..training() })[0].unwrap();
    w.engine.forget(1);
    let record = |w: &mut World| w.record(&call, Kind::Backward, "in[0]").map(|meta| meta.model);
    assert_eq!(record(&mut w), Some(0));
    for serial in 2..100 {
        w.taps(&Model::of(serial, &["", "a"]));
        w.engine.forget(serial);
    }
    assert_eq!(record(&mut w), None, "it is not remembered for ever");
}

#[test]
fn another_plan_takes_the_place_of_all_clauses_at_once() {
    let mut w = engine("a:forward,backward; b");
    let model = Model::of(1, &["", "a", "b"]);
    let old = w.taps(&model);
    let begun = w.calls(1, &old, &Trigger { pre: true, ..training() })[0].unwrap();
    w.engine.replace_plan(HookPlan::parse(1, "b@every=2,group=new").unwrap());
    assert_eq!(w.pass(1, &old, &training()), [0, 0], "old taps begin nothing");
    assert_eq!(w.engine.edit(&begun, Kind::Backward.bit(), "in[0]", false), LeafEdit::NONE);
    let gradient = w.record(&begun, Kind::Backward, "in[0]").unwrap();
    assert_eq!((gradient.module.as_str(), gradient.group.as_str()), ("a", ""), "as its own plan says");
    let new = w.taps(&model);
    assert_eq!((new.len(), new[0].0), (1, 2));
    let call = w.calls(1, &new, &training())[0].unwrap();
    assert_eq!(w.record(&call, Kind::Forward, "out").unwrap().group, "new");
    assert_eq!((w.engine.plan().revision(), call.micro), (1, 2), "the clock goes on");
    let said = w.reports.said.lock().unwrap();
    let [ToAgent::Model { model: 0, .. }, ToAgent::Steps(_), ToAgent::Model { model: 0, modules }] = &said[..] else {
        panic!("{said:?}")
    };
    assert_eq!(modules.iter().map(|m| m.kinds).collect::<Vec<_>>(), [0, 0, FORWARD]);
}

/// Whoever asks decides.
#[derive(Debug)]
struct Willing;

impl Register for Willing {
    fn settle(&self, verdict: Verdict) -> Option<Verdict> {
        Some(verdict)
    }

    fn peek(&self) -> Verdict {
        Verdict::Open
    }
}

#[test]
fn a_job_that_lets_nothing_be_compiled_again_loses_clauses_and_gets_none() {
    let mut w = engine("a; b");
    let mut prepare = |why: &str, revision, ids: &[u32]| {
        w.engine.forbid_compiling(why.to_owned());
        let clauses = ids.iter().map(|&id| Clause { id, text: "c".into() }).collect();
        let rule = w.engine.moment().rule;
        let proposal = Proposal { plan: Plan { revision, clauses, last_id: 9 }, base: Some(0), rule, begins: Some(9) };
        w.engine.prepare(&proposal, Box::new(Willing))
    };
    assert_eq!(prepare("the job says so", 1, &[1]), Ok(()));
    let refused = Err("cannot compile its modules again: the job says so".to_owned());
    assert_eq!(prepare("the job says so", 2, &[1, 2, 3]), refused);
    assert_eq!(prepare("", 2, &[1, 2, 3]), Ok(()), "it was not heard of, and may come again");
}

#[test]
fn a_module_that_is_called_by_itself_says_by_which_rule_steps_are_counted() {
    let mut w = engine("a");
    let taps = w.taps(&Model::of(1, &["", "a"]));
    for _ in 0..2 {
        w.engine.triggered(taps[0].1, &training()).unwrap();
    }
    let said = w.reports.said.lock().unwrap();
    assert_eq!(said.iter().filter(|message| matches!(message, ToAgent::Steps(_))).count(), 1);
}

#[test]
fn a_process_that_becomes_another_rank_says_so_and_its_records_are_of_that() {
    let mut w = engine("a");
    let model = Model::of(1, &["", "a"]);
    let taps = w.taps(&model);
    let again = model.select_in(&mut w.engine, 3, 4);
    assert_eq!((again.len(), again[0].tap), (1, taps[0].1), "it keeps its taps");
    let call = w.calls(1, &taps, &training())[0].unwrap();
    assert_eq!(w.record(&call, Kind::Forward, "out").unwrap().rank, 3);
    assert_eq!(w.reports.described.lock().unwrap().iter().map(|d| (d.0, d.1)).collect::<Vec<_>>(), [(0, 1), (3, 4)]);
}

/// A revision that is open to be decided, which begins with a step.
fn proposed(w: &mut World, revision: u64, hooks: &str, begins: Option<u64>) -> SharedRegister {
    let (leader, fd) = SharedRegister::create().unwrap();
    let clause = |(id, text): (usize, &str)| Clause { id: id as u32, text: text.into() };
    let clauses = hooks.split(';').filter(|text| !text.is_empty()).enumerate().map(clause).collect();
    let base = w.engine.plan().revision();
    let proposal = Proposal {
        plan: Plan { revision, clauses, last_id: 9 },
        base: Some(base),
        rule: w.engine.moment().rule,
        begins,
    };
    w.engine.prepare(&proposal, Box::new(SharedRegister::attach(fd).unwrap())).unwrap();
    leader
}

#[test]
fn hooks_begin_with_their_step_and_those_of_before_end_with_it() {
    let mut w = engine("a:forward,backward");
    let model = Model::of(1, &["", "a", "b"]);
    let old = w.taps(&model);
    let gradient = w.calls(1, &old, &training())[0].unwrap();
    let leader = proposed(&mut w, 1, "b", Some(2));
    leader.settle(Verdict::Commit);
    assert!(!w.engine.turn(), "step 0 is under way");
    w.engine.stepped(0);
    assert_ne!(w.pass(1, &old, &training())[0], 0);
    assert!(!w.engine.is_due());
    w.engine.stepped(0);
    assert!(w.engine.is_due(), "the next pass begins step 2");
    assert!(w.engine.turn() && !w.engine.turn());
    let new = w.taps(&model);
    assert_eq!((w.pass(1, &old, &training()), w.pass(1, &new, &training())), (vec![0], vec![FORWARD]));
    let late = w.record(&gradient, Kind::Backward, "in[0]").unwrap();
    assert_eq!((late.step, late.revision), (0, 0), "what a call has begun is captured");
    let now = w.calls(1, &new, &training())[0].unwrap();
    let record = w.record(&now, Kind::Forward, "out").unwrap();
    assert_eq!((record.step, record.revision, record.model), (2, 1, 0));
}

#[test]
fn a_revision_that_nobody_has_decided_upon_in_time_never_begins() {
    let mut w = engine("a");
    let model = Model::of(1, &["", "a", "b"]);
    let taps = w.taps(&model);
    let leader = proposed(&mut w, 1, "b", Some(1));
    w.pass(1, &taps, &training());
    w.engine.stepped(0);
    assert!(w.engine.is_due() && !w.engine.turn());
    assert_eq!(leader.settle(Verdict::Commit), Some(Verdict::Abandoned));
    assert_eq!((w.engine.plan().revision(), w.pass(1, &taps, &training())), (0, vec![FORWARD]));
}

#[test]
fn a_pass_that_begins_unasked_is_of_the_new_hooks_which_are_selected_after_it() {
    let mut w = engine("a");
    let model = Model::of(1, &["", "a", "b"]);
    let old = w.taps(&model);
    w.pass(1, &old, &training());
    let leader = proposed(&mut w, 1, "b", Some(1));
    leader.settle(Verdict::Commit);
    w.engine.stepped(0);
    // Nobody came before it, as after a forward that raised.
    w.engine.pass(1, 0, true, &training());
    assert_eq!((w.engine.plan().revision(), w.engine.triggered(old[0].1, &training()).is_none()), (1, true));
    assert!(!w.engine.turn(), "it is under way");
    w.engine.pass(1, 0, false, &training());
    assert!(w.engine.is_due() && w.engine.turn() && !w.engine.turn());
    let new = w.taps(&model);
    assert_eq!(w.pass(1, &new, &training()), [FORWARD]);
}

#[test]
fn an_armed_job_counts_the_passes_of_models_of_which_nothing_is_captured() {
    let mut w = engine("");
    let (model, other) = (Model::of(1, &["", "a"]), Model::of(2, &["", "a"]));
    for each in [&model, &other] {
        assert!(w.taps(each).is_empty());
    }
    for _ in 0..3 {
        w.pass(1, &[], &training());
        w.engine.stepped(0);
    }
    assert_eq!(w.engine.moment().next, 3);
    let others = |m: &&ToAgent| matches!(m, ToAgent::Others { modules } if modules.len() == 2);
    assert_eq!(
        w.reports.said.lock().unwrap().iter().filter(others).count(),
        2,
        "whoever adds hooks knows what there is"
    );
    let leader = proposed(&mut w, 1, "a", Some(4));
    leader.settle(Verdict::Commit);
    w.pass(1, &[], &training());
    w.engine.stepped(0);
    assert!(w.engine.turn());
    let taps = w.taps(&model);
    let call = w.calls(1, &taps, &training())[0].unwrap();
    assert_eq!((call.step, call.micro), (4, 0));
    w.engine.forget(1);
    w.engine.forget(2);
}

#[test]
fn steps_of_inference_are_counted_over_all_models_and_pipelines_batches() {
    let plans = Arc::new(PlanInForce::new(HookPlan::parse(0, "a").unwrap()));
    let mut engine = Engine::new(plans, StandInProcess::on(), Arc::new(StandInTransport::default()));
    let eval = Trigger { first: [4, 8, -1], ..Trigger::default() };
    for serial in [1, 2] {
        Model::of(serial, &["", "a"]).select_in(&mut engine, 0, 1);
    }
    engine.microbatches(2, false, 2, [-1, -1]);
    let mut seen = Vec::new();
    for serial in [1, 2, 2, 2, 1] {
        engine.pass(serial, 0, true, &eval);
        engine.pass(serial, 0, false, &eval);
        seen.push(engine.moment().next);
    }
    assert_eq!(seen, [1, 1, 2, 2, 3], "a batch that has begun is not over before its last pass");
}

#[test]
fn a_rank_that_comes_late_begins_with_the_plan_in_force() {
    let plan = |revision, text: &str| Plan { revision, clauses: vec![Clause { id: 4, text: text.into() }], last_id: 4 };
    let mut w = engine("a");
    w.engine.continue_with(&plan(3, "b"));
    assert!(w.engine.turn(), "models may have been selected from before");
    let model = Model::of(1, &["", "a", "b"]);
    let taps = w.taps(&model);
    assert_eq!((taps.as_slice(), w.engine.heard()), (&[(2, taps[0].1)][..], (3, None)));
    assert_eq!(w.engine.since().begins, Some(0), "of a process that begins with it");
    w.pass(1, &taps, &training());
    w.engine.continue_with(&plan(4, "a"));
    assert_eq!(w.engine.plan().revision(), 3, "not in the middle of its work");
}
