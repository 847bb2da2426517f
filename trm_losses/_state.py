"""State that keeps its precision whatever a user does to the model around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["FullPrecisionState"]


class FullPrecisionState(nn.Module):
    """A module whose float buffers follow ``.to(device)`` but stay float32 under ``.half()`` and ``.to(dtype)``.

    One step of a running mean at momentum 0.99 or above is lost in half precision.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self
