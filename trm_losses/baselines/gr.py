"""GR and GPR: an unknown label is present with an estimated chance, and weighs less the less the model says of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._checks import Dims, check_finite, check_number, check_numbers
from .._distributed import Distributed
from ._baseline import Baseline, cross_entropy, power_loss
from .epr import surplus

Ramp = tuple[float, float]
"""A number at the start and at the end of the training."""


class GRLoss(Baseline):
    r"""GR: a robust loss of presence and one of absence share each unknown label by an estimated chance K.

    .. math::
        L &= \frac{1}{BC} \Big[ \sum_{bc:\,y \ge 0} \mathrm{BCE}(y_{bc}, p_{bc}) + \sum_{bc:\,y = -1} V_{bc} \Big( K_{bc}
            \frac{1 - p_{bc}^{q_+}}{q_+} + (1 - K_{bc}) \frac{1 - (1 - p_{bc})^{q_-}}{q_-} \Big) \Big] \\
        K &= \mathrm{sg}\, \sigma(w p + b), \qquad V = \mathrm{sg} \exp\Big( -\frac{(p - \mu)^2}{2 \varsigma^2} \Big)

    K is the chance that an unknown label is present, V the weight of its term. Both change over the training. At
    epoch e of E, counted from 0, w and b have gone e / E of their way, :math:`\mu` and :math:`\varsigma` (e + 1) / E.
    :meth:`begin_epoch` moves them; before any call all four are at their start.

    Args:
        slope, offset: w and b at the start and at the end; GPR takes (0, 2) and (-2, -2) for VOC, (0, 10) and (-2, -8) for
            COCO, NUS and CUB.
        center, width: :math:`\mu` and :math:`\varsigma` likewise.
        q_present, q_absent: :math:`q_+` and :math:`q_-`, from 0 (cross-entropy) to 1 (mean absolute error) and above;
            GPR's second is 1.5 for CUB.

    Shape:
        logits, targets (B, C) -> scalar.

    Example:
        >>> loss = GRLoss(slope=(0, 0), offset=(-99, -99), width=(math.inf, math.inf))  # K = 0 and V = 1
        >>> loss(torch.zeros(1, 1), torch.tensor([[-1.]]))  # the absolute error
        tensor(0.5000)

    Reference: Chen et al., "Generalized Robust Loss", IJCAI 2024, for single positives; the defaults are those of its code.
    The term of known absent labels is ours. Published are 8 epochs; that the ramps follow any number is ours too.
    """

    ramps: Tensor

    def __init__(
        self,
        *,
        slope: Ramp = (0.0, 2.0),
        offset: Ramp = (-2.0, -2.0),
        center: Ramp = (0.5, 0.8),
        width: Ramp = (2.0, 0.5),
        q_present: float = 0.01,
        q_absent: float = 1.0,
        distributed: Distributed = False,
        validate: bool = True,
    ) -> None:
        super().__init__(distributed=distributed, validate=validate)
        name = type(self).__name__
        for ramp, given in (("slope", slope), ("offset", offset), ("center", center)):
            for value in given:
                check_number(name, ramp, value)
        for value in width:
            check_number(name, "width", value, 0, strict=True)
        check_numbers(name, 0, q_present=q_present, q_absent=q_absent)
        self.slope, self.offset, self.center, self.width = slope, offset, center, width
        self.q_present, self.q_absent = q_present, q_absent
        self.register_buffer("ramps", torch.zeros(2))  # the way that K and that V have gone

    def _loss(self, x: Tensor, y: Tensor, ids: Tensor | None) -> Tensor:
        return self._mean(cross_entropy(x, y) + self._undecided(x, y == -1), x)

    def _undecided(self, x: Tensor, unknown: Tensor) -> Tensor:
        """The sum of the weighted terms of unknown entries."""
        p = torch.sigmoid(x.detach())
        chance = torch.sigmoid(self._now(self.slope, 0, x) * p + self._now(self.offset, 0, x))
        terms = chance * power_loss(x, self.q_present) + (1 - chance) * power_loss(-x, self.q_absent)
        return torch.where(unknown, self._weight(x) * terms, 0.0).sum()

    def _weight(self, x: Tensor) -> Tensor:
        """V."""
        away = (torch.sigmoid(x.detach()) - self._now(self.center, 1, x)) / self._now(self.width, 1, x)
        return torch.exp(-0.5 * away * away)

    def _now(self, ramp: Ramp, which: int, x: Tensor) -> Tensor:
        """Where a number stands on its way; one that does not move may be infinite."""
        start, end = ramp
        share = self.ramps[which].to(x.dtype)
        return torch.full_like(share, start) if start == end else start + (end - start) * share

    def _schedule(self, epoch: int, epochs: int) -> None:
        self.ramps.copy_(self.ramps.new_tensor([epoch / epochs, (epoch + 1) / epochs]))


class GPRLoss(GRLoss):
    r"""GPR: GR with pseudo-labels of a frozen teacher, and a number of expected positives drawn to k.

    .. math::
        L = \frac{1}{BC} \Big[ \sum_{bc:\,y \ge 0} \mathrm{BCE}(y_{bc}, p_{bc})
            + \sum_{bc \in P} a_{bc}\, \mathrm{BCE}(\rho, p_{bc}) + \sum_{bc \in Q} -V_{bc} \log(1 - p_{bc})
            + \sum_{bc \in U} \text{the term of GR} \Big] + \beta R(p), \qquad a = \min(\max(1 - V, \lambda_2), \lambda_1)

    P are the unknown entries whose score of the teacher is at least :math:`\theta` and among the :math:`\lceil k \rceil`
    largest of their image. Q are the others among the :math:`\lfloor \delta C \rfloor` smallest of their image, U the rest.
    R is that of :class:`EPRLoss`. Without P, Q and R this is :class:`GRLoss`.

    Args:
        scores: (n, C) of the frozen teacher for the training images: probabilities, or whatever ``threshold`` is of.
        expected_positives: k, the mean number of present labels of an image.
        threshold: :math:`\theta` of CLIP's softmax over the classes: 0.5 (VOC, COCO) or 0.6 (NUS) at temperature 0.01, 0.005 at
            0.1 (CUB).
        negative_share: :math:`\delta`, 0.2 or 0.3 (COCO).
        weights: :math:`\lambda_2, \lambda_1`, between which a pseudo-positive weighs; (0.5, 0.7) for COCO and NUS, (0.2, 0.8)
            for CUB.
        confidence: :math:`\rho`, the soft label of a pseudo-positive.
        weight_expected: :math:`\beta`, 0.05 (VOC), 0.001 (COCO, NUS), 0.01 (CUB).
        options: of :class:`GRLoss`.

    Shape:
        logits, targets (B, C), ids (B,) int64 -> scalar.

    Example:
        >>> loss = GPRLoss(torch.tensor([[0.6, 0.3, 0.1]]), 1.0, negative_share=0.4, weight_expected=0.0)
        >>> logits = torch.zeros(1, 3, requires_grad=True)
        >>> loss(logits, torch.full((1, 3), -1.), ids=torch.tensor([0])).backward()
        >>> logits.grad[0] < 0  # the first class is taken for present
        tensor([ True, False, False])

    Reference: Tran et al., ICCV 2025 (arXiv 2508.20381), for single positives, with a teacher of CLIP scores of tiles. Any
    teacher, the bound :math:`\lceil k \rceil` and the term of known absent labels are ours. The released code never
    reaches the term of Q; ``negative_share=0`` leaves it out here.
    """

    scores: Tensor

    def __init__(
        self,
        scores: Tensor,
        expected_positives: float,
        *,
        threshold: float = 0.5,
        negative_share: float = 0.2,
        weights: Ramp = (0.4, 0.7),
        confidence: float = 0.9,
        weight_expected: float = 0.05,
        **options: Any,
    ) -> None:
        name = type(self).__name__
        Dims(name).check("scores", scores, "n C")
        check_finite(name, "scores", scores)
        super().__init__(**options)
        self.num_samples, self.num_classes = scores.shape
        check_number(name, "expected_positives", expected_positives, 0, strict=True)
        check_number(name, "threshold", threshold)
        check_number(name, "negative_share", negative_share, 0, 1)
        low, high = weights
        check_number(name, "weights", low, 0, high)
        check_number(name, "weights", high, 0, 1)
        check_number(name, "confidence", confidence, 0, 1)
        check_number(name, "weight_expected", weight_expected, 0)
        self.expected_positives, self.threshold, self.negative_share = expected_positives, threshold, negative_share
        self.weights, self.confidence, self.weight_expected = weights, confidence, weight_expected
        self.register_buffer("scores", scores.detach().clone())

    def _loss(self, x: Tensor, y: Tensor, ids: Tensor | None) -> Tensor:
        unknown = y == -1
        found, absent = self._pseudo(self.scores[ids], unknown)
        weight = self._weight(x)
        weights = torch.where(found, (1 - weight).clamp(*self.weights), torch.where(absent, weight, 1.0))
        taught = cross_entropy(x, y.masked_fill(found, self.confidence).masked_fill(absent, 0.0), weights)
        loss = self._mean(taught + self._undecided(x, unknown & ~found & ~absent), x)
        return loss + self.weight_expected * surplus(x, self.expected_positives, self._group)

    def _pseudo(self, scores: Tensor, unknown: Tensor) -> tuple[Tensor, Tensor]:
        """P and Q as masks (B, C)."""
        classes = scores.shape[1]
        top = scores.topk(min(math.ceil(self.expected_positives), classes)).indices
        low = scores.topk(int(self.negative_share * classes + 1e-6), largest=False).indices
        found = torch.zeros_like(unknown).scatter(1, top, True) & (scores >= self.threshold) & unknown
        return found, torch.zeros_like(unknown).scatter(1, low, True) & unknown & ~found
