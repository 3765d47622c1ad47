"""fully_shard on every block and on the model."""

import parallel
import tiny
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def main() -> None:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    model = tiny.build()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    parallel.train(model, torch.optim.SGD(model.parameters(), lr=0.1))


if __name__ == "__main__":
    parallel.launch(main)
