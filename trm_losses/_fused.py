"""When derivatives that are written out may stand in for autograd's."""

from __future__ import annotations

import torch


def may_fuse() -> bool:
    """Neither while ``torch.compile`` traces, which fuses by itself, nor inside ``torch.func``, which transforms operators."""
    if torch.compiler.is_compiling():
        return False
    return not getattr(torch._C, "_are_functorch_transforms_active", bool)()
