"""The asymmetric loss summed in one pass: value and gradient together, one kept buffer instead of a dozen.

The formula as written in :mod:`trm_losses.functional` is bound by memory traffic: autograd keeps some thirteen copies of
the logits. Here the derivative is written out, the dense pass treats every entry as absent in place, and the few present
and soft entries are overwritten after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Focus", "asymmetric_sum"]

# Elements handled at once, in reused memory. At least 32,768 for each thread, or the operators run on one thread.
_CHUNK = 1 << 18


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
    q = (p - margin).clamp_(min=0)
    rest = 1 - q
    negative_log = rest.log().neg_()
    slope = p * (1 - p)
    if not gamma:
        return negative_log, slope.div_(rest).mul_(q > 0)
    # gamma < 1: 0 ** (gamma - 1) is infinite where q is 0; loss and slope are 0 there.
    lower = torch.where(q > 0, q, 1.0) ** (gamma - 1) * (q > 0) if gamma < 1 else _power(q, gamma - 1) if gamma > 1 else None
    inner = q / rest
    if not focus.detach:
        inner.add_(negative_log, alpha=gamma)
    slope.mul_(inner)
    loss = q * negative_log  # not in place: lower may be q itself
    return (loss, slope) if lower is None else (loss.mul_(lower), slope.mul_(lower))


def _present(x: Tensor, y: Tensor, focus: Focus) -> tuple[Tensor, Tensor]:
    """Loss and derivative of logits whose label is 1, or soft (plain cross-entropy)."""
    log_p, log_not_p, p = F.logsigmoid(x), F.logsigmoid(-x), torch.sigmoid(x)
    soft = -y * log_p - (1 - y) * log_not_p
    if not focus.gamma_pos:
        hard, slope = -log_p, p - 1
    else:
        power = torch.exp(focus.gamma_pos * log_not_p)
        hard = -power * log_p
        slope = p - 1 if focus.detach else focus.gamma_pos * p * log_p + p - 1
        slope = power * slope
    return torch.where(y < 1, soft, hard), torch.where(y < 1, p - y, slope)


class _AsymmetricSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor | None, focus: Focus, plain: Callable[..., Tensor]
    ) -> Tensor:
        x, y = logits.reshape(-1), targets.reshape(-1)
        w = None if weights is None else weights.reshape(-1)
        total = x.new_zeros(())
        gradient = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for start in range(0, x.numel(), _CHUNK):
            part = slice(start, start + _CHUNK)
            yc = y[part]
            # An infinite logit at an unknown entry must not become 0 * inf.
            xc = x[part].where(yc >= 0, 0.0)
            loss, slope = _absent(xc, focus)
            dense = (yc == 0).to(x.dtype)
            if w is not None:
                dense *= w[part]
                dense = dense.where(yc == 0, 0.0)
            total += torch.dot(loss, dense)
            if gradient is not None:
                torch.mul(slope, dense, out=gradient[part])
            index = (yc > 0).nonzero().squeeze(1)
            if len(index):
                loss, slope = _present(xc[index], yc[index].to(x.dtype), focus)
                if w is not None:
                    loss, slope = loss * w[part][index], slope * w[part][index]
                total += loss.sum()
                if gradient is not None:
                    gradient[part][index] = slope
        ctx.plain = plain
        ctx.save_for_backward(logits, targets, weights, gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, weights, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the written-out derivative has no derivative of its own
            (result,) = torch.autograd.grad(ctx.plain(logits, targets, weights), logits, grad_output, create_graph=True)
            return result, None, None, None, None
        return grad_output * gradient.view_as(logits), None, None, None, None


def asymmetric_sum(
    logits: Tensor, targets: Tensor, weights: Tensor | None, focus: Focus, plain: Callable[..., Tensor]
) -> Tensor:
    """The loss summed over known entries; ``plain`` is the same sum in differentiable operators, for second derivatives."""
    result: Tensor = _AsymmetricSum.apply(logits, targets, weights, focus, plain)
    return result
