"""Shapes of arguments, refused by name."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .._checks import Dims

Reduction = Literal["none", "mean", "sum"]

# Arguments that are masks, and others that need not be floats.
_MASKS, _COUNTED = ("seen", "key_padding_mask"), ("targets", "count")


def check_shapes(owner: str, **given: tuple[Tensor | None, str]) -> None:
    """Refuse what does not fit, by name; "..." is any shape, the same wherever it stands, and "?" what may be left out."""
    dims, shape = Dims(owner), None
    for name, (tensor, letters) in given.items():
        if tensor is None and letters.endswith("?"):
            continue
        if letters == "..." and isinstance(tensor, Tensor):
            shape = " ".join(f"n{i}" for i in range(tensor.ndim)) if shape is None else shape
            letters = shape
        letters = letters.removesuffix("?")
        if name in _MASKS and tensor is not None:
            dims.mask(name, tensor, letters)
        else:
            dims.check(name, tensor, letters, floating=name not in _COUNTED)


def broadcast(owner: str, weights: Tensor, x: Tensor) -> Tensor:
    """Weights in the type and the shape of ``x``."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"{owner}: weights must be a torch.Tensor, got {type(weights).__name__}")
    pairs = zip(reversed(weights.shape), reversed(x.shape), strict=False)
    if weights.ndim > x.ndim or any(n not in (1, m) for n, m in pairs):
        raise ValueError(f"{owner}: weights must broadcast to shape {tuple(x.shape)}, got {tuple(weights.shape)}")
    return weights.to(x.dtype).expand_as(x)


def weighted_mean(loss: Tensor, weights: Tensor, count: Tensor) -> Tensor:
    """sum(weights * loss) / count, the loss masked where its weight is 0, and 0 where nothing counts."""
    return (torch.where(weights > 0, loss, 0.0) * weights).sum() / torch.where(count > 0, count, 1.0)
