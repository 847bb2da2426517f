"""What is equal, and how nearly."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.helpers import oracles


def close(actual: Any, expected: Any, rtol: float = 1e-10, atol: float | None = None) -> None:
    np.testing.assert_allclose(oracles.array(actual), oracles.array(expected), rtol=rtol, atol=rtol if atol is None else atol)


def several(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def tensors(result: Any) -> tuple[Tensor, ...]:
    return tuple(map(torch.as_tensor, several(result)))


def agree(actual: Any, expected: Any, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    """``expected`` may hold plain numbers, which a tensor would round to float32."""
    for a, e in zip(tensors(actual), several(expected), strict=True):
        assert tuple(a.shape) == tuple(np.shape(e))
        a = np.asarray(a.detach(), dtype=np.float64)
        np.testing.assert_allclose(a, np.asarray(e.detach() if isinstance(e, Tensor) else e), rtol=rtol, atol=atol)
