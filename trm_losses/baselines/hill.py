"""Hill: a loss of unknown labels that falls again for confident ones."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import functional as TF
from .._checks import check_choice, check_numbers
from .._distributed import Distributed
from ._baseline import Baseline


class HillLoss(Baseline):
    r"""Hill: unknown labels are absent, with a slope that vanishes where the model is sure of presence.

    .. math:: L = \sum_{bc:\,y = 1} (1 - \sigma(\ell_{bc} - m))^\gamma (-\log \sigma(\ell_{bc} - m))
        + \sum_{bc:\,y = 0} -\log(1 - p_{bc}) + \sum_{bc:\,y = -1} (\lambda - p_{bc})\, p_{bc}^2

    Args:
        strength: :math:`\lambda`; at 1.5 the last term is highest, and flat, at p = 1.
        margin: m; 0.5 to 1 is advised.
        gamma: :math:`\gamma`.
        reduction: ``"sum"``, as published: then the learning rate goes with B * C; or ``"mean"`` over B * C.

    Shape:
        logits, targets (B, C) -> scalar.

    Example:
        >>> HillLoss()(torch.zeros(1, 1), torch.tensor([[-1.]]))
        tensor(0.2500)

    Reference: Zhang et al., "Simple and Robust Loss Design", 2021 (arXiv 2112.07368), for positive labels; the term of known
    absent labels, and cross-entropy for soft ones, are ours.
    """

    def __init__(
        self,
        *,
        strength: float = 1.5,
        margin: float = 1.0,
        gamma: float = 2.0,
        reduction: Literal["mean", "sum"] = "sum",
        distributed: Distributed = False,
        validate: bool = True,
    ) -> None:
        super().__init__(distributed=distributed, validate=validate)
        name = type(self).__name__
        check_numbers(name, 0, strength=strength, margin=margin, gamma=gamma)
        check_choice(name, "reduction", reduction, ("mean", "sum"))
        self.strength, self.margin, self.gamma, self.reduction = strength, margin, gamma, reduction

    def _loss(self, x: Tensor, y: Tensor, ids: Tensor | None) -> Tensor:
        shifted = torch.where(y == 1, x - self.margin, x)
        total = TF.asymmetric_loss(shifted, y, gamma_pos=self.gamma, gamma_neg=0.0, margin=0.0, reduction="sum")
        p = torch.sigmoid(x)
        total = total + torch.where(y == -1, (self.strength - p) * p * p, 0.0).sum()
        return self._reduced(total, x, self.reduction)
