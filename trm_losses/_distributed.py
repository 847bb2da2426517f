"""Sums and gathers over ranks, with gradients, so that DDP's average over ranks equals one process.

A loss that is normalised by ``count_per_rank(count)`` and whose rows are local is, after DDP has averaged the gradients,
the loss of one process over the joined batch. All communication is in the forward pass. A backward pass that one rank
leaves out, or in which one of them has nothing to do, keeps no other waiting.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar, Union

import torch
import torch.distributed as dist
from torch import Tensor, nn

P = ParamSpec("P")
T = TypeVar("T")
Distributed = Union[bool, "dist.ProcessGroup"]


class _Kept:
    """A process group in the state of a module: its copy is itself, and no file holds it."""

    def __init__(self, group: Any, owner: str) -> None:
        self.group, self.owner = group, owner

    def __reduce__(self) -> Any:
        raise TypeError(f"{self.owner}: distributed must be True or False to be pickled, got a process group; save state_dict()")

    def __deepcopy__(self, memo: dict[int, Any]) -> _Kept:
        return self


class DistributedModule(nn.Module):
    """A module that may have ``distributed``: its copies reduce over the same group, which cannot be copied itself."""

    def extra_repr(self) -> str:
        """The arguments of the constructor, those of its bases too, that are kept under their names, and the sizes they have."""
        kinds = type(self).__mro__[: type(self).__mro__.index(DistributedModule)]
        names = ["num_samples", "num_classes", *(name for kind in kinds for name in inspect.signature(kind).parameters)]
        told = {name: vars(self).get(name) for name in names if name not in ("distributed", "validate")}
        return ", ".join(f"{name}={value!r}" for name, value in told.items() if value is not None)

    def __getstate__(self) -> dict[str, Any]:
        base: Any = super()  # torch has no types here
        state: dict[str, Any] = base.__getstate__()
        group = state.get("distributed", False)
        return state if isinstance(group, bool) else {**state, "distributed": _Kept(group, type(self).__name__)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        kept = state.get("distributed")
        state = {**state, "distributed": kept.group} if isinstance(kept, _Kept) else state
        base: Any = super()
        base.__setstate__(state)


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


def sum_per_rank(total: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """A rank's sum times the number of ranks: DDP's average is then the sum over the joined batch."""
    return total if group is None else total * dist.get_world_size(group)


def joined_sum(total: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over ranks as a value that a loss may be any function of; its gradient is that of :func:`sum_per_rank`."""
    if group is None:
        return total
    own = sum_per_rank(total, group)
    return sum_over_ranks(total, group) + (own - own.detach())


class Joined(NamedTuple):
    """Rows of all ranks in rank order, padded to the longest rank: a constant, but for :func:`with_gradients_of_ranks`."""

    rows: Tensor  # (total, ...)
    real: Tensor  # (total,) bool, those that are not padding
    first: int  # where this rank's own rows begin


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Joined:
    """Rows (n, ...) of all ranks, of which there may be different numbers; with one process ``rows`` themselves."""
    if group is None:
        return Joined(rows, torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device), 0)
    return uncompiled(_gather)(rows, group)  # how many rows there are is known when it runs


def uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """The function as it is, also between compiled parts."""
    if not torch.compiler.is_compiling():
        return function  # torch.compiler.disable would load the compiler
    plain: Callable[P, T] = torch.compiler.disable(function)
    return plain


def _gather(rows: Tensor, group: dist.ProcessGroup) -> Joined:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    # In the same message: whether the rows learn. Where those of any rank do, each rank owes it a gradient.
    sizes = torch.zeros(world, 2, dtype=torch.int64, device=rows.device)
    sizes[rank, 0], sizes[rank, 1] = rows.shape[0], rows.requires_grad and torch.is_grad_enabled()
    dist.all_reduce(sizes, group=group)
    (longest, learns), sizes = sizes.amax(dim=0).tolist(), sizes[:, 0]
    padding = rows.new_zeros((longest - rows.shape[0], *rows.shape[1:]))
    padded = torch.cat([rows.detach(), padding])
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded, group=group)
    real = torch.arange(longest, device=rows.device)[None] < sizes[:, None]
    return Joined(torch.cat(parts).requires_grad_(bool(learns)), real.flatten(), rank * longest)


def with_gradients_of_ranks(
    losses: Sequence[Tensor], rows: Tensor, joined: Joined, group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Losses that read joined rows, with the gradient that the same losses of all ranks have for this rank's own rows.

    What a rank's loss asks of the rows of others is computed here and sent to them, so that nothing is left to be sent in
    the backward pass. It is taken to enter every rank's total with the same factor, and has no second derivative.

    Args:
        losses: scalars, as many on every rank. joined: what :func:`gather_rows` made of the rows.
    """
    if group is None or not joined.rows.requires_grad:
        return list(losses)
    asked = torch.zeros(len(losses), *joined.rows.shape, dtype=joined.rows.dtype, device=joined.rows.device)
    for gradient, loss in zip(asked, losses, strict=True):
        if loss.requires_grad:  # else it is no part of what is trained
            (found,) = torch.autograd.grad(loss, joined.rows, retain_graph=True, allow_unused=True)
            if found is not None:
                gradient.copy_(found)
    own = sum_over_ranks(asked, group)[:, joined.first : joined.first + rows.shape[0]]
    return [_WithGradient.apply(loss, rows, gradient) for loss, gradient in zip(losses, own, strict=True)]


class _WithGradient(torch.autograd.Function):
    """The first argument, with this gradient by the second."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, rows: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad_output, grad_output * ctx.saved_tensors[0], None
