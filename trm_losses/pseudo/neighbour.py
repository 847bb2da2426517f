"""NeighbourRule: unknown labels from the images whose region of a class looks most alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import functional as TF
from .._checks import check_number
from .._precision import upcast
from ..labels import UNKNOWN
from .rule import Decision, Evidence, Rule, assumed_prior

__all__ = ["NeighbourRule"]


class NeighbourRule(Rule):
    """Soft labels that :meth:`refresh` computes for the whole training set at once.

    :func:`trm_losses.functional.neighbour_scores`: the k images whose region of a class is the most similar say what they know
    of it: a label if there is one, else the model's probability; with several ``steps`` what they heard of their own neighbors.
    Every unknown entry takes its estimate, sure or not, since what teaches something lies between the thresholds. Images without
    a class must look alike too, as they do to a frozen model: to pure noise the regions that show the class are the nearest.

    With ``expected_positives``, :func:`trm_losses.functional.match_prior` moves the estimates of each class to a prior: k / C
    times the class's mean probability relative to the mean over classes. Without known absent labels the model's own level means
    nothing. A class known to be present in more images than that is estimated absent in all others.

    Refresh from averaged weights, and seldom (once an epoch): an estimate that follows the model's every step confirms the
    model's mistakes.

    Args:
        num_classes: C.
        num_samples: N, the size of the training set.
        neighbours: k.
        temperature: of the softmax over neighbors.
        steps: how often scores are passed on.

    Reference: our choice; see :func:`trm_losses.functional.neighbour_scores`.
    """

    estimates: Tensor

    _class_axes = {"estimates": (1,)}
    needs = ("ids",)
    soft = True
    num_samples: int

    def __init__(
        self,
        num_classes: int,
        num_samples: int,
        *,
        neighbours: int = 20,
        temperature: float = 0.05,
        steps: int = 3,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_number(name, "num_classes", num_classes, 1)
        check_number(name, "num_samples", num_samples, 1)
        check_number(name, "neighbours", neighbours, 1)
        check_number(name, "temperature", temperature, 0, strict=True)
        check_number(name, "steps", steps, 1)
        self.num_classes, self.num_samples = num_classes, num_samples
        self.neighbours, self.temperature, self.steps = neighbours, temperature, steps
        # -1 before the first refresh.
        self.register_buffer("estimates", torch.full((num_samples, num_classes), float(UNKNOWN), device=device))

    @torch.no_grad()
    def reset(self) -> None:
        self.estimates.fill_(UNKNOWN)

    def _take_classes(self, places: Sequence[int]) -> None:
        new = torch.tensor([place == self.num_classes for place in places], device=self.estimates.device)
        super()._take_classes(places)
        self.estimates[:, new] = UNKNOWN

    def decide(self, evidence: Evidence) -> Decision:
        estimates = self.estimates[evidence.ids]
        return Decision(estimates, torch.where(estimates >= 0, estimates, 0.5))

    @torch.no_grad()
    def refresh(self, regions: Tensor, logits: Tensor, targets: Tensor, expected_positives: float | None) -> None:
        """New estimates; the regions take N C D numbers, the comparison 2 N N C D operations, block by block."""
        unknown = targets == UNKNOWN
        probabilities = torch.sigmoid(upcast(logits))
        known = targets.to(probabilities.dtype)
        estimates = TF.neighbour_scores(
            regions,
            torch.where(unknown, probabilities, known),
            known=~unknown,
            neighbours=self.neighbours,
            temperature=self.temperature,
            steps=self.steps,
        ).clamp(0, 1)  # a mean of ones may round to more than one
        if expected_positives is not None:
            prior = assumed_prior(probabilities.mean(dim=0), torch.ones_like(unknown[0]), expected_positives)
            matched = TF.match_prior(torch.where(unknown, estimates, known), prior, unknown)
            estimates = torch.where(unknown, matched, estimates)
        self.estimates.copy_(estimates)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, num_samples={self.num_samples}, neighbours={self.neighbours}, steps={self.steps}"
