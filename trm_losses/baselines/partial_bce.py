"""Partial BCE: known labels alone, weighed by how many an image has."""

from __future__ import annotations

from torch import Tensor

from .._checks import check_numbers
from .._distributed import Distributed
from ._baseline import Baseline, cross_entropy


class PartialBCELoss(Baseline):
    r"""Partial BCE: cross-entropy on the known labels, at a weight that makes up for how few of an image are known.

    .. math:: L = \frac1B \sum_b \frac{g(\rho_b)}{C} \sum_{c:\,y_{bc} \ge 0} \mathrm{BCE}(y_{bc}, p_{bc}), \qquad
        g(\rho) = \alpha \rho^\gamma + \beta, \quad \rho_b = \#\text{known}_b / C

    With the defaults g(1) = 1, which is plain binary cross-entropy, and g(0.1) is about 5. With single positives nothing
    tells absence, and "everything is present" is the minimum.

    Args:
        alpha, beta, gamma: of g. 1, 0 and -1 give the mean over the known labels of each image.

    Shape:
        logits, targets (B, C) -> scalar.

    Example:
        >>> import torch
        >>> PartialBCELoss()(torch.zeros(1, 2), torch.tensor([[1., 0.]]))
        tensor(0.6931)

    Reference: Durand et al., CVPR 2019; its code was not read, and the constants agree with two codes of others.
    """

    def __init__(
        self,
        *,
        alpha: float = -4.45,
        beta: float = 5.45,
        gamma: float = 1.0,
        distributed: Distributed = False,
        validate: bool = True,
    ) -> None:
        super().__init__(distributed=distributed, validate=validate)
        check_numbers(type(self).__name__, alpha=alpha, beta=beta, gamma=gamma)
        self.alpha, self.beta, self.gamma = alpha, beta, gamma

    def _loss(self, x: Tensor, y: Tensor, ids: Tensor | None) -> Tensor:
        # An image without a label has no term to weigh; 0 ** -1 would be infinite, and cost a second pass.
        share = (y >= 0).to(x.dtype).mean(dim=1, keepdim=True).clamp(min=1 / max(1, x.shape[1]))
        weights = self.alpha * share**self.gamma + self.beta
        return self._mean(cross_entropy(x, y, weights.expand_as(x)), x)
