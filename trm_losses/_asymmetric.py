"""The asymmetric loss summed in one pass: value and gradient together, one kept buffer instead of a dozen.

The formula as written in :mod:`trm_losses.functional` is bound by memory traffic: autograd keeps some thirteen copies of
the logits. Here the derivative is written out, the dense pass treats every entry as absent, with a factor of 0 where it is
not (a mask would cost as much as the rest together), and the few present and soft entries are overwritten after.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Focus", "asymmetric_sum"]

# Elements handled at once for each thread: at least 32,768, or the operators run on one thread.
_CHUNK = 1 << 17


class Focus(NamedTuple):
    """Settings of the asymmetric loss."""

    gamma_pos: float
    gamma_neg: float
    margin: float
    detach: bool


def _power(x: Tensor, exponent: float) -> Tensor:
    """x ** exponent for x >= 0; small whole exponents by multiplication, since a general power costs ten times as much."""
    if exponent == 1:
        return x
    if exponent == 2:
        return x * x
    return x**exponent


def _absent(x: Tensor, focus: Focus) -> tuple[Tensor, Tensor]:
    """Loss and derivative of logits as absent labels."""
    gamma, margin = focus.gamma_neg, focus.margin
    p = torch.sigmoid(x)
    if not margin:
        negative_log = -F.logsigmoid(-x)
        if not gamma:
            return negative_log, p
        power = torch.exp(gamma * F.logsigmoid(x))
        slope = p if focus.detach else p + gamma * (1 - p) * negative_log
        return power * negative_log, power * slope
    slope = torch.addcmul(p, p, p, value=-1)
    q = p.sub_(margin).clamp_(min=0)
    rest = 1 - q
    if not gamma:
        return -rest.log(), slope.div_(rest).mul_(q > 0)
    # gamma < 1: 0 ** (gamma - 1) is infinite where q is 0; loss and slope are 0 there.
    lower = torch.where(q > 0, q, 1.0) ** (gamma - 1) * (q > 0) if gamma < 1 else _power(q, gamma - 1) if gamma > 1 else None
    inner = q / rest
    negative_log = rest.log_().neg_()
    if not focus.detach:
        inner.add_(negative_log, alpha=gamma)
    slope.mul_(inner)
    loss = negative_log.mul_(q)
    return (loss, slope) if lower is None else (loss.mul_(lower), slope.mul_(lower))


def _present(x: Tensor, y: Tensor, focus: Focus, *, sparse: bool) -> tuple[Tensor, Tensor]:
    """Loss and derivative of logits whose label is 1, or soft (plain cross-entropy); ``sparse`` as in :func:`_one_pass`."""
    log_p, miss = F.logsigmoid(x), torch.sigmoid(-x)
    loss, slope = -log_p, -miss
    if focus.gamma_pos:
        power = _power(miss, focus.gamma_pos)
        if not focus.detach:
            slope.addcmul_(1 - miss, log_p, value=focus.gamma_pos)
        loss, slope = loss.mul_(power), slope.mul_(power)
    is_soft = y < 1
    if sparse and not is_soft.any():
        return loss, slope
    crossed = -y * log_p - (1 - y) * F.logsigmoid(-x)
    return torch.where(is_soft, crossed, loss), torch.where(is_soft, 1 - y - miss, slope)


def _one_pass(
    x: Tensor, y: Tensor, w: Tensor | None, focus: Focus, gradient: Tensor | None, *, masked: bool, sparse: bool
) -> tuple[Tensor, Tensor]:
    """The loss summed and the number of known entries, of flat tensors; the slope of each entry goes into ``gradient``.

    Unless ``masked``, a NaN or infinite logit or weight of an entry that is unknown may make the sum NaN, as 0 * inf. Present
    and soft entries are looked up where ``sparse``, which waits for the device, and otherwise computed everywhere.
    """
    total, known = x.new_zeros(()), x.new_zeros(())
    step = _CHUNK * torch.get_num_threads() if x.device.type == "cpu" else max(1, x.numel())
    for start in range(0, x.numel(), step):
        part = slice(start, start + step)
        xc, yc, wc = x[part], y[part], None if w is None else w[part]
        factor = torch.eq(yc, 0, out=torch.empty_like(xc))
        known += factor.sum()
        if wc is not None:
            factor.mul_(wc.where(yc == 0, 0.0) if masked else wc)
        loss, slope = _absent(xc.where(yc == 0, 0.0) if masked else xc, focus)
        total += torch.dot(loss, factor)
        if gradient is not None:
            torch.mul(slope, factor, out=gradient[part])
        index = (yc > 0).nonzero().squeeze(1) if sparse else None
        known += len(index) if index is not None else (yc > 0).sum()
        if index is not None and not len(index):
            continue
        if index is not None:
            xc, yc, wc = xc[index], yc[index], None if wc is None else wc[index]
        loss, slope = _present(xc, yc.to(x.dtype), focus, sparse=sparse)
        if wc is not None:
            loss, slope = loss * wc, slope * wc
        total += (loss if sparse else loss.where(yc > 0, 0.0)).sum()
        if gradient is not None and index is not None:
            gradient[part][index] = slope
        elif gradient is not None:
            gradient[part] = slope.where(yc > 0, gradient[part])
    return total, known


class _AsymmetricSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor | None, focus: Focus, plain: Callable[..., Tensor]
    ) -> tuple[Tensor, Tensor]:
        x, y = logits.reshape(-1), targets.reshape(-1)
        w = None if weights is None else weights.reshape(-1)
        gradient = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        on_cpu = x.device.type == "cpu"
        # Elsewhere to ask the device would be to wait, and masks are cheap.
        total, known = _one_pass(x, y, w, focus, gradient, masked=not on_cpu, sparse=on_cpu)
        if on_cpu and not math.isfinite(total.item()):
            total, known = _one_pass(x, y, w, focus, gradient, masked=True, sparse=True)
        ctx.plain = plain
        ctx.save_for_backward(logits, targets, weights, gradient)
        ctx.mark_non_differentiable(known)
        return total, known

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, weights, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the written-out derivative has no derivative of its own
            (result,) = torch.autograd.grad(ctx.plain(logits, targets, weights), logits, grad_output, create_graph=True)
            return result, None, None, None, None
        return grad_output * gradient.view_as(logits), None, None, None, None


def asymmetric_sum(
    logits: Tensor, targets: Tensor, weights: Tensor | None, focus: Focus, plain: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """The loss summed over known entries, and how many there are.

    ``plain`` is the same sum in differentiable operators, for second derivatives.
    """
    result: tuple[Tensor, Tensor] = _AsymmetricSum.apply(logits, targets, weights, focus, plain)
    return result
