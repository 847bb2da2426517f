"""Regions against one direction a class, over the length of the region, with one tensor as large as the regions.

Autograd keeps and adds two: the gradient through the product and that through the length. Written out they are one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._entries import LEAST, Factored, region_lengths, region_products
from ._fused import may_fuse
from ._precision import full_precision

__all__ = ["region_cosine"]


def region_cosine(regions: Tensor | Factored, directions: Tensor) -> Tensor:
    """(B, C) r . t / |r| of regions (B, C, D) and directions (C, D), which are taken as they are."""
    if isinstance(regions, Factored) or not may_fuse():
        return _plain(regions, directions)
    result: Tensor = _RegionCosine.apply(regions, directions)[0]
    return result


def _plain(regions: Tensor | Factored, directions: Tensor) -> Tensor:
    """The equation as it reads."""
    return region_products(regions, directions) / region_lengths(regions)


class _RegionCosine(torch.autograd.Function):
    @staticmethod
    def forward(regions: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        length = region_lengths(regions)
        return region_products(regions, directions) / length, length

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        cosine, length = output
        ctx.mark_non_differentiable(length)
        ctx.save_for_backward(*inputs, cosine, length)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None]:
        regions, directions, cosine, length = ctx.saved_tensors
        # Who calls backward inside autocast must not lose the precision of the forward pass.
        with full_precision(regions):
            if torch.is_grad_enabled():  # create_graph=True: what was kept is not on the graph
                cosine, length = _plain(regions, directions), region_lengths(regions)
            # dc/dt = r / |r|, and dc/dr = (t - c r / |r|) / |r|.
            share = grad_output / length * (length > LEAST)  # a region of zeros has no direction, and gets no gradient
            by_region = by_direction = None
            if ctx.needs_input_grad[0]:
                by_region = regions * (-share * cosine / length)[..., None]
                by_region.addcmul_(directions, share[..., None])
            if ctx.needs_input_grad[1]:
                by_direction = torch.einsum("bc,bcd->cd", share, regions)
        return by_region, by_direction
