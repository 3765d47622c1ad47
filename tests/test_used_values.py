"""A record has the value that torch used, also where hooks of the job's own, which came later, changed it."""

import pytest
import used_values

import captures
import harness

HOOKS = "**:forward_pre,forward,backward_pre,backward,grad"


@pytest.fixture(scope="module")
def run(run_once, untapped_once):
    argv = harness.python("used_values.py")
    outcome = run_once(argv, HOOKS).expect(0)
    assert outcome.losses == untapped_once(argv).losses
    return captures.expect_sound(outcome.run)


def used(case):
    """What torch uses: by module or parameter, kind and step of this case."""
    found, seen = {}, set()

    def watch(model, optimizer, step):
        # Anew in each step: after the hooks that the job has by now.
        for handle in seen:
            handle.remove()
        seen.clear()
        passes = {name: 0 for name, _ in model.named_children()}
        for name, module in model.named_children():

            def key(name=name, step=step):
                return name, step, passes[name]

            def before(_, args, key=key):
                found[("forward_pre", *key())] = args[0].detach().clone()

            def after(_module, _args, out, name=name, key=key):
                at = key()
                found[("forward", *at)] = out.detach().clone()
                if out.requires_grad:
                    # The last one.
                    out.grad_fn.register_prehook(
                        lambda gradients, at=at: found.__setitem__(("backward_pre", *at), gradients[0].clone())
                    )
                passes[name] += 1

            seen.add(module.register_forward_pre_hook(before))
            seen.add(module.register_forward_hook(after))

        def stepped(*_, step=step):
            for name, parameter in model.named_parameters():
                found["grad", name, step, 0] = parameter.grad.clone()

        seen.add(optimizer.register_step_post_hook(stepped))

    used_values.train(case, watch)
    return found


@pytest.mark.parametrize("case", used_values.CASES)
def test_a_record_has_what_torch_used(run, case):
    model = next(r.model for r in run.records if r.module == case)
    first = min(r.step for r in run.records if r.model == model)
    expected = used(case)
    assert {kind for kind, *_ in expected} == {"forward_pre", "forward", "backward_pre", "grad"}
    for (kind, name, step, micro), value in expected.items():
        key = (model, kind, step, micro)
        record = next(r for r in run[name] if (r.model, r.kind, r.step - first, r.micro) == key)
        assert captures.same_bytes(record.tensor(), value), record


def test_a_backward_pass_has_the_scale_of_its_own_loss(run):
    scales = {(r.step, r.micro): r.loss_scale for r in run["attacked"] if r.kind == "backward_pre"}
    first = min(step for step, _ in scales)
    # That of the training pass doubles with each step.
    steps = range(used_values.STEPS)
    expected = {(first + step, 1): used_values.SCALE * 2**step for step in steps}
    assert scales == {**{(first + step, 0): 1.0 for step in steps}, **expected}
    assert {r.loss_scale for r in run.records if r.kind == "grad"} == {1.0}
