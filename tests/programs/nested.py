"""Starts Python processes from processes that capture: `nested.py HOW`, where HOW is

evaluate  every rank of torchrun lets a process of its own evaluate another model;
spawn     torch.multiprocessing starts two ranks;
late      the same, by a process that ran the model before;
dry       the same, by one that did not, and each runs its model before it joins the other, and never wraps it.
"""

import os
import subprocess
import sys
import tempfile

import parallel
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel


def evaluate() -> None:
    torch.set_num_threads(1)
    model = tiny.build(seed=1)
    with torch.no_grad():
        print("evaluated", float(model(tiny.batch(0, [4], 0)[0]).mean()).hex(), flush=True)


def train(model: torch.nn.Module | None = None) -> None:
    model = model or DistributedDataParallel(tiny.build())
    parallel.train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=2)
    if "evaluate" in sys.argv:
        # Through a shell, as scripts do.
        command = ["bash", "-c", f"'{sys.executable}' '{__file__}' child; exit 0"]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        if dist.get_rank() == 0:
            print(out, end="", flush=True)
        parallel.train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=1)


def rank(number: int, meet: str, how: str) -> None:
    model = tiny.build() if how == "dry" else None
    if model is not None:
        with torch.no_grad():
            model(tiny.batch(0, [4, 4], number)[0])
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=number, world_size=2)
    parallel.launch(train, model)


if __name__ == "__main__":
    if sys.argv[1] == "child":
        evaluate()
    elif sys.argv[1] == "evaluate":
        parallel.launch(train)
    else:
        if sys.argv[1] == "late":
            with torch.no_grad():
                tiny.build()(tiny.batch(0, [4, 4], 0)[0])
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(rank, (os.path.join(folder, "meet"), sys.argv[1]), nprocs=2)
