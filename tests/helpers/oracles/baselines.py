"""The equations of the baselines as slow loops over numbers in float64; nothing here calls the package.

``held`` are the logits where a method lets no gradient through: weights, teachers and the choice of entries. Value and gradient
are then one function: its derivative by ``x`` at ``held = x``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from tests.helpers.oracles.numbers import Array, array, sigmoid


def slope(function: Callable[[Array], float], x: Array, step: float = 1e-5) -> Array:
    """The derivative by each entry, by central differences."""
    result = np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        result[i] = (function(up) - function(down)) / (2 * step)
    return result


def absent(x: float) -> float:
    """-log(1 - p)."""
    return x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))


def present(x: float) -> float:
    """-log p."""
    return absent(-x)


def bce(q: float, x: float) -> float:
    return q * present(x) + (1 - q) * absent(x)


def entropy(x: float) -> float:
    p = sigmoid(x)
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def assume_negative(x: Array, y: Array, held: Array, smoothing: float = 0.0) -> float:
    total = 0.0
    for i in np.ndindex(*x.shape):
        q = max(y[i], 0)
        total += bce((1 - smoothing) * q + smoothing * (1 - q), x[i])
    return total / x.size


def weak_assume_negative(x: Array, y: Array, held: Array) -> float:
    total = 0.0
    for i in np.ndindex(*x.shape):
        total += absent(x[i]) / max(1, x.shape[1] - 1) if y[i] == -1 else bce(y[i], x[i])
    return total / x.size


def known_mean(x: Array, y: Array) -> float:
    return sum(bce(y[i], x[i]) for i in np.ndindex(*x.shape) if y[i] >= 0) / x.size


def surplus(x: Array, k: float) -> float:
    expected = sum(sigmoid(x[i]) for i in np.ndindex(*x.shape)) / len(x)
    return ((expected - k) / x.shape[1]) ** 2


def epr(x: Array, y: Array, held: Array, k: float) -> float:
    return known_mean(x, y) + surplus(x, k)


def role(x: Array, theta: Array, y: Array, held: Array, held_theta: Array, k: float) -> float:
    model = known_mean(x, y) + surplus(x, k)
    labels = known_mean(theta, y) + surplus(theta, k)
    for i in np.ndindex(*x.shape):
        model += bce(sigmoid(held_theta[i]), x[i]) / x.size
        labels += bce(sigmoid(held[i]), theta[i]) / x.size
    return model / 2 + labels / 2


def em(x: Array, y: Array, held: Array, alpha: float) -> float:
    return known_mean(x, y) - alpha * sum(entropy(x[i]) for i in np.ndindex(*x.shape) if y[i] == -1) / x.size


def em_apl(x: Array, y: Array, held: Array, alpha: float, beta: float, soft: Array, labelled: Array) -> float:
    total = known_mean(x, y)
    for i in np.ndindex(*x.shape):
        if y[i] == -1:
            total += (beta * bce(soft[i], x[i]) if labelled[i] else -alpha * entropy(x[i])) / x.size
    return total


def label_least_probable(p: Array, unknown: Array, labelled: Array, share: str, passes: int) -> Array:
    """One labelling pass: of each class so many of the least probable unknown entries that are not labelled."""
    labelled = labelled.copy()
    for c in range(p.shape[1]):
        count = math.floor(Fraction(share) * int(unknown[:, c].sum()) / passes)
        rest = sorted((p[i, c], i) for i in range(len(p)) if unknown[i, c] and not labelled[i, c])
        for _, i in rest[:count]:
            labelled[i, c] = True
    return labelled


def large_entries(x: Array, y: Array, rate: Fraction) -> set[tuple[int, ...]]:
    """G: the unknown entries whose loss as absent ones reaches the k-th largest."""
    count = min(math.ceil(rate * x.size), x.size)
    if not count:
        return set()
    losses = sorted((absent(x[i]) if y[i] == -1 else 0.0 for i in np.ndindex(*x.shape)), reverse=True)
    return {i for i in np.ndindex(*x.shape) if y[i] == -1 and absent(x[i]) >= losses[count - 1]}


def large_loss(x: Array, y: Array, held: Array, scheme: str, rate: Fraction) -> float:
    large, total = large_entries(held, y, rate), 0.0
    for i in np.ndindex(*x.shape):
        if i not in large:
            total += bce(max(y[i], 0), x[i])
        elif scheme != "reject":
            total += present(x[i])
    return total / x.size


def splc(x: Array, y: Array, held: Array, threshold: float, margin: float, gamma: float, correcting: bool) -> float:
    total = 0.0
    for i in np.ndindex(*x.shape):
        if 0 < y[i] < 1:
            total += bce(y[i], x[i])
            continue
        found = y[i] == -1 and correcting and sigmoid(held[i]) > threshold
        z = x[i] - margin if y[i] == 1 else x[i]
        positive = y[i] == 1 or found
        total += (1 - sigmoid(z)) ** gamma * present(z) if positive else sigmoid(z) ** gamma * absent(z)
    return total


def hill(x: Array, y: Array, held: Array, strength: float, margin: float, gamma: float) -> float:
    total = 0.0
    for i in np.ndindex(*x.shape):
        p, z = sigmoid(x[i]), x[i] - margin
        if y[i] == 1:
            total += (1 - sigmoid(z)) ** gamma * present(z)
        elif y[i] == -1:
            total += (strength - p) * p**2
        else:
            total += bce(y[i], x[i])
    return total


def partial_bce(x: Array, y: Array, held: Array, alpha: float, beta: float, gamma: float) -> float:
    total = 0.0
    for b in range(len(x)):
        known = [c for c in range(x.shape[1]) if y[b, c] >= 0]
        if known:
            weight = alpha * (len(known) / x.shape[1]) ** gamma + beta
            total += weight / x.shape[1] * sum(bce(y[b, c], x[b, c]) for c in known)
    return total / len(x)


def left_out(x: Array, y: Array, prior: Any, threshold: float, likely: int) -> set[tuple[int, ...]]:
    """What the selective policy takes for likely present: frequent classes, and the most probable of the batch."""
    unknown = [i for i in np.ndindex(*x.shape) if y[i] == -1]
    top = sorted(unknown, key=lambda i: -x[i])[: likely * len(x)]
    return {i for i in unknown if prior[i[1]] > threshold} | set(top)


def partial_asl(
    x: Array, y: Array, held: Array, gammas: tuple[float, float, float], margin: float, out: set[tuple[int, ...]]
) -> float:
    """``out`` are the unknown entries that the policy leaves out."""
    total = 0.0
    for i in np.ndindex(*x.shape):
        p, q, weight = sigmoid(held[i]), max(sigmoid(held[i]) - margin, 0.0), 0.0
        if y[i] == 1:
            total += (1 - p) ** gammas[0] * present(x[i])
        elif 0 < y[i] < 1:
            total += bce(y[i], x[i])
        elif i not in out:
            weight = q ** gammas[1 if y[i] == 0 else 2]
            total += weight * -math.log(1 - max(sigmoid(x[i]) - margin, 0.0))
    return total


def softmax_rows(similarities: Any, temperature: float) -> Array:
    rows = array(similarities)
    result = np.zeros_like(rows)
    for b in range(len(rows)):
        exps = [math.exp((v - max(rows[b])) / temperature) for v in rows[b]]
        result[b] = [e / sum(exps) for e in exps]
    return result


def vlpl(x: Array, y: Array, held: Array, scores: Array, alpha: float, beta: float, threshold: float, lowest: int) -> float:
    total = known_mean(x, y)
    for b in range(len(x)):
        low = sorted(range(x.shape[1]), key=lambda c: scores[b, c])[:lowest]
        for c in range(x.shape[1]):
            if y[b, c] != -1:
                continue
            if scores[b, c] > threshold:
                total += beta * (0.9 * present(x[b, c]) + 0.1 * absent(x[b, c])) / x.size
            elif c not in low:
                total -= alpha * entropy(x[b, c]) / x.size
    return total


def doubted(p: float, q: float) -> float:
    """(1 - p^q) / q, and its limit at q = 0."""
    return (1 - p**q) / q if q else -math.log(p)


def on_its_way(ramp: Any, share: float) -> float:
    return float(ramp[0] + (ramp[1] - ramp[0]) * share)


def gr_weight(m: Any, p: float) -> float:
    """V of a probability; ``m`` has the settings, and how far both ramps are."""
    center, width = (on_its_way(ramp, float(m.ramps[1])) for ramp in (m.center, m.width))
    return math.exp(-((p - center) ** 2) / (2 * width**2))


def gr_term(m: Any, x: float, held: float) -> float:
    """What an unknown entry gives."""
    slope, offset = (on_its_way(ramp, float(m.ramps[0])) for ramp in (m.slope, m.offset))
    chance = sigmoid(slope * sigmoid(held) + offset)
    terms = chance * doubted(sigmoid(x), m.q_present) + (1 - chance) * doubted(sigmoid(-x), m.q_absent)
    return gr_weight(m, sigmoid(held)) * terms


def gr(m: Any, x: Array, y: Array, held: Array) -> float:
    return known_mean(x, y) + sum(gr_term(m, x[i], held[i]) for i in np.ndindex(*x.shape) if y[i] == -1) / x.size


def gpr(m: Any, x: Array, y: Array, held: Array, scores: Array) -> float:
    total, classes = known_mean(x, y), x.shape[1]
    for b in range(len(x)):
        ranked = sorted(range(classes), key=lambda c: -scores[b, c])
        top = ranked[: math.ceil(m.expected_positives)]
        low = ranked[classes - math.floor(Fraction(str(m.negative_share)) * classes) :]
        for c in range(classes):
            if y[b, c] != -1:
                continue
            weight = gr_weight(m, sigmoid(held[b, c]))
            if c in top and scores[b, c] >= m.threshold:
                least, most = m.weights
                total += min(max(1 - weight, least), most) * bce(m.confidence, x[b, c]) / x.size
            elif c in low:
                total += weight * absent(x[b, c]) / x.size
            else:
                total += gr_term(m, x[b, c], held[b, c]) / x.size
    return total + m.weight_expected * surplus(x, m.expected_positives)


def gce(x: Array, y: Array, q: float) -> float:
    total = 0.0
    for i in np.ndindex(*x.shape):
        if y[i] in (0, 1):
            total += doubted(sigmoid(x[i] if y[i] else -x[i]), q)
        elif y[i] > 0:
            total += bce(y[i], x[i])
    return total / x.size
