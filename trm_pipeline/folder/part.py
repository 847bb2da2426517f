"""Some rows of cached features."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trm_pipeline.features.cached import Batch, CachedFeatures, Features


class Part(Features):
    """Some images of cached features on a grid (h, w) of tokens, as if there were no others."""

    def __init__(self, whole: CachedFeatures, rows: Tensor, grid: tuple[int, int]) -> None:
        self.whole, self.rows, self.grid = whole, rows, grid

    def only(self, rows: Tensor) -> Part:
        """Some of these: the places of a mask (n,), or places."""
        return Part(self.whole, self.rows[rows], self.grid)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def views(self) -> int:
        """See :class:`Features`."""
        return self.whole.views

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None, *, view: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Iterator[Batch]:
        """See :class:`Features`."""
        return self.whole.batches_of(self.rows, batch_size, generator, view=view, part=part)
