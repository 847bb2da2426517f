"""What the recipes train on: random tokens with a drawn truth, as a frozen vision-language model would give them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from trm_losses import TRMObjective

IMAGES, CLASSES, NUM_TOKENS, DIM = 96, 5, 9, 32
BATCH, STEPS = 12, 16  # images of a step, over all processes


def drawn() -> tuple[TensorDataset, Tensor]:
    """Images as (tokens, targets) of which half of the labels are unknown, and the class texts."""
    generator = torch.Generator().manual_seed(0)
    text = torch.nn.functional.normalize(torch.randn(CLASSES, DIM, generator=generator), dim=-1)
    truth = (torch.rand(IMAGES, CLASSES, generator=generator) < 0.3).float()
    tokens = 0.1 * torch.randn(IMAGES, NUM_TOKENS, DIM, generator=generator)
    tokens[:, :CLASSES] += truth[:, :, None] * text
    targets = torch.where(torch.rand(IMAGES, CLASSES, generator=generator) < 0.5, truth, -1.0)
    return TensorDataset(tokens, targets), text


def built(text: Tensor) -> TRMObjective:
    """The objective at the method's defaults; without dropout, so that processes and one process can be compared."""
    torch.manual_seed(0)  # every process starts from the same weights
    objective = TRMObjective.from_text(text, total_steps=STEPS, recipe="paper", distributed=True)
    for part in objective.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return objective


def batches(rank: int = 0, world: int = 1) -> list[Tensor]:
    """For each step the images of this rank: its part of the one batch of all, whatever their number."""
    generator = torch.Generator().manual_seed(1)
    steps: list[Tensor] = []
    while len(steps) < STEPS:
        steps += torch.randperm(IMAGES, generator=generator).split(BATCH)
    return [step.tensor_split(world)[rank] for step in steps[:STEPS]]
