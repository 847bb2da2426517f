"""Where half precision loses too much."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["full_precision"]

# Of torch 2.4. Autocast for Apple's GPU is of 2.5, and whatever it does not know it refuses even to switch off.
_is_available = getattr(torch.amp, "is_autocast_available", lambda device_type: device_type not in ("mps", "meta"))


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast is off on the tensor's device: exponents and sums lose too much in half precision."""
    device_type = tensor.device.type
    return torch.autocast(device_type, enabled=False) if _is_available(device_type) else nullcontext()
