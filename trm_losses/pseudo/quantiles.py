"""Quantiles: the surest share of a class's unknown entries becomes present, the least sure absent."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_number
from .._distributed import sum_over_ranks
from .._state import FullPrecisionState
from ..labels import UNKNOWN
from .rule import Evidence, assumed_prior, label_prior

__all__ = ["Quantiles"]

_BINS = 256  # of the histograms of scores


class Quantiles(FullPrecisionState):
    r"""Decides by shares, which need no absolute level.

    Of the unknown entries met so far (a decayed histogram of each class) the top share :math:`\rho r_c` becomes present, the
    bottom share :math:`\max(0, 1 - 2 r_c)` absent. The prior :math:`r_c` is the share of present among the known labels; with
    ``expected_positives`` k it is k / C times the class's mean score relative to the mean over classes. A class without known
    labels (in the former case) or without scores abstains. A score of exactly one half, where every term abstains, is neither
    counted nor decided.

    Args:
        num_classes: C.
        share: :math:`\rho`, 0.3 to 0.9.
        momentum: decay of the histograms for each update.

    Reference: our choice.
    """

    histogram: Tensor

    _class_axes = {"histogram": (0,)}

    def __init__(
        self, num_classes: int, *, share: float = 0.6, momentum: float = 0.99, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_number(name, "num_classes", num_classes, 1)
        check_number(name, "share", share, 0, 1)
        check_number(name, "momentum", momentum, 0, 1)
        self.num_classes, self.share, self.momentum = num_classes, share, momentum
        self.register_buffer("histogram", torch.zeros(num_classes, _BINS, device=device))

    def forward(self, scores: Tensor, evidence: Evidence) -> Tensor:
        """Labels (B, C) of scores (B, C); -1 between the shares."""
        mass = self.histogram.sum(dim=1)
        if evidence.expected_positives is None:
            ready, prior = (mass > 0) & (evidence.known_count.sum(dim=0) > 0), label_prior(evidence.known_count)
        else:
            centres = (torch.arange(_BINS, device=mass.device) + 0.5) / _BINS
            mean = self.histogram @ centres / torch.where(mass > 0, mass, 1.0)
            ready = mass > 0
            prior = assumed_prior(mean, ready, evidence.expected_positives)
        top, bottom = self.share * prior, (1 - 2 * prior).clamp(min=0)
        decided = ready & (scores != 0.5)
        positive = decided & (top > 0) & (scores >= 1 - self._cut(self.histogram.flip(1), top))
        negative = decided & (bottom > 0) & (scores <= self._cut(self.histogram, bottom))
        labels = torch.where(negative, 0.0, float(UNKNOWN))
        return torch.where(positive, 1.0, labels).to(scores.dtype)

    @torch.no_grad()
    def update(self, scores: Tensor, evidence: Evidence) -> None:
        """Count the scores (B, C) of unknown entries."""
        counted = (evidence.targets == UNKNOWN) & (scores != 0.5)
        first = _BINS * torch.arange(scores.shape[1], device=scores.device)
        index = (scores * _BINS).long().clamp(0, _BINS - 1) + first
        met = torch.zeros_like(self.histogram).flatten().index_add_(0, index.flatten(), counted.flatten().float())
        self.histogram.mul_(self.momentum).add_(sum_over_ranks(met.view_as(self.histogram), evidence.group))

    @staticmethod
    def _cut(histogram: Tensor, share: Tensor) -> Tensor:
        """(C,) score below which this share of the histogram lies, linear inside a bin."""
        below, wanted = histogram.cumsum(dim=1), share * histogram.sum(dim=1)
        index = (below < wanted[:, None]).sum(dim=1, keepdim=True).clamp(max=_BINS - 1)
        inside = histogram.gather(1, index)
        part = (wanted[:, None] - below.gather(1, index) + inside) / torch.where(inside > 0, inside, 1.0)
        return ((index + part.clamp(0, 1)) / _BINS).squeeze(1)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, share={self.share}"
