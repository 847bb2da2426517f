"""DistributedDataParallel: ``torchrun --nproc-per-node 2 examples/recipes/ddp.py``."""

import torch
import torch.distributed as dist
from tokens import batches, built, drawn

from trm_losses import TRMObjective


def train() -> TRMObjective:
    data, text = drawn()
    objective = built(text)  # distributed=True: normalisers, anchors and prototypes are those of all ranks
    model = torch.nn.parallel.DistributedDataParallel(objective)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    for images in batches(dist.get_rank(), dist.get_world_size()):
        tokens, targets = data[images]
        output = model(tokens, text, targets)
        optimizer.zero_grad()
        output.loss.backward()  # averages gradients over ranks: they are now those of the joined batch
        optimizer.step()
        objective.update(output)  # after the step, on every rank
    return objective


if __name__ == "__main__":
    dist.init_process_group("gloo")  # "nccl" where each process has a GPU
    train()
    dist.destroy_process_group()
