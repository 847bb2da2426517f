"""GCE: what a known label costs is bounded, so that a wrong one cannot pull without end."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_number
from .._distributed import Distributed
from ._baseline import Baseline, cross_entropy, power_loss


class GCELoss(Baseline):
    r"""Generalised cross-entropy of each known label: it doubts a label that the model is sure against.

    .. math:: L = \frac{1}{BC} \Big[ \sum_{bc:\,y = 1} \frac{1 - p_{bc}^q}{q} + \sum_{bc:\,y = 0} \frac{1 - (1 - p_{bc})^q}{q}
        \Big]

    Labels may be wrong as well as missing: a tag may stand at another object's image, and models annotate. The cost of a
    wrong label under cross-entropy has no bound, and its slope is largest where the model is surest. Here the cost is at
    most 1 / q, and the slope is that of cross-entropy times :math:`p^q`, or :math:`(1 - p)^q` of an absent label. A wrong
    label that the others contradict loses its pull; a right one that is hard loses some too.

    Args:
        q: from 0, cross-entropy, to 1, mean absolute error; the more labels are wrong, the larger.

    Shape:
        logits, targets (B, C) -> scalar.

    Example:
        >>> loss = GCELoss(q=0.5)
        >>> loss(torch.tensor([[-50.0]]), torch.tensor([[1.0]]))  # where cross-entropy is 50
        tensor(2.)

    Reference: Zhang and Sabuncu, NeurIPS 2018, for a softmax over classes, with q = 0.7. Ours is that each known label has
    a term of its own, and that soft labels take cross-entropy: they tell their doubt themselves. Unknown labels give
    nothing, so with single positives "everything is present" is the minimum, as in :class:`PartialBCELoss`.
    """

    def __init__(self, *, q: float = 0.7, distributed: Distributed = False, validate: bool = True) -> None:
        super().__init__(distributed=distributed, validate=validate)
        check_number(type(self).__name__, "q", q, 0, 1)
        self.q = q

    def _loss(self, x: Tensor, y: Tensor, ids: Tensor | None) -> Tensor:
        hard = (y == 0) | (y == 1)
        own = torch.where(hard, power_loss(torch.where(y == 1, x, -x), self.q), 0.0).sum()
        return self._mean(own + cross_entropy(x, y.masked_fill(hard, -1.0)), x)
