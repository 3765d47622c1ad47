"""Two nodes are two agents, each with a run of its own, and one reader that makes tensors whole over both."""

import json
import pathlib

import flexmodel
import pytest

import captures
import harness

HOOKS = "layers.*.mlp:forward,backward;lm_head:forward,backward_pre;embed"
STEPS = 3
ROWS = 2
ARGS = ("ddp.py", str(STEPS), str(ROWS))


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> pathlib.Path:
    """Ranks 0 and 1 on node `left`, ranks 2 and 3 on node `right`, as torchrun starts them on two machines."""
    folder = tmp_path_factory.mktemp("nodes") / "x"
    port = str(harness.free_port())
    started = []
    for number, node in enumerate(("left", "right")):
        torchrun = ["torchrun", "--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "2"]
        torchrun += ["--master-addr", "127.0.0.1", "--master-port", port, str(harness.PROGRAMS / ARGS[0]), *ARGS[1:]]
        command = [harness.FLEXMODEL, "run", "--hooks", HOOKS, "--out", str(folder / "{node}"), "--", *torchrun]
        started.append(harness.Job(command, harness.environment(FLEXMODEL_NODE=node)))
    with started[0] as left, started[1] as right:
        left.wait().expect(0)
        right.wait().expect(0)
    return folder


@pytest.fixture(scope="module")
def one_node(run_once) -> pathlib.Path:
    """The same job with all four ranks on one node."""
    return run_once(harness.on_ranks(*ARGS, ranks=4), HOOKS).expect(0).run


def test_every_node_has_the_parts_of_its_ranks(job):
    ranks = {node: {p.rank for r in flexmodel.open(job / node).records for p in r.parts} for node in ("left", "right")}
    assert ranks == {"left": {0, 1}, "right": {2, 3}}
    assert sorted(p.name for p in job.iterdir()) == ["left", "right"]


def test_tensors_are_those_of_one_node_byte_for_byte(job, one_node):
    run = captures.expect_sound(job)
    assert run.info.world == 4 and run.info.node == "left, right" and run.info.exit_code == 0
    assert all(record.complete and record.ranks == (0, 1, 2, 3) for record in run.records)
    assert run.get("layers.0.mlp", step=1).shape[0] == 4 * ROWS
    captures.expect_equal(captures.read(job), captures.read(one_node))


def test_commands_take_the_folder_for_one_run(job, one_node, run_once, tmp_path):
    def run(*argv: str) -> str:
        return harness.run([harness.FLEXMODEL, *argv]).expect(0).out

    listing = json.loads(run("ls", str(job), "--json"))
    assert (listing["world"], listing["nodes"], listing["incomplete"]) == (4, ["left", "right"], 0)
    alone = json.loads(run("ls", str(job / "left"), "--json"))
    assert alone["incomplete"] == alone["records"] > 0
    assert "whole, from 4 ranks" in run("show", str(job), "lm_head", "--kind", "forward", "--step", "2")
    assert run("certify", str(job), str(one_node), "--exact").splitlines()[-1].startswith("certified: ")
    one_process = run_once(harness.python("plain.py", str(STEPS), str(4 * ROWS)), HOOKS).expect(0).run
    assert "4 in the run, 1 in the reference" in run("certify", str(job), str(one_process))
    run("export", str(job), "--to", "torch", str(tmp_path / "run.pt"))


def test_nodes_of_two_jobs_are_refused_in_one_line(job, one_node, tmp_path):
    (tmp_path / "left").symlink_to(job / "left")
    (tmp_path / "other").symlink_to(one_node)
    outcome = harness.run([harness.FLEXMODEL, "ls", str(tmp_path)]).expect(1)
    assert "left and other both have rank 0" in outcome.err and len(outcome.err.splitlines()) == 1
    with pytest.raises(flexmodel.RunError, match="left and other both have rank 0"):
        flexmodel.open(tmp_path)
