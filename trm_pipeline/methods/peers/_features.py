"""What SST and SARB share: class features, their shares of a training, and the distances of images of one class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trm_losses._precision import full_precision, upcast
from trm_pipeline.methods.base import Method, Setting
from trm_pipeline.methods.wrapped import Wrapped

EPOCHS = 20
"""Published; everything below is told by its share of the training."""


class OfClassFeatures(Wrapped):
    """A method on the class features (B, C, D) of a head; all terms of the head give way to its own.

    Steps are counted, not epochs, so that a resumed training goes on where it was.
    """

    step: Tensor

    def __init__(self, inner: Method, setting: Setting) -> None:
        super().__init__(inner)
        self.total_steps = max(1, setting.total_steps)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @property
    def share(self) -> float:
        """Of the training that is done."""
        return int(self.step) / self.total_steps

    @property
    def ramp(self) -> float:
        """From 0 to 1 through the first published epoch."""
        return min(1.0, EPOCHS * self.share)

    @property
    def started(self) -> bool:
        """Whether pseudo-labels or blends take part: from the sixth published epoch on."""
        return self.share >= 0.25

    @torch.no_grad()
    def after_step(self) -> None:
        super().after_step()
        self.step += 1


def known_mean(logits: Tensor, targets: Tensor) -> Tensor:
    """PBCE: cross-entropy, with soft targets too, over the entries that have one; gradients reach the targets as well."""
    x, known = upcast(logits), targets >= 0
    entries = torch.where(known, F.softplus(x) - targets * x, 0.0)
    return entries.sum() / known.sum().clamp(min=1)


def distances(features: Tensor, targets: Tensor) -> Tensor:
    r"""The mean over pairs of images with a known label of one class: 1 - cos where both show it, 1 + cos where one or none does.

    With n pairs of the first kind, of each of the other two at most 3 n are taken: the n of the largest value, and of the rest
    2 n at random. Without any, all.
    """
    with full_precision(features):
        unit = F.normalize(upcast(features), dim=-1).transpose(0, 1)  # (C, B, D)
        cosines = unit @ unit.transpose(1, 2)
    known, present = (targets >= 0).T, (targets == 1).T  # (C, B)
    pairs = (known[:, :, None] & known[:, None, :]).triu(diagonal=1)
    both = pairs & present[:, :, None] & present[:, None, :]
    none = pairs & ~present[:, :, None] & ~present[:, None, :]
    near = 1 - cosines[both]
    kinds = [near]
    for kind in (pairs & ~both & ~none, none):
        far = 1 + cosines[kind]
        if 0 < 3 * len(near) < len(far):
            order = far.detach().argsort(descending=True)
            rest = order[len(near) :]
            drawn = rest[torch.randperm(len(rest), device=rest.device)[: 2 * len(near)]]
            far = far[torch.cat([order[: len(near)], drawn])]
        kinds.append(far)
    values = torch.cat(kinds)
    return values.sum() / max(1, len(values))
