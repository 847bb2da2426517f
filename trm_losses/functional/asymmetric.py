"""The asymmetric loss, as it reads and in one pass: value and gradient together, one kept buffer instead of a dozen.

The formula as it reads, :func:`_asymmetric_entries`, is bound by memory traffic: autograd keeps some thirteen copies of the
logits. In one pass, on a CPU, the derivative is written out. Every entry is first treated as absent, with a factor of 0
where it is not (a mask would cost as much as the rest together). The few present and soft entries are overwritten after.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from .._checks import check_choice, signed
from .._distributed import count_per_rank, sum_per_rank
from .._fused import may_fuse
from .._precision import full_precision, upcast
from ._shapes import Reduction, broadcast, check_shapes

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
    check_choice("asymmetric_loss", "reduction", reduction, ("none", "mean", "sum"))
    check_shapes("asymmetric_loss", logits=(logits, "..."), targets=(targets, "..."))
    targets = signed(targets)
    with full_precision(logits):
        x = upcast(logits)
        w = None if weights is None else broadcast("asymmetric_loss", weights, x)
        focus = Focus(gamma_pos, gamma_neg, margin, detach_focus)
        if reduction == "none":
            return _asymmetric_entries(x, targets, w, focus)
        learned = targets.requires_grad or (w is not None and w.requires_grad)
        # Margin and focus as they are usually set; without them the formula as it reads is short.
        one_pass = x.device.type == "cpu" and margin > 0 and gamma_neg >= 1 and may_fuse() and not learned
        if one_pass:
            total, known = _AsymmetricSum.apply(x, targets, w, focus)
        if not one_pass or not math.isfinite(total.item()):  # NaN at an unknown entry spoils the one pass
            total, known = _asymmetric_entries(x, targets, w, focus).sum(), (targets >= 0).sum().to(x.dtype)
        if reduction == "sum":
            return sum_per_rank(total, group)
        count = count_per_rank(known, group)
        # Not clamped at 1: a rank's share of the joined count may be a fraction. Nothing known anywhere: 0 / 1.
        mean: Tensor = total / torch.where(count > 0, count, 1.0)
        return mean


def _asymmetric_entries(logits: Tensor, targets: Tensor, weights: Tensor | None, focus: Focus) -> Tensor:
    """The loss of each entry in differentiable operators, 0 at unknown ones: the readable form, and the traceable one."""
    gamma_pos, gamma_neg, margin, detach = focus
    known, y = targets >= 0, targets.to(logits.dtype)
    # The input is masked, not only the result: an infinite logit at an entry of another kind would give 0 * inf = NaN.
    x = torch.where(targets > 0, logits, 0.0)
    log_p, log_not_p = F.logsigmoid(x), F.logsigmoid(-x)
    present = -log_p
    if gamma_pos:
        power = torch.exp(gamma_pos * log_not_p)
        present = (power.detach() if detach else power) * present
    x = torch.where(targets == 0, logits, 0.0)
    if margin:
        shifted = (torch.sigmoid(x) - margin).clamp(min=0)
        absent = -torch.log((torch.sigmoid(-x) + margin).clamp(max=1))
        # 0 ** gamma has no finite slope for gamma < 1; below the margin the loss is 0 whatever the focus.
        power = torch.where(shifted > 0, shifted, 1.0) ** gamma_neg
    else:
        absent, power = -F.logsigmoid(-x), torch.exp(gamma_neg * F.logsigmoid(x))
    if gamma_neg:
        absent = (power.detach() if detach else power) * absent
    present = torch.where(y < 1, -y * log_p - (1 - y) * log_not_p, present)  # soft
    loss = torch.where(targets > 0, present, torch.where(known, absent, 0.0))
    return loss if weights is None else loss * torch.where(known, weights, 0.0)


def _absent(x: Tensor, focus: Focus) -> tuple[Tensor, Tensor]:
    """Loss and derivative of logits as absent labels."""
    gamma = focus.gamma_neg
    p = torch.sigmoid(x)
    slope = torch.addcmul(p, p, p, value=-1)
    q = p.sub_(focus.margin).clamp_(min=0)
    rest = 1 - q
    inner = q / rest
    negative_log = rest.log_().neg_()
    if not focus.detach:
        inner.add_(negative_log, alpha=gamma)
    lower = q ** (gamma - 1)
    return negative_log.mul_(q).mul_(lower), slope.mul_(inner).mul_(lower)


def _present(x: Tensor, y: Tensor, focus: Focus) -> tuple[Tensor, Tensor]:
    """Loss and derivative of logits whose label is 1, or soft (plain cross-entropy)."""
    log_p, miss = F.logsigmoid(x), torch.sigmoid(-x)
    loss, slope = -log_p, -miss
    if focus.gamma_pos:
        power = miss**focus.gamma_pos
        if not focus.detach:
            slope.addcmul_(1 - miss, log_p, value=focus.gamma_pos)
        loss, slope = loss.mul_(power), slope.mul_(power)
    crossed = -y * log_p - (1 - y) * F.logsigmoid(-x)
    return torch.where(y < 1, crossed, loss), torch.where(y < 1, 1 - y - miss, slope)


class _AsymmetricSum(torch.autograd.Function):
    """The loss summed and the number of known entries; the margin is not 0, gamma_neg at least 1."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor | None, focus: Focus) -> tuple[Tensor, Tensor]:
        step = _CHUNK * torch.get_num_threads()
        every_x, every_y, every_w = logits.reshape(-1), targets.reshape(-1), None if weights is None else weights.reshape(-1)
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        total, known = logits.new_zeros(()), logits.new_zeros(())
        for start in range(0, logits.numel(), step):
            part = slice(start, start + step)
            x, y, w, out = every_x[part], every_y[part], None if every_w is None else every_w[part], gradient.view(-1)[part]
            factor = torch.eq(y, 0, out=torch.empty_like(x))
            index = torch.gt(y, 0).nonzero().squeeze(1)
            known += factor.sum() + len(index)
            if w is not None:
                factor.mul_(w)
            loss, slope = _absent(x, focus)
            total += torch.dot(loss, factor)
            torch.mul(slope, factor, out=out)
            if len(index):
                loss, slope = _present(x[index], y[index].to(x.dtype), focus)
                of = 1 if w is None else w[index]
                total += (loss * of).sum()
                out[index] = slope * of
        ctx.focus = focus
        ctx.save_for_backward(logits, targets, weights, gradient)
        ctx.mark_non_differentiable(known)
        return total, known

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, weights, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the written-out derivative has no derivative of its own
            total = _asymmetric_entries(logits, targets, weights, ctx.focus).sum()
            return torch.autograd.grad(total, logits, grad_output, create_graph=True)[0], None, None, None
        return grad_output * gradient, None, None, None
