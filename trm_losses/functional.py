"""The equations of the package as pure functions; every Module is a thin shell over one of them.

Letters: B batch, C classes, D joint embedding width, N tokens, H heads. Labels: 1 present, 0 absent, values between
are soft, -1 unknown. Losses and similarities of half-precision inputs are computed in float32, with autocast off, and the
result is float32. Shapes, types and devices that do not fit are refused by name; values are the caller's, and are checked by
the Modules.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from ._asymmetric import Focus, asymmetric_sum
from ._checks import Dims, signed
from ._contrast import MASKED as _MASKED
from ._contrast import SAFE_TEMPERATURE, log_sum_of_others, unit_rows
from ._distributed import Joined, count_per_rank, gather_rows, sum_per_rank, with_gradients_of_ranks
from ._entries import Entries, take
from ._fused import may_fuse
from ._precision import full_precision as full_precision

__all__ = [
    "Entries",
    "Reduction",
    "Similarities",
    "asymmetric_loss",
    "calibrate",
    "class_sums",
    "multi_label_contrastive",
    "multimodal_contrastive",
    "match_prior",
    "neighbour_scores",
    "prototype_similarities",
    "region_attention",
    "region_distillation",
    "saliency_map",
    "text_region_logits",
    "update_prototypes",
]

Reduction = Literal["none", "mean", "sum"]


def upcast(tensor: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def unit(tensor: Tensor) -> Tensor:
    """Vectors of length one along the last axis, in at least float32 (a zero vector stays zero)."""
    return unit_rows(upcast(tensor))


# Arguments that are masks, and others that need not be floats.
_MASKS = ("free", "known", "seen", "key_padding_mask")
_COUNTED = ("targets", "count", *_MASKS)


def _check_shapes(owner: str, **given: tuple[Tensor | None, str]) -> None:
    """Refuse what does not fit, by name; "..." is any shape, the same wherever it stands, and "?" what may be left out."""
    dims, shape = Dims(owner), None
    for name, (tensor, letters) in given.items():
        if tensor is None and letters.endswith("?"):
            continue
        if letters == "..." and isinstance(tensor, Tensor):
            shape = " ".join(f"n{i}" for i in range(tensor.ndim)) if shape is None else shape
            letters = shape
        dims.check(name, tensor, letters.removesuffix("?"), floating=name not in _COUNTED)
        if name in _MASKS and tensor is not None and tensor.dtype != torch.bool:
            raise TypeError(f"{owner}: {name} must be bool, got {tensor.dtype}")


def _broadcast(owner: str, weights: Tensor, x: Tensor) -> Tensor:
    """Weights in the type and the shape of ``x``."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"{owner}: weights must be a torch.Tensor, got {type(weights).__name__}")
    pairs = zip(reversed(weights.shape), reversed(x.shape), strict=False)
    if weights.ndim > x.ndim or any(n not in (1, m) for n, m in pairs):
        raise ValueError(f"{owner}: weights must broadcast to shape {tuple(x.shape)}, got {tuple(weights.shape)}")
    return weights.to(x.dtype).expand_as(x)


def asymmetric_loss(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    gamma_pos: float = 1.0,
    gamma_neg: float = 2.0,
    margin: float = 0.05,
    detach_focus: bool = False,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Asymmetric loss over known labels, from logits.

    .. math:: \ell = -y (1-p)^{\gamma_+} \log p - (1-y)\, q^{\gamma_-} \log(1-q),\quad p=\sigma(x),\ q=\max(p-\delta, 0)

    Entries with a soft label (0 < y < 1) take plain cross-entropy (no focus, no margin), because focusing moves the
    minimum away from p = y. With both gammas and the margin at 0 this is binary cross-entropy on the known entries.
    Logarithms are taken from logits, so that a confidently wrong positive keeps its gradient.

    Args:
        logits: (B, C), or any shape shared with ``targets``.
        targets: 1, 0, between, or -1 for unknown: those give 0 and no gradient.
        weights: a factor for each entry, broadcast; the mean still divides by the number of known entries.
        gamma_pos, gamma_neg: focusing exponents of present and absent labels.
        margin: the probability shift :math:`\delta` of absent labels.
        detach_focus: no gradient through the focusing factors.
        reduction: ``"mean"`` over known entries, ``"sum"``, or ``"none"`` (keeps the shape, 0 at unknown entries).
        group: process group over which ``"mean"`` counts the known entries, and whose average ``"sum"`` makes a sum.

    Reference: ASL (Ridnik et al., ICCV 2021), with the settings of DualCoOp; the rule for soft labels is ours.
    """
    _check_shapes("asymmetric_loss", logits=(logits, "..."), targets=(targets, "..."))
    targets = signed(targets)
    with full_precision(logits):
        x = upcast(logits)
        w = None if weights is None else _broadcast("asymmetric_loss", weights, x)
        focus = Focus(gamma_pos, gamma_neg, margin, detach_focus)
        if reduction == "none":
            return _asymmetric_entries(x, targets, w, focus)
        if not may_fuse() or targets.requires_grad or (w is not None and w.requires_grad):
            total, known = _asymmetric_entries(x, targets, w, focus).sum(), (targets >= 0).sum().to(x.dtype)
        else:
            total, known = asymmetric_sum(x, targets, w, focus, lambda x, y, w: _asymmetric_entries(x, y, w, focus).sum())
        if reduction == "sum":
            return sum_per_rank(total, group)
        count = count_per_rank(known, group)
        # Not clamped at 1: a rank's share of the joined count may be a fraction. Nothing known anywhere: 0 / 1.
        return total / torch.where(count > 0, count, 1.0)


def _asymmetric_entries(logits: Tensor, targets: Tensor, weights: Tensor | None, focus: Focus) -> Tensor:
    """The loss of each entry in differentiable operators, 0 at unknown ones: the readable form, and the traceable one."""
    gamma_pos, gamma_neg, margin, detach = focus
    known = targets >= 0
    # The input is masked, not only the result: an infinite logit at an unknown entry would give 0 * inf = NaN.
    x = torch.where(known, logits, 0.0)
    y = torch.where(known, targets.to(x.dtype), 0.0)
    log_p, log_not_p = F.logsigmoid(x), F.logsigmoid(-x)
    present, absent = -log_p, -log_not_p
    if gamma_pos:
        power = torch.exp(gamma_pos * log_not_p)
        present = (power.detach() if detach else power) * present
    if margin:
        shifted = (torch.sigmoid(x) - margin).clamp(min=0)
        absent = -torch.log((torch.sigmoid(-x) + margin).clamp(max=1))
        if gamma_neg:
            # 0 ** gamma has no finite slope for gamma < 1; below the margin the loss is 0 whatever the focus.
            power = torch.where(shifted > 0, shifted, 1.0) ** gamma_neg
            absent = (power.detach() if detach else power) * absent
    elif gamma_neg:
        power = torch.exp(gamma_neg * log_p)
        absent = (power.detach() if detach else power) * absent
    loss = y * present + (1 - y) * absent
    soft = (y > 0) & (y < 1)
    loss = torch.where(soft, -y * log_p - (1 - y) * log_not_p, loss)
    loss = torch.where(known, loss, 0.0)
    return loss if weights is None else loss * torch.where(known, weights, 0.0)


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
    _check_shapes("text_region_logits", regions=(regions, "B C D"), text=(text, "C D"), bias=(bias, "C?"))
    with full_precision(text):
        r = upcast(regions)
        logits = scale * torch.einsum("bcd,cd->bc", r, unit(text).to(r.dtype))
        return logits if bias is None else logits - bias


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

    The queries are the same for every image, so query and key projections of a head fold into C vectors of width D
    where that is cheaper than projecting every token.

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
    _check_shapes(
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
    return logits.masked_fill(padded, _MASKED).softmax(dim=-1).masked_fill(padded, 0.0)


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


def region_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor | None = None,
    *,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""The region head teaches the query head, over the classes of an image:

    .. math:: L = \frac{T^2}{B} \sum_b \mathrm{KL}(\mathrm{softmax}(\ell^r_b / T)\,\|\,\mathrm{softmax}(\ell^q_b / T))

    Args:
        student_logits, teacher_logits: (B, C), without the bias of the classes. The teacher gets no gradient.
        weights: (B,) a factor for each image.
        temperature: T.
        reduction: ``"mean"`` over images, ``"sum"``, or ``"none"`` -> (B,).
        group: process group over which ``"mean"`` counts the images, and whose average ``"sum"`` makes a sum.

    Reference: region teaches query is the patent's; the form over classes is what the authors' other code suggests.
    """
    _check_shapes(
        "region_distillation",
        student_logits=(student_logits, "B C"),
        teacher_logits=(teacher_logits, "B C"),
        weights=(weights, "B?"),
    )
    with full_precision(student_logits):
        student, teacher = upcast(student_logits) / temperature, upcast(teacher_logits.detach()) / temperature
        divergence = F.kl_div(
            F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1), log_target=True, reduction="none"
        )
        loss = temperature**2 * divergence.sum(dim=-1)
        if weights is not None:
            loss = loss * upcast(weights)
        if reduction == "none":
            return loss
        if reduction == "sum":
            return sum_per_rank(loss.sum(), group)
        count = count_per_rank(loss.new_full((), loss.shape[0]), group)
        return loss.sum() / torch.where(count > 0, count, 1.0)




# Largest block of intermediate values held at once, in elements (64 MiB of float32).
_BLOCK = 1 << 24


def _rows_against_classes(
    rows: Tensor, keys: Tensor, positive: Tensor, temperature: float, allowed: Tensor | None = None
) -> Tensor:
    """-log softmax over the classes of the keys at each row's own class; classes not allowed leave the denominator."""
    if may_fuse() and len(rows) > _TILE[0] and not _needs_gradient(rows, keys):
        own = torch.einsum("nd,nd->n", rows, keys[positive])
        return _log_sum_over_classes(rows, rows.new_ones(len(rows)), keys, allowed, temperature) - own / temperature
    if len(keys) > len(rows):  # a block of rows at a time
        own = (rows * keys[positive]).sum(dim=1) / temperature
        return log_sum_of_others(rows, keys, allowed, None, temperature) - own
    step = max(1, _BLOCK // max(1, len(keys)))
    if not may_fuse() or len(rows) <= step:
        return _plain_against_classes(rows, keys, positive, temperature, allowed)
    parts = []
    for part, own in zip(torch.split(rows, step), torch.split(positive, step), strict=True):
        given = (part, keys, own, temperature, allowed)
        parts.append(checkpoint(_plain_against_classes, *given, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(parts)


def _plain_against_classes(
    rows: Tensor, keys: Tensor, positive: Tensor, temperature: float, allowed: Tensor | None
) -> Tensor:
    """The same with all rows at once, as the equation reads."""
    logits = rows @ keys.T / temperature
    if allowed is not None:
        logits = logits.masked_fill(~allowed, _MASKED)
    return torch.logsumexp(logits, dim=1) - logits.gather(1, positive[:, None]).squeeze(1)


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


# Rows and classes whose similarities are held at once where nothing is kept of them (2 MiB of float32).
_TILE = 512, 1024


def _log_sum_over_classes(
    rows: Tensor, lengths: Tensor, keys: Tensor, allowed: Tensor | None, temperature: float
) -> Tensor:
    """(n,) the log of the sum over the classes allowed of exp(row . key / (length temperature)), the cosines at most 1.

    Tile by tile where there is no gradient, each formed in cache and dropped: what is left to pay is the product itself.
    """
    scale = (lengths * temperature)[:, None]
    if _needs_gradient(rows, lengths, keys) or not may_fuse() or temperature < SAFE_TEMPERATURE:
        step = max(1, _BLOCK // max(1, len(keys)))
        # Without a loop where it fits, whose length a compiled graph would fix to this batch size.
        whole = len(rows) <= step
        pairs = [(rows, scale)] if whole else zip(torch.split(rows, step), torch.split(scale, step), strict=True)
        parts = []
        for part, by in pairs:
            logits = part @ keys.T / by
            parts.append(torch.logsumexp(logits if allowed is None else logits.masked_fill(~allowed, _MASKED), dim=1))
        return torch.cat(parts)
    keys = keys if allowed is None else keys[allowed]
    sums = rows.new_zeros(len(rows))
    for total, part, by in zip(*(torch.split(x, _TILE[0]) for x in (sums, rows, scale)), strict=True):
        part = part / by
        for some in torch.split(keys, _TILE[1]):
            total += (part @ some.T).exp_().sum(dim=1)
    return torch.where(sums > 0, sums, 1.0).log()  # where no class is allowed nobody reads it


def _weighted_mean(loss: Tensor, weights: Tensor, count: Tensor) -> Tensor:
    """sum(weights * loss) / count, the loss masked where its weight is 0, and 0 where nothing counts."""
    return (torch.where(weights > 0, loss, 0.0) * weights).sum() / torch.where(count > 0, count, 1.0)


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
    _check_shapes(
        "multimodal_contrastive",
        **({} if isinstance(regions, Entries) else {"regions": (regions, "B C D")}),
        text=(text, "C D"),
        targets=(targets, "B C"),
        prototypes=(prototypes, "C D?"),
        seen=(seen, "C?"),
        weights=(weights, "B C?"),
    )
    targets = signed(targets)
    with full_precision(regions.features if isinstance(regions, Entries) else regions):
        only = _CONTRASTS if only is None else only
        texts = unit_rows(upcast(text))
        rows = _anchors(regions, targets >= anchor_threshold, weights)
        dtype = torch.promote_types(rows.features.dtype, texts.dtype)
        texts = texts.to(dtype)
        rows = rows._replace(features=rows.features.to(dtype), weight=rows.weight.to(dtype))

        # Keeps a batch without anchors on the graph, as a sum of no elements.
        zero = rows.features.flatten()[:0].sum() + texts.flatten()[:0].sum()
        terms = dict.fromkeys(_CONTRASTS, zero)

        shared: dict[str, Tensor] = {}  # terms that read the anchors of all ranks
        if "region_region" in only or "text_region" in only:
            keys = _keys(rows, len(texts), group)
        if "region_region" in only:
            shared["region_region"] = _region_region(rows, keys, temperature_region, group)
        if "text_region" in only:
            shared["text_region"] = _text_region(rows, keys, texts, temperature, group)
        if shared:
            losses = with_gradients_of_ranks([zero + term for term in shared.values()], rows.features, keys.joined, group)
            terms.update(zip(shared, losses, strict=True))
        if "region_text" in only:
            loss = _rows_against_classes(rows.features, texts, rows.own, temperature)
            count = count_per_rank(rows.valid.sum().to(texts.dtype), group)
            terms["region_text"] = zero + _weighted_mean(loss, rows.weight, count)
        if prototypes is not None and ("region_prototype" in only or "text_prototype" in only):
            fixed = unit_rows(upcast(prototypes.detach())).to(texts.dtype)
            known = torch.ones(len(texts), dtype=torch.bool, device=fixed.device) if seen is None else seen
            if "region_prototype" in only:
                loss = _rows_against_classes(rows.features, fixed, rows.own, temperature, known)
                counted = rows.valid & known[rows.own]
                count = count_per_rank(counted.sum().to(texts.dtype), group)
                terms["region_prototype"] = zero + _weighted_mean(loss, rows.weight * counted, count)
            if "text_prototype" in only:
                # Classes not seen have no row and stand in no denominator; compiled code has them for static shapes.
                every = torch.arange(len(texts), device=fixed.device)
                every = every if torch.compiler.is_compiling() else every[known]
                loss = _rows_against_classes(texts[every], fixed, every, temperature, known)
                mass = known[every].to(texts.dtype)
                terms["text_prototype"] = zero + _weighted_mean(loss, mass, mass.sum())
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
    every = torch.compiler.is_compiling() and isinstance(regions, Tensor)

    def chosen(entries: Tensor) -> Tensor:
        return entries.flatten(0, 1) if every else entries[is_anchor]

    if every and isinstance(regions, Tensor):  # what an entry that is no anchor holds must not matter, not even NaN
        features = torch.where(is_anchor[..., None], regions, 0.0).flatten(0, 1)
    else:
        features = take(regions, is_anchor)
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
    if classes > len(key_own) and not torch.compiler.is_compiling():  # only the classes present
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
        logits = logits.masked_fill(~keys.valid, _MASKED)
    log_sum = torch.logsumexp(logits, dim=1) if len(keys.own) else logits.sum(dim=1)
    loss = log_sum[own] - (rows.features * texts[own]).sum(dim=1) / temperature
    present = (keys.mass > 0).sum().to(texts.dtype)
    if group is not None:
        present = present / torch.distributed.get_world_size(group)
    return _weighted_mean(loss, rows.weight / keys.mass[rows.own].clamp(min=1), present)


def multi_label_contrastive(
    features: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    temperature: float = 0.1,
    anchor_threshold: float = 0.9,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Supervised contrast of images that carry any number of labels, from one feature each.

    .. math:: L = -\operatorname{mean}_{(b,c)} \frac{1}{|P_{bc}|} \sum_{p \in P_{bc}}
        \log \frac{\exp(f_b \cdot f_p / \tau)}{\sum_{a \neq b} \exp(f_b \cdot f_a / \tau)}

    Every positive label (b, c) is an anchor; its positives :math:`P_{bc}` are the other images with class c, and the
    denominator runs over all other images with a positive label, each once. Labels without a partner are left out of the
    mean. Where each image has exactly one label this is SupCon. Unknown and absent labels are no anchors; an image without
    a positive label takes no part.

    Args:
        features: (B, D). targets: (B, C).
        weights: (B, C) factors of the anchors, which do not enter the count.
        temperature: :math:`\tau`. anchor_threshold: least target of an anchor.
        group: process group; images of all ranks are contrasted.

    Returns:
        A scalar; without a pair it is 0 and still attached to the features.

    Reference: our choice, after MulSupCon (Zhang and Wu, AAAI 2024) and SupCon (Khosla et al., NeurIPS 2020).
    """
    _check_shapes("multi_label_contrastive", features=(features, "B D"), targets=(targets, "B C"), weights=(weights, "B C?"))
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
        return with_gradients_of_ranks([zero + _weighted_mean(loss, row_weight * paired, count)], f, joined, group)[0]


def class_sums(features: Tensor | Entries, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sums of unit features by class: (B, C, D) and (B, C) -> sums (C, D) and mass (C,).

    Entries of weight 0 take no part, whatever they hold; :class:`Entries` need hold the others alone.
    """
    if not isinstance(features, Entries):
        _check_shapes("class_sums", features=(features, "B C D"), weights=(weights, "B C"))
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
    r"""One step of the prototypes towards the class means of a batch.

    .. math:: P_c \leftarrow \mathrm{normalise}(m_c P_c + (1-m_c)\,\bar z_c),\quad m_c = \min(m, n_c / (n_c + 1)),
        \quad n_c \leftarrow n_c + 1

    so the first update of a class is its normalised mean. Classes without mass stay as they are.

    Args:
        prototypes: (C, D) unit vectors. count: (C,) updates so far, integer.
        sums, mass: (C, D) and (C,) as :func:`class_sums` gives them, summed over ranks first where there are several.
        momentum: m.

    Returns:
        The new prototypes and counts; the arguments are not written to.

    Reference: prototypes in a memory block are the paper's; the running mean that starts from data is our choice.
    """
    _check_shapes(
        "update_prototypes", prototypes=(prototypes, "C D"), count=(count, "C"), sums=(sums, "C D"), mass=(mass, "C")
    )
    has = mass > 0
    mean = sums / torch.where(has, mass, 1.0)[:, None]
    n = count.to(prototypes.dtype)
    m = (n / (n + 1)).clamp(max=momentum)[:, None]
    moved = F.normalize(m * prototypes + (1 - m) * mean.to(prototypes.dtype), dim=-1)
    return torch.where(has[:, None], moved, prototypes), count + has


class Similarities(NamedTuple):
    """How each region relates to the prototypes, all (B, C): intra-class and inter-class, same and cross modality."""

    intra_visual: Tensor
    intra_text: Tensor
    inter_visual: Tensor
    inter_text: Tensor


def intra_similarities(
    features: Tensor, visual: Tensor, text: Tensor, *, first: int = 0
) -> tuple[Tensor, Tensor]:
    """The intra-class similarities of :func:`prototype_similarities`: visual and text, each (B, C)."""
    with full_precision(text):
        z = upcast(features)
        norm = _length(z)
        return _own_cosine(z, norm, visual, first), _own_cosine(z, norm, text, first)


def _length(regions: Tensor) -> Tensor:
    """(B, C) length of each region, at least 1e-12."""
    length: Tensor = torch.linalg.vector_norm(regions, dim=-1).clamp(min=1e-12)
    return length


def _own_cosine(features: Tensor, norm: Tensor, prototypes: Tensor, first: int) -> Tensor:
    """(B, C) cosine of each region with the prototype of its class."""
    own = upcast(prototypes[first : first + norm.shape[1]]).to(norm.dtype)
    length = torch.linalg.vector_norm(own, dim=-1).clamp(min=1e-12)
    return torch.einsum("bcd,cd->bc", features, own).div(length).div(norm)


def _inter_class(
    features: Tensor, norm: Tensor, prototypes: Tensor, temperature: float, seen: Tensor, first: int
) -> Tensor:
    """softmax over the seen classes of region-prototype similarities, at each region's own class."""
    keys = unit(prototypes).to(norm.dtype)
    log_sum = _log_sum_over_classes(features.flatten(0, 1), norm.flatten(), keys, seen, temperature).view_as(norm)
    own = _own_cosine(features, norm, prototypes, first) / temperature
    return torch.exp(own - log_sum).clamp(max=1) * seen[first : first + norm.shape[1]]


def prototype_similarities(
    features: Tensor,
    visual: Tensor,
    text: Tensor,
    *,
    seen: Tensor | None = None,
    temperature_visual: float = 0.07,
    temperature_text: float = 0.02,
    first: int = 0,
) -> Similarities:
    r"""The four relations from which unknown labels are estimated.

    * intra-class: :math:`s^v = \hat z_{bc} \cdot P^v_c` and :math:`s^t = \hat z_{bc} \cdot P^t_c`
      ("does the region found for class c look like class c");
    * inter-class: :math:`\pi^x = \mathrm{softmax}_{c'}(\hat z_{bc} \cdot P^x_{c'} / \tau_x)[c]`
      ("does it look more like c than like any other class"); the visual one runs over seen classes and is 0 elsewhere.

    Args:
        features: (B, C, D). visual, text: prototypes (C, D).
        seen: (C,) bool, None for all.
        temperature_visual, temperature_text: :math:`\tau_v, \tau_t`; tie the latter to the model, 2 / logit scale.
        first: where ``features`` are of a chunk of the classes, (B, c, D), the class with which it begins.

    Reference: intra- and inter-class relations in one modality and across the two are the paper's; the formulas ours.
    """
    _check_shapes(
        "prototype_similarities",
        features=(features, "B c D"),
        visual=(visual, "C D"),
        text=(text, "C D"),
        seen=(seen, "C?"),
    )
    with full_precision(text):
        z = upcast(features)
        norm = _length(z)
        every = torch.ones(len(text), dtype=torch.bool, device=text.device)
        s_v, s_t = intra_similarities(z, visual, text, first=first)
        inter_v = _inter_class(z, norm, visual, temperature_visual, every if seen is None else seen, first)
        inter_t = _inter_class(z, norm, text, temperature_text, every, first)
        return Similarities(s_v, s_t, inter_v, inter_t)


def calibrate(
    similarity: Tensor, mean_present: Tensor, mean_absent: Tensor, gap: Tensor, *, steepness: float = 6.0
) -> Tensor:
    r"""A similarity as a probability: :math:`\sigma(k (s - \frac12(\mu_+ + \mu_-)) / \mathrm{gap})`.

    Args:
        similarity: (B, C). mean_present, mean_absent, gap: (C,) the mean similarity of known present and known absent
            entries of a class, and their distance. steepness: k.

    Reference: our choice, because one fixed threshold cannot fit all classes.
    """
    _check_shapes(
        "calibrate",
        similarity=(similarity, "B C"),
        mean_present=(mean_present, "C"),
        mean_absent=(mean_absent, "C"),
        gap=(gap, "C"),
    )
    return torch.sigmoid(steepness * (similarity - 0.5 * (mean_present + mean_absent)) / gap)


@torch.no_grad()
def match_prior(probabilities: Tensor, prior: Tensor, free: Tensor) -> Tensor:
    r"""Probabilities moved to a class prior: :math:`\sigma(\mathrm{logit}\, q_{ic} + b_c)` with one shift for each class.

    Training without known absent labels leaves probabilities at a level of its own; their order is kept.

    Args:
        probabilities: (N, C), known labels among them. prior: (C,) the mean that a class shall have over its N entries, as near
            as its free entries can bring it. free: (N, C) bool, entries that are moved.

    Returns:
        (N, C) in float32 or the probabilities' own precision; what is not free is as it was.

    Reference: our choice.
    """
    _check_shapes("match_prior", probabilities=(probabilities, "N C"), prior=(prior, "C"), free=(free, "N C"))
    with full_precision(probabilities):
        q = upcast(probabilities)
        least = torch.finfo(q.dtype).tiny  # a probability of 0 has a logit too, and keeps its place below all others
        logits = q.clamp(min=least).log() - (1 - q).clamp(min=least).log()
        wanted = prior * len(q) - (q * ~free).sum(dim=0)
        low, high = (logits.new_full((logits.shape[1],), sign * (8.0 - 2 * math.log(least))) for sign in (-1.0, 1.0))
        for _ in range(60):  # each halves the interval: the sum grows with the shift
            middle = 0.5 * (low + high)
            short = (torch.sigmoid(logits + middle) * free).sum(dim=0) < wanted
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        return torch.where(free, torch.sigmoid(logits + high), q)


@torch.no_grad()
def neighbour_scores(
    features: Tensor,
    scores: Tensor,
    *,
    known: Tensor | None = None,
    neighbours: int = 20,
    temperature: float = 0.05,
    steps: int = 1,
) -> Tensor:
    r"""What the images whose region of a class looks most alike say about that class: label propagation over regions.

    .. math:: q_{ic} = \sum_{j \in \mathcal N_{ic}} \mathrm{softmax}_j(\hat r_{ic} \cdot \hat r_{jc} / \tau)\, s_{jc}

    with :math:`\mathcal N_{ic}` the k images other than i whose regions of class c are the most similar. With several steps what
    came out is passed on, and known entries say what they said at first. Classes and blocks of images are taken in turn, so
    memory grows with the number of images, not with its square.

    Args:
        features: (N, C, D) regions of N images, in any floating type. scores: (N, C), known labels or probabilities.
        known: (N, C) bool, entries that keep their score between the steps; None for no entry.
        neighbours: k; all other images where there are fewer. temperature: :math:`\tau`. steps: how often.

    Returns:
        (N, C) in float32 or the scores' own precision; a single image, which has no neighbour, keeps its score.

    Reference: our choice; inter-image relations of one class beside the paper's relations to prototypes. Passing on with known
    labels clamped is label propagation (Zhu and Ghahramani, 2002).
    """
    _check_shapes("neighbour_scores", features=(features, "N C D"), scores=(scores, "N C"), known=(known, "N C?"))
    with full_precision(features):
        scores = upcast(scores)
        images, classes = scores.shape
        k = min(neighbours, images - 1)
        if k < 1:
            return scores.clone()
        out = scores.clone()
        for c in range(classes):
            similarity, index = _nearest(unit(features[:, c]), k)
            weight = torch.softmax(similarity / temperature, dim=1).to(out.dtype)
            said = scores[:, c]
            for _ in range(steps):
                out[:, c] = (weight * said[index]).sum(dim=1)
                said = out[:, c] if known is None else torch.where(known[:, c], scores[:, c], out[:, c])
        return out


def _nearest(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(N, k) greatest products of each row of z (N, D) with other rows, and which rows they are."""
    images = len(z)
    blocks = []
    for rows in torch.split(torch.arange(images, device=z.device), max(1, _BLOCK // images)):
        similarity = z[rows] @ z.T
        similarity[rows - rows[0], rows] = -float("inf")  # nobody speaks for itself
        blocks.append(similarity.topk(k, dim=1))
    return torch.cat([block.values for block in blocks]), torch.cat([block.indices for block in blocks])
