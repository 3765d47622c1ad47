"""Accelerate's offloading to CPU, then to disk, with weights loaded for every call: `offload.py FOLDER`."""

import sys

import tiny
import torch
from accelerate import cpu_offload, dispatch_model

CALLS = 3
DEVICE_MAP = {"embed": "cpu", "layers.0": "cpu", "layers.1": "disk", "norm": "disk", "lm_head": "cpu"}


def build() -> tiny.Net:
    """The model with all of its weights in memory."""
    return tiny.build().eval()


def run(model: torch.nn.Module) -> None:
    for call in range(CALLS):
        tokens, targets = tiny.batch(call, [4], 0)
        with torch.no_grad():
            loss = tiny.loss_of(model(tokens), targets)
        tiny.report(0, call, loss)
    print("offloaded", *(name for name, parameter in model.named_parameters() if parameter.device.type == "meta"))


def main(folder: str) -> None:
    torch.set_num_threads(1)
    run(cpu_offload(build(), execution_device=torch.device("cpu")))
    run(dispatch_model(build(), device_map=DEVICE_MAP, main_device="cpu", offload_dir=folder))


if __name__ == "__main__":
    main(sys.argv[1])
