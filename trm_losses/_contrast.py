"""Log-sum-exp of rows with all keys but themselves, in memory linear in their number.

Written out, N anchors need several N x N matrices: similarities, mask, softmax and its gradient. Here a block of rows at a
time is formed and dropped, and formed again for the gradient. Where rows and keys are the same, that costs nothing:
similarities are symmetric, so that only keys from the block on are needed, for the rows and, transposed, for the keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ._fused import may_fuse
from ._precision import full_precision

__all__ = ["MASKED", "SAFE_TEMPERATURE", "log_sum_of_others", "unit_rows"]

# Stands for minus infinity inside a softmax: exp() of it is 0, and a row of nothing else stays finite.
MASKED = -1e9

# Rows held at once; so many or fewer take the plain form, which is no slower there.
_ROWS = 256

# From here on exp(1 / temperature), the largest that unit vectors reach, is small enough in float32 for sums without the
# maximum of each row taken out first. Below 2 / 100: the scale of CLIP, the exponential of a parameter, is 100.00001.
SAFE_TEMPERATURE = 0.019

_LEAST = 1e-12  # length of a row


def log_sum_of_others(
    rows: Tensor, keys: Tensor, valid: Tensor | None, first: int | None, temperature: float | Tensor
) -> Tensor:
    """(n,) the log of the sum of exp(row . key / temperature) over the keys, all of them unit vectors.

    Args:
        rows: (n, D). keys: (M, D), the rows themselves or those of all ranks.
        valid: (M,) bool, the keys that count; None for all.
        first: the key that is row 0; row i leaves out key first + i, which is itself. None where no row is among the keys.
        temperature: a learned one, a tensor, gets its gradient too.
    """
    if not may_fuse() or rows.shape[0] <= _ROWS:
        return _plain(rows, keys, valid, first, temperature)
    if keys is rows and valid is None and not isinstance(temperature, Tensor) and temperature >= SAFE_TEMPERATURE:
        result: Tensor = _LogSumOfOthers.apply(rows, temperature)
        return result
    parts = [
        checkpoint(_plain, part, keys, valid, place, temperature, use_reentrant=False, preserve_rng_state=False)
        for i, part in enumerate(torch.split(rows, _ROWS))
        for place in [None if first is None else first + i * _ROWS]
    ]
    return torch.cat(parts)


def _plain(rows: Tensor, keys: Tensor, valid: Tensor | None, first: int | None, temperature: float | Tensor) -> Tensor:
    """The equation as it reads, with all rows at once."""
    if not len(keys):
        return rows.sum(dim=1)
    if first is None:
        logits = rows @ keys.T / temperature
        return torch.logsumexp(logits if valid is None else logits.masked_fill(~valid, MASKED), dim=1)
    place = torch.arange(keys.shape[0], device=rows.device)
    excluded = place == torch.arange(first, first + rows.shape[0], device=rows.device)[:, None]
    if valid is not None:
        excluded = excluded | ~valid
    return torch.logsumexp((rows @ keys.T / temperature).masked_fill(excluded, MASKED), dim=1)


class _LogSumOfOthers(torch.autograd.Function):
    """The same with the rows as keys: two products of N x N x D where autograd takes three."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, temperature: float) -> Tensor:
        total = rows.new_zeros(rows.shape[0])
        for start in range(0, rows.shape[0], _ROWS):
            pairs = _block(rows, start, temperature)
            end = start + pairs.shape[0]
            total[start:end] += pairs.sum(dim=1)
            total[end:] += pairs[:, end - start :].sum(dim=0)
        ctx.temperature = temperature
        ctx.save_for_backward(rows, total)
        return total.log()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        rows, total = ctx.saved_tensors
        # Who calls backward inside autocast must not lose the precision of the forward pass.
        with full_precision(rows):
            if torch.is_grad_enabled():  # create_graph=True: what is written out below has no derivative of its own
                log_sum = _plain(rows, rows, None, 0, ctx.temperature)
                return torch.autograd.grad(log_sum, rows, grad_output, create_graph=True)[0], None
            share = grad_output / (total * ctx.temperature)
            gradient = torch.zeros_like(rows)
            for start in range(0, rows.shape[0], _ROWS):
                pairs = _block(rows, start, ctx.temperature)
                end = start + pairs.shape[0]
                pairs *= share[start:end, None] + share[start:]  # a pair (i, j) is in the sums of i and of j
                gradient[start:end].addmm_(pairs, rows[start:])
                gradient[end:].addmm_(pairs[:, end - start :].T, rows[start:end])
        return gradient, None


def _block(rows: Tensor, start: int, temperature: float) -> Tensor:
    """exp(row . key / temperature) of ``_ROWS`` rows from ``start`` with the rows from ``start`` on, 0 with itself."""
    part = rows[start : start + _ROWS]
    pairs = torch.addmm(part.new_zeros(()), part, rows[start:].T, beta=0, alpha=1 / temperature).exp_()
    pairs[:, : part.shape[0]].fill_diagonal_(0)
    return pairs


def unit_rows(rows: Tensor) -> Tensor:
    """Rows of length one (a zero row stays zero), as ``F.normalize`` gives them; half the memory in the backward pass."""
    if not may_fuse():
        return rows / _length(rows)
    result: Tensor = _UnitRows.apply(rows)[0]
    return result


def _length(rows: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp(min=_LEAST)
    return length


class _UnitRows(torch.autograd.Function):
    """Keeps what it returns and not the rows. The length is returned for second derivatives, which pass through it."""

    @staticmethod
    def forward(rows: Tensor) -> tuple[Tensor, Tensor]:
        length = _length(rows)
        return rows / length, length

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, by_unit: Tensor | None, by_length: Tensor | None) -> Tensor | None:
        unit, length = ctx.saved_tensors
        gradient = None if by_length is None else by_length * unit
        if by_unit is not None:
            along = (unit * by_unit).sum(dim=-1, keepdim=True)
            across = torch.addcmul(by_unit, unit, along, value=-1) / length
            across = across * (length > _LEAST)  # a row of zeros has no direction; by the clamp it would have a huge slope
            gradient = across if gradient is None else gradient + across
        return gradient
