"""One logit for each class, from its one region and its one text."""

from __future__ import annotations

import torch
from torch import Tensor

from .._precision import full_precision, unit, upcast
from ._shapes import check_shapes

__all__ = ["text_region_logits"]


def text_region_logits(regions: Tensor, text: Tensor, scale: Tensor | float, bias: Tensor | None = None) -> Tensor:
    r"""One logit for each class from its one region and its one text: :math:`s\, r_{bc}\cdot\hat t_c - \beta_c`.

    Args:
        regions: (B, C, D). Regions pooled from unit tokens are not longer than 1; a region spread over
            disagreeing tokens is short, which is evidence of absence, so their length is kept.
        text: (C, D), normalised here.
        scale: s.
        bias: (C,) :math:`\beta`, or None for the similarity alone (as distillation wants it).

    Returns:
        (B, C).

    Reference: the matching of one text with one region is the paper's; scale and bias are our choice.
    """
    check_shapes("text_region_logits", regions=(regions, "B C D"), text=(text, "C D"), bias=(bias, "C?"))
    with full_precision(text):
        r = upcast(regions)
        logits = scale * torch.einsum("bcd,cd->bc", r, unit(text).to(r.dtype))
        return logits if bias is None else logits - bias
