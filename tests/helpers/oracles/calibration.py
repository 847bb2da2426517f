"""Scale and shift of logits, and what is promised of thresholds, by slow loops from their equations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.helpers.oracles.numbers import Array, array, sigmoid

Numbers = Sequence[float]


def platt(logits: Any, targets: Any) -> tuple[Array, Array, Array]:
    """Scales (C,), shifts (C,) and the pooled (2,), of targets 1, 0 or -1 of both kinds."""
    z, y = array(logits), array(targets)
    classes = z.shape[1]
    known = y != -1
    mean, deviation = float(z[known].mean()), float(z[known].std())
    x = (z - mean) / (deviation or 1.0)
    pooled, _ = minimum(x[known], y[known], (1.0, 0.0), (3.0, 10.0))
    own = [c for c in range(classes) if min((y[:, c] == 1).sum(), (y[:, c] == 0).sum()) >= 5]
    found = dict.fromkeys(range(classes), pooled)
    spread = (0.3, 1.0)
    for _ in range(10):
        sums = [0.3**2, 1.0]
        for c in own:
            rows = known[:, c]
            (a, s), variance = minimum(x[rows, c], y[rows, c], pooled, spread)
            found[c] = (a, s)
            sums[0] += math.log(a / pooled[0]) ** 2 + variance[0]
            sums[1] += (s - pooled[1]) ** 2 + variance[1]
        spread = (math.sqrt(sums[0] / (1 + len(own))), math.sqrt(sums[1] / (1 + len(own))))
    scales = np.array([found[c][0] for c in range(classes)] + [pooled[0]]) / (deviation or 1.0)
    shifts = np.array([found[c][1] for c in range(classes)] + [pooled[1]]) - scales * mean
    return scales[:-1], shifts[:-1], np.array([scales[-1], shifts[-1]])


def minimum(x: Array, y: Array, centre: Numbers, spread: Numbers) -> tuple[tuple[float, float], tuple[float, float]]:
    """Scale and shift of one class, and the variances of the logarithm of the scale and of the shift."""

    def objective(a: float, s: float) -> float:
        if a <= 0:
            return math.inf
        z, r = a * x + s, a / centre[0]
        loss = float((np.logaddexp(0, z) - y * z).sum())
        return loss + (r - 1 - math.log(r)) / spread[0] ** 2 + (s - centre[1]) ** 2 / (2 * spread[1] ** 2)

    a, s = centre
    for _ in range(100):
        p = np.array([sigmoid(v) for v in a * x + s])
        gradient = np.array(
            [((p - y) * x).sum() + (1 / centre[0] - 1 / a) / spread[0] ** 2, (p - y).sum() + (s - centre[1]) / spread[1] ** 2]
        )
        w = p * (1 - p)
        curvature = np.array([[(w * x * x).sum(), (w * x).sum()], [(w * x).sum(), w.sum()]])
        curvature += np.diag([1 / (a * spread[0]) ** 2, 1 / spread[1] ** 2])
        step = np.linalg.solve(curvature, gradient)
        while objective(a - step[0], s - step[1]) > objective(a, s) + 1e-12:
            step = step / 2
        a, s = a - step[0], s - step[1]
    assert np.abs(gradient).max() < 1e-6
    covariance = np.linalg.inv(curvature)
    return (float(a), float(s)), (float(covariance[0, 0] / a**2), float(covariance[1, 1]))


def listed_probability(p: Numbers, k: int) -> float:
    """Of class k being the one listed of the present ones, which are never none; by counting how many others are present."""
    others = [1.0]  # of so many present
    for c, share in enumerate(p):
        if c != k:
            others = [
                (others[n] * (1 - share) if n < len(others) else 0.0) + (others[n - 1] * share if n else 0.0)
                for n in range(len(others) + 1)
            ]
    return p[k] * sum(q / (1 + n) for n, q in enumerate(others)) / (1 - math.prod(1 - share for share in p))


def shift_to(logits: Array, rate: float) -> float:
    """What added to the logits makes their mean probability the rate, by bisection."""
    low, high = -700.0, 700.0
    for _ in range(200):
        middle = (low + high) / 2
        mean = float(np.mean([sigmoid(v) for v in (logits + middle).ravel()]))
        low, high = (low, middle) if mean > rate else (middle, high)
    return (low + high) / 2


def single_positives(logits: Any, targets: Any, expected_positives: float) -> tuple[float, float]:
    """Scale and shift of all classes, by looking at ever finer grids."""
    z, y = array(logits), array(targets)
    mean, deviation = float(z.mean()), float(z.std())
    x = (z - mean) / deviation
    rate = expected_positives / z.shape[1]

    def objective(log_scale: float) -> float:
        scale = math.exp(log_scale)
        shift = shift_to(scale * x, rate)
        total = (scale - 1 - log_scale) / 3**2
        for row, labels in zip(x, y, strict=True):
            listed = [k for k, label in enumerate(labels) if label == 1]
            p = [sigmoid(scale * v + shift) for v in row]
            total -= sum(math.log(listed_probability(p, k)) for k in listed) / max(1, len(listed))
        return total

    low, high = -2.0, 2.0
    for _ in range(8):
        grid = np.linspace(low, high, 9)
        best = int(np.argmin([objective(v) for v in grid]))
        low, high = grid[max(0, best - 1)], grid[min(8, best + 1)]
    scale = math.exp((low + high) / 2)
    shift = shift_to(scale * x, rate)
    return scale / deviation, shift - scale / deviation * mean


# Thresholds ---------------------------------------------------------------------------------------------------------------

Counts = tuple[float, float, float, float]


def counts(scores: Numbers, labels: Sequence[int], threshold: float) -> Counts:
    """True and false positives, false and true negatives."""
    pairs = list(zip((s > threshold for s in scores), labels, strict=True))
    return tuple(float(pairs.count(pair)) for pair in ((True, 1), (True, 0), (False, 1), (False, 0)))  # type: ignore[return-value]


def metric_of(metric: str, of: Counts, miss: float) -> tuple[float, float]:
    """The share behind the metric: so many of so many; a false alarm costs 1."""
    tp, fp, fn, tn = of
    cost = (fp + miss * fn) / max(1.0, miss)
    return {"precision": (tp, tp + fp), "recall": (tp, tp + fn), "f1": (tp, tp + fp + fn), "cost": (cost, tp + fp + fn + tn)}[
        metric
    ]


def candidates(scores: Numbers) -> list[float]:
    """Middles between neighbouring scores, half of the lowest, and what lets nothing through, first."""
    falling = sorted(set(scores), reverse=True)
    middles = [(a + b) / 2 for a, b in zip(falling, falling[1:], strict=False)]
    return [(1 + falling[0]) / 2, *middles, falling[-1] / 2 if falling[-1] > 0 else -0.5]


def best_threshold(
    metric: str, scores: Numbers, labels: Sequence[int], levels: Numbers, at_least: float = 0.9, miss: float = 1.0
) -> float:
    """The threshold that some entries would choose among these levels, of which the first lets nothing through."""
    rated = []
    for level in levels[metric != "cost" :]:
        found, size = metric_of(metric, counts(scores, labels, level), miss)
        if metric == "precision":
            found, size = found + 0.5, size + 1
        rated.append((found / size if size else 0.0, level))
    if metric in ("precision", "recall"):
        wanted = min(at_least, max(rate for rate, _ in rated))
        good = [level for rate, level in rated if rate >= wanted - 1e-12]
        return min(good) if metric == "precision" else max(good)
    sign = -1 if metric == "cost" else 1
    top = max(sign * rate for rate, _ in rated)
    return min((level for rate, level in rated if sign * rate >= top - 1e-12), key=lambda level: abs(level - 0.5))


def promise(
    metric: str, scores: Numbers, labels: Sequence[int], halves: Any, at_least: float = 0.9, miss: float = 1.0
) -> tuple[float, float, float, float]:
    """Threshold, value, low and high; the halves (S, n) bool are of entries by falling scores."""
    from scipy.stats import beta

    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    scores, labels = [scores[i] for i in order], [labels[i] for i in order]
    levels = candidates(scores)
    threshold = best_threshold(metric, scores, labels, levels, at_least, miss)
    own = metric_of(metric, counts(scores, labels, threshold), miss)
    shares, sizes = [], []
    for half in halves:
        for side in (True, False):
            choose = [i for i in range(len(scores)) if bool(half[i]) == side]
            rest = [i for i in range(len(scores)) if bool(half[i]) != side]
            mine = [labels[i] for i in choose]
            level = best_threshold(metric, [scores[i] for i in choose], mine, levels, at_least, miss)
            found, size = metric_of(metric, counts([scores[i] for i in rest], [labels[i] for i in rest], level), miss)
            sizes.append(size)
            if size and 1 in mine:
                shares.append(found / size)
    measured, seen = sum(shares) / len(shares), 2 * sum(sizes) / len(sizes)
    value = 0.632 * measured + 0.368 * own[0] / own[1]
    pairs = [own, (measured * seen, seen)]
    low, high = (
        edge(value, *(beta.ppf(q, found + 0.5, size - found + 0.5) for found, size in pairs))
        for edge, q in ((min, 0.05), (max, 0.95))
    )

    def shown(share: float) -> float:
        return 2 * share / (1 + share) if metric == "f1" else share * max(1.0, miss) if metric == "cost" else share

    return threshold, shown(value), shown(low), shown(high)


def calibration_error(probabilities: Numbers, targets: Numbers, bins: int = 15) -> float:
    """Of one class."""
    inside: dict[int, list[tuple[float, float]]] = {}
    for p, y in zip(probabilities, targets, strict=True):
        if y != -1:
            inside.setdefault(math.floor(p * bins), []).append((p, y))
    total = sum(len(entries) for entries in inside.values())
    return sum(
        len(entries) / total * abs(sum(y for _, y in entries) / len(entries) - sum(p for p, _ in entries) / len(entries))
        for entries in inside.values()
    )
