"""AN: unknown labels are taken for absent ones."""

from __future__ import annotations

from torch import Tensor

from .._checks import check_number
from .._distributed import Distributed
from ._baseline import Baseline, cross_entropy


class AssumeNegativeLoss(Baseline):
    r"""AN: binary cross-entropy with every unknown label taken for absent; with ``smoothing``, AN-LS.

    .. math:: L = \frac{1}{BC} \sum_{bc} \mathrm{BCE}\big((1-\eta)\, \tilde y_{bc} + \eta\,(1 - \tilde y_{bc}),\, p_{bc}\big),
        \qquad \tilde y = y \text{ where known, else } 0

    Args:
        smoothing: :math:`\eta`, 0 for AN; 0.1 is published for AN-LS: labels of 0.9 and 0.1, not the halves of classic
            smoothing.

    Shape:
        logits, targets (B, C) -> scalar.

    Example:
        >>> import torch
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
