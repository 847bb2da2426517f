"""Attention of category queries over image tokens, and its saliency on the grid."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import Dims
from .._precision import upcast
from ._log_sums import MASKED
from ._shapes import check_shapes


def region_attention(
    queries: Tensor,
    keys: Tensor,
    query_weight: Tensor,
    key_weight: Tensor | None,
    scale: Tensor | float,
    *,
    num_heads: int,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    r"""Attention of C queries over N tokens: :math:`A_i = \mathrm{softmax}_N(\kappa h\, q_i k_i^\top)`.

    The queries are the same for every image. So query and key projections of a head fold into C vectors of width D, if that
    is cheaper than projecting every token.

    Args:
        queries: (C, D) unit vectors. keys: (B, N, D); or (B, H, N, D / H), projected already.
        query_weight, key_weight: (D, D); rows are split over the heads. key_weight is None where the keys are projected.
        scale: :math:`\kappa`. The factor h makes up for a head's slice carrying 1/h of the product.
        num_heads: H.
        key_padding_mask: (B, N) bool, True where there is no token. An image of padding alone gives zeros.

    Returns:
        (B, H, C, N), rows sum to 1.

    Reference: cross-attention with category queries is the paper's; the start at identity weights is our choice.
    """
    check_shapes(
        "region_attention",
        queries=(queries, "C D"),
        keys=(keys, "B N D" if key_weight is not None else "B H N d"),
        query_weight=(query_weight, "D D"),
        key_weight=(key_weight, "D D?"),
        key_padding_mask=(key_padding_mask, "B N?"),
    )
    classes, width = queries.shape
    key_weight = None if key_weight is None else key_weight.to(keys.dtype)
    scale = scale * num_heads  # here, where there are no B N of each
    split = queries.to(keys.dtype) @ query_weight.to(keys.dtype).T * scale
    split = split.reshape(classes, num_heads, width // num_heads).transpose(0, 1)  # (H, C, d)
    if key_weight is not None and folds_keys(classes, keys.shape[0] * keys.shape[1], width, num_heads):
        folded = torch.bmm(split, key_weight.reshape(num_heads, width // num_heads, width))  # (H, C, D)
        logits = torch.einsum("hcd,bnd->bhcn", folded, keys)
    else:
        projected = keys if key_weight is None else project_heads(keys, key_weight, num_heads)
        logits = torch.einsum("hce,bhne->bhcn", split, projected)
    logits = upcast(logits)
    if key_padding_mask is None:
        return logits.softmax(dim=-1)
    padded = key_padding_mask[:, None, None, :]
    return logits.masked_fill(padded, MASKED).softmax(dim=-1).masked_fill(padded, 0.0)


def folds_keys(classes: int, tokens: int, width: int, num_heads: int) -> bool:
    """Whether :func:`region_attention` folds the key projection into the queries, or projects the ``tokens`` of all images.

    Folded queries cost C D^2 and products of width D for each head and token; projected tokens as much for each of them.
    """
    if torch.compiler.is_compiling():  # for any number of tokens: one graph for all batch sizes
        return classes * (num_heads - 1) <= width
    return classes * (width + (num_heads - 1) * tokens) <= tokens * width


def project_heads(tokens: Tensor, weight: Tensor, num_heads: int) -> Tensor:
    """Tokens (B, N, D) through the rows (D, D) that each head has: (B, H, N, D / H)."""
    return torch.einsum("bnd,hed->bhne", tokens, weight.reshape(num_heads, -1, tokens.shape[-1]))


def saliency_map(saliency: Tensor, grid: tuple[int, int]) -> Tensor:
    """Saliency laid out on the grid of the tokens, to be shown over the image.

    Args:
        saliency: (B, C, N). grid: rows and columns ``(H, W)`` with H * W = N, the ``.grid`` of a backbone's features.

    Returns:
        (B, C, H, W), the cells in row-major order.

    Example:
        >>> saliency_map(torch.arange(6.0).reshape(1, 1, 6), (2, 3))
        tensor([[[[0., 1., 2.],
                  [3., 4., 5.]]]])
    """
    height, width = grid
    Dims("saliency_map", N=height * width).check("saliency", saliency, "B C N", hint=f"N is the number of cells of {grid}")
    return saliency.reshape(*saliency.shape[:2], height, width)
