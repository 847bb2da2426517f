"""Accelerate (``pip install accelerate``): ``torchrun --nproc-per-node 2 examples/recipes/accelerate_.py``."""

import torch
from accelerate import Accelerator
from tokens import batches, built, drawn

from trm_losses import TRMObjective


def train() -> TRMObjective:
    accelerator = Accelerator(cpu=True)  # its gather has no gradient and is not needed: the losses gather what they need
    data, text = drawn()
    objective = built(text)
    model, optimizer = accelerator.prepare(objective, torch.optim.AdamW(objective.parameters(), lr=1e-3))
    for images in batches(accelerator.process_index, accelerator.num_processes):
        tokens, targets = (x.to(accelerator.device) for x in data[images])
        output = model(tokens, text.to(accelerator.device), targets)
        optimizer.zero_grad()
        accelerator.backward(output.loss)
        optimizer.step()
        objective.update(output)
    return objective


if __name__ == "__main__":
    train()
