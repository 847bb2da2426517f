"""SPLC: missing labels are corrected on the way."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import functional as TF
from .._checks import check_choice, check_number, check_numbers
from .._distributed import Distributed
from ._baseline import Baseline


class SPLCLoss(Baseline):
    r"""SPLC: focal loss with a margin, whose unknown labels are absent, or present once the model finds them probable.

    .. math::
        L &= \sum_{bc} \tilde y_{bc}\, (1 - \sigma(z_{bc}))^\gamma (-\log \sigma(z_{bc}))
            + (1 - \tilde y_{bc})\, \sigma(z_{bc})^\gamma (-\log(1 - \sigma(z_{bc}))) \\
        z &= \ell - m \text{ where } y = 1, \text{ else } \ell, \qquad
        \tilde y = y \text{ where known, else } [p > \tau]

    In the first epoch, ``begin_epoch(0, ...)`` or no call at all, every unknown label is absent. Each step decides anew, and
    the labels found take no margin. The focusing factors have their gradient.

    Args:
        threshold: :math:`\tau`; published is 0.65 where three quarters of the positives are left.
        margin: m. gamma: :math:`\gamma`.
        start: the first epoch, counted from 0, that corrects.
        reduction: ``"sum"``, as published: then the learning rate goes with B * C; or ``"mean"`` over B * C.

    Shape:
        logits, targets (B, C) -> scalar.

    Example:
        >>> loss, logits, targets = SPLCLoss(), torch.tensor([[2.]]), torch.tensor([[-1.]])
        >>> absent = loss(logits, targets)
        >>> loss.begin_epoch(1, 10)
        >>> bool(loss(logits, targets) < absent)
        True

    Reference: Zhang et al., "Simple and Robust Loss Design", 2021 (arXiv 2112.07368), for positive labels. That a known absent
    label is never corrected, and cross-entropy for soft ones, are ours.
    """

    correcting: Tensor

    def __init__(
        self,
        *,
        threshold: float = 0.6,
        margin: float = 1.0,
        gamma: float = 2.0,
        start: int = 1,
        reduction: Literal["mean", "sum"] = "sum",
        distributed: Distributed = False,
        validate: bool = True,
    ) -> None:
        super().__init__(distributed=distributed, validate=validate)
        name = type(self).__name__
        check_number(name, "threshold", threshold, 0, 1)
        check_numbers(name, 0, margin=margin, gamma=gamma, start=start)
        check_choice(name, "reduction", reduction, ("mean", "sum"))
        self.threshold, self.margin, self.gamma, self.start, self.reduction = threshold, margin, gamma, start, reduction
        self.register_buffer("correcting", torch.tensor(start == 0))

    def _loss(self, x: Tensor, y: Tensor, ids: Tensor | None) -> Tensor:
        found = self.correcting & (torch.sigmoid(x) > self.threshold)
        total = TF.asymmetric_loss(
            torch.where(y == 1, x - self.margin, x),
            torch.where(y == -1, found.to(y.dtype), y),
            gamma_pos=self.gamma,
            gamma_neg=self.gamma,
            margin=0.0,
            reduction="sum",
        )
        return self._reduced(total, x, self.reduction)

    def _schedule(self, epoch: int, epochs: int) -> None:
        self.correcting.fill_(epoch >= self.start)
