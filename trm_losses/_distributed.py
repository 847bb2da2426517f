"""Sums and gathers over ranks, with gradients, so that DDP's average over ranks equals one process.

A loss that is normalised by ``count_per_rank(count)`` and whose rows are local is, after DDP has averaged the gradients,
the loss of one process over the joined batch.
"""

from __future__ import annotations

from typing import Union

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


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, int]:
    """Rows (n, ...) of all ranks in rank order, with gradient; ranks may hold different numbers of rows.

    Returns:
        The joined rows (padded to the longest rank), a mask (total,) of the rows that are real, and the position at
        which this rank's own rows begin.
    """
    if group is None:
        return rows, torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device), 0
    from torch.distributed.nn.functional import all_gather

    rank, world = dist.get_rank(group), dist.get_world_size(group)
    sizes = torch.zeros(world, dtype=torch.int64, device=rows.device)
    sizes[rank] = rows.shape[0]
    dist.all_reduce(sizes, group=group)
    longest = int(sizes.max())
    padding = rows.new_zeros((longest - rows.shape[0], *rows.shape[1:]))
    padded = torch.cat([rows, padding])
    joined = torch.cat(all_gather(padded, group=group))  # type: ignore[no-untyped-call]
    real = torch.arange(longest, device=rows.device)[None] < sizes[:, None]
    return joined, real.flatten(), rank * longest
