"""Edits change the job as the same plain PyTorch hooks would; the record is what was there before the edit."""

import edited
import pytest
import tiny
import torch

import captures
import harness
import layouts
import reference

STEPS = edited.STEPS


def _edited(attach) -> list[str]:
    """Losses of a model with the hooks that `attach(model)` sets."""
    model = tiny.build()
    attach(model)
    return _train(model)


def _train(model, before=lambda step: None) -> list[str]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        before(step)
        tokens, targets = tiny.batch(step, [4], 0)
        loss = tiny.loss_of(model(tokens), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()).hex())
    return losses


EDITS = {
    "layers.0.mlp:forward|scale(0.5)": lambda m: m.layers[0].mlp.register_forward_hook(lambda _m, _i, out: out * 0.5),
    "layers.1.attn:forward_pre|scale(2)": lambda m: m.layers[1].attn.register_forward_pre_hook(
        lambda _m, args: (args[0] * 2,)
    ),
    "layers.0.attn:backward|scale(-1.5)": lambda m: m.layers[0].attn.register_full_backward_hook(
        lambda _m, grad_in, _out: (grad_in[0] * -1.5,)
    ),
    "layers.1.mlp:backward_pre|scale(0.25)": lambda m: m.layers[1].mlp.register_full_backward_pre_hook(
        lambda _m, grad_out: (grad_out[0] * 0.25,)
    ),
    "layers.0.mlp:forward|zero": lambda m: m.layers[0].mlp.register_forward_hook(
        lambda _m, _i, out: torch.zeros_like(out) + out * 0
    ),
    "layers.1.attn:backward|zero": lambda m: m.layers[1].attn.register_full_backward_hook(
        lambda _m, grad_in, _out: (torch.zeros_like(grad_in[0]),)
    ),
}


def test_the_edits_of_this_file_change_losses():
    plain = _train(tiny.build())
    for clause, attach in EDITS.items():
        assert _edited(attach) != plain, clause


def _only_in_the_second_step() -> list[str]:
    at = {"step": 0}
    model = tiny.build()
    model.layers[0].mlp.register_forward_hook(lambda _m, _i, out: out * 0.5 if at["step"] == 1 else out)
    return _train(model, lambda step: at.update(step=step))


MODELS = [f"model{number}" for number in range(len(EDITS))]
# A run counts steps over all of its models: these two are the last ones.
AT = STEPS * len(MODELS) + 1
OTHERS = {
    "in-one-step": (f"layers.0.mlp@steps={AT}..{AT}|scale(0.5)", _only_in_the_second_step),
    "of-integers": ("embed:forward_pre|scale(3)", lambda: _train(tiny.build())),
}


@pytest.fixture(scope="module")
def losses(run_once) -> dict[str, list[str]]:
    """Those of each edit's own model, by the edit."""
    clauses = [*EDITS, *(clause for clause, _ in OTHERS.values())]
    names = [*MODELS, *OTHERS]
    hooks = ";".join(f"{name}.{clause}" for name, clause in zip(names, clauses, strict=True))
    found = run_once(harness.python("edited.py", *names), hooks).expect(0).losses
    return {clause: found[STEPS * number :][:STEPS] for number, clause in enumerate([*EDITS, *OTHERS])}


@pytest.mark.parametrize("clause", EDITS)
def test_an_edit_is_the_hook_one_would_write(clause, losses):
    assert losses[clause] == _edited(EDITS[clause])


@pytest.mark.parametrize("what", OTHERS)
def test_integers_and_other_steps_are_left_alone(what, losses):
    assert losses[what] == OTHERS[what][1]()


def test_edits_compose_and_record_what_was_there_before(run_once):
    clauses = [clause for clause in EDITS if "zero" not in clause]
    model = tiny.build()
    names = {clause.split(":")[0] for clause in clauses}
    # The recorder's hooks come first: they see inputs and outputs before the edit.
    recorder = reference.Recorder(model, names.__contains__)
    for clause in clauses:
        EDITS[clause](model)
    losses = _train(model, recorder.forward_pass)

    outcome = run_once(harness.python("plain.py"), ";".join(clauses)).expect(0)
    assert outcome.losses == losses
    captures.expect_sound(outcome.run)
    found = captures.read(outcome.run)
    wanted = {(clause.split(":")[0], clause.split(":")[1].split("|")[0]) for clause in clauses}
    assert {(key.module, key.kind) for key in found} == wanted
    # Gradients reach the recorder, which sits inside, after the edit.
    factor = {"backward": -1.5, "backward_pre": 0.25}
    for key, value in found.items():
        assert captures.same_bytes(value * factor.get(key.kind, 1.0), recorder.found[key]), key


def test_every_rank_of_a_sharded_job_edits_alike(run_once):
    hooks = "layers.0.mlp:forward|scale(0.5);layers.1.mlp:backward|zero"
    ddp = run_once(layouts.WRAPPED["ddp"][0], hooks).expect(0)
    fsdp = run_once(harness.on_ranks("fsdp2.py"), hooks).expect(0)
    unedited = run_once(layouts.WRAPPED["ddp"][0], layouts.HOOKS).expect(0)
    assert ddp.losses == fsdp.losses
    assert ddp.losses[1:] != unedited.losses[1:]
