"""Some rows of cached features."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trm_pipeline.features.cached import Batch, CachedFeatures, Features, drawn_rows, own_part

__all__ = ["Part"]


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
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        drawn = torch.full((len(self),), view)
        if generator is not None:
            drawn = torch.randint(self.views, (len(self),), generator=generator)
        for index in (own_part(batch, part) for batch in torch.split(order, batch_size)):
            own = (drawn[index], self.rows[index])
            tokens, pooled = (drawn_rows(arrays, *own).to(self.whole.device) for arrays in (self.whole.tokens, self.whole.pooled))
            yield Batch(tokens, pooled, index)
