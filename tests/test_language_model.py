"""A transformers model under FSDP2, as scripts/quickstart trains it."""

import flexmodel
import pytest
import torch
import train_lm

import captures
import harness
import reference

TAPPED = {"model", "model.embed_tokens", "model.layers.0.mlp", "model.layers.3.self_attn", "model.layers.1", "lm_head"}
HOOKS = ";".join(f"{name}:forward,forward_pre,backward,backward_pre" for name in sorted(TAPPED))
STEPS = 3


@pytest.fixture(scope="module")
def outcome(run_once):
    return run_once(harness.torchrun("train_lm.py", str(STEPS)), HOOKS).expect(0)


@pytest.fixture(scope="module")
def first_step():
    """Records of step 0, every rank's batch run by itself."""
    parts = []
    data = train_lm.text()
    for rank in range(2):
        model = train_lm.build()
        recorder = reference.Recorder(model, TAPPED.__contains__)
        generator = torch.Generator().manual_seed(rank)
        starts = torch.randint(0, len(data) - train_lm.SEQ, (train_lm.BATCH,), generator=generator)
        tokens = torch.stack([data[s : s + train_lm.SEQ] for s in starts.tolist()]).long()
        model(input_ids=tokens, labels=tokens).loss.backward()
        parts.append(recorder.found)
    return parts


def test_the_loss_is_the_untapped_jobs(outcome, untapped_once):
    assert outcome.out == untapped_once(harness.torchrun("train_lm.py", str(STEPS))).out


def test_whole_tensors_equal_the_one_process_reference(outcome, first_step):
    captures.expect_sound(outcome.run)
    found = {key: value for key, value in captures.read(outcome.run).items() if key.step == 0}
    expected = {}
    for key, value in first_step[0].items():
        other = first_step[1][key]
        # What has no batch dimension (positions) is the same on every rank.
        alike = captures.same_bytes(value, other) and value.shape[0] != train_lm.BATCH
        expected[key] = value if alike else torch.cat([value, other])
    captures.expect_equal(found, expected)


def test_outputs_of_model_classes_are_named_by_their_fields(outcome):
    paths = {(key.module, key.kind, key.path) for key in captures.read(outcome.run)}
    assert ("model", "forward", "out.last_hidden_state") in paths
    assert ("model.layers.3.self_attn", "forward", "out[0]") in paths
    assert ("model.layers.3.self_attn", "forward_pre", "in.hidden_states") in paths


def test_classes_are_those_that_the_author_wrote(outcome):
    classes = {record.module: record.class_name for record in flexmodel.open(outcome.run).records}
    assert classes["model.layers.1"] == "LlamaDecoderLayer"  # and not fully_shard's FSDPLlamaDecoderLayer
    assert classes["model.layers.0.mlp"] == "LlamaMLP"
