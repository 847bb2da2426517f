"""Scores of the neighbour rule."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tests.helpers.oracles.numbers import Array, array, unit


def neighbour_scores(
    features: Any, scores: Any, neighbours: int, temperature: float, *, known: Any = None, steps: int = 1
) -> Array:
    """What the k most similar regions of a class in other images say, by sorting; known entries say the same at every step."""
    f, said = array(features), array(scores)
    for _ in range(steps):
        out = said.copy()
        for i, c in np.ndindex(*said.shape):
            others = [(float(unit(f[i, c]) @ unit(f[j, c])), j) for j in range(len(f)) if j != i]
            near = sorted(others, reverse=True)[:neighbours]
            if near:
                mass = [math.exp(similarity / temperature) for similarity, _ in near]
                out[i, c] = sum(m * said[j, c] for m, (_, j) in zip(mass, near, strict=True)) / sum(mass)
        said = out.copy() if known is None else np.where(np.asarray(known), array(scores), out)
    return out
