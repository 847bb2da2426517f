"""Contrast of images that carry any number of labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .._checks import signed
from .._distributed import count_per_rank, gather_rows, with_gradients_of_ranks
from .._precision import full_precision, unit, upcast
from ._log_sums import log_sum_of_others
from ._shapes import check_shapes, weighted_mean


def multi_label_contrastive(
    features: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    temperature: float = 0.1,
    anchor_threshold: float = 0.9,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""The equation of :class:`trm_losses.ImageContrastiveLoss`: images that carry any number of labels, one feature each.

    Args:
        features: (B, D). targets: (B, C).
        weights: (B, C) factors of the anchors, which do not enter the count.
        temperature: :math:`\tau`. anchor_threshold: least target of an anchor.
        group: process group; images of all ranks are contrasted.

    Returns:
        A scalar; without a pair it is 0 and still attached to the features.

    Reference: our choice, after MulSupCon (Zhang and Wu, AAAI 2024) and SupCon (Khosla et al., NeurIPS 2020).
    """
    check_shapes("multi_label_contrastive", features=(features, "B D"), targets=(targets, "B C"), weights=(weights, "B C?"))
    targets = signed(targets)
    with full_precision(features):
        is_anchor = targets >= anchor_threshold
        # What an image without a positive label holds must not matter, not even NaN: 0 * NaN would reach the sums.
        features = torch.where(is_anchor.any(dim=1, keepdim=True), features, 0.0)
        f = unit(features)
        joined = gather_rows(f, group)
        keys = joined.rows
        label = is_anchor.to(f.dtype)
        key_label = gather_rows(label, group).rows
        key_valid = (key_label.sum(dim=1) > 0) & joined.real
        log_sum = log_sum_of_others(f, keys, key_valid, joined.first, temperature)
        partners = key_label.sum(dim=0) - 1
        to_class = f @ (key_label.T @ keys).T - (f * f).sum(dim=1, keepdim=True)
        paired = is_anchor & (partners > 0)
        loss = torch.where(paired, log_sum[:, None] - to_class / (temperature * partners.clamp(min=1)), 0.0)
        row_weight = label if weights is None else torch.where(is_anchor, upcast(weights), 0.0)
        count = count_per_rank(paired.sum().to(f.dtype), group)
        zero = upcast(features.flatten()[:0].sum()) + f.flatten()[:0].sum()
        return with_gradients_of_ranks([zero + weighted_mean(loss, row_weight * paired, count)], f, joined, group)[0]
