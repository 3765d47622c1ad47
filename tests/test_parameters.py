"""Whole parameters and gradients of every step, under every wrapper, from the pieces that ranks hold."""

import closure
import flexmodel
import fsdp2_tp
import hsdp
import pytest
import tensor_parallel
import test_tensor_parallel
import tiny

import captures
import harness
import layouts
import reference
import reference_parallel


def whole(model, **run) -> dict:
    """Parameters and gradients of every step as records."""
    found = reference_parallel.sliced(model, lambda name: False, **run)
    params = {reference.Key(name, "param", "param", step): value for (name, step), value in found.params.items()}
    return params | {reference.Key(name, "grad", "grad", step): value for (name, step), value in found.grads.items()}


@pytest.fixture(scope="module")
def expected():
    return whole(tiny.build(), steps=layouts.STEPS, sizes=(4, 4))


@pytest.mark.parametrize("name", layouts.WRAPPED)
def test_the_bytes_are_those_of_one_process(name, run_once, expected):
    argv, number = layouts.WRAPPED[name]
    outcome = run_once(argv, layouts.HOOKS).expect(0)
    captures.expect_equal(layouts.tensors(outcome, number, parameters=True), expected)


@pytest.mark.parametrize("argv", [("fsdp2.py",), ("zero.py", "3")], ids=["fsdp2", "zero3"])
def test_without_a_tap_on_a_module_they_are_the_same(argv, run_once, untapped_once, expected):
    """Nothing but parameters and their gradients are asked for."""
    program = harness.on_ranks(*argv)
    outcome = run_once(program, "**:param,grad").expect(0)
    assert outcome.losses == untapped_once(program).losses
    captures.expect_equal(captures.read(outcome.run), expected)
    assert flexmodel.open(outcome.run).info.wrapper == {"fsdp2.py": "FSDP2", "zero.py": "DeepSpeed ZeRO-3"}[argv[0]]


@pytest.mark.parametrize("number", range(2), ids=layouts.REPLICAS[-2:])
def test_shards_that_are_replicated_are_joined_once(number, run_once):
    outcome = run_once(layouts.REPLICAS, layouts.HOOKS).expect(0)
    found = layouts.tensors(outcome, number, hsdp.STEPS, parameters=True)
    captures.expect_equal(found, whole(tiny.build(), steps=hsdp.STEPS, sizes=hsdp.SIZES))


@pytest.mark.parametrize("style", test_tensor_parallel.STYLES)
def test_tensor_parallel_ones_are_those_of_one_process(style, run_once):
    outcome = run_once(layouts.TENSOR_PARALLEL, layouts.HOOKS).expect(0)
    number = test_tensor_parallel.STYLES.index(style)
    model = tensor_parallel.build(style)
    sizes = {"steps": tensor_parallel.STEPS, "sizes": (tensor_parallel.ROWS,)}
    found = layouts.tensors(outcome, number, tensor_parallel.STEPS, parameters=True)
    captures.expect_close(found, whole(model, **sizes))


def test_shards_of_shards_are_joined_in_their_order(run_once):
    outcome = run_once(layouts.CROSSED, layouts.HOOKS).expect(0)
    model = tensor_parallel.build("sequence")
    expected = whole(model, steps=fsdp2_tp.STEPS, sizes=fsdp2_tp.SIZES)
    captures.expect_close(layouts.tensors(outcome, parameters=True), expected)


def test_gradients_that_a_closure_computes_are_those_of_its_step(run_once, untapped_once):
    argv = harness.python("closure.py")
    outcome = run_once(argv, "**:param,grad").expect(0)
    assert outcome.losses == untapped_once(argv).losses
    captures.expect_equal(captures.read(outcome.run), whole(tiny.build(), steps=closure.STEPS, sizes=(closure.ROWS,)))


def test_one_process_and_a_module_for_all_that_is_in_it(run_once):
    hooks = "layers.0.mlp:param,forward@every=2;lm_head.weight:grad"
    outcome = run_once(harness.python("plain.py"), hooks).expect(0)
    run = captures.expect_sound(outcome.run)
    inside = {f"layers.0.mlp.{name}.{key}" for name in ("up", "down") for key in ("weight", "bias")}
    assert {r.module for r in run.records if r.kind == "param"} == inside
    assert {r.step for r in run.records if r.kind == "param"} == {0, 2}
    assert {(r.module, r.step) for r in run.records if r.kind == "grad"} == {("lm_head.weight", s) for s in range(3)}
    assert {r.module for r in run.records if r.kind == "forward"} == {"layers.0.mlp"}
    found = whole(tiny.build(), steps=3, sizes=(4,))
    captures.expect_equal(
        {k: v for k, v in captures.read(outcome.run).items() if k.kind in ("param", "grad")},
        {k: v for k, v in found.items() if (k.kind == "grad") == (k.module == "lm_head.weight")
         and (k.kind == "grad" or (k.module in inside and k.step != 1))},
    )  # fmt: skip
