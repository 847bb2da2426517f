"""EPR: known positives, and the expected number of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .._checks import check_number
from .._distributed import Distributed, joined_sum, sum_over_ranks
from ._baseline import Baseline, cross_entropy


def surplus(x: Tensor, expected: float, group: ProcessGroup | None) -> Tensor:
    """How far the expected number of present labels is from k, as a share of the classes, squared."""
    rows = sum_over_ranks(x.new_full((), x.shape[0]), group).clamp(min=1)
    return ((joined_sum(torch.sigmoid(x).sum(), group) / rows - expected) / max(1, x.shape[1])) ** 2


class EPRLoss(Baseline):
    r"""EPR: the known labels, and a number of expected positives in the batch drawn to k.

    .. math:: L = \frac{1}{BC} \sum_{bc:\,y \ge 0} \mathrm{BCE}(y_{bc}, p_{bc}) + R(p), \qquad
        R(p) = \Big( \frac{\frac1B \sum_{bc} p_{bc} - k}{C} \Big)^2

    R is of the batch, so it depends on the batch size, and unknown labels are moved by it: a batch without a label
    gives R.

    Args:
        expected_positives: k, the mean number of present labels of an image; published are the true means of 1.5 (VOC),
            2.9 (COCO), 1.9 (NUS) and 31.4 (CUB), which single positives cannot tell.

    Shape:
        logits, targets (B, C) -> scalar.

    Example:
        >>> EPRLoss(1.0)(torch.zeros(1, 2), torch.tensor([[1., -1.]]))  # one of two is expected as it is
        tensor(0.3466)

    Reference: Cole et al., CVPR 2021, for single positives; the term of known absent labels is ours.
    """

    def __init__(self, expected_positives: float, *, distributed: Distributed = False, validate: bool = True) -> None:
        super().__init__(distributed=distributed, validate=validate)
        check_number(type(self).__name__, "expected_positives", expected_positives, 0, strict=True)
        self.expected_positives = expected_positives

    def _loss(self, x: Tensor, y: Tensor, ids: Tensor | None) -> Tensor:
        return self._mean(cross_entropy(x, y), x) + surplus(x, self.expected_positives, self._group)
