"""The sizes, the random values and the inputs that tests share; of one seed each, in float64."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

BATCH, CLASSES, WIDTH, TOKENS = 4, 5, 8, 6
Inputs = dict[str, Tensor]
Result = Any


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def labels(batch: int = BATCH, classes: int = CLASSES, seed: int = 0, soft: bool = True) -> Tensor:
    """Present, absent, unknown and some soft labels; a class with two positives where there is room."""
    y = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    y = y[torch.randint(0, 3, (batch, classes), generator=generator(seed))]
    y[:2, 0] = 1
    y[0, -1] = 0 if classes > 1 else 1
    if soft and batch > 2 and classes > 2:
        y[2, 1], y[1, 2] = 0.3, 0.95
    return y


M = TypeVar("M", bound=nn.Module)


def shaken(module: M, seed: int = 7, size: float = 0.2) -> M:
    """Parameters moved off their start, so that no zero or identity hides a term; without dropout."""
    source = generator(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(size * torch.randn(p.shape, generator=source))
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return module


SAMPLES = 6


def region_text(batch: int, classes: int) -> Inputs:
    return {
        "regions": 0.4 * normal(batch, classes, WIDTH, seed=1),
        "text": normal(classes, WIDTH, seed=2),
        "targets": labels(batch, classes, seed=3),
    }


def with_weights(batch: int, classes: int) -> Inputs:
    weights = torch.rand(batch, classes, generator=generator(4), dtype=torch.float64)
    weights[-1, 0] = 0.0
    return {**region_text(batch, classes), "weights": weights}


def with_prototypes(batch: int, classes: int) -> Inputs:
    seen = torch.ones(classes, dtype=torch.bool)
    seen[classes // 2] = classes == 1
    return {**with_weights(batch, classes), "prototypes": normal(classes, WIDTH, seed=5), "seen": seen}


def image_labels(batch: int, classes: int) -> Inputs:
    weights = torch.rand(batch, classes, generator=generator(4), dtype=torch.float64)
    return {"features": normal(batch, WIDTH, seed=1), "targets": labels(batch, classes, seed=8), "weights": weights}


def token_text(batch: int, classes: int) -> Inputs:
    return {"tokens": normal(batch, TOKENS, WIDTH, seed=6), "text": normal(classes, WIDTH, seed=7)}


def with_padding(batch: int, classes: int) -> Inputs:
    mask = torch.zeros(batch, TOKENS, dtype=torch.bool)
    mask[0, 4:] = mask[-1, 0] = True
    return {**token_text(batch, classes), "key_padding_mask": mask}


def two_logits(batch: int, classes: int) -> Inputs:
    return {"student_logits": 3 * normal(batch, classes, seed=8), "teacher_logits": 3 * normal(batch, classes, seed=9)}


def named_right(features: Tensor, text: Tensor) -> float:
    """The share of (b, c) whose feature is closest to the text of class c."""
    unit = torch.nn.functional.normalize
    nearest = torch.einsum("bcd,kd->bck", unit(features, dim=-1), unit(text, dim=-1)).argmax(dim=-1)
    return float((nearest == torch.arange(len(text))).float().mean())
