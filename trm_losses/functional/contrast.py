"""Five contrasts between regions, class texts and class prototypes."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .._checks import signed
from .._distributed import Joined, count_per_rank, gather_rows, with_gradients_of_ranks
from .._entries import Entries, take
from .._precision import full_precision, unit_rows, upcast
from ._log_sums import MASKED, log_sum_of_others, rows_against_classes
from ._shapes import check_shapes, weighted_mean

_CONTRASTS = ("region_region", "region_text", "text_region", "region_prototype", "text_prototype")


def multimodal_contrastive(
    regions: Tensor | Entries,
    text: Tensor,
    targets: Tensor,
    *,
    prototypes: Tensor | None = None,
    seen: Tensor | None = None,
    weights: Tensor | None = None,
    temperature: float = 0.07,
    temperature_region: float = 0.1,
    anchor_threshold: float = 0.9,
    only: Collection[str] | None = None,
    group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    r"""Five contrasts between regions, class texts and class prototypes.

    The anchors are the entries (b, c) whose target is at least ``anchor_threshold``: known positives, and
    pseudo-positives sure enough. With f the unit region, t the unit text and P the unit prototype of a class:

    * ``region_region``: f against the regions of all anchors but itself, positives are the same class in other images;
    * ``region_text``: f against all texts; ``text_region``: t of a class present in the batch against all anchors;
    * ``region_prototype``, ``text_prototype``: f, and t of every seen class, against the prototypes of seen classes
      (which get no gradient); both 0 without prototypes.

    Each term is the mean of its :math:`-\log` softmax rows (``region_region`` over anchors with a positive,
    ``text_region`` first within a class); a weight multiplies its row and does not enter the count. Many anchors are
    compared a block of rows at a time (not under ``torch.compile``), so that memory grows with their number, not its square.

    Args:
        regions: (B, C, D), or :class:`Entries` that hold the anchors. text: (C, D).
        targets: (B, C).
        prototypes: (C, D). seen: (C,) bool, the classes whose prototype holds data; None for all.
        weights: (B, C) factors of the anchors.
        temperature: of all terms but ``region_region``, which has ``temperature_region``.
        anchor_threshold: least target of an anchor.
        only: the names of the terms to compute, None for all; the others are 0.
        group: process group; anchors of all ranks are contrasted.

    Returns:
        The five scalars by name. Without anchors they are 0 and still attached to the inputs; only ``text_prototype`` asks
        for no anchor.

    Reference: contrast within and across modalities is the paper's; this form is ours, after SADCL and SupCon.
    """
    check_shapes(
        "multimodal_contrastive",
        regions=(regions.features, "n D") if isinstance(regions, Entries) else (regions, "B C D"),
        text=(text, "C D"),
        targets=(targets, "B C"),
        prototypes=(prototypes, "C D?"),
        seen=(seen, "C?"),
        weights=(weights, "B C?"),
    )
    targets = signed(targets)
    with full_precision(text):
        only = _CONTRASTS if only is None else only
        texts = unit_rows(upcast(text))
        rows = _anchors(regions, targets >= anchor_threshold, weights)
        dtype = torch.promote_types(rows.features.dtype, texts.dtype)
        texts = texts.to(dtype)
        rows = _Anchors(rows.features.to(dtype), rows.own, rows.valid, rows.weight.to(dtype))

        # Keeps a batch without anchors on the graph, as a sum of no elements.
        zero = rows.features.flatten()[:0].sum() + texts.flatten()[:0].sum()
        terms = dict.fromkeys(_CONTRASTS, zero)

        if "region_region" in only or "text_region" in only:  # both read the anchors of all ranks
            keys, shared = _keys(rows, len(texts), group), {}
            if "region_region" in only:
                shared["region_region"] = _region_region(rows, keys, temperature_region, group)
            if "text_region" in only:
                shared["text_region"] = _text_region(rows, keys, texts, temperature, group)
            losses = with_gradients_of_ranks([zero + term for term in shared.values()], rows.features, keys.joined, group)
            terms.update(zip(shared, losses, strict=True))
        if "region_text" in only:
            loss = rows_against_classes(rows.features, texts, rows.own, temperature)
            count = count_per_rank(rows.valid.sum().to(texts.dtype), group)
            terms["region_text"] = zero + weighted_mean(loss, rows.weight, count)
        if prototypes is not None and ("region_prototype" in only or "text_prototype" in only):
            fixed = unit_rows(upcast(prototypes.detach())).to(texts.dtype)
            known = torch.ones(len(texts), dtype=torch.bool, device=fixed.device) if seen is None else seen
            if "region_prototype" in only:
                loss = rows_against_classes(rows.features, fixed, rows.own, temperature, known)
                counted = rows.valid & known[rows.own]
                count = count_per_rank(counted.sum().to(texts.dtype), group)
                terms["region_prototype"] = zero + weighted_mean(loss, rows.weight * counted, count)
            if "text_prototype" in only:
                # Classes not seen have no row and stand in no denominator; compiled code has them for static shapes.
                every = torch.arange(len(texts), device=fixed.device)
                every = every if torch.compiler.is_compiling() else every[known]
                loss = rows_against_classes(texts[every], fixed, every, temperature, known)
                mass = known[every].to(texts.dtype)
                terms["text_prototype"] = zero + weighted_mean(loss, mass, mass.sum())
        return terms


class _Anchors(NamedTuple):
    """The n entries of a batch that are contrasted; when compiling every entry, for static shapes."""

    features: Tensor  # (n, D), unit
    own: Tensor  # (n,) the class
    valid: Tensor  # (n,) False where the entry is no anchor
    weight: Tensor  # (n,) 0 there


class _Keys(NamedTuple):
    """The anchors of all ranks, for the rows of this one to be contrasted with."""

    joined: Joined  # (M, D)
    own: Tensor  # (M,)
    valid: Tensor | None  # (M,), None where all are
    mass: Tensor  # (C,) how many are valid of each class


def _anchors(regions: Tensor | Entries, is_anchor: Tensor, weights: Tensor | None) -> _Anchors:
    batch, classes = is_anchor.shape
    own = torch.arange(classes, device=is_anchor.device).expand(batch, classes)
    every = None if isinstance(regions, Entries) or not torch.compiler.is_compiling() else regions

    def chosen(entries: Tensor) -> Tensor:
        return entries[is_anchor] if every is None else entries.flatten(0, 1)

    # What an entry that is no anchor holds must not matter, not even NaN.
    features = take(regions, is_anchor) if every is None else torch.where(is_anchor[..., None], every, 0.0).flatten(0, 1)
    features = unit_rows(upcast(features))
    valid = chosen(is_anchor)
    weight = valid.to(features.dtype) if weights is None else valid * upcast(chosen(weights))
    return _Anchors(features, chosen(own), valid, weight)


def _keys(rows: _Anchors, classes: int, group: ProcessGroup | None) -> _Keys:
    joined = gather_rows(rows.features, group)
    own, valid = rows.own, rows.valid if torch.compiler.is_compiling() else None
    if group is not None:
        own, valid = gather_rows(torch.stack([own, rows.valid.to(own.dtype)], dim=1), group).rows.unbind(dim=1)
        valid = valid.bool() & joined.real
    one = joined.rows.new_ones(len(own)) if valid is None else valid.to(joined.rows.dtype)
    return _Keys(joined, own, valid, one.new_zeros(classes).index_add(0, own, one))


def _region_region(rows: _Anchors, keys: _Keys, temperature: float, group: ProcessGroup | None) -> Tensor:
    """Each anchor against all others: the mean of its log-sum-exp less its mean similarity with those of its class."""
    features, own = rows.features, rows.own
    log_sum = log_sum_of_others(features, keys.joined.rows, keys.valid, keys.joined.first, temperature)
    partners = keys.mass[own] - 1
    paired = rows.valid & (partners > 0)
    count = count_per_rank(paired.sum().to(features.dtype), group)
    weight = torch.where(paired & (rows.weight > 0), rows.weight, 0.0) / torch.where(count > 0, count, 1.0)
    share = weight / partners.clamp(min=1)

    # The similarities with those of a class, summed over its anchors, are one product of two sums: no pair is listed.
    key_own, classes = keys.own, len(keys.mass)
    if classes > 2 * len(key_own) and not torch.compiler.is_compiling():  # only the classes present
        there, key_own = torch.unique(key_own, return_inverse=True)
        own, classes = key_own[keys.joined.first : keys.joined.first + len(own)], len(there)
    nothing = features.new_zeros(classes, features.shape[1])
    key_features = keys.joined.rows if keys.valid is None else keys.joined.rows * keys.valid[:, None]
    pull = (nothing.index_add(0, own, share[:, None] * features) * nothing.index_add(0, key_own, key_features)).sum()
    # That of an anchor with itself is in it too; a unit vector keeps its length, so it has no gradient.
    pull = pull - (share * torch.linalg.vector_norm(features.detach(), dim=1).square()).sum()
    loss: Tensor = (weight * log_sum).sum() - pull / temperature
    return loss


def _text_region(rows: _Anchors, keys: _Keys, texts: Tensor, temperature: float, group: ProcessGroup | None) -> Tensor:
    """Each text of a class present against all anchors."""
    own = rows.own
    if len(texts) > len(own) and not torch.compiler.is_compiling():  # only the texts of classes present are anchors
        there, own = torch.unique(own, return_inverse=True)
        texts = texts[there]
    logits = texts @ keys.joined.rows.T / temperature  # (classes, all anchors)
    if keys.valid is not None:
        logits = logits.masked_fill(~keys.valid, MASKED)
    log_sum = torch.logsumexp(logits, dim=1) if len(keys.own) else logits.sum(dim=1)
    loss = log_sum[own] - (rows.features * texts[own]).sum(dim=1) / temperature
    present = (keys.mass > 0).sum().to(texts.dtype)
    if group is not None:
        present = present / torch.distributed.get_world_size(group)
    return weighted_mean(loss, rows.weight / keys.mass[rows.own].clamp(min=1), present)
