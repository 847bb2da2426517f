"""The asymmetric loss, as it reads and in one pass: value and gradient together, one kept buffer instead of a dozen.

The formula as it reads, :func:`_asymmetric_entries`, is bound by memory traffic: autograd keeps some thirteen copies of the
logits. In one pass the derivative is written out, the dense pass treats every entry as absent, with a factor of 0 where it is
not (a mask would cost as much as the rest together), and the few present and soft entries are overwritten after.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from .._checks import signed
from .._distributed import count_per_rank, sum_per_rank
from .._fused import may_fuse
from .._precision import full_precision, upcast
from ._shapes import Reduction, broadcast, check_shapes

__all__ = ["Focus", "asymmetric_loss"]

# Elements handled at once for each thread: at least 32,768, or the operators run on one thread.
_CHUNK = 1 << 17


class Focus(NamedTuple):
    """Settings of the asymmetric loss."""

    gamma_pos: float
    gamma_neg: float
    margin: float
    detach: bool


def asymmetric_loss(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    gamma_pos: float = 1.0,
    gamma_neg: float = 2.0,
    margin: float = 0.05,
    detach_focus: bool = False,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Asymmetric loss over known labels, from logits.

    .. math:: \ell = -y (1-p)^{\gamma_+} \log p - (1-y)\, q^{\gamma_-} \log(1-q),\quad p=\sigma(x),\ q=\max(p-\delta, 0)

    Entries with a soft label (0 < y < 1) take plain cross-entropy (no focus, no margin), because focusing moves the
    minimum away from p = y. With both gammas and the margin at 0 this is binary cross-entropy on the known entries.
    Logarithms are taken from logits, so that a confidently wrong positive keeps its gradient.

    Args:
        logits: (B, C), or any shape shared with ``targets``.
        targets: 1, 0, between, or -1 for unknown: those give 0 and no gradient.
        weights: a factor for each entry, broadcast; the mean still divides by the number of known entries.
        gamma_pos, gamma_neg: focusing exponents of present and absent labels.
        margin: the probability shift :math:`\delta` of absent labels.
        detach_focus: no gradient through the focusing factors.
        reduction: ``"mean"`` over known entries, ``"sum"``, or ``"none"`` (keeps the shape, 0 at unknown entries).
        group: process group over which ``"mean"`` counts the known entries, and whose average ``"sum"`` makes a sum.

    Reference: ASL (Ridnik et al., ICCV 2021), with the settings of DualCoOp; the rule for soft labels is ours.
    """
    check_shapes("asymmetric_loss", logits=(logits, "..."), targets=(targets, "..."))
    targets = signed(targets)
    with full_precision(logits):
        x = upcast(logits)
        w = None if weights is None else broadcast("asymmetric_loss", weights, x)
        focus = Focus(gamma_pos, gamma_neg, margin, detach_focus)
        if reduction == "none":
            return _asymmetric_entries(x, targets, w, focus)
        if not may_fuse() or targets.requires_grad or (w is not None and w.requires_grad):
            total, known = _asymmetric_entries(x, targets, w, focus).sum(), (targets >= 0).sum().to(x.dtype)
        else:
            total, known = _AsymmetricSum.apply(x, targets, w, focus)
        if reduction == "sum":
            return sum_per_rank(total, group)
        count = count_per_rank(known, group)
        # Not clamped at 1: a rank's share of the joined count may be a fraction. Nothing known anywhere: 0 / 1.
        return total / torch.where(count > 0, count, 1.0)


def _asymmetric_entries(logits: Tensor, targets: Tensor, weights: Tensor | None, focus: Focus) -> Tensor:
    """The loss of each entry in differentiable operators, 0 at unknown ones: the readable form, and the traceable one."""
    gamma_pos, gamma_neg, margin, detach = focus
    known = targets >= 0
    # The input is masked, not only the result: an infinite logit at an unknown entry would give 0 * inf = NaN.
    x = torch.where(known, logits, 0.0)
    y = torch.where(known, targets.to(x.dtype), 0.0)
    log_p, log_not_p = F.logsigmoid(x), F.logsigmoid(-x)
    present, absent = -log_p, -log_not_p
    if gamma_pos:
        power = torch.exp(gamma_pos * log_not_p)
        present = (power.detach() if detach else power) * present
    if margin:
        shifted = (torch.sigmoid(x) - margin).clamp(min=0)
        absent = -torch.log((torch.sigmoid(-x) + margin).clamp(max=1))
        if gamma_neg:
            # 0 ** gamma has no finite slope for gamma < 1; below the margin the loss is 0 whatever the focus.
            power = torch.where(shifted > 0, shifted, 1.0) ** gamma_neg
            absent = (power.detach() if detach else power) * absent
    elif gamma_neg:
        power = torch.exp(gamma_neg * log_p)
        absent = (power.detach() if detach else power) * absent
    loss = y * present + (1 - y) * absent
    soft = (y > 0) & (y < 1)
    loss = torch.where(soft, -y * log_p - (1 - y) * log_not_p, loss)
    loss = torch.where(known, loss, 0.0)
    return loss if weights is None else loss * torch.where(known, weights, 0.0)


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
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor | None, focus: Focus) -> tuple[Tensor, Tensor]:
        x, y = logits.reshape(-1), targets.reshape(-1)
        w = None if weights is None else weights.reshape(-1)
        gradient = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        on_cpu = x.device.type == "cpu"
        # Elsewhere to ask the device would be to wait, and masks are cheap.
        total, known = _one_pass(x, y, w, focus, gradient, masked=not on_cpu, sparse=on_cpu)
        if on_cpu and not math.isfinite(total.item()):
            total, known = _one_pass(x, y, w, focus, gradient, masked=True, sparse=True)
        ctx.focus = focus
        ctx.save_for_backward(logits, targets, weights, gradient)
        ctx.mark_non_differentiable(known)
        return total, known

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, weights, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the written-out derivative has no derivative of its own
            total = _asymmetric_entries(logits, targets, weights, ctx.focus).sum()
            (result,) = torch.autograd.grad(total, logits, grad_output, create_graph=True)
            return result, None, None, None
        return grad_output * gradient.view_as(logits), None, None, None
