"""PrototypeRule: unknown labels from how a region relates to the multimodal prototypes."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional as TF
from .._checks import check_number, check_numbers
from .._distributed import sum_over_ranks
from ..functional.similarities import intra_similarities
from ..labels import UNKNOWN
from ..prototypes import PrototypeBank
from .rule import Decision, Evidence, Rule

_STEEPNESS = 6.0  # of the calibrated similarities
_LEAST_GAP = 0.02  # between the mean similarities of present and absent entries
_LEAST_POSITIVES = 10  # known ones that a class needs for statistics of its own


class PrototypeRule(Rule):
    r"""Scores from four relations to the prototypes, decided by thresholds.

    With the :func:`trm_losses.functional.prototype_similarities` of a region, the intra-class ones s calibrated to
    :math:`\tilde s` by the running means of known present and absent entries of the class,

    .. math:: q = \tfrac14 (\tilde s^v + \pi^v + \tilde s^t + \pi^t)

    Terms are left out for a class, and the other weights renormalised: both of a modality if its prototype was never updated,
    the calibrated one if present entries were not more similar than absent ones so far. A class with fewer than ten known
    positives uses statistics pooled over classes. Without any known absent label the mean over the batch's unknown entries stands
    for the mean of absent ones.

    Args:
        num_classes: C.
        positive: a score of at least this is present, with the score as its soft label; at least one half.
        negative: a score of at most this is absent; what lies between stays unknown.
        temperature_visual: of the inter-class term :math:`\pi^v`.
        temperature_text: of :math:`\pi^t`; tie it to the model, 2 / its logit scale.
        momentum: decay of the running statistics for each update.

    Raises:
        ValueError: settings, each by name; thresholds in the wrong order.

    Reference: estimating unknown labels from intra- and inter-class relations to multimodal prototypes is TRM-ML's (paper);
    calibration, weights and constants are our choice. Thresholds on estimated labels follow SARB and the authors' other code.
    """

    similarity_sum: Tensor
    similarity_mass: Tensor

    _class_axes = {"similarity_sum": (2,), "similarity_mass": (2,)}
    needs = ("regions", "bank")

    def __init__(
        self,
        num_classes: int,
        *,
        positive: float = 0.8,
        negative: float = 0.1,
        temperature_visual: float = 0.07,
        temperature_text: float = 0.02,
        momentum: float = 0.99,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_number(name, "num_classes", num_classes, 1)
        check_numbers(name, 0, strict=True, temperature_visual=temperature_visual, temperature_text=temperature_text)
        check_number(name, "momentum", momentum, 0, 1)
        check_number(name, "positive", positive, 0.5, 1)
        check_number(name, "negative", negative, 0, 1)
        if negative >= positive:
            raise ValueError(f"{name}: negative must be below positive, got {negative} and {positive}")
        self.num_classes, self.momentum = num_classes, momentum
        self.temperature_visual, self.temperature_text = temperature_visual, temperature_text
        self.positive, self.negative = positive, negative
        # Decayed sums of s over known entries: (modality: visual, text) x (absent, present) x C, and how many they hold.
        self.register_buffer("similarity_sum", torch.zeros(2, 2, num_classes, device=device))
        self.register_buffer("similarity_mass", torch.zeros(2, 2, num_classes, device=device))

    def decide(self, evidence: Evidence) -> Decision:
        scores = self.scores(evidence)
        unsure = torch.where(scores <= self.negative, 0.0, float(UNKNOWN))
        return Decision(torch.where(scores >= self.positive, scores, unsure), scores)

    def similarities(self, regions: Tensor, bank: PrototypeBank | None, first: int = 0) -> TF.Similarities:
        assert bank is not None
        return TF.prototype_similarities(
            regions,
            bank.visual,
            bank.text,
            seen=bank.seen,
            temperature_visual=self.temperature_visual,
            temperature_text=self.temperature_text,
            first=first,
        )

    def scores(self, evidence: Evidence) -> Tensor:
        """q (B, C) of every entry, known ones included; one half where every term abstains."""
        bank, regions = evidence.bank, evidence.regions
        assert regions is not None and bank is not None
        sim = regions if isinstance(regions, TF.Similarities) else self.similarities(regions, bank)
        seen = bank.seen
        many = torch.tensor(self.num_classes > 1, device=seen.device)
        has_text = torch.linalg.vector_norm(bank.text.float(), dim=-1) > 0
        parts: list[tuple[Tensor, Tensor]] = []  # probability (B, C) and weight (C,) of each term
        for index, (intra, inter, usable, comparable) in enumerate(
            (
                (sim.intra_visual, sim.inter_visual, seen, many & (seen.sum() > 1)),
                (sim.intra_text, sim.inter_text, has_text, many),
            )
        ):
            calibrated, trusted = self._calibrated(intra, evidence, index)
            parts.append((calibrated, 0.25 * (usable & trusted)))
            parts.append((inter, 0.25 * (usable & comparable)))
        mass = torch.stack([weight for _, weight in parts]).sum(dim=0)
        total = torch.stack([score * weight for score, weight in parts]).sum(dim=0)
        return torch.where(mass > 0, total / torch.where(mass > 0, mass, 1.0), 0.5)

    def _calibrated(self, intra: Tensor, evidence: Evidence, modality: int) -> tuple[Tensor, Tensor]:
        """The calibrated similarity (B, C), and whether the class's statistics can be trusted (C,)."""
        sums, mass = self.similarity_sum[modality], self.similarity_mass[modality]
        mean = sums / torch.where(mass > 0, mass, 1.0)  # (absent, present) x C
        pooled = sums.sum(dim=1) / torch.where(mass.sum(dim=1) > 0, mass.sum(dim=1), 1.0)
        # Without any known absent label, unknown entries stand for them: most of them are absent.
        no_absent = mass[0].sum() == 0
        free = (evidence.targets == UNKNOWN).to(intra.dtype)
        met, number = sum_over_ranks(torch.stack([(intra * free).sum(dim=0), free.sum(dim=0)]), evidence.group)
        typical = met / number.clamp(min=1)
        own = (evidence.known_count[1] >= _LEAST_POSITIVES) & (mass[1] > 0)
        absent = torch.where(no_absent, typical, torch.where(own & (mass[0] > 0), mean[0], pooled[0]))
        own = own & (no_absent | (mass[0] > 0))
        present = torch.where(own, mean[1], pooled[1])
        anywhere = met.sum() / number.sum().clamp(min=1)
        pooled_gap = pooled[1] - torch.where(no_absent, anywhere, pooled[0])
        difference = present - absent
        gap = torch.maximum(difference, 0.5 * pooled_gap).clamp(min=_LEAST_GAP)
        trusted = (mass[1].sum() > 0) & (difference > 0)
        return TF.calibrate(intra, present, absent, gap, steepness=_STEEPNESS), trusted

    @torch.no_grad()
    def update(self, evidence: Evidence) -> None:
        regions, targets, bank = evidence.regions, evidence.targets, evidence.bank
        assert regions is not None and bank is not None
        known = torch.stack([targets == 0, targets == 1]).float()  # (absent, present) x B x C
        if isinstance(regions, TF.Similarities):
            intra = regions.intra_visual, regions.intra_text
        else:
            intra = intra_similarities(regions, bank.visual, bank.text)
        similarities = torch.where(targets == UNKNOWN, 0.0, torch.stack(intra).float())
        sums = torch.einsum("xbc,mbc->xmc", similarities, known)
        mass = known.sum(dim=1).expand(2, -1, -1).clone()
        # A prototype that is still its start value says nothing about what similarities it will have.
        sums[0] *= bank.seen
        mass[0] *= bank.seen
        joined = sum_over_ranks(torch.cat([sums, mass]), evidence.group)
        self.similarity_sum.mul_(self.momentum).add_(joined[:2])
        self.similarity_mass.mul_(self.momentum).add_(joined[2:])
