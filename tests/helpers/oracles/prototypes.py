"""The prototype of each class, and how similar a region is to it."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.helpers.oracles.numbers import Array, array, softmax, unit

# Prototypes -----------------------------------------------------------------------------------------------------------


class Bank:
    """Prototypes after any number of updates."""

    def __init__(self, init: Any, momentum: float = 0.99, text_momentum: float = 0.99) -> None:
        self.visual = np.array([unit(row) for row in array(init)])
        self.text = self.visual.copy()
        self.count, self.text_count = [0] * len(self.text), 0
        self.momentum, self.text_momentum = momentum, text_momentum

    @property
    def seen(self) -> list[bool]:
        return [n > 0 for n in self.count]

    def update(self, regions: Any, targets: Any, weights: Any = None, text: Any = None) -> None:
        z, y = array(regions), array(targets)
        w = np.ones_like(y) if weights is None else array(weights)
        for c in range(len(self.count)):
            own = [b for b in range(len(y)) if y[b, c] == 1 and w[b, c] > 0]
            if own:
                mean = sum(w[b, c] * unit(z[b, c]) for b in own) / sum(w[b, c] for b in own)
                m = min(self.momentum, self.count[c] / (self.count[c] + 1))
                self.visual[c] = unit(m * self.visual[c] + (1 - m) * mean)
                self.count[c] += 1
        if text is not None:
            m = min(self.text_momentum, self.text_count / (self.text_count + 1))
            for c, row in enumerate(array(text)):
                self.text[c] = unit(m * self.text[c] + (1 - m) * unit(row))
            self.text_count += 1


def similarities(
    regions: Any, visual: Any, text: Any, seen: Any, temperature_visual: float = 0.07, temperature_text: float = 0.02
) -> tuple[Array, Array, Array, Array]:
    """Intra visual, intra text, inter visual (over seen classes, 0 for the others), inter text."""
    z, v, t = array(regions), [unit(row) for row in array(visual)], [unit(row) for row in array(text)]
    out = tuple(np.zeros(z.shape[:2]) for _ in range(4))
    classes = range(len(v))
    known = [c for c in classes if seen is None or bool(seen[c])]
    for b, c in np.ndindex(*z.shape[:2]):
        f = unit(z[b, c])
        out[0][b, c], out[1][b, c] = f @ v[c], f @ t[c]
        if c in known:
            out[2][b, c] = softmax([float(f @ v[k]) / temperature_visual for k in known])[known.index(c)]
        out[3][b, c] = softmax([float(f @ t[k]) / temperature_text for k in classes])[c]
    return out[0], out[1], out[2], out[3]
