"""Partial ASL: an asymmetric loss with a policy for unknown labels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import functional as TF
from .._checks import Dims, check_choice, check_number, check_numbers
from .._distributed import Distributed, gather_rows, sum_over_ranks
from ._baseline import Baseline


class PartialASLLoss(Baseline):
    r"""P-ASL: the asymmetric loss, with one of three policies for unknown labels; ``"selective"`` is CSL.

    .. math::
        L = \sum_{bc:\,y = 1} \mathrm{sg}(1 - p)^{\gamma_+} (-\log p)
        + \sum_{bc:\,y = 0} \mathrm{sg}(q)^{\gamma_-} (-\log(1 - q))
        + \sum_{bc:\,y = -1} \Omega_{bc}\, \mathrm{sg}(q)^{\gamma_0} (-\log(1 - q)), \qquad q = \max(p - \delta, 0)

    ``"ignore"`` has :math:`\Omega = 0`, ``"negative"`` 1. ``"selective"`` has 1 but for two kinds of unknown entries: those
    of classes whose prior is above ``prior_threshold``, and the ``likely * B`` most probable ones of the batch, together
    over all its images. The focusing factors have no gradient. Soft labels take plain cross-entropy.

    The prior of a class is its mean probability over the training of another model with ``"ignore"``, untrained steps
    included. :meth:`update` keeps it, after each step, in ``prior``, which then goes into the selective loss. With
    ``"selective"`` it stays as given. Without one no class is left out as a whole.

    Args:
        num_classes: C.
        policy: ``"ignore"``, ``"negative"`` or ``"selective"``.
        gamma_pos, gamma_neg, gamma_unknown: :math:`\gamma_+, \gamma_-, \gamma_0`. Published are 0, 1, 2 (command line), and with
            a prior threshold of 0.5 0, 1, 4 (labels missing at random) and 0, 3, 4 (labels fixed by class).
        margin: :math:`\delta`.
        prior: (C,) for ``"selective"``.
        prior_threshold: share of images above which a class is left out where unknown.
        likely: entries an image, on average, that are left out as likely present. With no more classes than that all are left
            out, which is ``"ignore"``: with few classes give 1.
        reduction: ``"sum"``, as published: then the learning rate goes with B * C; or ``"mean"`` over B * C.

    Shape:
        logits, targets (B, C) -> scalar.

    Example:
        >>> logits, targets = torch.tensor([[0., 2.]]), torch.tensor([[1., -1.]])
        >>> first = PartialASLLoss(2, policy="ignore")
        >>> first.update(logits, targets)
        >>> first.prior
        tensor([0.5000, 0.8808])
        >>> loss = PartialASLLoss(2, policy="selective", prior=first.prior, prior_threshold=0.6, likely=0)
        >>> bool(loss(logits, targets) == first(logits, targets))  # the second class is frequent, and left out
        True

    Reference: Ben-Baruch et al., "Class-aware Selective Loss", CVPR 2022, after ASL (Ridnik et al., ICCV 2021); the rule for
    soft labels and the mean are ours.
    """

    prior: Tensor
    prior_steps: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        policy: Literal["ignore", "negative", "selective"] = "selective",
        gamma_pos: float = 0.0,
        gamma_neg: float = 1.0,
        gamma_unknown: float = 2.0,
        margin: float = 0.0,
        prior: Tensor | None = None,
        prior_threshold: float = 0.05,
        likely: int = 5,
        reduction: Literal["mean", "sum"] = "sum",
        distributed: Distributed = False,
        validate: bool = True,
    ) -> None:
        super().__init__(num_classes=num_classes, distributed=distributed, validate=validate)
        name = type(self).__name__
        check_choice(name, "policy", policy, ("ignore", "negative", "selective"))
        check_numbers(name, 0, gamma_pos=gamma_pos, gamma_neg=gamma_neg, gamma_unknown=gamma_unknown)
        check_number(name, "margin", margin, 0, 0.99)
        check_number(name, "prior_threshold", prior_threshold, 0, 1)
        check_number(name, "likely", likely, 0)
        check_choice(name, "reduction", reduction, ("mean", "sum"))
        if prior is not None:
            if policy != "selective":
                raise ValueError(f"{name}: prior must be given with policy='selective' alone, got one with policy={policy!r}")
            Dims(name, C=num_classes).check("prior", prior, "C")
        self.policy, self.reduction, self.likely = policy, reduction, likely
        self.gamma_pos, self.gamma_neg, self.gamma_unknown, self.margin = gamma_pos, gamma_neg, gamma_unknown, margin
        self.prior_threshold = prior_threshold
        self.register_buffer("prior", torch.zeros(num_classes) if prior is None else prior.detach().clone())
        self.register_buffer("prior_steps", torch.zeros((), dtype=torch.int64))

    def _loss(self, x: Tensor, y: Tensor, ids: Tensor | None) -> Tensor:
        total = self._asymmetric(x, y, self.gamma_neg)
        if self.policy != "ignore":
            unknown = y == -1
            if self.policy == "selective":
                unknown = unknown & (self.prior <= self.prior_threshold) & ~self._likely(x, unknown)
            total = total + self._asymmetric(x, torch.where(unknown, 0.0, -1.0), self.gamma_unknown)
        return self._reduced(total, x, self.reduction)

    def _asymmetric(self, x: Tensor, y: Tensor, gamma_neg: float) -> Tensor:
        return TF.asymmetric_loss(
            x, y, gamma_pos=self.gamma_pos, gamma_neg=gamma_neg, margin=self.margin, detach_focus=True, reduction="sum"
        )

    def _likely(self, x: Tensor, unknown: Tensor) -> Tensor:
        """The unknown entries of the batch with the largest logits, as a mask; those of classes left out count."""
        rows = self._rows(x)
        count = min(self.likely * rows, rows * x.shape[1])
        values, top = torch.where(unknown, x.detach(), -torch.inf).flatten().topk(min(count, x.numel()))
        if self._group is not None:  # a rank's own largest are all that can be among those of all
            joined = gather_rows(values, self._group)
            place = joined.rows.masked_fill(~joined.real, -torch.inf).topk(count).indices - joined.first
            top = top[place[(place >= 0) & (place < len(top))]]
        return torch.zeros_like(unknown).flatten().index_fill(0, top, True).view_as(unknown)

    @torch.no_grad()
    def update(self, logits: Tensor, targets: Tensor, *, ids: Tensor | None = None) -> None:
        """Take the probabilities of a step into ``prior``, but with ``"selective"``."""
        x, _ = self._arguments(logits, targets, ids)
        if self.policy != "selective" and (rows := self._rows(x)):
            self.prior_steps += 1
            mean = sum_over_ranks(torch.sigmoid(x).sum(dim=0), self._group) / rows
            self.prior.lerp_(mean.to(self.prior.dtype), 1 / self.prior_steps.to(self.prior.dtype))
