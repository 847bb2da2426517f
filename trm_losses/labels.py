"""Partial labels: the one encoding of this package, conversions into it, and the usual ways to hide labels.

A label matrix has shape (B, C): one row an image, one column a class. An entry is 1 (present), 0 (absent), a
value between them (soft), or :data:`UNKNOWN` = -1 (nobody said). Public label files use other codes, among
them the opposite one, so they are converted once, where they are read.

Every function returns a new tensor on the device and in the dtype of its input. ``bool`` and ``uint8`` cannot
hold -1 and come back as ``int8``. In ``uint8``, where -1 is written as 255, 255 is read as -1, here and in every loss.
"""

from __future__ import annotations

import operator
import random
from array import array
from itertools import repeat, starmap

import torch
from torch import Tensor

from ._checks import NUMBERS, check_number, check_targets, signed

__all__ = [
    "UNKNOWN",
    "class_weights",
    "from_nan",
    "from_positive_only",
    "from_ternary",
    "hide_labels",
    "keep_single_positive",
    "known_fraction",
    "move_positives",
    "sample_classes",
]

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

    Returns:
        Tensor of the same shape with 1 present, 0 absent, -1 unknown.

    Raises:
        TypeError: ``labels`` is not a tensor of integers or floats.
        ValueError: another value than 1, -1 or 0.

    Example:
        >>> from_ternary(torch.tensor([[1, -1, 0]]))
        tensor([[ 1,  0, -1]])

    Reference:
        The files of HCP-MLR-PL and TaI-DPT.
    """
    labels = _numeric("from_ternary", "labels", labels)
    ok = (labels == 1) | (labels == -1) | (labels == 0)
    _require("from_ternary", "labels", labels, ok, "1 (present), -1 (absent) or 0 (unknown)", "the file has other codes")
    return torch.where(labels == 1, labels, -labels - 1)  # -1 becomes 0, and 0 becomes -1


def from_positive_only(labels: Tensor) -> Tensor:
    r"""Convert labels of which only the presences are known: 1 present, 0 not observed.

    .. math:: 1 \to 1, \quad 0 \to -1

    Args:
        labels: bool, integer or float tensor with the values 1 and 0.

    Shape:
        labels and the result (B, C), or any other shape.

    Returns:
        Tensor of the same shape with 1 present, -1 unknown.

    Raises:
        TypeError: ``labels`` is not a tensor of bools, integers or floats.
        ValueError: another value than 1 or 0.

    Example:
        >>> from_positive_only(torch.tensor([[1, 0, 0]]))
        tensor([[ 1, -1, -1]])

    Reference:
        Single positive labels (Cole et al. 2021).
    """
    labels = _numeric("from_positive_only", "labels", labels)
    ok = (labels == 1) | (labels == 0)
    fix = "labels with known absences go through from_ternary"
    _require("from_positive_only", "labels", labels, ok, "1 (present) or 0 (not observed)", fix)
    return torch.where(labels == 1, labels, UNKNOWN)


def from_nan(labels: Tensor) -> Tensor:
    r"""Convert labels in which NaN stands for a missing one, as pandas writes it.

    .. math:: \text{NaN} \to -1

    Args:
        labels: NaN, or a value of this package's encoding, soft ones and -1 included.

    Shape:
        labels and the result (B, C), or any other shape.

    Returns:
        Tensor of the same shape with -1 in place of NaN.

    Raises:
        TypeError: ``labels`` is not a tensor of bools, integers or floats.
        ValueError: a value that is neither NaN nor in the encoding.

    Example:
        >>> from_nan(torch.tensor([[1.0, 0.0, float("nan")]]))
        tensor([[ 1.,  0., -1.]])
    """
    labels = _numeric("from_nan", "labels", labels)
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
    targets = _numeric("known_fraction", "targets", targets)
    if targets.numel() == 0:
        raise ValueError(f"known_fraction: targets must have at least one entry, got shape {tuple(targets.shape)}")
    targets = check_targets("known_fraction", targets)
    return int((targets != UNKNOWN).sum()) / targets.numel()


def hide_labels(targets: Tensor, known: float = 0.1, seed: int = 0) -> Tensor:
    r"""Keep each label with probability ``known`` and turn all others into unknown ones.

    .. math:: y'_{bc} = y_{bc} \;\text{if}\; u_{bc} < \text{known, else} -1, \qquad u \sim U[0, 1)^{B \times C}

    This is the procedure behind the usual 10 % to 90 % results. *u* is what
    ``numpy.random.seed(seed); numpy.random.uniform(0, 1, (B, C))`` gives, so the known entries are the same as in the
    published files, number by number. Presences and absences are hidden alike. The masks are nested: what is known at 10 %
    is known at every larger share. They depend on the order of the rows and columns and on B: the same images sorted
    otherwise, or without those that have no annotation, get another mask.

    Args:
        targets: labels in this package's encoding, soft ones allowed; entries that are unknown stay unknown.
        known: share of labels to keep, above 0 and at most 1.
        seed: seed of numpy's legacy generator, from 0 to 2**32 - 1.

    Shape:
        targets and the result (B, C).

    Returns:
        Tensor (B, C) with -1 at the hidden entries.

    Raises:
        TypeError: ``targets`` is not a tensor of bools, integers or floats, or ``seed`` is not an integer.
        ValueError: wrong shape, a value outside the encoding, ``known`` or ``seed`` out of range.

    Example:
        >>> hide_labels(torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0]]), known=0.5)
        tensor([[-1, -1, -1, -1],
                [ 0, -1,  1, -1]])

    Reference:
        HCP-MLR-PL (SST, SARB, HST); the label files published with TaI-DPT follow it exactly.
    """
    targets = check_targets("hide_labels", _matrix("hide_labels", targets))
    if not 0 < known <= 1:
        raise ValueError(f"hide_labels: known must be a share above 0 and at most 1, got {known}; 10 per cent is 0.1")
    keep = _numpy_uniform("hide_labels", targets.numel(), seed).view(targets.shape) < known
    return torch.where(keep.to(targets.device), targets, UNKNOWN)


def keep_single_positive(targets: Tensor, *, seed: int = 0) -> Tensor:
    r"""Keep one positive label of each image, chosen uniformly at random, and nothing else.

    .. math:: y'_{bc} = 1 \;\text{if}\; c = \operatorname{arg\,max}_{c': y_{bc'} = 1} u_{bc'}, \;\text{else} -1

    with the uniform *u* of :func:`hide_labels`: the largest of independent uniforms is each of them equally
    often. An image without a known positive becomes all unknown. The choice is our own: published single
    positive labels were drawn in another way and are read from their files.

    Args:
        targets: labels 1, 0 or -1.
        seed: seed of numpy's legacy generator, from 0 to 2**32 - 1.

    Shape:
        targets and the result (B, C).

    Returns:
        Tensor (B, C) with the values 1 and -1, at most one 1 in a row.

    Raises:
        TypeError: ``targets`` is not a tensor of bools, integers or floats, or ``seed`` is not an integer.
        ValueError: wrong shape, a soft label or another value outside the encoding, ``seed`` out of range.

    Example:
        >>> keep_single_positive(torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0]]))
        tensor([[-1, -1,  1, -1],
                [-1, -1, -1, -1]])

    Reference:
        Setting of Cole et al. 2021, "Multi-Label Learning from Single Positive Labels".
    """
    targets = check_targets("keep_single_positive", _matrix("keep_single_positive", targets), soft=False)
    positive = (targets == 1).cpu()
    draws = _numpy_uniform("keep_single_positive", targets.numel(), seed).view(targets.shape)
    column = torch.where(positive, draws, -1.0).argmax(dim=1, keepdim=True)
    keep = torch.zeros_like(positive).scatter_(1, column, True) & positive
    return torch.where(keep.to(targets.device), targets, UNKNOWN)


def move_positives(targets: Tensor, truth: Tensor, share: float, seed: int = 0) -> Tensor:
    r"""Make labels wrong: a share of the known positives moves, each to an absent class of its own image.

    The class that gets the label becomes present, whether it was known to be absent or unknown. The class that had it becomes
    unknown. So the number of known positives stays, and every wrong label says "present" of something absent.

    With n positives exactly :math:`\lfloor \text{share} \cdot n + \frac12 \rfloor` move, each as likely as any other, to a
    class drawn among those absent in the truth. Two labels of an image never move to one class. If an image has fewer absent
    classes than present labels, the labels left over stay where they are, and others move in their place as far as there are any.
    A smaller share of the same seed moves some of the labels that a larger one moves, to the same classes.

    Args:
        targets: labels 1, 0 or -1, such as those that :func:`hide_labels` leaves.
        truth: the labels before any were hidden; a class whose entry is unknown or present takes no label.
        share: of the known positives, from 0 to 1.
        seed: seed of numpy's legacy generator, from 0 to 2**32 - 1; its draws are others than those of :func:`hide_labels`.

    Shape:
        targets, truth and the result (B, C).

    Returns:
        Tensor (B, C) in the type of ``targets``.

    Raises:
        TypeError: not a tensor of bools, integers or floats, or ``seed`` is not an integer.
        ValueError: wrong shapes, a soft label or another value outside the encoding, ``share`` or ``seed`` out of range.

    Example:
        >>> move_positives(torch.tensor([[1, -1, 0]]), torch.tensor([[1, 1, 0]]), 1.0)
        tensor([[-1, -1,  1]])

    Reference:
        Our choice.
    """
    name = "move_positives"
    targets = check_targets(name, _matrix(name, targets), soft=False)
    truth = check_targets(name, _numeric(name, "truth", truth), name="truth", soft=False)
    if truth.shape != targets.shape:
        raise ValueError(f"{name}: truth must have the shape of targets {tuple(targets.shape)}, got {tuple(truth.shape)}")
    check_number(name, "share", share, 0, 1)
    positive, absent = (targets == 1).cpu(), (truth == 0).cpu() & (targets != 1).cpu()
    draws = _numpy_uniform(name, 3 * targets.numel(), seed).view(3, *targets.shape)  # the first of them hide labels
    order = torch.where(positive, draws[1], torch.inf)
    rank = order.argsort(dim=1).argsort(dim=1)  # of a positive among those of its image
    places = torch.where(absent, draws[2], torch.inf).argsort(dim=1)  # absent classes come first
    movable = positive & (rank < absent.sum(dim=1, keepdim=True))
    count = min(int(share * int(positive.sum()) + 0.5), int(movable.sum()))
    chosen = torch.where(movable, order, torch.inf).flatten().argsort()[:count]
    row, own = chosen // targets.shape[1], chosen % targets.shape[1]
    place = places[row, rank[row, own]]
    row, own, place = (index.to(targets.device) for index in (row, own, place))
    moved = targets.clone()
    moved[row, own], moved[row, place] = UNKNOWN, 1
    return moved


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
    targets = check_targets("class_weights", _matrix("class_weights", targets))
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
        targets (B, C), the result (K,).

    Returns:
        Indices of the classes in ascending order.

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
    targets = _matrix("sample_classes", targets)
    check_number("sample_classes", "size", size, 1)
    if size != int(size):
        raise ValueError(f"sample_classes: size must be a whole number, got {size}")
    draws = torch.rand(targets.shape[1], generator=generator, device=generator.device if generator else targets.device)
    draws = draws.to(targets.device) + (targets > 0).any(dim=0)
    return draws.topk(min(size, len(draws))).indices.sort().values


def _numpy_uniform(owner: str, count: int, seed: int) -> Tensor:
    """(count,) float64 on the CPU, bit for bit ``numpy.random.RandomState(seed).uniform(0, 1, count)``.

    Python and numpy share the Mersenne twister and the formula that makes a double of two of its words; only
    their seeding differs. So numpy's seeding (Knuth's recurrence, ``init_genrand``) is done here and Python
    draws.
    """
    word = operator.index(seed)
    if not 0 <= word < 2**32:
        raise ValueError(f"{owner}: seed must be from 0 to 2**32 - 1, got {seed}")
    state = [word]
    for i in range(1, 624):
        word = (1812433253 * (word ^ (word >> 30)) + i) & 0xFFFFFFFF
        state.append(word)
    source = random.Random()
    source.setstate((3, (*state, 624), None))
    return torch.frombuffer(array("d", starmap(source.random, repeat((), count))), dtype=torch.float64)


def _numeric(owner: str, name: str, x: Tensor) -> Tensor:
    """``x`` in a dtype that can hold -1."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{owner}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in NUMBERS:
        raise TypeError(f"{owner}: {name} must hold bools, integers or floats, got {x.dtype}; use .long() or .float()")
    return x.to(torch.int8) if x.dtype == torch.bool else signed(x)


def _matrix(owner: str, targets: Tensor) -> Tensor:
    """``targets`` in a dtype that can hold -1, as a non-empty matrix."""
    targets = _numeric(owner, "targets", targets)
    if targets.dim() != 2 or targets.numel() == 0:
        fix = "one row an image, one column a class"
        raise ValueError(f"{owner}: targets must have shape (B, C) with B, C >= 1, got {tuple(targets.shape)}; {fix}")
    return targets


def _require(owner: str, name: str, x: Tensor, ok: Tensor, wanted: str, fix: str) -> None:
    """Raise with the first value of ``x`` that is not ``ok``."""
    if not bool(ok.all()):
        raise ValueError(f"{owner}: {name} must be {wanted}, got {x[~ok][0].item()}; {fix}")
