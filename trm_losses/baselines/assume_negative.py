"""AssumeNegativeLoss and WeakAssumeNegativeLoss: what is not labelled is taken for absent."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_number
from .._distributed import Distributed
from ._baseline import Baseline, cross_entropy

__all__ = ["AssumeNegativeLoss", "WeakAssumeNegativeLoss"]


class AssumeNegativeLoss(Baseline):
    r"""AN: binary cross-entropy with every unknown label taken for absent; with ``smoothing``, AN-LS.

    .. math:: L = \frac{1}{BC} \sum_{bc} \mathrm{BCE}\big((1-\eta)\, \tilde y_{bc} + \eta\,(1 - \tilde y_{bc}),\, p_{bc}\big),
        \qquad \tilde y = y \text{ where known, else } 0

    Args:
        smoothing: :math:`\eta`, 0 for AN; 0.1 is published for AN-LS: labels of 0.9 and 0.1, not the halves of classic
            smoothing.
        distributed: False, True or a process group: the batch is then that of all ranks.
        validate: check label values and look for NaN (waits for the device).

    Shape:
        logits, targets (B, C) -> scalar.

    Raises:
        ValueError: shapes, devices, label values or NaN, each by name. TypeError: not a tensor, not floating point.

    Example:
        >>> AssumeNegativeLoss()(torch.zeros(1, 2), torch.tensor([[1., -1.]]))
        tensor(0.6931)

    Reference: Cole et al., CVPR 2021, for single positives; known absent labels change nothing.
    """

    def __init__(self, *, smoothing: float = 0.0, distributed: Distributed = False, validate: bool = True) -> None:
        super().__init__(distributed=distributed, validate=validate)
        check_number(type(self).__name__, "smoothing", smoothing, 0, 1)
        self.smoothing = smoothing

    def _loss(self, x: Tensor, y: Tensor, ids: Tensor | None) -> Tensor:
        y = y.clamp(min=0)
        return self._mean(cross_entropy(x, y + self.smoothing * (1 - 2 * y)), x)

    def extra_repr(self) -> str:
        return f"smoothing={self.smoothing}"


class WeakAssumeNegativeLoss(Baseline):
    r"""WAN: as AN, with unknown labels at the weight that one positive label of an image has against its others.

    .. math:: L = \frac{1}{BC} \Big[ \sum_{bc:\,y \ge 0} \mathrm{BCE}(y_{bc}, p_{bc})
        + \frac{1}{C-1} \sum_{bc:\,y = -1} -\log(1 - p_{bc}) \Big]

    Args:
        distributed: False, True or a process group: the batch is then that of all ranks.
        validate: check label values and look for NaN (waits for the device).

    Shape:
        logits, targets (B, C) -> scalar.

    Raises:
        ValueError: shapes, devices, label values or NaN, each by name. TypeError: not a tensor, not floating point.

    Example:
        >>> WeakAssumeNegativeLoss()(torch.zeros(1, 3), torch.tensor([[1., -1., -1.]]))  # (1 + 1 / 2 + 1 / 2) log 2 / 3
        tensor(0.4621)

    Reference: Cole et al., CVPR 2021, for single positives. That a known absent label has the whole weight is ours, and
    so is the weight 1 where there is one class.
    """

    def _loss(self, x: Tensor, y: Tensor, ids: Tensor | None) -> Tensor:
        weights = torch.ones_like(x).masked_fill(y == -1, 1 / max(1, x.shape[1] - 1))
        return self._mean(cross_entropy(x, y.clamp(min=0), weights), x)
