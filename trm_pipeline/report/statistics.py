"""What a few seeds can tell of the difference between two methods."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Paired", "paired", "sign_flip_p", "t_quantile", "t_two_sided_p"]


class Paired(NamedTuple):
    """A mean difference over n seeds, its interval by Student's t, and two-sided p of t and of all sign flips."""

    n: int
    mean: float
    low: float
    high: float
    t_p: float
    flip_p: float


def paired(differences: Sequence[float], *, level: float = 0.95) -> Paired:
    """Of differences between two methods on the same seeds, at least two of them."""
    n = len(differences)
    if n < 2:
        raise ValueError(f"a spread needs at least 2 seeds, got {n}")
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(n)
    half = t_quantile(0.5 + level / 2, n - 1) * error
    t_p = t_two_sided_p(mean / error, n - 1) if error else float(mean == 0)
    return Paired(n, mean, mean - half, mean + half, t_p, sign_flip_p(differences))


def sign_flip_p(differences: Sequence[float]) -> float:
    """Share of the 2^n sign patterns whose sum is as far from 0 as that of the differences, which is at least 2 / 2^n.

    Where neither method is better, each seed's difference could as well have had the other sign.
    """
    total = abs(sum(differences))
    slack = 1e-9 * sum(map(abs, differences))
    signs = itertools.product((1, -1), repeat=len(differences))
    sums = [abs(sum(s * d for s, d in zip(pattern, differences, strict=True))) for pattern in signs]
    return sum(value >= total - slack for value in sums) / len(sums)


def t_two_sided_p(t: float, freedom: int) -> float:
    """P(|T| >= |t|) of Student's t: the regularised incomplete beta function at f / (f + t^2)."""
    return _incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5)


def t_quantile(share: float, freedom: int) -> float:
    """The value below which T lies with this probability, by bisection."""
    if share < 0.5:
        return -t_quantile(1 - share, freedom)
    low, high = 0.0, 1.0
    while 1 - t_two_sided_p(high, freedom) / 2 < share:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - t_two_sided_p(middle, freedom) / 2 < share else (low, middle)
    return (low + high) / 2


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """I_x(a, b), by the continued fraction where it converges fast."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    # Lentz's way from the front: c and d are the last ratios of numerators and of denominators.
    tiny, c, d = 1e-300, 1.0, 1 / max(1 - (a + b) * x / (a + 1), 1e-300)
    value = d
    for m in range(1, 1000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + term * d or tiny)
            c = 1 + term / c or tiny
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * value
