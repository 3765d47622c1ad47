//! What is inferred of leaves.

use super::*;

const DP: Known = Known {
    batch: [4, 16, -1],
    input_digest: 7,
    own: [4, 16, 8],
    order: Order::Unstated,
    kind: Kind::Forward,
    micro: (0, 1),
};

fn sequence_first(own: [i64; 3]) -> Known {
    Known { batch: own, own, order: Order::SequenceFirst, ..DP }
}

#[test]
fn a_leaf_that_starts_with_the_batch_is_sharded_there() {
    assert_eq!(place(&[4, 16, 8], "out", DP), shard(0));
    assert_eq!(place(&[64, 8], "out", DP), shard(0));
    assert_eq!(place(&[16, 4, 8], "out", DP), shard(1));
}

#[test]
fn a_leaf_without_batch_is_not_guessed() {
    assert_eq!(place(&[], "out", DP), Placement::Unknown);
    assert_eq!(place(&[16, 8], "out", DP), Placement::Unknown);
    assert_eq!(place(&[1, 16, 8], "out", DP), Placement::Unknown);
    // As many experts, with room for as many tokens as there are rows.
    assert_eq!(place(&[3, 4, 8], "out", DP), Placement::Unknown);
}

#[test]
fn a_module_that_was_given_no_tensor_has_a_table() {
    assert_eq!(place(&[4, 8], "out", Known { own: [-1; 3], ..DP }), Placement::Unknown);
}

#[test]
fn weights_that_a_parametrization_computes_and_pieces_of_packed_sequences_have_no_batch() {
    let place = |module: &str, path: &str| {
        infer(Leaf { shape: &[4, 8], module, path }, DP, None, &mesh(&[Role::Data]), Vec::new())[0].place.clone()
    };
    assert_eq!(place("stem.parametrizations.weight.0", "out"), Placement::Unknown);
    assert_eq!(place("stem", "out"), shard(0));
    assert_eq!(place("mlp.experts.0.act", "out"), Placement::Unknown);
    assert_eq!(place("mlp.experts", "out"), shard(0));
    for path in ["in[0].data", "out[0].batch_sizes", "in[0].sorted_indices", "in[0].unsorted_indices"] {
        assert_eq!(place("rnn", path), Placement::Unknown, "{path}");
    }
    assert_eq!(place("rnn", "out.data_of_all"), shard(0));
}

#[test]
fn gradients_of_what_may_be_the_same_on_all_ranks_are_not_joined() {
    let square = Known { batch: [16, 16, -1], ..DP };
    assert_eq!(place(&[16, 8], "out", square), Placement::ReplicateOrShard { dim: 0 });
    for kind in [Kind::Backward, Kind::BackwardPre] {
        assert_eq!(place(&[16, 8], "out", Known { kind, ..square }), Placement::Unknown);
        assert_eq!(place(&[4, 16], "out", Known { kind, ..DP }), shard(0));
        let one = Known { batch: [1, 16, -1], kind, ..DP };
        assert_eq!(place(&[1, 16], "out", one), Placement::ReplicateOrShard { dim: 0 });
    }
}

#[test]
fn what_a_batch_looks_like_is_told_apart_by_its_bytes() {
    assert_eq!(place(&[1, 16], "out", Known { batch: [1, 16, -1], ..DP }), Placement::ReplicateOrShard { dim: 0 });
    let square = Known { batch: [16, 16, -1], ..DP };
    assert_eq!(place(&[16, 8], "out", square), Placement::ReplicateOrShard { dim: 0 });
    assert_eq!(place(&[16, 16, 8], "out", square), shard(0));
}

#[test]
fn tokens_of_one_sequence_are_rows_or_a_table() {
    let one = Known { batch: [1, 16, -1], own: [16, 8, -1], ..DP };
    assert_eq!(place(&[16, 4], "out", one), Placement::ReplicateOrShard { dim: 0 });
    assert_eq!(place(&[16, 2, 4], "out", one), Placement::ReplicateOrShard { dim: 0 });
    for shape in [&[16][..], &[16, 1], &[16, 16], &[4, 16]] {
        assert_eq!(place(shape, "out", one), Placement::Unknown, "{shape:?}");
    }
    assert_eq!(place(&[16, 4], "out", Known { kind: Kind::BackwardPre, ..one }), Placement::Unknown);
}

#[test]
fn attention_with_the_sequence_first_has_weights_with_the_batch_first() {
    let known = sequence_first([7, 5, 8]);
    assert_eq!(place(&[7, 5, 8], "out[0]", known), shard(1));
    assert_eq!(place(&[5, 7, 7], "out[1]", known), shard(0));
    let square = sequence_first([5, 5, 8]);
    assert_eq!(place(&[5, 5, 8], "out[0]", square), shard(1));
    assert_eq!(place(&[5, 5, 5], "out[1]", square), Placement::Unknown);
}

#[test]
fn inside_of_a_module_with_the_sequence_first_so_is_all() {
    for batch in [[7, 5, -1], [5, 7, -1]] {
        let known = Known { batch, order: Order::InSequenceFirst, ..DP };
        assert_eq!(place(&[7, 5, 8], "out", known), shard(1));
        assert_eq!(place(&[35, 8], "out", known), Placement::Unknown);
    }
}

#[test]
fn beside_modules_with_the_sequence_first_the_order_is_not_guessed() {
    let known = Known { order: Order::Mixed, ..DP };
    assert_eq!(place(&[4, 16, 8], "out", known), Placement::Unknown);
    assert_eq!(place(&[16, 4, 8], "out", known), Placement::Unknown);
    assert_eq!(place(&[16, 8], "out", known), Placement::ReplicateOrShard { dim: 0 });
    assert_eq!(place(&[4, 16, 8], "out", Known { order: Order::BatchFirst, ..known }), shard(0));
}

#[test]
fn megatrons_layers_turn_batch_and_length() {
    let known = Known { order: Order::Turned, ..DP };
    assert_eq!(place(&[4, 16], "in[0]", known), shard(0));
    assert_eq!(place(&[16, 4, 8], "out", known), shard(1));
    // A piece of the sequences.
    assert_eq!(place(&[8, 4, 8], "out", known), shard(1));
    assert_eq!(place(&[16, 8], "out", known), Placement::Unknown);
    // An embedding before it is turned, and weights of attention.
    assert_eq!(place(&[4, 16, 8], "out", known), shard(0));
    assert_eq!(place(&[4, 2, 16, 16], "out", known), shard(0));
    assert_eq!(place(&[1, 1, 16, 16], "in[1]", known), Placement::Unknown);
    let axes = infer(Leaf { shape: &[8, 4, 8], ..OUT }, known, None, &mesh(&[Role::Tensor]), Vec::new());
    assert_eq!(axes[0].place, Placement::ReplicateOrShard { dim: 0 });
}

#[test]
fn states_of_a_recurrent_network_have_the_batch_second() {
    let known = Known { batch: [16, 4, 8], order: Order::Recurrent, ..DP };
    assert_eq!(place(&[2, 4, 8], "out[1][0]", known), shard(1));
    assert_eq!(place(&[4, 16, 8], "out[0]", known), shard(0));
    let known = sequence_first([16, 4, 8]);
    assert_eq!(place(&[2, 4, 8], "out[1]", known), shard(1));
}

fn mesh(roles: &[Role]) -> Vec<MeshAxis> {
    let axis = |(i, role): (usize, &Role)| MeshAxis {
        name: format!("axis{i}"),
        index: 1,
        size: 2,
        role: *role,
        ranks: Vec::new(),
        position: i,
    };
    roles.iter().enumerate().map(axis).collect()
}

const OUT: Leaf<'_> = Leaf { shape: &[4, 16, 8], module: "m", path: "out" };

#[test]
fn what_the_user_says_goes() {
    let hint = ShardHint { dim: -1, axis: "tp".into() };
    let axes = infer(OUT, DP, Some(&hint), &mesh(&[Role::Data]), Vec::new());
    assert_eq!(axes, [Axis { name: "tp".into(), index: 1, size: 2, place: shard(2), input_digest: None }]);
    let axes = infer(OUT, DP, Some(&hint), &mesh(&[Role::Data, Role::Other]), Vec::new());
    assert_eq!(axes.iter().map(|a| (&*a.name, &a.place)).collect::<Vec<_>>(), [("dp", &shard(0)), ("tp", &shard(2))]);
}

#[test]
fn the_batch_lies_over_all_data_axes_as_one() {
    let axes = infer(OUT, DP, None, &mesh(&[Role::Data, Role::Tensor, Role::Data]), Vec::new());
    let dp = Axis { name: "dp".into(), index: 3, size: 4, place: shard(0), input_digest: None };
    assert_eq!(
        axes,
        [dp, Axis { name: "axis1".into(), index: 1, size: 2, place: Placement::Unknown, input_digest: None }]
    );
    assert_eq!(data_size(&mesh(&[Role::Data, Role::Tensor, Role::Data])), 4);
}

#[test]
fn what_is_only_supposed_says_what_the_model_was_given() {
    let place = |known: Known, hint: Option<&ShardHint>| {
        let axis = infer(OUT, known, hint, &mesh(&[Role::Assumed]), Vec::new()).remove(0);
        (axis.name, axis.place, axis.input_digest)
    };
    assert_eq!(place(DP, None), ("dp".into(), shard(0), Some(7)));
    assert_eq!(place(Known { input_digest: 0, ..DP }, None), ("dp".into(), Placement::Unknown, None));
    let hint = ShardHint { dim: 2, axis: "tp".into() };
    assert_eq!(place(DP, Some(&hint)), ("tp".into(), shard(2), None));
    assert_eq!(data_size(&mesh(&[Role::Assumed])), 2);
}

#[test]
fn a_pipeline_cuts_the_batch_inside_of_the_other_axes() {
    let known = Known { micro: (2, 3), ..DP };
    let axes = infer(OUT, known, None, &mesh(&[Role::Data]), Vec::new());
    assert_eq!(axes.iter().map(|a| (&*a.name, a.index)).collect::<Vec<_>>(), [("dp", 1), (MICRO, 2)]);
    assert_eq!(axes[1].place, shard(0));
    let axes = infer(Leaf { shape: &[16, 8], ..OUT }, known, None, &mesh(&[Role::Data]), Vec::new());
    assert_eq!(axes.len(), 1);
}

#[test]
fn what_torch_says_goes_before_what_is_inferred() {
    let from_torch = vec![Axis { name: "axis1".into(), index: 0, size: 2, place: shard(2), input_digest: None }];
    let axes = infer(OUT, DP, None, &mesh(&[Role::Data, Role::Tensor]), from_torch);
    assert_eq!(axes.iter().map(|a| &a.place).collect::<Vec<_>>(), [&shard(0), &shard(2)]);
}

#[test]
fn a_tensor_axis_may_cut_sequences_too() {
    let place = |shape: &[u64], length: i64| {
        let known = Known { batch: [4, length, -1], ..DP };
        infer(Leaf { shape, ..OUT }, known, None, &mesh(&[Role::Tensor]), Vec::new())[0].place.clone()
    };
    // The second of two members.
    assert_eq!(place(&[4, 8, 3], 16), Placement::ReplicateOrShard { dim: 1 });
    assert_eq!(place(&[4, 7, 3], 15), Placement::ReplicateOrShard { dim: 1 });
    assert_eq!(place(&[4, 16, 3], 16), Placement::Unknown);
    assert_eq!(place(&[4, 8], 16), Placement::Unknown);
}

#[test]
fn one_token_is_not_cut() {
    let known = Known { batch: [4, 1, -1], ..DP };
    for index in 0..2 {
        let mut mesh = mesh(&[Role::Tensor]);
        mesh[0].index = index;
        let axes = infer(Leaf { shape: &[4, 1, 3], ..OUT }, known, None, &mesh, Vec::new());
        assert_eq!(axes[0].place, Placement::Unknown);
    }
}

#[test]
fn a_context_axis_cuts_sequences_in_an_order_that_is_not_known() {
    let axes = infer(OUT, DP, None, &mesh(&[Role::Context]), Vec::new());
    assert_eq!(axes[0].place, Placement::Unknown);
    let hint = ShardHint { dim: 1, axis: "axis0".into() };
    assert_eq!(infer(OUT, DP, Some(&hint), &mesh(&[Role::Context]), Vec::new())[0].place, shard(1));
}

#[test]
fn some_ranks_are_an_axis_of_their_own() {
    let me = Rank { rank: 2, world: 4, group: 0 };
    let axes = of_some(OUT, DP, None, (&mesh(&[Role::Data]), Vec::new()), me, &[0, 2, 9]);
    assert_eq!(axes, [Axis { name: "dp".into(), index: 1, size: 2, place: shard(0), input_digest: None }]);
    let axes = of_some(OUT, DP, None, (&mesh(&[Role::Data, Role::Tensor]), Vec::new()), me, &[0, 2]);
    assert_eq!(axes, [Axis { name: "rank".into(), index: 1, size: 2, place: Placement::Unknown, input_digest: None }]);
    assert!(of_some(OUT, DP, None, (&mesh(&[Role::Data, Role::Tensor]), Vec::new()), me, &[2]).is_empty());
    let from_torch = || vec![Axis { name: "tp".into(), index: 0, size: 2, place: shard(2), input_digest: None }];
    assert_eq!(of_some(OUT, DP, None, (&[], from_torch()), me, &[2]), from_torch());
}

#[test]
fn one_process_has_no_axes() {
    assert!(infer(OUT, DP, None, &[], Vec::new()).is_empty());
}
