"""Regions of some entries alone, where those of all classes would not fit into memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import Dims, check_ids


class Entries(NamedTuple):
    """Regions at some entries (b, c) of a batch, in the order of their rows and classes: features (n, D), row and own (n,).

    Contrast and bank take these in place of regions (B, C, D): of those they read the known positives and the sure
    pseudo-positives alone.
    """

    features: Tensor
    row: Tensor
    own: Tensor


def take(regions: Tensor | Entries, mask: Tensor) -> Tensor:
    """Regions at the entries of a mask (B, C), one after another: (n, D)."""
    return regions.features[mask[regions.row, regions.own]] if isinstance(regions, Entries) else regions[mask]


def check_regions(dims: Dims, regions: Tensor | Entries, *, needed: Tensor | None = None) -> None:
    """Check shapes of regions (B, C, D) or entries; and, where a mask of the ``needed`` entries is given, that they are in order
    (waits for the device)."""
    if not isinstance(regions, Entries):
        dims.check("regions", regions, "B C D")
        return
    dims.check("regions.features", regions.features, "n D")
    dims.check("regions.row", regions.row, "n", floating=False)
    dims.check("regions.own", regions.own, "n", floating=False)
    check_ids(dims.owner, regions.row, name="regions.row")
    check_ids(dims.owner, regions.own, name="regions.own")
    if needed is not None and not torch.compiler.is_compiling():
        places = regions.row * needed.shape[1] + regions.own
        if bool((places.diff() <= 0).any()):
            raise ValueError(f"{dims.owner}: regions must stand in the order of their rows and classes, each entry once")
        held = torch.zeros_like(needed)
        held[regions.row, regions.own] = True
        missing = int((needed & ~held).sum())
        if missing:
            raise ValueError(
                f"{dims.owner}: regions must hold every entry that is read, got {len(regions.own)} and {missing} missing; "
                "pool them with RegionPooler.entries(prepared, mask)"
            )
