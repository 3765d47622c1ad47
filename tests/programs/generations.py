"""Goes on with a copy of its model after every step, as a population search does; some copies go through a file.

Every generation prints how many hooks its model has, some also how many objects the process holds.
"""

import copy
import gc
import io

import tiny
import torch

GENERATIONS = 24
HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
         "_forward_hooks_always_called")  # fmt: skip


class Awkward(torch.nn.Linear):
    """Restores itself without asking torch."""

    def __setstate__(self, state):
        self.__dict__.update(state)


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def main() -> None:
    torch.set_num_threads(1)
    model = tiny.build()
    model.lm_head = Awkward(tiny.WIDTH, tiny.VOCAB, bias=False)
    for generation in range(GENERATIONS):
        model = through_a_file(model) if generation % 4 == 3 else copy.deepcopy(model)
        tokens, targets = tiny.batch(generation, [4], 0)
        loss = tiny.loss_of(model(tokens), targets)
        loss.backward()
        if generation < GENERATIONS // 2:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
        else:
            # torch.optim imports torch.compile's half of torch.
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        model.zero_grad()
        tiny.report(0, generation, loss)
        print("hooks", *(sum(len(getattr(module, name)) for module in model.modules()) for name in HOOKS), flush=True)
        if generation % 6 == 5:
            del loss
            gc.collect()
            print("objects", len(gc.get_objects()), flush=True)


if __name__ == "__main__":
    main()
