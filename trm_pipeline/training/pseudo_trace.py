"""How right pseudo-labels are, against labels that training never sees: a diagnosis that feeds nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from trm_losses import PseudoLabels
from trm_losses.labels import UNKNOWN
from trm_pipeline import ranks

Point = dict[str, float | int | None]
"""step, positive_precision, positive_recall, negative_precision, negative_recall (None: nothing to divide by), decided."""


class PseudoTrace:
    r"""Precision and recall of pseudo-labels over the unknown entries of the steps since the last point.

    .. math:: P_+ = \frac{\#(\tilde y \ge \frac12, y = 1)}{\#(\tilde y \ge \frac12)}, \quad
        R_+ = \frac{\#(\tilde y \ge \frac12, y = 1)}{\#(y = 1)}

    and the same of absent labels, :math:`0 \le \tilde y < \frac12` against y = 0.

    Args:
        truth: (N, C) the labels before any were hidden, of the whole training set.
    """

    def __init__(self, truth: Tensor) -> None:
        self.truth = truth
        self.points: list[Point] = []
        self._clear()

    def _clear(self) -> None:
        # (present, absent) x (right, decided, true): counts since the last point.
        self._counts = torch.zeros(2, 3, dtype=torch.int64)

    @torch.no_grad()
    def add(self, pseudo: PseudoLabels, targets: Tensor, index: Tensor) -> None:
        """Count a step: pseudo-labels and known labels (B, C) of the images ``index`` (B,)."""
        truth = self.truth[index]
        labels, hidden = pseudo.targets.cpu(), (targets.cpu() == UNKNOWN) & (truth != UNKNOWN)
        for row, (said, true) in enumerate(((labels >= 0.5, truth == 1), ((labels >= 0) & (labels < 0.5), truth == 0))):
            said, true = said & hidden, true & hidden
            self._counts[row] += torch.stack([(said & true).sum(), said.sum(), true.sum()])

    def point(self, step: int) -> None:
        """Close the counts since the last point as one of the trace."""
        point: Point = {"step": step}
        self._counts = torch.stack(ranks.gather(self._counts)).sum(dim=0)  # NCCL adds nothing up on a CPU
        for word, (right, said, true) in zip(("positive", "negative"), self._counts.tolist(), strict=True):
            point[f"{word}_precision"] = round(right / said, 4) if said else None
            point[f"{word}_recall"] = round(right / true, 4) if true else None
        point["decided"] = int(self._counts[:, 1].sum())
        self.points.append(point)
        self._clear()
