"""Log-sum-exp of rows with all keys but themselves, and with classes, in memory linear in the number of rows.

Written out, N anchors need several N x N matrices: similarities, mask, softmax and its gradient. If rows and keys are the
same, a block of rows is formed and dropped, and formed again for the gradient. That costs nothing, since similarities are
symmetric: only keys from the block on are needed, for the rows and, transposed, for the keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._fused import may_fuse
from .._precision import full_precision

# Stands for minus infinity inside a softmax: exp() of it is 0, and a row of nothing else stays finite.
MASKED = -1e9

# Rows of a block of the symmetric sum; up to half as many again take the plain form, which is no slower there.
_ROWS = 256

# Pairs held at once (64 MiB of float32): more are formed in blocks of rows, again for the gradient, for memory alone. It takes
# half as long again, and a quarter of the peak or less.
BLOCK = 1 << 24

# From here on exp(1 / temperature), the largest that unit vectors reach, is small enough in float32 for sums without the
# maximum of each row taken out first. Below 2 / 100: the scale of CLIP, the exponential of a parameter, is 100.00001.
SAFE_TEMPERATURE = 0.019


def log_sum_of_others(rows: Tensor, keys: Tensor, valid: Tensor | None, first: int, temperature: float | Tensor) -> Tensor:
    """(n,) the log of the sum of exp(row . key / temperature) over the keys but a row itself, all of them unit vectors.

    Args:
        rows: (n, D). keys: (M, D), the rows themselves or those of all ranks.
        valid: (M,) bool, the keys that count; None for all.
        first: the key that is row 0; row i leaves out key first + i.
        temperature: a learned one, a tensor, gets its gradient too.
    """
    if not may_fuse():
        return _plain(rows, keys, valid, first, temperature)
    alone = keys is rows and valid is None and not isinstance(temperature, Tensor) and temperature >= SAFE_TEMPERATURE
    if alone and len(rows) > 3 * _ROWS // 2:
        result: Tensor = _LogSumOfOthers.apply(rows, temperature)
        return result
    place = torch.arange(first, first + len(rows), device=rows.device)
    return _in_blocks(lambda part, at: _at(part, keys, valid, at, temperature), len(keys), rows, place)


def _plain(rows: Tensor, keys: Tensor, valid: Tensor | None, first: int, temperature: float | Tensor) -> Tensor:
    """The equation as it reads, with all rows at once."""
    return _at(rows, keys, valid, torch.arange(first, first + len(rows), device=rows.device), temperature)


def _at(rows: Tensor, keys: Tensor, valid: Tensor | None, place: Tensor, temperature: float | Tensor) -> Tensor:
    """The same of rows that are the keys at ``place``."""
    if not len(keys):
        return rows.sum(dim=1)
    excluded = torch.arange(len(keys), device=rows.device) == place[:, None]
    if valid is not None:
        excluded = excluded | ~valid
    return torch.logsumexp((rows @ keys.T / temperature).masked_fill(excluded, MASKED), dim=1)


def _in_blocks(function: Callable[..., Tensor], keys: int, *rows: Tensor) -> Tensor:
    """``function`` of the rows, all at once or in blocks of at most ``BLOCK`` pairs with the keys."""
    step = max(1, BLOCK // max(1, keys))
    # Without a loop where it fits, whose length a compiled graph would fix to this batch size.
    if len(rows[0]) <= step:
        return function(*rows)
    call = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False) if may_fuse() else function
    return torch.cat([call(*parts) for parts in zip(*(torch.split(x, step) for x in rows), strict=True)])


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


def rows_against_classes(
    rows: Tensor, keys: Tensor, positive: Tensor, temperature: float, allowed: Tensor | None = None
) -> Tensor:
    """-log softmax over the classes of the keys at each row's own class; classes not allowed leave the denominator."""

    def plain(rows: Tensor, positive: Tensor) -> Tensor:
        logits = rows @ keys.T / temperature
        if allowed is not None:
            logits = logits.masked_fill(~allowed, MASKED)
        return torch.logsumexp(logits, dim=1) - logits.gather(1, positive[:, None]).squeeze(1)

    return _in_blocks(plain, len(keys), rows, positive) if may_fuse() else plain(rows, positive)


# Rows and classes whose similarities are held at once where nothing is kept of them (2 MiB of float32), and the pairs from
# which on that pays: as many take 0.8 of the time and a quarter of the memory.
_TILE, _TILED = (512, 1024), 1 << 18


def log_sum_over_classes(rows: Tensor, lengths: Tensor, keys: Tensor, allowed: Tensor, temperature: float) -> Tensor:
    """(n,) the log of the sum over the classes allowed of exp(row . key / (length temperature)), the cosines at most 1.

    Many pairs without gradient tile by tile, each formed in cache and dropped: what is left to pay is the product itself.
    """
    scale = (lengths * temperature)[:, None]
    learned = torch.is_grad_enabled() and any(x.requires_grad for x in (rows, lengths, keys))
    if not may_fuse() or learned or temperature < SAFE_TEMPERATURE or len(rows) * len(keys) < _TILED:

        def plain(rows: Tensor, scale: Tensor) -> Tensor:
            return torch.logsumexp((rows @ keys.T / scale).masked_fill(~allowed, MASKED), dim=1)

        return _in_blocks(plain, len(keys), rows, scale)
    keys = keys[allowed]
    sums = rows.new_zeros(len(rows))
    for total, part, by in zip(*(torch.split(x, _TILE[0]) for x in (sums, rows, scale)), strict=True):
        part = part / by
        for some in torch.split(keys, _TILE[1]):
            total += (part @ some.T).exp_().sum(dim=1)
    return torch.where(sums > 0, sums, 1.0).log()  # where no class is allowed nobody reads it
