"""Tokens shared out among classes: attention whose columns are bounded as well as its rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_number
from .._precision import full_precision, upcast
from ._log_sums import MASKED
from ._shapes import check_shapes

_LEAST = 1e-30  # of a sum that is divided by: an image of padding alone has none


def sinkhorn_attention(scores: Tensor, mass: Tensor | None = None, *, iterations: int = 100) -> Tensor:
    r"""Attention whose rows sum to 1 and whose columns have a given mass: C times Sinkhorn's transport plan.

    .. math:: A_{cn} = f_c\, e^{s_{cn}} g_n, \qquad \sum_n A_{cn} = 1, \quad \sum_c A_{cn} = C u_n

    An iteration sets the columns right and then the rows, so rows are exact. Columns come near with the number of
    iterations, and slower the more the scores differ.

    Args:
        scores: (B, C, N), minus the cost over its smoothness; they should differ by less than 80.
        mass: (B, N) u, which sums to 1 in an image, or is 0 everywhere where there is no token. None: columns are free, and
            this is the softmax over the tokens.
        iterations: 1 or more.

    Returns:
        (B, C, N).

    Example:
        >>> sinkhorn_attention(torch.tensor([[[9.0, 0.0], [9.0, 0.0]]]), torch.tensor([[0.5, 0.5]]))
        tensor([[[0.5000, 0.5000],
                 [0.5000, 0.5000]]])

    Reference: Sinkhorn's iteration (Cuturi, NeurIPS 2013).
    """
    check_shapes("sinkhorn_attention", scores=(scores, "B C N"), mass=(mass, "B N?"))
    check_number("sinkhorn_attention", "iterations", iterations, 1)
    with full_precision(scores):
        s = upcast(scores)
        if mass is None:
            return s.softmax(dim=-1)
        # The first step of the columns takes out whatever all scores of a token have in common.
        kernel = torch.exp(s - s.amax(dim=1, keepdim=True))
        wanted = scores.shape[1] * upcast(mass).to(s.dtype)[..., None]
        rows = torch.ones_like(s[..., :1])
        for _ in range(iterations):
            columns = wanted / (kernel.mT @ rows).clamp(min=_LEAST)
            rows = 1 / (kernel @ columns).clamp(min=_LEAST)
        return rows * kernel * columns.mT


@torch.no_grad()
def transport_attention(
    similarity: Tensor,
    scale: Tensor | float = 8.0,
    *,
    key_padding_mask: Tensor | None = None,
    temperature: float = 0.1,
    smoothness: float = 0.1,
    iterations: int = 100,
) -> Tensor:
    r"""KCOT: the tokens of an image shared out among its classes by optimal transport, without a gradient.

    .. math:: u = \mathrm{softmax}_n(\max_c S_{cn} / \tau), \qquad
        s_{cn} = -\frac1\epsilon \big( 1 - \mathrm{softmax}_c(\kappa S_{cn}) \big)

    A is :func:`sinkhorn_attention` of s with mass u. A softmax over tokens lets all classes look at the same tokens. Here what
    one class takes of a token is gone for the others, and each class has the same share of the whole. So a class that the
    image lacks is left with what no other class wants.

    Args:
        similarity: (B, C, N) cosines S of class texts and tokens.
        scale: :math:`\kappa`, how sharply the classes compete for a token.
        key_padding_mask: (B, N) bool, True where there is no token. An image of padding alone gives zeros.
        temperature: :math:`\tau` of the mass of tokens.
        smoothness: :math:`\epsilon`, 0.02 or more.
        iterations: of Sinkhorn; 100 bring the columns within 1e-4 of their mass for most images, two classes may need 300.

    Returns:
        (B, C, N), rows sum to 1; an image needs all its classes at once.

    Example:
        >>> S = torch.tensor([[[0.9, 0.8, 0.1], [0.8, 0.1, 0.1]]])
        >>> transport_attention(S).argmax(dim=-1)  # a softmax over tokens would give the first token to both
        tensor([[1, 0]])

    Reference: knowledge-constrained optimal transport of RAM (Tan et al., CVPR 2025). Its cost in training has a second term,
    of a frozen teacher, that is left out here. :math:`\epsilon` and the number of iterations are ours.
    """
    check_shapes("transport_attention", similarity=(similarity, "B C N"), key_padding_mask=(key_padding_mask, "B N?"))
    check_number("transport_attention", "temperature", temperature, 0, strict=True)
    check_number("transport_attention", "smoothness", smoothness, 0.02)
    with full_precision(similarity):
        s = upcast(similarity)
        best = s.amax(dim=1) / temperature
        if key_padding_mask is None:
            mass = best.softmax(dim=-1)
        else:
            mass = best.masked_fill(key_padding_mask, MASKED).softmax(dim=-1).masked_fill(key_padding_mask, 0.0)
        return sinkhorn_attention(((scale * s).softmax(dim=1) - 1) / smoothness, mass, iterations=iterations)
