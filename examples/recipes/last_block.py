"""The last block of a vision tower, trained with the head: ``python examples/recipes/last_block.py``.

All before it stays frozen, so that its output can be computed once. Random weights stand in for those of a real model; take
``open_clip.create_model("ViT-B-32", pretrained="openai")`` and your own images, and a rate for the block far below the head's.
"""

import torch
import torch.nn.functional as F
from tokens import CLASSES, IMAGES, drawn
from torch import Tensor, nn

from trm_losses import TRMObjective

STEPS, WIDTH, DIM = 30, 48, 32


class Tower(nn.Module):
    """What a ViT is for this: blocks over patches, and a projection of its tokens into the space of the texts."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, batch_first=True) for _ in range(3))
        self.norm, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, DIM, bias=False)

    def before_the_last(self, patches: Tensor) -> Tensor:
        for block in list(self.blocks)[:-1]:
            patches = block(patches)
        return patches

    def forward(self, hidden: Tensor) -> Tensor:
        return F.normalize(self.proj(self.norm(self.blocks[-1](hidden))), dim=-1)


def train() -> tuple[Tower, list[float]]:
    torch.manual_seed(0)
    data, text = drawn()
    tower, lift = Tower().requires_grad_(False), torch.randn(DIM, WIDTH) / DIM**0.5
    tower.blocks[-1].requires_grad_(True)
    with torch.no_grad():
        hidden = tower.before_the_last(data.tensors[0] @ lift)  # of all images, once
    objective = TRMObjective.from_text(text, total_steps=STEPS)
    optimizer = torch.optim.AdamW(
        [{"params": objective.parameters(), "lr": 1e-2}, {"params": tower.blocks[-1].parameters(), "lr": 1e-3}]
    )
    losses = []
    for step in range(STEPS):
        images = torch.arange(32 * step, 32 * step + 32) % IMAGES
        output = objective(tower(hidden[images]), text, data.tensors[1][images])
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        objective.update(output)
        losses.append(output.loss.item() / CLASSES)
    return tower, losses


if __name__ == "__main__":
    _, losses = train()
    print(f"loss of a label: {losses[0]:.3f} before, {losses[-1]:.3f} after {STEPS} steps")
