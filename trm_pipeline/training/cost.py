"""What a cell costs: the most memory that was held while it trained, and how much it trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

_PROC = Path("/proc/self")


def watch_memory(device: torch.device) -> Callable[[], float | None]:
    """Begin to watch; the function it gives tells the peak since then in MiB, or None where nothing can tell it.

    On cuda it is what torch allocated. Elsewhere torch keeps no account, and it is the resident peak of this process, with
    the interpreter, its libraries and the pages of cached features that were read.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device) / 2**20
    try:
        (_PROC / "clear_refs").write_text("5", encoding="utf-8")  # the kernel begins its peak again
    except OSError:
        return lambda: None
    return _resident_peak


def _resident_peak() -> float | None:
    for line in (_PROC / "status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**10
    return None


def trained_parameters(method: nn.Module) -> int:
    """Numbers that the optimiser moves, labels that are learned beside the model among them."""
    return sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad)
