"""A linear layer on the pooled feature."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trm_losses import TextRegionMatchingLoss, param_groups
from trm_losses.functional import asymmetric_loss
from trm_pipeline import ranks
from trm_pipeline.config.presets import Preset
from trm_pipeline.features.cached import Batch
from trm_pipeline.methods.base import Method, Setting, weak_negatives


class LinearProbe(Method):
    """A linear layer on the pooled feature that starts as the zero-shot classifier.

    Unit features of one model lie close together and differ in few directions; standardised by the mean and deviation of
    the first batch they can be learned from at a common rate. Weights and biases are converted with them, so the start
    stays the zero-shot classifier.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.prompts = setting.prompts("fixed")
        self.linear = nn.Linear(setting.text.shape[1], setting.num_classes)
        self.scale = setting.preset.linear["scale"]
        self.register_buffer("mean", torch.zeros(setting.text.shape[1]))
        self.register_buffer("deviation", torch.ones(setting.text.shape[1]))

    @torch.no_grad()
    def calibrate(self, batch: Batch, text: Tensor, prior: float) -> None:
        unit = F.normalize(batch.pooled, dim=-1)
        self.mean.copy_(unit.mean(dim=0))
        self.deviation.copy_(unit.std(dim=0).clamp(min=1e-4))
        matching = TextRegionMatchingLoss(len(text), scale=self.scale).to(text.device)
        matching.calibrate_bias(unit[:, None].expand(-1, len(text), -1), text, prior)
        weight = self.scale * F.normalize(text, dim=-1)
        self.linear.weight.copy_(weight * self.deviation)
        self.linear.bias.copy_(weight @ self.mean - matching.bias)

    def logits(self, batch: Batch, text: Tensor) -> Tensor:
        linear: Tensor = self.linear((F.normalize(batch.pooled, dim=-1) - self.mean) / self.deviation)
        return linear

    def loss(self, batch: Batch, text: Tensor, targets: Tensor, weak_negative: float = 0.0) -> dict[str, Tensor]:
        logits = self.logits(batch, text)
        loss = asymmetric_loss(logits, targets, gamma_pos=0, gamma_neg=0, margin=0, group=ranks.group())
        return {"bce": targets.shape[1] * loss, **weak_negatives(targets, weak_negative, (1.0, logits))}

    def groups(self, preset: Preset) -> list[dict[str, Any]]:
        return param_groups(self, lr=preset.lr_factor * preset.linear["lr"], weight_decay=preset.weight_decay)
