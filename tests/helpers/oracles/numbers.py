"""What the slow loops calculate with; nothing here or beside it calls the package."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]


def array(x: Any) -> Array:
    """A tensor (or anything) as float64 numpy."""
    return np.asarray(x.detach().cpu() if isinstance(x, torch.Tensor) else x, dtype=np.float64)


def unit(v: Array) -> Array:
    """A vector of length one."""
    length = math.sqrt(sum(float(x) ** 2 for x in v))
    return v / length if length else v


def cosine(a: Any, b: Any) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return float(dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    exps = [math.exp(v - top) for v in values]
    return [e / sum(exps) for e in exps]


def log_sum_exp(values: list[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))
