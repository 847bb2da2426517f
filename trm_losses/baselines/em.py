"""EM: the entropy of unknown labels is maximised."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_number
from .._distributed import Distributed
from ._baseline import Baseline, cross_entropy, entropy


class EMLoss(Baseline):
    r"""EM: the entropy H of unknown labels is made large, so that they teach neither presence nor absence.

    .. math:: L = \frac{1}{BC} \Big[ \sum_{bc:\,y \ge 0} \mathrm{BCE}(y_{bc}, p_{bc}) - \alpha \sum_{bc:\,y = -1} H(p_{bc}) \Big]

    An unknown logit is drawn towards 0 by :math:`\alpha\, p (1-p)\, \ell`, so probabilities are high: the authors count as
    present what is above 0.75. The loss may be negative.

    Args:
        alpha: :math:`\alpha`; published are 0.2 (VOC), 0.1 (COCO, NUS) and 0.01 (CUB).

    Shape:
        logits, targets (B, C) -> scalar.

    Example:
        >>> EMLoss(alpha=0.2)(torch.zeros(1, 2), torch.tensor([[1., -1.]]))  # (1 - 0.2) log 2 / 2
        tensor(0.2773)

    Reference: Zhou et al., "Acknowledging the Unknown", ECCV 2022, for single positives; the term of known absent labels
    is ours.
    """

    def __init__(self, *, alpha: float = 0.1, distributed: Distributed = False, validate: bool = True) -> None:
        super().__init__(distributed=distributed, validate=validate)
        check_number(type(self).__name__, "alpha", alpha, 0)
        self.alpha = alpha

    def _loss(self, x: Tensor, y: Tensor, ids: Tensor | None) -> Tensor:
        undecided = torch.where(y == -1, entropy(x), 0.0).sum()
        return self._mean(cross_entropy(x, y) - self.alpha * undecided, x)
