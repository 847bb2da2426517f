"""Sharded parameters, FSDP2: ``torchrun --nproc-per-node 2 examples/recipes/fsdp2.py``."""

import torch
import torch.distributed as dist
from tokens import batches, built, drawn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from trm_losses import TRMObjective


def train() -> TRMObjective:
    data, text = drawn()
    objective = built(text)
    # Each rank keeps its part of every parameter and of the optimiser's state. Buffers, and so the prototypes, stay whole.
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))  # "cuda" where each process has a GPU
    scalars = [p for p in objective.parameters() if p.ndim == 0]  # scale and sharpness, which FSDP2 does not take
    fully_shard(objective.pooler, mesh=mesh, ignored_params=set(scalars))  # the large part, whole in its own passes alone
    fully_shard(objective, mesh=mesh, ignored_params=set(scalars))  # what is left: biases, a head of the contrast
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)  # after sharding: of the parts
    for images in batches(dist.get_rank(), dist.get_world_size()):
        tokens, targets = data[images]
        output = objective(tokens, text, targets)
        optimizer.zero_grad()
        output.loss.backward()  # averages gradients over ranks, each its part
        for p in scalars:
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
        optimizer.step()
        objective.update(output)
    return objective


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train()
    dist.destroy_process_group()
