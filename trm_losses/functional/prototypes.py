"""Sums of unit features by class, and the running means of prototypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._entries import Entries, take
from .._precision import unit, upcast
from ._shapes import check_shapes


def class_sums(features: Tensor | Entries, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sums of unit features by class: (B, C, D) and (B, C) -> sums (C, D) and mass (C,).

    Entries of weight 0 take no part, whatever they hold; :class:`Entries` need hold the others alone.
    """
    if not isinstance(features, Entries):
        check_shapes("class_sums", features=(features, "B C D"), weights=(weights, "B C"))
    weights = upcast(weights)
    enters = weights > 0
    if torch.compiler.is_compiling() and isinstance(features, Tensor):  # static shapes
        entered = torch.where(enters[..., None], unit(features), 0.0)
        return torch.einsum("bc,bcd->cd", weights, entered.to(weights.dtype)), weights.sum(dim=0)
    # Few entries enter: only those are read.
    entered, weight = upcast(take(features, enters)), weights[enters]
    length = torch.linalg.vector_norm(entered, dim=1, keepdim=True).clamp(min=1e-12)
    classes = weights.shape[1]
    own = torch.arange(classes, device=weights.device).expand_as(enters)[enters]
    share = weight[:, None] / length
    entered = entered * share if torch.is_grad_enabled() else entered.mul_(share)  # what was taken is a copy
    entered = entered.to(weights.dtype)
    sums = entered.new_zeros(classes, entered.shape[1]).index_add_(0, own, entered)
    return sums, weight.new_zeros(classes).index_add_(0, own, weight)


def update_prototypes(
    prototypes: Tensor, count: Tensor, sums: Tensor, mass: Tensor, *, momentum: float = 0.99
) -> tuple[Tensor, Tensor]:
    """One step of the prototypes of :class:`trm_losses.PrototypeBank` towards the class means of a batch.

    Each count goes up by one, so the first update of a class is its normalised mean. Classes without mass stay as they are.

    Args:
        prototypes: (C, D) unit vectors. count: (C,) updates so far, integer.
        sums, mass: (C, D) and (C,) as :func:`class_sums` gives them, summed over ranks first where there are several.
        momentum: m.

    Returns:
        The new prototypes and counts; the arguments are not written to.

    Reference: prototypes in a memory block are the paper's; the running mean that starts from data is our choice.
    """
    check_shapes("update_prototypes", prototypes=(prototypes, "C D"), count=(count, "C"), sums=(sums, "C D"), mass=(mass, "C"))
    has = mass > 0
    mean = sums / torch.where(has, mass, 1.0)[:, None]
    n = count.to(prototypes.dtype)
    m = (n / (n + 1)).clamp(max=momentum)[:, None]
    moved = F.normalize(m * prototypes + (1 - m) * mean.to(prototypes.dtype), dim=-1)
    return torch.where(has[:, None], moved, prototypes), count + has
