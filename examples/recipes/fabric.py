"""Lightning Fabric (``pip install lightning``): ``torchrun --nproc-per-node 2 examples/recipes/fabric.py``."""

import torch
from lightning.fabric import Fabric
from tokens import batches, built, drawn

from trm_losses import TRMObjective


def train(fabric: Fabric) -> TRMObjective:
    data, text = drawn()
    objective = built(text)
    model, optimizer = fabric.setup(objective, torch.optim.AdamW(objective.parameters(), lr=1e-3))
    for images in batches(fabric.global_rank, fabric.world_size):
        tokens, targets = fabric.to_device(data[images])
        output = model(tokens, fabric.to_device(text), targets)
        optimizer.zero_grad()
        fabric.backward(output.loss)
        optimizer.step()
        objective.update(output)
    return objective


if __name__ == "__main__":
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    train(fabric)
