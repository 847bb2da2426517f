"""The encoding, conversions into it, and what is counted of known labels."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import NUMBERS, check_number, check_targets, signed

UNKNOWN: int = -1
"""The value of an entry whose label is not known."""


def from_ternary(labels: Tensor) -> Tensor:
    r"""Convert labels written as 1 present, -1 absent, 0 unknown, the code of most published label files.

    .. math:: 1 \to 1, \quad -1 \to 0, \quad 0 \to -1

    The mapping is not its own inverse, and labels that already are in this package's encoding look just like
    ternary ones: convert once.

    Args:
        labels: integer or float tensor with the values 1, -1 and 0.

    Shape:
        labels and the result (B, C), or any other shape.

    Raises:
        TypeError: ``labels`` is not a tensor of integers or floats.
        ValueError: another value than 1, -1 or 0.

    Example:
        >>> from_ternary(torch.tensor([[1, -1, 0]]))
        tensor([[ 1,  0, -1]])

    Reference:
        The files of HCP-MLR-PL and TaI-DPT.
    """
    labels = numeric("from_ternary", "labels", labels)
    ok = (labels == 1) | (labels == -1) | (labels == 0)
    _require("from_ternary", labels, ok, "1 (present), -1 (absent) or 0 (unknown)", "the file has other codes")
    return torch.where(labels == 1, labels, -labels - 1)  # -1 becomes 0, and 0 becomes -1


def from_positive_only(labels: Tensor) -> Tensor:
    r"""Convert labels of which only the presences are known: 1 present, 0 not observed.

    .. math:: 1 \to 1, \quad 0 \to -1

    Args:
        labels: bool, integer or float tensor with the values 1 and 0.

    Shape:
        labels and the result (B, C), or any other shape.

    Raises:
        TypeError: ``labels`` is not a tensor of bools, integers or floats.
        ValueError: another value than 1 or 0.

    Example:
        >>> from_positive_only(torch.tensor([[1, 0, 0]]))
        tensor([[ 1, -1, -1]])

    Reference:
        Single positive labels (Cole et al. 2021).
    """
    labels = numeric("from_positive_only", "labels", labels)
    ok = (labels == 1) | (labels == 0)
    fix = "labels with known absences go through from_ternary"
    _require("from_positive_only", labels, ok, "1 (present) or 0 (not observed)", fix)
    return torch.where(labels == 1, labels, UNKNOWN)


def from_nan(labels: Tensor) -> Tensor:
    r"""Convert labels in which NaN stands for a missing one, as pandas writes it.

    .. math:: \text{NaN} \to -1

    Args:
        labels: NaN, or a value of this package's encoding, soft ones and -1 included.

    Shape:
        labels and the result (B, C), or any other shape.

    Raises:
        TypeError: ``labels`` is not a tensor of bools, integers or floats.
        ValueError: a value that is neither NaN nor in the encoding.

    Example:
        >>> from_nan(torch.tensor([[1.0, 0.0, float("nan")]]))
        tensor([[ 1.,  0., -1.]])
    """
    labels = numeric("from_nan", "labels", labels)
    return check_targets("from_nan", torch.where(labels.isnan(), UNKNOWN, labels), name="labels")


def known_fraction(targets: Tensor) -> float:
    """Share of the entries of ``targets`` whose label is known.

    Args:
        targets: labels in this package's encoding, soft ones allowed.

    Shape:
        targets (B, C), or any other shape with at least one entry.

    Returns:
        A number from 0 to 1.

    Raises:
        TypeError: ``targets`` is not a tensor of bools, integers or floats.
        ValueError: no entry, or a value outside the encoding.

    Example:
        >>> known_fraction(torch.tensor([[1, 0, -1, -1]]))
        0.5
    """
    targets = numeric("known_fraction", "targets", targets)
    if targets.numel() == 0:
        raise ValueError(f"known_fraction: targets must have at least one entry, got shape {tuple(targets.shape)}")
    targets = check_targets("known_fraction", targets)
    return int((targets != UNKNOWN).sum()) / targets.numel()


def class_weights(targets: Tensor, *, power: float = 1 / 6) -> Tensor:
    r"""Weights of classes, 1 for the most frequent one and more for rarer ones, out of the known labels alone.

    .. math:: w_c = \Big( 1 - \log \frac{f_c}{\max_{c'} f_{c'}} \Big)^{\text{power}}, \qquad
        f_c = \frac{\max(1, \sum_{b:\, y_{bc} \ge 0} y_{bc})}{\#\{b: y_{bc} \ge 0\}}

    f is the share of present labels among the known ones, so a class of which less is known is not taken for a rarer one. A class
    without a positive counts as if it had one. If nothing is known of a class, its weight is 1. If every known label is
    present, as with single positives, f is the number of positives over all B images.

    Args:
        targets: labels in this package's encoding, of the whole training set; soft ones count by their value.
        power: 0 gives ones; 1/6 is COMIC's.

    Shape:
        targets (B, C), the result (C,).

    Returns:
        Weights in float32. ``weights.expand_as(targets)`` of a batch is what :class:`TextRegionMatchingLoss` takes as weights.

    Raises:
        TypeError: ``targets`` is not a tensor of bools, integers or floats.
        ValueError: wrong shape, a value outside the encoding, ``power`` below 0.

    Example:
        >>> class_weights(torch.tensor([[1, 0], [1, -1], [1, 1], [1, 0]]), power=1.0)
        tensor([1.0000, 2.0986])

    Reference:
        The weight of COMIC, which counts positives. The share among known labels is ours, and so is what it is if none is known.
    """
    targets = check_targets("class_weights", matrix("class_weights", targets))
    check_number("class_weights", "power", power, 0)
    known = targets != UNKNOWN
    counted = known if bool((known & (targets < 1)).any()) else torch.ones_like(known)
    number = counted.sum(dim=0).float()
    share = torch.where(known, targets, 0).sum(dim=0, dtype=torch.float32).clamp(min=1) / number
    asked = number > 0
    most = torch.where(asked, share, 0.0).amax()
    return torch.where(asked, (1 - torch.log(share / most)) ** power, 1.0)


def sample_classes(targets: Tensor, size: int, *, generator: torch.Generator | None = None) -> Tensor:
    r"""Choose the classes of one training step: those present in the batch, and others at random up to ``size``.

    .. math:: \operatorname{top}_{K}\big(u_c + \mathbb{1}[\exists b: y_{bc} > 0]\big), \qquad
        u \sim U[0, 1)^C, \quad K = \min(\text{size}, C)

    With thousands of classes their texts cost more than anything else in a step; ``prompts(classes)`` of a
    :class:`~trm_losses.PromptLearner` gives the texts that go with ``targets[:, classes]``. Where more classes than ``size``
    are present, ``size`` of these are drawn. Presences then weigh more among the known labels than they do in the whole.

    Every rank must take the same classes if what it learns is to agree: give the targets of all ranks, gathered, and
    generators of the same seed. Nothing here waits for an accelerator, and values are not checked.

    Args:
        targets: labels in this package's encoding, soft ones allowed; one above 0 counts as present.
        size: number of classes to take, 1 or more.
        generator: source of the draws, on any device. Default: the generator of torch for the device of ``targets``.

    Shape:
        targets (B, C), the result (K,), indices of the classes in ascending order.

    Raises:
        TypeError: ``targets`` is not a tensor of bools, integers or floats.
        ValueError: wrong shape, or ``size`` below 1.

    Example:
        >>> classes = sample_classes(torch.tensor([[1, 0, -1, 0, 0], [0, 0, -1, 1, 0]]), 3)
        >>> len(classes), bool((classes == 0).any() and (classes == 3).any())
        (3, True)

    Reference:
        Our choice; sampled softmax draws the classes of a step in this way.
    """
    targets = matrix("sample_classes", targets)
    check_number("sample_classes", "size", size, 1, whole=True)
    draws = torch.rand(targets.shape[1], generator=generator, device=generator.device if generator else targets.device)
    draws = draws.to(targets.device) + (targets > 0).any(dim=0)
    return draws.topk(min(size, len(draws))).indices.sort().values


def numeric(owner: str, name: str, x: Tensor) -> Tensor:
    """``x`` in a dtype that can hold -1."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{owner}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in NUMBERS:
        raise TypeError(f"{owner}: {name} must hold bools, integers or floats, got {x.dtype}; use .long() or .float()")
    return x.to(torch.int8) if x.dtype == torch.bool else signed(x)


def matrix(owner: str, targets: Tensor) -> Tensor:
    """``targets`` in a dtype that can hold -1, as a non-empty matrix."""
    targets = numeric(owner, "targets", targets)
    if targets.dim() != 2 or targets.numel() == 0:
        fix = "one row an image, one column a class"
        raise ValueError(f"{owner}: targets must have shape (B, C) with B, C >= 1, got {tuple(targets.shape)}; {fix}")
    return targets


def _require(owner: str, labels: Tensor, ok: Tensor, wanted: str, fix: str) -> None:
    """Raise with the first label that is not ``ok``."""
    if not bool(ok.all()):
        raise ValueError(f"{owner}: labels must be {wanted}, got {labels[~ok][0].item()}; {fix}")
