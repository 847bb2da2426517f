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

from .._fused import may_fuse
from .._precision import full_precision

__all__ = ["BLOCK", "MASKED", "SAFE_TEMPERATURE", "log_sum_of_others", "log_sum_over_classes", "rows_against_classes"]


# Stands for minus infinity inside a softmax: exp() of it is 0, and a row of nothing else stays finite.
MASKED = -1e9

# Rows held at once; so many or fewer take the plain form, which is no slower there.
_ROWS = 256

# From here on exp(1 / temperature), the largest that unit vectors reach, is small enough in float32 for sums without the
# maximum of each row taken out first. Below 2 / 100: the scale of CLIP, the exponential of a parameter, is 100.00001.
SAFE_TEMPERATURE = 0.019


def log_sum_of_others(rows: Tensor, keys: Tensor, valid: Tensor | None, first: int | None, temperature: float | Tensor) -> Tensor:
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


def _block(rows: Tensor, start: int, temperature: float) -> Tensor:
    """exp(row . key / temperature) of ``_ROWS`` rows from ``start`` with the rows from ``start`` on, 0 with itself."""
    part = rows[start : start + _ROWS]
    pairs = torch.addmm(part.new_zeros(()), part, rows[start:].T, beta=0, alpha=1 / temperature).exp_()
    pairs[:, : part.shape[0]].fill_diagonal_(0)
    return pairs


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


# Largest block of intermediate values held at once, in elements (64 MiB of float32).
BLOCK = 1 << 24

# Rows and classes whose similarities are held at once where nothing is kept of them (2 MiB of float32).
_TILE = 512, 1024


def rows_against_classes(
    rows: Tensor, keys: Tensor, positive: Tensor, temperature: float, allowed: Tensor | None = None
) -> Tensor:
    """-log softmax over the classes of the keys at each row's own class; classes not allowed leave the denominator."""
    if may_fuse() and len(rows) > _TILE[0] and not _needs_gradient(rows, keys):
        own = torch.einsum("nd,nd->n", rows, keys[positive])
        return log_sum_over_classes(rows, rows.new_ones(len(rows)), keys, allowed, temperature) - own / temperature
    if len(keys) > len(rows):  # a block of rows at a time
        own = (rows * keys[positive]).sum(dim=1) / temperature
        return log_sum_of_others(rows, keys, allowed, None, temperature) - own
    step = max(1, BLOCK // max(1, len(keys)))
    if not may_fuse() or len(rows) <= step:
        return _plain_against_classes(rows, keys, positive, temperature, allowed)
    parts = []
    for part, own in zip(torch.split(rows, step), torch.split(positive, step), strict=True):
        given = (part, keys, own, temperature, allowed)
        parts.append(checkpoint(_plain_against_classes, *given, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(parts)


def _plain_against_classes(rows: Tensor, keys: Tensor, positive: Tensor, temperature: float, allowed: Tensor | None) -> Tensor:
    """The same with all rows at once, as the equation reads."""
    logits = rows @ keys.T / temperature
    if allowed is not None:
        logits = logits.masked_fill(~allowed, MASKED)
    return torch.logsumexp(logits, dim=1) - logits.gather(1, positive[:, None]).squeeze(1)


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def log_sum_over_classes(rows: Tensor, lengths: Tensor, keys: Tensor, allowed: Tensor | None, temperature: float) -> Tensor:
    """(n,) the log of the sum over the classes allowed of exp(row . key / (length temperature)), the cosines at most 1.

    Tile by tile where there is no gradient, each formed in cache and dropped: what is left to pay is the product itself.
    """
    scale = (lengths * temperature)[:, None]
    if _needs_gradient(rows, lengths, keys) or not may_fuse() or temperature < SAFE_TEMPERATURE:
        step = max(1, BLOCK // max(1, len(keys)))
        # Without a loop where it fits, whose length a compiled graph would fix to this batch size.
        whole = len(rows) <= step
        pairs = [(rows, scale)] if whole else zip(torch.split(rows, step), torch.split(scale, step), strict=True)
        parts = []
        for part, by in pairs:
            logits = part @ keys.T / by
            parts.append(torch.logsumexp(logits if allowed is None else logits.masked_fill(~allowed, MASKED), dim=1))
        return torch.cat(parts)
    keys = keys if allowed is None else keys[allowed]
    sums = rows.new_zeros(len(rows))
    for total, part, by in zip(*(torch.split(x, _TILE[0]) for x in (sums, rows, scale)), strict=True):
        part = part / by
        for some in torch.split(keys, _TILE[1]):
            total += (part @ some.T).exp_().sum(dim=1)
    return torch.where(sums > 0, sums, 1.0).log()  # where no class is allowed nobody reads it
