"""WAN: unknown labels are taken for absent, at a small weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ._baseline import Baseline, cross_entropy


class WeakAssumeNegativeLoss(Baseline):
    r"""WAN: as AN, with unknown labels at the weight that one positive label of an image has against its others.

    .. math:: L = \frac{1}{BC} \Big[ \sum_{bc:\,y \ge 0} \mathrm{BCE}(y_{bc}, p_{bc})
        + \frac{1}{C-1} \sum_{bc:\,y = -1} -\log(1 - p_{bc}) \Big]

    Shape:
        logits, targets (B, C) -> scalar.

    Example:
        >>> WeakAssumeNegativeLoss()(torch.zeros(1, 3), torch.tensor([[1., -1., -1.]]))  # (1 + 1 / 2 + 1 / 2) log 2 / 3
        tensor(0.4621)

    Reference: Cole et al., CVPR 2021, for single positives. That a known absent label has the whole weight is ours, and
    so is the weight 1 where there is one class.
    """

    def _loss(self, x: Tensor, y: Tensor, ids: Tensor | None) -> Tensor:
        weights = torch.ones_like(x).masked_fill(y == -1, 1 / max(1, x.shape[1] - 1))
        return self._mean(cross_entropy(x, y.clamp(min=0), weights), x)
