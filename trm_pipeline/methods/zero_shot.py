"""Classifiers that learn nothing: cosines of the frozen model."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trm_pipeline.features.cached import Batch


def zero_shot_global(batch: Batch, text: Tensor) -> Tensor:
    """CLIP's own classifier: the cosine of the pooled feature and the class text."""
    return F.normalize(batch.pooled, dim=-1) @ F.normalize(text, dim=-1).T


def zero_shot_tokens(batch: Batch, text: Tensor, sharpness: Tensor | float = 8.0) -> Tensor:
    """Cosines of the tokens, averaged with their own softmax over tokens."""
    cosines = F.normalize(batch.tokens, dim=-1) @ F.normalize(text, dim=-1).T  # (B, N, C)
    return (torch.softmax(sharpness * cosines, dim=1) * cosines).sum(dim=1)


ZERO_SHOT: dict[str, Callable[[Batch, Tensor], Tensor]] = {
    "zero-shot-global": zero_shot_global,
    "zero-shot-tokens": zero_shot_tokens,
}
