"""What a few seeds can tell of the difference between two methods."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats


class Paired(NamedTuple):
    """A mean difference over n seeds, its 95 % interval by Student's t, and two-sided p of t and of all sign flips."""

    n: int
    mean: float
    low: float
    high: float
    t_p: float
    flip_p: float


def paired(differences: Sequence[float]) -> Paired:
    """Of differences between two methods on the same seeds, at least two of them."""
    n = len(differences)
    if n < 2:
        raise ValueError(f"a spread needs at least 2 seeds, got {n}")
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(n)
    half = float(stats.t.ppf(0.975, n - 1)) * error
    t_p = float(2 * stats.t.sf(abs(mean / error), n - 1)) if error else float(mean == 0)
    return Paired(n, mean, mean - half, mean + half, t_p, sign_flip_p(differences))


def sign_flip_p(differences: Sequence[float]) -> float:
    """Share of the 2^n sign patterns whose sum is as far from 0 as that of the differences, which is at least 2 / 2^n.

    Where neither method is better, each seed's difference could as well have had the other sign.
    """
    # Rounded: equal sums are told apart by their last digits otherwise.
    flips = stats.permutation_test(
        (differences,),
        lambda flipped, axis: flipped.sum(axis).round(9),
        permutation_type="samples",
        n_resamples=2 ** len(differences),
    )
    return float(flips.pvalue)
