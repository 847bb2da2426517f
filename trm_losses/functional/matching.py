"""One logit for each class, from its one region and its one text."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_number
from .._precision import full_precision, unit, upcast
from ._shapes import check_shapes


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
        logits: Tensor = scale * torch.linalg.vecdot(r, unit(text).to(r.dtype))
        return logits if bias is None else logits - bias


def boost_logits(token_logits: Tensor, alpha: float = 5.0, *, key_padding_mask: Tensor | None = None) -> Tensor:
    r"""BoostLU: one logit for each class out of a logit at each token, where what speaks for a class counts :math:`\alpha` times.

    .. math:: \ell_{bc} = \mathrm{mean}_n\, z'_{bnc}, \qquad z' = \alpha z \text{ if } z > 0, \text{ else } z

    A model trained with assumed absence still finds the right places, but with too small scores. At :math:`\alpha = 1` this is
    the mean over tokens, the same as the logit of the mean token for a linear layer. It may be used in training and test, or
    in test alone.

    Args:
        token_logits: (B, N, C) z, such as a linear layer on each token.
        alpha: :math:`\alpha`; published is 5.
        key_padding_mask: (B, N) bool, True where there is no token. An image of padding alone gives zeros.

    Returns:
        (B, C).

    Example:
        >>> boost_logits(torch.tensor([[[1.0], [-3.0]]]))
        tensor([[1.]])

    Reference: Kim et al., "Bridging the Gap between Model Explanations", CVPR 2023; the mask is ours.
    """
    check_shapes("boost_logits", token_logits=(token_logits, "B N C"), key_padding_mask=(key_padding_mask, "B N?"))
    check_number("boost_logits", "alpha", alpha, 0)
    with full_precision(token_logits):
        z = upcast(token_logits)
        real: Tensor | int = max(1, z.shape[1])
        if key_padding_mask is not None:
            z = z.masked_fill(key_padding_mask[..., None], 0.0)
            real = (~key_padding_mask).sum(dim=1, keepdim=True).clamp(min=1)
        return torch.where(z > 0, alpha * z, z).sum(dim=1) / real
