"""TeacherRule: unknown labels as another classifier estimates them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import Dims, check_estimates
from ..labels import UNKNOWN
from .rule import Decision, Evidence, Rule


class TeacherRule(Rule):
    """Soft labels that another classifier gave before training, for every entry of the training set.

    The best teacher sees something that the pupil does not: :class:`trm_losses.GlobalHead` reads whole images where the pupil
    reads regions. What the pupil has learned never comes back to it.

    Args:
        estimates: (N, C) probabilities of the training images, in the order that ``ids`` count; NaN or -1: no estimate.

    Raises:
        ValueError, TypeError: estimates of another shape or outside [0, 1].

    Reference: our choice; a frozen teacher is GPR's and VLPL's too, whose estimates are CLIP's similarities.
    """

    estimates: Tensor

    _class_axes = {"estimates": (1,)}
    needs = ("ids",)
    soft = True

    def __init__(self, estimates: Tensor) -> None:
        super().__init__()
        name = type(self).__name__
        dims = Dims(name)
        dims.check("estimates", estimates, "N C")
        estimates = check_estimates(name, estimates)
        self.num_samples, self.num_classes = estimates.shape
        self.register_buffer("estimates", estimates)

    @torch.no_grad()
    def reset(self) -> None:
        """Nothing was learned, and nothing is forgotten."""

    def _take_classes(self, places: Sequence[int]) -> None:
        new = torch.tensor([place == self.num_classes for place in places], device=self.estimates.device)
        super()._take_classes(places)
        self.estimates[:, new] = UNKNOWN

    def decide(self, evidence: Evidence) -> Decision:
        assert evidence.ids is not None
        estimates = self.estimates[evidence.ids]
        return Decision(estimates, torch.where(estimates >= 0, estimates, 0.5))
