"""The usual ways to hide labels, and one to make them wrong."""

from __future__ import annotations

import operator
import random

import torch
from torch import Tensor

from .._checks import check_number, check_targets
from .encoding import UNKNOWN, matrix, numeric


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
    targets = check_targets("hide_labels", matrix("hide_labels", targets))
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
    targets = check_targets("keep_single_positive", matrix("keep_single_positive", targets), soft=False)
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
        targets, truth and the result (B, C), in the type of ``targets``.

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
    targets = check_targets(name, matrix(name, targets), soft=False)
    truth = check_targets(name, numeric(name, "truth", truth), name="truth", soft=False)
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


def _numpy_uniform(owner: str, count: int, seed: int) -> Tensor:
    """(count,) float64 on the CPU, bit for bit ``numpy.random.RandomState(seed).uniform(0, 1, count)``.

    Python and numpy share the Mersenne twister; only their seeding differs. So numpy's seeding (Knuth's recurrence,
    ``init_genrand``) is done here and Python draws. A double is the upper 27 and 26 bits of two words of 32.
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
    draws = torch.empty(count, dtype=torch.float64, device="cpu")
    for block in draws.split(1 << 16):
        words = torch.frombuffer(bytearray(source.randbytes(8 * len(block))), dtype=torch.int64)
        block.copy_((words >> 5 & 0x7FFFFFF) << 26 | words >> 38 & 0x3FFFFFF).div_(2.0**53)
    return draws
