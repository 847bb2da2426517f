"""PseudoLabeler: estimates of the unknown labels from multimodal prototypes."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import functional as TF
from ._checks import Dims, check_choice, check_finite, check_number, check_targets
from ._distributed import Distributed, resolve_group, sum_over_ranks
from ._state import FullPrecisionState
from .labels import UNKNOWN
from .prototype_bank import PrototypeBank

__all__ = ["PseudoLabeler", "PseudoLabels"]


class PseudoLabels(NamedTuple):
    """Decisions over unknown entries, all (B, C): targets (-1 where known or undecided), loss weights, scores in [0, 1]."""

    targets: Tensor
    weights: Tensor
    scores: Tensor

    def merge(self, targets: Tensor) -> Tensor:
        """Known labels as they are, and the pseudo-labels at unknown entries."""
        return torch.where(targets == UNKNOWN, self.targets, targets.to(self.targets.dtype))


class PseudoLabeler(FullPrecisionState):
    r"""Turns unknown labels into pseudo-labels, or leaves them unknown.

    ``rule="prototype"``: with the four :func:`trm_losses.functional.prototype_similarities` of a region, the intra-class
    ones calibrated by the running means of known present and absent entries of the class,

    .. math:: q = \tfrac12 \omega (q^v + \pi^v) + \tfrac12 (1 - \omega) (q^t + \pi^t)

    An entry with :math:`q \ge \theta_+` becomes present (with the soft label q), one with :math:`q \le \theta_-` absent,
    all others stay unknown. A modality abstains, and the other weights are renormalised, where the class's prototype was
    never updated, or where present entries were not more similar than absent ones so far; classes with fewer than
    ``min_positives`` known positives use statistics pooled over classes. Without any known absent label the mean over the
    batch's unknown entries stands for the mean of absent ones.

    ``rule="logit"``: hard labels from the model's own logits, thresholds in logits.

    ``rule="neighbour"``: soft labels that :meth:`refresh` computes for the whole training set at once, by
    :func:`trm_losses.functional.neighbour_scores`: the k images whose region of a class is the most similar say what they
    know of it, a label where there is one, else the probability that the model gives them. Every unknown entry takes its
    estimate, sure or not, since what teaches something lies between the thresholds. Refresh from averaged weights, and
    seldom (once an epoch): an estimate that follows the model's every step confirms the model's mistakes.

    Nothing is decided in the first ``warmup_steps``; the weights then grow linearly over ``ramp_steps``. Steps are counted
    by :meth:`update`, which is called after the optimiser's step, before the bank's. Known labels are never changed.

    Args:
        num_classes: C.
        rule: ``"prototype"``, ``"logit"`` or ``"neighbour"``.
        threshold_pos, threshold_neg: :math:`\theta_+, \theta_-`; None for 0.8 and 0.1 (prototype) or 0.9 and -0.9 (logit). The
            neighbour rule has none.
        weight_pos, weight_neg: factors of pseudo-positives and pseudo-negatives in the loss; with the neighbour rule those
            are the labels from one half up, and below. None for 1 and 0.5, or 1 and 1 (neighbour).
        soft_positives: the label of a pseudo-positive is q instead of 1 (prototype rule; the logit rule is hard, and
            the neighbour rule soft).
        num_samples: N, the size of the training set (neighbour rule, and only there).
        neighbours, neighbour_temperature: k and :math:`\tau` of the neighbour rule.
        visual_weight: :math:`\omega`.
        temperature_visual, temperature_text: of the inter-class terms; tie the latter to the model, 2 / its logit scale.
        steepness: k of :func:`trm_losses.functional.calibrate`. min_gap: least distance of the means.
        min_positives: known positives a class needs for statistics of its own.
        momentum: decay of the running statistics for each update.
        warmup_steps, ramp_steps: counted in updates; 10 % of training each is a good start.
        cap: keep only the surest pseudo-positives of an image, at most max(1, 2k - its known positives); not of the neighbour
            rule.
        expected_positives: k, the mean number of present classes; None estimates it from the known labels, which is only
            right where labels are hidden at random (not with single positives).
        distributed: False, True or a process group: statistics are over all ranks (but for the unknown entries that stand for
            absent ones while no absent label is known at all: those are the rank's own).
        validate: check label values and look for NaN (waits for the device).

    Shape:
        regions (B, C, D), targets (B, C), text (C, D), logits (B, C), ids (B,) -> :class:`PseudoLabels` of (B, C).

    Raises:
        ValueError, TypeError: shapes, devices, label values, settings, each by name; ``logits`` or ``ids`` missing for
            the rule that needs them.

    Example:
        >>> import torch
        >>> labeler = PseudoLabeler(1, rule="logit", warmup_steps=0, ramp_steps=0)
        >>> bank = PrototypeBank(1, 4)
        >>> logits = torch.tensor([[2.0], [-2.0], [0.0], [9.0]])
        >>> pseudo = labeler(torch.zeros(4, 1, 4), torch.tensor([[-1.0], [-1.0], [-1.0], [0.0]]), bank, logits=logits)
        >>> pseudo.targets.flatten().tolist()
        [1.0, 0.0, -1.0, -1.0]

    Reference: estimating unknown labels from intra- and inter-class relations to multimodal prototypes is TRM-ML's
    (paper); the logit rule is in the authors' other code; calibration, thresholds, ramp, cap and neighbours are our choice.
    """

    step: Tensor
    similarity_sum: Tensor
    similarity_mass: Tensor
    known_count: Tensor
    estimates: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        rule: Literal["prototype", "logit", "neighbour"] = "prototype",
        threshold_pos: float | None = None,
        threshold_neg: float | None = None,
        weight_pos: float | None = None,
        weight_neg: float | None = None,
        soft_positives: bool = True,
        num_samples: int | None = None,
        neighbours: int = 20,
        neighbour_temperature: float = 0.05,
        visual_weight: float = 0.5,
        temperature_visual: float = 0.07,
        temperature_text: float = 0.02,
        steepness: float = 6.0,
        min_gap: float = 0.02,
        min_positives: int = 10,
        momentum: float = 0.99,
        warmup_steps: int = 0,
        ramp_steps: int = 0,
        cap: bool = True,
        expected_positives: float | None = None,
        distributed: Distributed = False,
        validate: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_choice(name, "rule", rule, ("prototype", "logit", "neighbour"))
        by_neighbours = rule == "neighbour"
        if by_neighbours != (num_samples is not None):
            raise ValueError(
                f"{name}: num_samples must be given with rule='neighbour', the number of training images, and only there; "
                f"got {num_samples!r} with rule={rule!r}"
            )
        if by_neighbours and (threshold_pos is not None or threshold_neg is not None):
            raise ValueError(f"{name}: thresholds must not be given with rule='neighbour', whose labels are soft")
        weight_pos = 1.0 if weight_pos is None else weight_pos
        weight_neg = (1.0 if by_neighbours else 0.5) if weight_neg is None else weight_neg
        defaults = (0.9, -0.9) if rule == "logit" else (0.8, 0.1)
        threshold_pos = defaults[0] if threshold_pos is None else threshold_pos
        threshold_neg = defaults[1] if threshold_neg is None else threshold_neg
        if threshold_neg >= threshold_pos:
            raise ValueError(f"{name}: threshold_neg must be below threshold_pos, got {threshold_neg} and {threshold_pos}")
        for key, value, low, high in (
            ("num_classes", num_classes, 1, None),
            ("weight_pos", weight_pos, 0, None),
            ("weight_neg", weight_neg, 0, None),
            ("visual_weight", visual_weight, 0, 1),
            ("steepness", steepness, 0, None),
            ("min_positives", min_positives, 0, None),
            ("momentum", momentum, 0, 1),
            ("warmup_steps", warmup_steps, 0, None),
            ("ramp_steps", ramp_steps, 0, None),
            ("num_samples", 1 if num_samples is None else num_samples, 1, None),
            ("neighbours", neighbours, 1, None),
        ):
            check_number(name, key, value, low, high)
        for key, value in (
            ("temperature_visual", temperature_visual),
            ("temperature_text", temperature_text),
            ("min_gap", min_gap),
            ("neighbour_temperature", neighbour_temperature),
            ("expected_positives", 1.0 if expected_positives is None else expected_positives),
        ):
            check_number(name, key, value, 0, strict=True)
        self.num_classes, self.rule = num_classes, rule
        self.threshold_pos, self.threshold_neg = threshold_pos, threshold_neg
        self.weight_pos, self.weight_neg, self.soft_positives = weight_pos, weight_neg, soft_positives
        self.visual_weight = visual_weight
        self.temperature_visual, self.temperature_text = temperature_visual, temperature_text
        self.steepness, self.min_gap, self.min_positives = steepness, min_gap, min_positives
        self.momentum, self.warmup_steps, self.ramp_steps = momentum, warmup_steps, ramp_steps
        self.cap, self.expected_positives = cap, expected_positives
        self.neighbours, self.neighbour_temperature = neighbours, neighbour_temperature
        self.distributed, self.validate = distributed, validate
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))
        # Decayed sums of s over known entries: (modality: visual, text) x (absent, present) x C, and how many they hold.
        self.register_buffer("similarity_sum", torch.zeros(2, 2, num_classes, device=device))
        self.register_buffer("similarity_mass", torch.zeros(2, 2, num_classes, device=device))
        if num_samples is not None:  # estimates of the neighbour rule by sample; -1 before the first refresh
            self.register_buffer("estimates", torch.full((num_samples, num_classes), float(UNKNOWN), device=device))
        # Known labels met so far: (absent, present) x C.
        self.register_buffer("known_count", torch.zeros(2, num_classes, dtype=torch.int64, device=device))

    @torch.no_grad()
    def reset(self) -> None:
        """Forget statistics and steps."""
        for buffer in self.buffers(recurse=False):
            buffer.zero_()
        if self.rule == "neighbour":
            self.estimates.fill_(UNKNOWN)

    @property
    def ramp(self) -> Tensor:
        """The factor in [0, 1] of all weights at the current step; 0 in the warm-up."""
        since = (self.step - self.warmup_steps).float()
        grown = (since / self.ramp_steps).clamp(0, 1) if self.ramp_steps else torch.ones_like(since)
        return grown * (since >= 0)

    @property
    def prior(self) -> Tensor:
        """(C,) share of present among the known labels so far; pooled over classes for classes without any."""
        absent, present = self.known_count.float()
        known = absent + present
        pooled = present.sum() / known.sum().clamp(min=1)
        return torch.where(known > 0, present / known.clamp(min=1), pooled)

    def _check(self, regions: Tensor, targets: Tensor, bank: PrototypeBank, text: Tensor | None) -> Dims:
        dims = Dims(type(self).__name__, C=self.num_classes)
        dims.check("regions", regions, "B C D")
        dims.check("targets", targets, "B C", floating=False)
        centres = "C D" if bank.visual.ndim == 2 else "C K D"
        dims.check("bank.visual", bank.visual, centres, hint="regions and bank share classes and width")
        if text is not None:
            dims.check("text", text, "C D")
        if self.validate:
            check_targets(dims.owner, targets)
            check_finite(dims.owner, "regions", regions)
        return dims

    @torch.no_grad()
    def forward(
        self,
        regions: Tensor,
        targets: Tensor,
        bank: PrototypeBank,
        *,
        text: Tensor | None = None,
        logits: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> PseudoLabels:
        """Pseudo-labels of a batch with the current prototypes, without gradient.

        Args:
            regions: (B, C, D) features of the kind that the bank holds.
            targets: (B, C); entries other than -1 are left alone.
            bank: gives visual and text prototypes and which are seen.
            text: (C, D) in place of the bank's text prototypes.
            logits: (B, C) of the model, for ``rule="logit"``.
            ids: (B,) the places of the images in the training set, for ``rule="neighbour"``.
        """
        dims = self._check(regions, targets, bank, text)
        unknown = targets == UNKNOWN
        if self.rule == "neighbour":
            return self._from_neighbours(dims, unknown, ids)
        with TF.full_precision(regions):
            if self.rule == "logit":
                if logits is None:
                    raise ValueError(f"{dims.owner}: logits (B, C) must be given for rule='logit'")
                dims.check("logits", logits, "B C")
                level = TF.upcast(logits)
                scores = torch.sigmoid(level)
            else:
                scores = level = self.scores(regions, targets, bank, text=text)
            positive = unknown & (level >= self.threshold_pos)
            negative = unknown & (level <= self.threshold_neg)
            if self.cap:
                positive = positive & self._within_cap(scores, positive, targets)
            active = self.step >= self.warmup_steps
            positive, negative = positive & active, negative & active
            label = scores if self.soft_positives and self.rule == "prototype" else torch.ones_like(scores)
            labels = torch.where(positive, label, torch.where(negative, 0.0, float(UNKNOWN)))
            weights = self.ramp * (positive * self.weight_pos + negative * self.weight_neg)
            return PseudoLabels(labels, weights.to(scores.dtype), scores)

    def _from_neighbours(self, dims: Dims, unknown: Tensor, ids: Tensor | None) -> PseudoLabels:
        """The soft labels of the last refresh."""
        if ids is None:
            raise ValueError(f"{dims.owner}: ids (B,) must be given for rule='neighbour', the places in the training set")
        dims.check("ids", ids, "B", floating=False)
        count = len(self.estimates)
        if self.validate and bool(((ids < 0) | (ids >= count)).any()):
            raise ValueError(f"{dims.owner}: ids must be from 0 to num_samples - 1 = {count - 1}, got {ids.min()} to {ids.max()}")
        estimates = self.estimates[ids]
        decided = unknown & (estimates >= 0) & (self.step >= self.warmup_steps)
        weights = self.ramp * decided * torch.where(estimates >= 0.5, self.weight_pos, self.weight_neg)
        scores = torch.where(estimates >= 0, estimates, 0.5)
        return PseudoLabels(torch.where(decided, estimates, float(UNKNOWN)), weights, scores)

    @torch.no_grad()
    def refresh(self, regions: Tensor, logits: Tensor, targets: Tensor) -> None:
        """New estimates for ``rule="neighbour"`` from the whole training set, in the order that ``ids`` count.

        Give what averaged weights make of it, and the mean over views where an image has several. Where several processes
        train, each gives the whole set.

        Args:
            regions: (N, C, D) region-level features, half precision welcome. logits, targets: (N, C).
        """
        if self.rule != "neighbour":
            raise ValueError(f"{type(self).__name__}: refresh is of rule='neighbour', this is rule={self.rule!r}")
        dims = Dims(type(self).__name__, N=len(self.estimates), C=self.num_classes)
        dims.check("regions", regions, "N C D", hint="one for each of num_samples")
        dims.check("logits", logits, "N C")
        dims.check("targets", targets, "N C", floating=False)
        if self.validate:
            check_finite(dims.owner, "regions", regions)
            check_finite(dims.owner, "logits", logits)
            check_targets(dims.owner, targets)
        said = torch.where(targets == UNKNOWN, torch.sigmoid(TF.upcast(logits)), targets.to(TF.upcast(logits).dtype))
        heard = TF.neighbour_scores(
            regions, said, neighbours=self.neighbours, temperature=self.neighbour_temperature
        )
        self.estimates.copy_(heard.clamp(0, 1))  # a mean of ones may round to more than one

    @torch.no_grad()
    def scores(self, regions: Tensor, targets: Tensor, bank: PrototypeBank, *, text: Tensor | None = None) -> Tensor:
        """q (B, C) of the prototype rule for every entry, known ones included; 0.5 where every term abstains."""
        text = bank.text if text is None else text
        seen = bank.seen
        sim = TF.prototype_similarities(
            regions,
            bank.visual,
            text,
            seen=seen,
            absent=bank.absent,
            temperature_visual=self.temperature_visual,
            temperature_text=self.temperature_text,
        )
        many = torch.tensor(self.num_classes > 1, device=seen.device)
        has_text = torch.linalg.vector_norm(text.float(), dim=-1) > 0
        parts: list[tuple[Tensor, Tensor]] = []  # probability (B, C) and weight (C,) of each term
        for index, (intra, inter, usable, comparable, weight) in enumerate(
            (
                (sim.intra_visual, sim.inter_visual, seen, many & (seen.sum() > 1), self.visual_weight),
                (sim.intra_text, sim.inter_text, has_text, many, 1 - self.visual_weight),
            )
        ):
            calibrated, trusted = self._calibrated(intra, targets == UNKNOWN, index)
            parts.append((calibrated, 0.5 * weight * (usable & trusted)))
            parts.append((inter, 0.5 * weight * (usable & comparable)))
        mass = torch.stack([weight for _, weight in parts]).sum(dim=0)
        total = torch.stack([score * weight for score, weight in parts]).sum(dim=0)
        return torch.where(mass > 0, total / torch.where(mass > 0, mass, 1.0), 0.5)

    def _calibrated(self, intra: Tensor, unknown: Tensor, modality: int) -> tuple[Tensor, Tensor]:
        """The calibrated similarity (B, C), and whether the class's statistics can be trusted (C,)."""
        sums, mass = self.similarity_sum[modality], self.similarity_mass[modality]
        mean = sums / torch.where(mass > 0, mass, 1.0)  # (absent, present) x C
        pooled = sums.sum(dim=1) / torch.where(mass.sum(dim=1) > 0, mass.sum(dim=1), 1.0)
        # Without any known absent label, unknown entries stand for them: most of them are absent.
        no_absent = mass[0].sum() == 0
        free = unknown.to(intra.dtype)
        typical = (intra * free).sum(dim=0) / free.sum(dim=0).clamp(min=1)
        own = (self.known_count[1] >= self.min_positives) & (mass[1] > 0)
        absent = torch.where(no_absent, typical, torch.where(own & (mass[0] > 0), mean[0], pooled[0]))
        own = own & (no_absent | (mass[0] > 0))
        present = torch.where(own, mean[1], pooled[1])
        anywhere = (intra * free).sum() / free.sum().clamp(min=1)
        pooled_gap = pooled[1] - torch.where(no_absent, anywhere, pooled[0])
        difference = present - absent
        gap = torch.maximum(difference, 0.5 * pooled_gap).clamp(min=self.min_gap)
        trusted = (mass[1].sum() > 0) & (difference > 0)
        return TF.calibrate(intra, present, absent, gap, steepness=self.steepness), trusted

    def _within_cap(self, scores: Tensor, positive: Tensor, targets: Tensor) -> Tensor:
        """(B, C) bool: among the surest candidates of its image that the cap leaves room for."""
        expected = self.prior.sum() if self.expected_positives is None else self.expected_positives
        room = (2 * expected - (targets == 1).sum(dim=1, keepdim=True)).clamp(min=1).floor()
        order = torch.where(positive, scores, -1.0).argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
        return rank < room

    @torch.no_grad()
    def update(self, regions: Tensor, targets: Tensor, bank: PrototypeBank, *, text: Tensor | None = None) -> None:
        """Count a step and take the known entries of a batch into the statistics; before the bank's own update."""
        self._check(regions, targets, bank, text)
        text = bank.text if text is None else text
        group = resolve_group(self.distributed)
        known = torch.stack([targets == 0, targets == 1])  # (absent, present) x B x C
        counts = known.sum(dim=1)
        with TF.full_precision(regions):
            similarities = torch.stack(TF.intra_similarities(regions, bank.visual, text, bank.absent)).float()
            similarities = torch.where(targets == UNKNOWN, 0.0, similarities)
            sums = torch.einsum("xbc,mbc->xmc", similarities, known.float())
            mass = counts.float().expand(2, -1, -1).clone()
            # A prototype that is still its start value says nothing about what similarities it will have.
            sums[0] *= bank.seen
            mass[0] *= bank.seen
            joined = sum_over_ranks(torch.cat([sums, mass, counts[None].float()]), group)
        self.similarity_sum.mul_(self.momentum).add_(joined[:2])
        self.similarity_mass.mul_(self.momentum).add_(joined[2:4])
        self.known_count.add_(joined[4].to(torch.int64))
        self.step.add_(1)

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, rule={self.rule!r}, threshold_pos={self.threshold_pos}, "
            f"threshold_neg={self.threshold_neg}, warmup_steps={self.warmup_steps}, ramp_steps={self.ramp_steps}"
        )
