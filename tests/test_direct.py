"""Parts of a model called directly: what runs inside of them is of the same pass, also after a forward that raised."""

import direct
import pytest

import captures
import harness
import reference


@pytest.mark.parametrize("hooks", ["**.act;**.first", "**.act:forward,forward_pre,backward;net;scale"])
@pytest.mark.parametrize("argument", ["", "dynamo"])
def test_parts_called_directly_hold_what_runs_inside_of_them(hooks, argument, run_once, untapped_once):
    names = {clause.split(":")[0].removeprefix("**.") for clause in hooks.split(";")}
    task = direct.build()
    recorder = reference.Recorder(task, lambda name: name.rsplit(".", 1)[-1] in names)
    direct.main(task, recorder.forward_pass)
    kinds = {"net": ["forward"], "scale": ["forward"], "first": ["forward"], "act": ["forward"]}
    if ":" in hooks:
        kinds["act"] += ["forward_pre", "backward"]
    expected = {key: t for key, t in recorder.found.items() if key.kind in kinds[key.module.rsplit(".", 1)[-1]]}
    assert {key.call for key in expected} == {0, 1}
    assert {key.micro for key in expected} == {0, 1, 2}

    argv = harness.python("direct.py", argument)
    outcome = run_once(argv, hooks).expect(0)
    assert outcome.losses == untapped_once(argv).losses
    captures.expect_sound(outcome.run)
    captures.expect_equal(captures.read(outcome.run), expected)
