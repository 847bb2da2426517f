"""ROLE: labels estimated online, with the expected number of positives."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import Dims, check_number
from .._distributed import Distributed
from .._precision import upcast
from ._baseline import Baseline, cross_entropy
from .epr import surplus


class ROLELoss(Baseline):
    r"""ROLE: a label of every training image and class is learned beside the model, and each of the two teaches the other.

    .. math:: L &= \tfrac12 \big[ K(p) + D(q, p) + R(p) \big] + \tfrac12 \big[ K(q) + D(p, q) + R(q) \big],
            \qquad q_b = \sigma(\Theta_{i_b}) \\
        K(p) &= \frac{1}{BC} \sum_{bc:\,y \ge 0} \mathrm{BCE}(y_{bc}, p_{bc}), \qquad
        D(q, p) = \frac{1}{BC} \sum_{bc} \mathrm{BCE}(\mathrm{sg}\,q_{bc}, p_{bc})

    with R of :class:`EPRLoss`. :math:`\Theta` is a parameter: it belongs into the optimiser, by :meth:`param_groups`. An
    optimiser with momentum also moves the rows whose images are not in the batch. Where several processes train, DDP must average
    its gradient too: wrap model and loss as one module.

    Args:
        targets: (n, C) labels of the training set, from which :math:`\Theta` starts: logit(0.995) where present,
            logit(0.005) where absent, between for soft ones, :math:`u\,\mathrm{logit}(0.6)` with :math:`u \sim U(-1, 1)`
            where unknown.
        expected_positives: k of :class:`EPRLoss`.
        generator: of the start of unknown labels.

    Shape:
        logits, targets (B, C), ids (B,) int64 -> scalar.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> targets = torch.tensor([[1., -1.], [-1., 1.]])
        >>> loss = ROLELoss(targets, 1.5)
        >>> loss(torch.zeros(1, 2), targets[1:], ids=torch.tensor([1])).backward()
        >>> loss.estimates.grad[0]  # the first image is not in the batch
        tensor([0., 0.])

    Reference: Cole et al., CVPR 2021, for single positives; the start at logit(0.005) of known absent labels too. Their terms
    and the start of soft labels are ours.
    """

    def __init__(
        self,
        targets: Tensor,
        expected_positives: float,
        *,
        generator: torch.Generator | None = None,
        distributed: Distributed = False,
        validate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        owner = type(self).__name__
        targets = Dims(owner).targets(targets, "n C", validate=True, hint="the labels of the whole training set")
        if not targets.numel():
            raise ValueError(f"{owner}: targets must hold at least one image and one class, got shape {tuple(targets.shape)}")
        super().__init__(num_samples=targets.shape[0], num_classes=targets.shape[1], distributed=distributed, validate=validate)
        check_number(owner, "expected_positives", expected_positives, 0, strict=True)
        self.expected_positives = expected_positives
        draws = torch.rand(targets.shape, generator=generator, device=generator.device if generator else targets.device)
        start = torch.where(
            targets == -1,
            (2 * draws.to(targets.device) - 1) * math.log(0.6 / 0.4),
            torch.logit(targets.to(draws.dtype).clamp(0.005, 0.995)),
        )
        self.estimates = nn.Parameter(start.to(device=device, dtype=dtype))

    def param_groups(self, *, lr: float) -> list[dict[str, Any]]:
        """For an optimiser whose model learns at ``lr``: the labels at ten times that rate, without weight decay."""
        return [{"params": [self.estimates], "lr": 10 * lr, "weight_decay": 0.0}]

    def _loss(self, x: Tensor, y: Tensor, ids: Tensor | None) -> Tensor:
        theta = upcast(self.estimates[ids]).to(x.dtype)
        return 0.5 * (self._half(x, y, theta) + self._half(theta, y, x))

    def _half(self, x: Tensor, y: Tensor, teacher: Tensor) -> Tensor:
        total = cross_entropy(x, y) + cross_entropy(x, torch.sigmoid(teacher.detach()))
        return self._mean(total, x) + surplus(x, self.expected_positives, self._group)
