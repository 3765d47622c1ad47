"""`flexmodel run` is transparent: exit code, stdout, signals, launchers."""

import signal

import pytest

import captures
import harness
import layouts

HOOKS = "layers.*.mlp:forward,backward"
ACCELERATE = ["accelerate", "launch", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


@pytest.mark.parametrize("code", [0, 7, 255])
def test_exit_code_is_the_commands(code, tmp_path):
    outcome = harness.tapped(["bash", "-c", f"echo out; echo err >&2; exit {code}"], HOOKS, tmp_path / "x")
    outcome.expect(code)
    assert outcome.out == "out\n"
    assert "err\n" in outcome.err


def test_death_by_signal_is_reported_as_shells_do(tmp_path):
    harness.tapped(["bash", "-c", "kill -KILL $$"], HOOKS, tmp_path / "x").expect(128 + signal.SIGKILL)


def test_a_command_that_is_not_there_is_127(tmp_path):
    outcome = harness.tapped(["no-such-command-here"], HOOKS, tmp_path / "x").expect(127)
    assert "no-such-command-here" in outcome.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_the_command(number, tmp_path):
    script = (
        "import signal, sys\n"
        f"signal.pthread_sigmask(signal.SIG_BLOCK, [{int(number)}])\n"
        "print('ready', flush=True)\n"
        f"print('caught' if signal.sigtimedwait([{int(number)}], 60) else 'nothing')\n"
        "sys.exit(5)\n"
    )
    argv = [harness.FLEXMODEL, "run", "--hooks", HOOKS, "--out", str(tmp_path / "x"), "--", "python3", "-c", script]
    with harness.Job(argv) as job:
        job.wait_for_line("ready")
        job.process.send_signal(number)
        outcome = job.wait()
    outcome.expect(5)
    assert outcome.out == "ready\ncaught\n"


def test_nothing_is_left_running(tmp_path):
    argv = [harness.FLEXMODEL, "run", "--hooks", HOOKS, "--out", str(tmp_path / "x"), "--", "true"]
    with harness.Job(argv) as job:
        job.wait().expect(0)
        harness.wait_until(lambda: not job.pids(), "the end of every process")


def test_a_failing_script_fails_as_it_would(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("import torch\ntorch.nn.Linear(2, 2)(torch.ones(2))\nraise ValueError('mine')\n")
    outcome = harness.tapped(["python", str(script)], "**", tmp_path / "x").expect(1)
    assert "ValueError: mine" in outcome.err


def test_a_finished_run_prints_one_summary(run_once):
    outcome = run_once(harness.python("plain.py"), HOOKS).expect(0)
    assert "record" in outcome.err and str(outcome.run) in outcome.err
    assert all(line.startswith("step ") for line in outcome.out.splitlines())


@pytest.mark.parametrize("folder", [harness.BIN, harness.ROOT / "scripts"], ids=["installed", "in-the-checkout"])
def test_the_torchrun_wrapper_takes_hooks_from_the_environment(folder, tmp_path):
    argv = [str(folder / "flexmodel-torchrun"), *harness.torchrun("ddp.py", "1")[1:]]
    harness.run(argv, harness.environment(FLEXMODEL_HOOKS=HOOKS), cwd=tmp_path).expect(0)
    (run,) = (tmp_path / "runs").iterdir()
    assert {key.module for key in captures.read(run)} == {"layers.0.mlp", "layers.1.mlp"}


@pytest.mark.parametrize("name", ["module", "deepspeed", "accelerate"])
def test_other_launchers_of_ranks_carry_the_taps(name, run_once, tmp_path):
    port = str(harness.free_port())
    argv = {
        "module": ["python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        "deepspeed": ["deepspeed", "--num_gpus", "2", "--no_local_rank", "--master_port", port],
        # The flag is about how ranks are started; it takes no GPU. With --cpu more than one needs MPI.
        "accelerate": [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", port],
    }[name]
    program = "accelerate_ddp.py" if name == "accelerate" else "ddp.py"
    argv.append(str(harness.PROGRAMS / program))
    outcome = harness.tapped(argv, HOOKS, tmp_path / "x", HF_HOME=str(tmp_path / "hf")).expect(0)
    assert outcome.losses == run_once(harness.torchrun(program), layouts.HOOKS).expect(0).losses
    captures.expect_sound(tmp_path / "x")
    found = captures.read(tmp_path / "x")
    assert len(found) == 2 * 2 * 3  # modules, kinds, steps
    assert all(value.shape[0] == 8 for value in found.values())


def test_accelerate_launch_of_one_process_carries_the_taps(untapped_once, tmp_path):
    argv = [*ACCELERATE, "--cpu", "--num_processes", "1", str(harness.PROGRAMS / "plain.py")]
    outcome = harness.tapped(argv, HOOKS, tmp_path / "x", HF_HOME=str(tmp_path / "hf")).expect(0)
    assert outcome.losses == untapped_once(harness.python("plain.py")).losses
    assert len(captures.read(tmp_path / "x")) == 2 * 2 * 3


def test_hooks_can_come_from_a_toml_file(tmp_path):
    hooks = tmp_path / "hooks.toml"
    hooks.write_text('[[hook]]\nselect = "layers.0.mlp"\nkinds = ["forward", "backward"]\n')
    outcome = harness.tapped(harness.python("plain.py", "1"), str(hooks), tmp_path / "x").expect(0)
    assert {(k.module, k.kind) for k in captures.read(outcome.run)} == {
        ("layers.0.mlp", "forward"),
        ("layers.0.mlp", "backward"),
    }


def test_disable_switches_everything_off(tmp_path, untapped_once):
    outcome = harness.tapped(harness.python("plain.py"), HOOKS, tmp_path / "x", FLEXMODEL_DISABLE="1").expect(0)
    assert outcome.losses == untapped_once(harness.python("plain.py")).losses
    if (tmp_path / "x").exists():
        assert captures.read(tmp_path / "x") == {}
