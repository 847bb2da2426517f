"""Half precision is raised, and autocast is off: exponents and sums lose too much in it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


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


def unit_rows(rows: Tensor) -> Tensor:
    """Rows of length one, as ``F.normalize`` gives them; a row shorter than 1e-12 becomes 0 and gets no gradient.

    Times the inverse, not over the length: the gradient of a product takes fewer passes over the rows, and less memory.
    """
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows * torch.where(length < 1e-12, 0.0, 1 / length.clamp(min=1e-12))
