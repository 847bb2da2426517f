"""Thresholds out of known labels, and what they will reach on other images."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_choice, check_number, check_numbers, check_scores
from .calibration import LEAST
from .labels import UNKNOWN

# Times that the entries of a class are split into halves, to measure what a choice is worth.
_SPLITS = 25

# Thresholds tried, and labels of all halves that are counted at a time: what bounds seconds and memory.
_LEVELS, _AT_ONCE = 1 << 17, 1 << 19


class Thresholds(NamedTuple):
    """What :func:`choose_thresholds` returns: (C,) tensors on the CPU, float64 but for the last."""

    threshold: Tensor
    """Scores above it are predicted present."""
    value: Tensor
    """What the metric is expected to be on other images."""
    low: Tensor
    """Lower end of the interval that holds it in nine of ten cases."""
    high: Tensor
    """Its upper end."""
    chosen: Tensor
    """bool: chosen from the class's own labels. Elsewhere all numbers are those of the classes taken together."""


def choose_thresholds(
    scores: Tensor,
    targets: Tensor,
    *,
    metric: Literal["f1", "precision", "recall", "cost"] = "f1",
    at_least: float = 0.9,
    false_alarm: float = 1.0,
    miss: float = 1.0,
) -> Thresholds:
    r"""A threshold for each class from its known labels, and what it will reach on other images.

    Tried are the middles between neighbouring scores, and half of the lowest. Of more than 131,072 of them it is at most so many,
    the closer together the higher the scores.

    ============= =================================================================================================
    metric        the threshold
    ============= =================================================================================================
    ``f1``        with the best F1
    ``precision`` the lowest with precision ``at_least``; if none has it, the one that comes nearest
    ``recall``    the highest with recall ``at_least``
    ``cost``      with the least mean cost of an entry; above all scores if it is cheapest to predict nothing
    ============= =================================================================================================

    Of equally good ones it is the one nearest to 0.5. While choosing, precision counts half a hit and half a false alarm more, so
    that one right answer is not 100 %.

    The value on the labels that chose is too good. So 25 times the entries are split into halves. Each half chooses, the other
    measures. With e the mean of what the halves measure and q the value of the final threshold on all entries:

    .. math::
        \mathrm{value} = 0.632\, e + 0.368\, q

    The interval runs from the lower end to the upper end of two intervals, around e and around q. Each is the 90 % interval of a
    share of n entries under Jeffreys' prior, a Beta distribution; n are the entries that the metric looks at. For F1 the share is
    TP / (TP + FP + FN), of which F1 is a function; for a cost it is the cost over the largest one. The whole is wide on purpose:
    of draws of 40 to 1,000 known labels, of four kinds of scores, it held what came on fresh data in at least 90 %.

    Args:
        scores: probabilities.
        targets: 1, 0 or -1 (unknown). Known entries must be a fair draw of all.
        metric: what to choose by, and what ``value`` is.
        at_least: the precision or recall wanted.
        false_alarm, miss: what a present answer to an absent class costs, and an absent one to a present class.

    Shape:
        scores and targets (B, C); each result (C,).

    Returns:
        :class:`Thresholds`. A class with fewer than five known present or five known absent labels takes the numbers of all
        classes together. The halves are drawn by a fixed seed: the same input gives the same answer.

    Raises:
        TypeError: an argument is not a tensor, or ``scores`` are not floats.
        ValueError: shapes or devices that do not fit, NaN, soft targets, scores outside [0, 1], settings; no known present or
            no known absent label in any class.

    Example:
        >>> scores = torch.tensor([[0.1], [0.2], [0.3], [0.4], [0.5], [0.6], [0.7], [0.8], [0.9], [0.95]])
        >>> found = choose_thresholds(scores, (scores > 0.55).long())
        >>> round(found.threshold.item(), 2), found.chosen.item()
        (0.55, True)

    Reference: the weights of e and q are those of Efron's .632 estimator (1983), with halves in place of the bootstrap. Their use
    for the whole choice, and the interval, are our choice.
    """
    name = "choose_thresholds"
    check_choice(name, "metric", metric, ("f1", "precision", "recall", "cost"))
    check_number(name, "at_least", at_least, 0, 1, strict=True)
    check_numbers(name, 0, strict=True, false_alarm=false_alarm, miss=miss)
    targets = check_scores(name, scores, targets, probabilities=True).cpu()
    scores = scores.detach().cpu()
    count = torch.stack([(targets == label).sum(dim=0) for label in (0, 1)])
    absent, present = count.sum(dim=1).tolist()
    if not (absent and present):
        raise ValueError(
            f"{name}: targets must hold known present and known absent labels, got {present} present and {absent} absent"
        )
    rule = _Rule(metric, at_least, false_alarm, miss)
    chosen = (count >= LEAST).all(dim=0)
    known = targets != UNKNOWN
    pooled = None if bool(chosen.all()) else _threshold(rule, scores[known], targets[known] == 1)
    rows = []
    for c, own in enumerate(chosen.tolist()):
        seen = known[:, c]
        rows.append(_threshold(rule, scores[seen, c], targets[seen, c] == 1) if own else pooled)
    threshold, value, low, high = torch.tensor(rows, dtype=torch.float64, device="cpu").unbind(dim=1)
    return Thresholds(threshold, value, low, high, chosen)


class _Counts(NamedTuple):
    """Of entries at thresholds (R, L): predicted and present, predicted present; (R, 1): present, all."""

    hits: Tensor
    said: Tensor
    present: Tensor
    total: Tensor

    def at(self, place: Tensor) -> _Counts:
        """At one threshold of each row, (R, 1) each."""
        return self._replace(hits=self.hits.gather(1, place), said=self.said.gather(1, place))

    def without(self, other: _Counts) -> _Counts:
        """The counts of the entries that the other has not."""
        return _Counts(*(x - part for x, part in zip(self, other, strict=True)))


def _counted(y: Tensor, among: Tensor, places: Tensor) -> _Counts:
    """Of labels (n,) by falling scores, among some of them (R, n), both bool: counts of those before the places (L,)."""
    last = (places - 1).clamp(min=0)
    counts = (x.cumsum(dim=1, dtype=torch.int32).index_select(1, last) for x in (among & y, among))
    hits, said = (torch.where(places > 0, x, 0).double() for x in counts)
    return _Counts(hits, said, hits[:, -1:], said[:, -1:])


class _Rule(NamedTuple):
    """What a threshold is chosen by."""

    metric: str
    at_least: float
    false_alarm: float
    miss: float

    def share(self, counts: _Counts) -> tuple[Tensor, Tensor]:
        """The share that the metric is a function of, as a number of entries and the number of those that it looks at."""
        hits, said, present, total = counts
        if self.metric == "precision":
            return hits, said
        if self.metric == "recall":
            return hits, present.expand_as(hits)
        if self.metric == "f1":
            return hits, said + present - hits
        cost = self.false_alarm * (said - hits) + self.miss * (present - hits)
        return cost / max(self.false_alarm, self.miss), total.expand_as(hits)

    def value(self, share: float) -> float:
        """The metric, of its share."""
        if self.metric == "cost":
            return share * max(self.false_alarm, self.miss)
        return 2 * share / (1 + share) if self.metric == "f1" else share

    def choose(self, counts: _Counts, levels: Tensor) -> Tensor:
        """(R, 1) places of the thresholds that each row of counts would choose."""
        found, size = self.share(counts)
        if self.metric == "precision":
            found, size = found + 0.5, size + 1
        good = (-found if self.metric == "cost" else found) / size.clamp(min=0.5)
        wanted = good.amax(dim=1, keepdim=True)
        if self.metric in ("precision", "recall"):
            wanted = wanted.clamp(max=self.at_least)
        last = {"precision": levels, "recall": -levels}.get(self.metric, (levels - 0.5).abs())
        return torch.where(good >= wanted - 1e-12, last, torch.inf).argmin(dim=1, keepdim=True)


def _threshold(rule: _Rule, scores: Tensor, y: Tensor) -> tuple[float, float, float, float]:
    """Threshold, value, low and high from scores (n,) and labels (n,), bool, that are all known."""
    scores, order = scores.sort(descending=True)
    y = y[order]
    del order
    levels, places = _levels(scores, nothing=rule.metric == "cost")  # whose best may be to predict nothing
    whole = _counted(y, torch.ones_like(y)[None], places)
    best = rule.choose(whole, levels)
    hits, seen = (float(x) for x in rule.share(whole.at(best)))
    shares, sizes = [], []
    generator = torch.Generator("cpu").manual_seed(0)
    at_once = max(1, _AT_ONCE // len(y))
    for first in range(0, _SPLITS, at_once):
        shape = min(at_once, _SPLITS - first), len(y)
        half = _counted(y, torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") < 0.5, places)
        choosing = _Counts(*map(torch.cat, zip(half, whole.without(half), strict=True)))
        found, size = rule.share(whole.without(choosing).at(rule.choose(choosing, levels)))
        usable = (size > 0) & (choosing.present > 0)
        shares.append((found / size)[usable])
        sizes.append(size)
    of_halves, seen_by_halves = torch.cat(shares), 2 * float(torch.cat(sizes).mean())
    own, ends = hits / seen, [_jeffreys(hits, seen)]
    value = own
    if len(of_halves):
        measured = float(of_halves.mean())
        ends.append(_jeffreys(measured * seen_by_halves, seen_by_halves))
        value = 0.632 * measured + 0.368 * own
    low, high = min(value, *(end[0] for end in ends)), max(value, *(end[1] for end in ends))
    return float(levels[best]), rule.value(value), rule.value(low), rule.value(high)


def _levels(scores: Tensor, *, nothing: bool) -> tuple[Tensor, Tensor]:
    """Thresholds (L,) between falling scores (n,), and how many scores lie above each; with ``nothing`` one above all of them.

    They are numbers that the type of the scores has, and part the scores in that type too.
    """
    edges = torch.cat([scores.new_ones(1), scores, scores.new_full((1,), 0.0 if scores[-1] > 0 else -1.0)])
    apart = edges[:-1] > edges[1:]
    apart[0] = nothing
    places = apart.nonzero().flatten()
    if len(places) > _LEVELS:
        share = torch.linspace(0, 1, _LEVELS, dtype=torch.float64, device="cpu")
        places = places[(share.square() * (len(places) - 1)).long()]
    above, below = edges[places].double(), edges[places + 1].double()
    levels = ((above + below) / 2).to(scores.dtype).double()
    return torch.where(levels < above, levels, below), places


def _jeffreys(found: float, size: float) -> tuple[float, float]:
    """The 90 % interval of a share of which so many of so many were found: quantiles of Beta(found + 1/2, rest + 1/2)."""
    a, b = found + 0.5, size - found + 0.5
    logit = math.log(a / b) + math.sqrt(1 / a + 1 / b) * torch.linspace(-15, 15, 3001, dtype=torch.float64, device="cpu")
    density = a * F.logsigmoid(logit) + b * F.logsigmoid(-logit)
    mass = (density - density.max()).exp().cumsum(dim=0)
    low, high = (float(torch.sigmoid(logit[(mass < share * mass[-1]).sum()])) for share in (0.05, 0.95))
    return low, high
