"""Regions where those of all classes would not fit into memory: of some entries alone, or of all as two factors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import Dims, check_ids

__all__ = ["LEAST", "Entries", "Factored", "check_regions", "region_lengths", "region_products", "take"]

LEAST = 1e-12  # length of a region


class Entries(NamedTuple):
    """Regions at some entries (b, c) of a batch, in the order of their rows and classes: features (n, D), row and own (n,).

    Contrast and bank take these in place of regions (B, C, D): of those they read the known positives and the sure
    pseudo-positives alone.
    """

    features: Tensor
    row: Tensor
    own: Tensor


class Factored(NamedTuple):
    """Regions of all classes, not multiplied out: (B, C, D) = saliency (B, C, N) @ tokens (B, N, D).

    The logits of the matching and the similarities of the labeller take these in place of regions. What they ask of a region
    r = a V is its product with a vector, r . t = a . (V t), and its length, |r|^2 = a V V^T a: all of size N, where a region
    has D. The length comes out right to the rounding of the tokens' own squared, so in float32 no region is taken for shorter
    than some 3e-4 of its longest token.
    """

    saliency: Tensor
    tokens: Tensor


def region_products(regions: Tensor | Factored, directions: Tensor) -> Tensor:
    """(B, C) product of each region with the direction (C, D) of its class."""
    if isinstance(regions, Factored):
        return (regions.saliency * torch.einsum("cd,bnd->bcn", directions, regions.tokens)).sum(dim=-1)
    return torch.einsum("bcd,cd->bc", regions, directions)


def region_lengths(regions: Tensor | Factored) -> Tensor:
    """(B, C) length of each region, at least 1e-12."""
    if isinstance(regions, Factored):
        gram = torch.bmm(regions.tokens, regions.tokens.mT)
        square = (torch.bmm(regions.saliency, gram) * regions.saliency).sum(dim=-1)
        # What is left of a region that its tokens cancel is rounding, which must not be stretched to length one.
        rounding = torch.finfo(gram.dtype).eps * gram.detach().diagonal(dim1=1, dim2=2).amax(dim=1, keepdim=True)
        return torch.maximum(square, rounding.clamp(min=LEAST**2)).sqrt()
    length: Tensor = torch.linalg.vector_norm(regions, dim=-1).clamp(min=LEAST)
    return length


def take(regions: Tensor | Entries, mask: Tensor) -> Tensor:
    """Regions at the entries of a mask (B, C), one after another: (n, D)."""
    return regions.features[mask[regions.row, regions.own]] if isinstance(regions, Entries) else regions[mask]


def check_regions(
    dims: Dims,
    regions: Tensor | Entries | Factored,
    form: type[Entries | Factored] = Entries,
    *,
    needed: Tensor | None = None,
    hint: str = "",
) -> None:
    """Check shapes of a tensor, or of the one ``form`` that may stand in its place; and, where a mask of the ``needed`` entries
    is given, that they are in order (waits for the device)."""
    if isinstance(regions, Factored) and form is Factored:
        dims.check("regions.saliency", regions.saliency, "B C N", hint=hint)
        dims.check("regions.tokens", regions.tokens, "B N D")
        return
    if not isinstance(regions, Entries) or form is not Entries:
        dims.check("regions", regions, "B C D", hint=hint)
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
