"""Half precision is raised, and autocast is off: exponents and sums lose too much in it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ._fused import may_fuse

__all__ = ["full_precision", "unit", "unit_rows", "upcast"]


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast is off on the tensor's device: exponents and sums lose too much in half precision.

    A device that autocast does not know refuses even to have it switched off.
    """
    device_type = tensor.device.type
    # torch 2.7 cannot trace the question.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if known else nullcontext()


def upcast(tensor: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def unit(tensor: Tensor) -> Tensor:
    """Vectors of length one along the last axis, in at least float32 (a zero vector stays zero)."""
    return unit_rows(upcast(tensor))


_LEAST = 1e-12  # length of a row


def unit_rows(rows: Tensor) -> Tensor:
    """Rows of length one (a zero row stays zero), as ``F.normalize`` gives them; half the memory in the backward pass."""
    if not may_fuse():
        return rows / _length(rows)
    result: Tensor = _UnitRows.apply(rows)[0]
    return result


def _length(rows: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp(min=_LEAST)
    return length


class _UnitRows(torch.autograd.Function):
    """Keeps what it returns and not the rows. The length is returned for second derivatives, which pass through it."""

    @staticmethod
    def forward(rows: Tensor) -> tuple[Tensor, Tensor]:
        length = _length(rows)
        return rows / length, length

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, by_unit: Tensor | None, by_length: Tensor | None) -> Tensor | None:
        unit, length = ctx.saved_tensors
        gradient = None if by_length is None else by_length * unit
        if by_unit is not None:
            along = (unit * by_unit).sum(dim=-1, keepdim=True)
            across = torch.addcmul(by_unit, unit, along, value=-1) / length
            across = across * (length > _LEAST)  # a row of zeros has no direction; by the clamp it would have a huge slope
            gradient = across if gradient is None else gradient + across
        return gradient
