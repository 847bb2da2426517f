"""What the recipes of an input train on: small pictures of which a few labels are known, and a stand-in for a frozen tower."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from PIL import Image
from torch import Tensor

from trm_losses import TRMObjective

NAMES = ("cat", "dog", "car")
IMAGES, SIDE, PATCH, DIM, BATCH, EPOCHS = 60, 24, 8, 16, 12, 8


def drawn() -> list[tuple[Image.Image, dict[str, int]]]:
    """Pictures with a patch for each class that is present, and of two labels in three what is known: 1 or 0 by name."""
    generator = torch.Generator().manual_seed(0)
    looks = torch.randint(0, 256, (len(NAMES), 3, PATCH, PATCH), generator=generator)
    found = []
    for _ in range(IMAGES):
        pixels = torch.randint(0, 60, (3, SIDE, SIDE), generator=generator)
        truth = (torch.rand(len(NAMES), generator=generator) < 0.4).tolist()
        for row, look in enumerate(looks):
            if truth[row]:
                pixels[:, PATCH * row : PATCH * (row + 1), :PATCH] = look
        known = {name: int(label) for name, label in zip(NAMES, truth, strict=True) if torch.rand((), generator=generator) < 0.67}
        found.append((Image.fromarray(pixels.permute(1, 2, 0).to(torch.uint8).numpy()), known))
    return found


def train(batches: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
    """The plain loop over images (B, 3, H, W) from 0 to 1 and targets (B, C), 1, 0 or -1; the loss of each step."""
    torch.manual_seed(0)
    text = torch.nn.functional.normalize(torch.randn(len(NAMES), DIM), dim=-1)
    tower = torch.nn.Conv2d(3, DIM, PATCH, PATCH).requires_grad_(False)  # in its place a backbone, and its tokens
    objective = TRMObjective.from_text(text, total_steps=EPOCHS * IMAGES // BATCH)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    losses = []
    for _ in range(EPOCHS):
        for images, targets in batches:
            output = objective(tower(images).flatten(2).mT, text, targets)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            objective.update(output)
            losses.append(output.loss.item())
    return losses
