"""Sums and gathers over ranks, with gradients, so that DDP's average over ranks equals one process.

A loss that is normalised by ``count_per_rank(count)`` and whose rows are local is, after DDP has averaged the gradients,
the loss of one process over the joined batch.
"""

from __future__ import annotations

from typing import Any, Union

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Distributed", "count_per_rank", "gather_rows", "resolve_group", "sum_over_ranks"]

Distributed = Union[bool, "dist.ProcessGroup"]


def resolve_group(distributed: Distributed) -> dist.ProcessGroup | None:
    """The process group to reduce over, or None where there is only this process."""
    if distributed is False or not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if distributed is True else distributed
    return group if dist.get_world_size(group) > 1 else None


def sum_over_ranks(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of ``value`` over ranks, without gradient; ``value`` itself where there is one process."""
    if group is None:
        return value
    total = value.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def count_per_rank(count: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """A normaliser's sum over ranks divided by their number: DDP's average then divides by the joined count."""
    return count if group is None else sum_over_ranks(count, group) / dist.get_world_size(group)


class _Gather(torch.autograd.Function):
    """Rows of all ranks, equally many of each; a row's gradient is the sum of what every rank has for it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, rows.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        total = sum_over_ranks(grad_output, ctx.group)
        return total.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, int]:
    """Rows (n, ...) of all ranks in rank order, with gradient; ranks may hold different numbers of rows.

    Returns:
        The joined rows (padded to the longest rank), a mask (total,) of the rows that are real, and the position at
        which this rank's own rows begin.
    """
    if group is None:
        return rows, torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device), 0
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    sizes = torch.zeros(world, dtype=torch.int64, device=rows.device)
    sizes[rank] = rows.shape[0]
    dist.all_reduce(sizes, group=group)
    longest = int(sizes.max())
    padding = rows.new_zeros((longest - rows.shape[0], *rows.shape[1:]))
    joined: Tensor = _Gather.apply(torch.cat([rows, padding]), group)
    real = torch.arange(longest, device=rows.device)[None] < sizes[:, None]
    return joined, real.flatten(), rank * longest
