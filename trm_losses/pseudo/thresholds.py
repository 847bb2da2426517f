"""Thresholds: fixed levels above which a score is a pseudo-positive, and below which a pseudo-negative."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import check_number
from ..labels import UNKNOWN
from .rule import Evidence

__all__ = ["Thresholds"]


class Thresholds(nn.Module):
    r"""A score :math:`q \ge \theta_+` becomes present, with q as its soft label, :math:`q \le \theta_-` absent.

    Args:
        positive: :math:`\theta_+`, at least one half.
        negative: :math:`\theta_-`, below it.

    Raises:
        ValueError: thresholds out of range or in the wrong order.

    Reference: our choice; thresholds on estimated labels follow SARB and the authors' other code.
    """

    def __init__(self, positive: float = 0.8, negative: float = 0.1) -> None:
        super().__init__()
        name = type(self).__name__
        check_number(name, "positive", positive, 0.5, 1)
        check_number(name, "negative", negative, 0, 1)
        if negative >= positive:
            raise ValueError(f"{name}: negative must be below positive, got {negative} and {positive}")
        self.positive, self.negative = positive, negative

    def forward(self, scores: Tensor, evidence: Evidence) -> Tensor:
        """Labels (B, C) of scores (B, C); -1 between the thresholds."""
        return torch.where(scores >= self.positive, scores, torch.where(scores <= self.negative, 0.0, float(UNKNOWN)))

    def extra_repr(self) -> str:
        return f"positive={self.positive}, negative={self.negative}"
