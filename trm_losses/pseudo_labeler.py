"""PseudoLabeler: estimates of the unknown labels from multimodal prototypes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import functional as TF
from ._checks import Dims, check_choice, check_finite, check_ids, check_number, signed
from ._distributed import Distributed, resolve_group, sum_over_ranks
from ._state import FullPrecisionState
from .labels import UNKNOWN
from .prototype_bank import PrototypeBank

__all__ = ["PseudoLabeler", "PseudoLabels"]

_BINS = 256  # of the histograms of scores
_RELATION_TEMPERATURE = 0.1


class PseudoLabels(NamedTuple):
    """Decisions over unknown entries, all (B, C): targets (-1 where known or undecided), loss weights, scores in [0, 1]."""

    targets: Tensor
    weights: Tensor
    scores: Tensor

    def merge(self, targets: Tensor) -> Tensor:
        """Known labels as they are, and the pseudo-labels at unknown entries."""
        dims = Dims(type(self).__name__)
        dims.check("targets of PseudoLabels", self.targets, "B C")
        targets = dims.targets(targets, "B C", validate=False)
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

    ``rule="quantile"``: the same scores without absolute thresholds. Of the unknown entries met so far (a decayed histogram for
    each class) the top share :math:`\rho_+ r_c` becomes present (with the label 1, for q may be of any size) and the bottom
    share :math:`\max(0, 1 - 2 r_c)` absent. The class prior :math:`r_c` is the share of present among the known labels; where
    ``expected_positives`` says that labels are not hidden at random, k / C times the class's mean score relative to the mean
    over classes. A class without known labels (in the former case) or without scores abstains; a score of exactly one half,
    which is that of a class whose every term abstains, is neither counted nor decided.

    ``rule="logit"``: hard labels from the model's own logits, thresholds in logits.

    ``rule="neighbour"``: soft labels that :meth:`refresh` computes for the whole training set at once, by
    :func:`trm_losses.functional.neighbour_scores`: the k images whose region of a class is the most similar say what they
    know of it, a label where there is one, else the probability that the model gives them; with several ``neighbour_steps``
    what they heard of their own neighbours. Every unknown entry takes its estimate, sure or not, since what teaches something
    lies between the thresholds. Given ``expected_positives``, :func:`trm_losses.functional.match_prior` moves the estimates of
    each class to the prior :math:`r_c` of the quantile rule, with the mean probability as the score: without known absent
    labels the model's own level means nothing. A class known to be present in more images than that is estimated absent in all
    others. Refresh from averaged weights, and seldom (once an epoch): an estimate that follows the model's every step confirms
    the model's mistakes.

    With ``ema_logits`` of an averaged model its vote joins in, :math:`q \leftarrow (1 - \eta) q + \eta \sigma(\ell)`; then, with
    ``relation`` :math:`\rho > 0`, the known present classes of the image speak for those that come with them,

    .. math:: q_{bc} \leftarrow (1 - \rho) q_{bc} + \rho \operatorname{mean}_{c' : Y_{bc'} = 1} G_{c'c}

    with G the counts of two classes known present in one image, each row divided by its sum, or
    :math:`\mathrm{softmax}(P P^\top / 0.1)` of the visual prototypes (the text where not seen), both over the other classes.
    Classes that were never met with another have no row; an image without any keeps its scores. Elsewhere a class that nothing
    speaks for falls to :math:`(1 - \rho) q`: with thresholds near 1 keep the ratio small.

    Nothing is decided in the first ``warmup_steps``; the weights then grow linearly over ``ramp_steps``. Steps are counted
    by :meth:`update`, which is called after the optimiser's step, before the bank's. Known labels are never changed.

    Args:
        num_classes: C.
        rule: ``"prototype"``, ``"quantile"``, ``"logit"`` or ``"neighbour"``.
        threshold_pos, threshold_neg: :math:`\theta_+, \theta_-`; None for 0.8 and 0.1 (prototype) or 0.9 and -0.9 (logit); not
            for the others.
        quantile_pos: :math:`\rho_+` of the quantile rule; 0.3 to 0.9.
        ema_weight: :math:`\eta`, where ``ema_logits`` are given.
        relation: :math:`\rho`, 0 to 0.2. relation_from: G, ``"labels"`` or ``"prototypes"``. Both of the first two rules.
        weight_pos, weight_neg: factors of pseudo-positives and pseudo-negatives in the loss; with the neighbour rule those
            are the labels from one half up, and below. None for 1 and 0.5, or 1 and 1 (neighbour).
        soft_positives: the label of a pseudo-positive is q instead of 1 (prototype rule; quantile and logit are hard,
            neighbour is soft).
        num_samples: N, the size of the training set (neighbour rule, and only there).
        neighbours, neighbour_temperature, neighbour_steps: k, :math:`\tau`, and how often scores are passed on (neighbour rule).
        visual_weight: :math:`\omega`.
        temperature_visual, temperature_text: of the inter-class terms; tie the latter to the model, 2 / its logit scale.
        steepness: k of :func:`trm_losses.functional.calibrate`. min_gap: least distance of the means.
        min_positives: known positives a class needs for statistics of its own.
        momentum: decay of the running statistics and histograms for each update.
        warmup_steps, ramp_steps: counted in updates; 10 % of training each is a good start.
        cap: keep only the surest pseudo-positives of an image, at most max(1, 2k - its known positives); not of the neighbour
            rule.
        expected_positives: k, the mean number of present classes; None estimates it from the known labels, which is only
            right where labels are hidden at random (not with single positives).
        single_positive: with the prototype rule and ``expected_positives``: as long as no known absent label was met, the lowest
            scores of an image, up to a share of 1 - 2k / C of its unknown entries, become absent too.
        distributed: False, True or a process group: statistics are over all ranks, and so are the unknown entries that stand for
            absent ones while no absent label is known at all; every rank must then ask for scores when one does.
        validate: check label values and look for NaN (waits for the device).

    Shape:
        regions (B, C, D), targets (B, C), text (C, D), logits, ema_logits (B, C), ids (B,) -> :class:`PseudoLabels` of (B, C).

    Raises:
        ValueError, TypeError: shapes, devices, label values, settings, each by name; ``logits`` or ``ids`` missing for the
            rule that needs them, ``ema_logits`` or thresholds given to one that takes none; ``single_positive`` without
            ``expected_positives``.

    Example:
        >>> import torch
        >>> labeler = PseudoLabeler(1, rule="logit", warmup_steps=0, ramp_steps=0)
        >>> bank = PrototypeBank(1, 4)
        >>> logits = torch.tensor([[2.0], [-2.0], [0.0], [9.0]])
        >>> pseudo = labeler(torch.zeros(4, 1, 4), torch.tensor([[-1.0], [-1.0], [-1.0], [0.0]]), bank, logits=logits)
        >>> pseudo.targets.flatten().tolist()
        [1.0, 0.0, -1.0, -1.0]

    Reference: estimating unknown labels from intra- and inter-class relations to multimodal prototypes is TRM-ML's
    (paper); the logit rule is in the authors' other code; calibration, thresholds, quantiles, the averaged model's vote, the
    relation term, neighbours, ramp and cap are our choice.
    """

    step: Tensor
    similarity_sum: Tensor
    similarity_mass: Tensor
    known_count: Tensor
    estimates: Tensor
    histogram: Tensor
    cooccurrence: Tensor

    _class_axes = {
        "similarity_sum": (2,),
        "similarity_mass": (2,),
        "known_count": (1,),
        "estimates": (1,),
        "histogram": (0,),
        "cooccurrence": (0, 1),
    }

    def __init__(
        self,
        num_classes: int,
        *,
        rule: Literal["prototype", "quantile", "logit", "neighbour"] = "prototype",
        threshold_pos: float | None = None,
        threshold_neg: float | None = None,
        quantile_pos: float = 0.6,
        ema_weight: float = 0.3,
        relation: float = 0.0,
        relation_from: Literal["labels", "prototypes"] = "labels",
        weight_pos: float | None = None,
        weight_neg: float | None = None,
        soft_positives: bool = True,
        num_samples: int | None = None,
        neighbours: int = 20,
        neighbour_temperature: float = 0.05,
        neighbour_steps: int = 1,
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
        single_positive: bool = False,
        distributed: Distributed = False,
        validate: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_choice(name, "rule", rule, ("prototype", "quantile", "logit", "neighbour"))
        check_choice(name, "relation_from", relation_from, ("labels", "prototypes"))
        if rule in ("quantile", "neighbour") and (threshold_pos, threshold_neg) != (None, None):
            got = f"{threshold_pos} and {threshold_neg}"
            hint = "set quantile_pos" if rule == "quantile" else "its labels are soft"
            raise ValueError(f"{name}: threshold_pos and threshold_neg must be None with rule={rule!r}, got {got}; {hint}")
        if single_positive and (rule != "prototype" or expected_positives is None):
            got = f"rule={rule!r} and expected_positives={expected_positives}"
            raise ValueError(f"{name}: single_positive needs rule='prototype' and expected_positives, got {got}")
        if relation and rule not in ("prototype", "quantile"):
            raise ValueError(f"{name}: relation needs rule='prototype' or 'quantile', got {relation} with rule={rule!r}")
        by_neighbours = rule == "neighbour"
        if by_neighbours != (num_samples is not None):
            raise ValueError(
                f"{name}: num_samples must be given with rule='neighbour', the number of training images, and only there; "
                f"got {num_samples!r} with rule={rule!r}"
            )
        weight_pos = 1.0 if weight_pos is None else weight_pos
        weight_neg = (1.0 if by_neighbours else 0.5) if weight_neg is None else weight_neg
        defaults = {"prototype": (0.8, 0.1), "logit": (0.9, -0.9)}.get(rule, (math.inf, -math.inf))
        threshold_pos = defaults[0] if threshold_pos is None else threshold_pos
        threshold_neg = defaults[1] if threshold_neg is None else threshold_neg
        if threshold_neg >= threshold_pos:
            raise ValueError(f"{name}: threshold_neg must be below threshold_pos, got {threshold_neg} and {threshold_pos}")
        for key, value, low, high in (
            ("num_classes", num_classes, 1, None),
            ("quantile_pos", quantile_pos, 0, 1),
            ("ema_weight", ema_weight, 0, 1),
            ("relation", relation, 0, 1),
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
            ("neighbour_steps", neighbour_steps, 1, None),
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
        self.quantile_pos, self.ema_weight = quantile_pos, ema_weight
        self.relation, self.relation_from = relation, relation_from
        self.weight_pos, self.weight_neg, self.soft_positives = weight_pos, weight_neg, soft_positives
        self.visual_weight = visual_weight
        self.temperature_visual, self.temperature_text = temperature_visual, temperature_text
        self.steepness, self.min_gap, self.min_positives = steepness, min_gap, min_positives
        self.momentum, self.warmup_steps, self.ramp_steps = momentum, warmup_steps, ramp_steps
        self.cap, self.expected_positives, self.single_positive = cap, expected_positives, single_positive
        self.neighbours, self.neighbour_temperature, self.neighbour_steps = neighbours, neighbour_temperature, neighbour_steps
        self.distributed, self.validate = distributed, validate
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))
        # Decayed sums of s over known entries: (modality: visual, text) x (absent, present) x C, and how many they hold.
        self.register_buffer("similarity_sum", torch.zeros(2, 2, num_classes, device=device))
        self.register_buffer("similarity_mass", torch.zeros(2, 2, num_classes, device=device))
        if num_samples is not None:  # estimates of the neighbour rule by sample; -1 before the first refresh
            self.register_buffer("estimates", torch.full((num_samples, num_classes), float(UNKNOWN), device=device))
        # Known labels met so far: (absent, present) x C.
        self.register_buffer("known_count", torch.zeros(2, num_classes, dtype=torch.int64, device=device))
        if rule == "quantile":  # Decayed counts of the scores of unknown entries.
            self.register_buffer("histogram", torch.zeros(num_classes, _BINS, device=device))
        if relation and relation_from == "labels":  # Images in which both classes are known present.
            together = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
            self.register_buffer("cooccurrence", together)

    @torch.no_grad()
    def reset(self) -> None:
        """Forget statistics and steps."""
        for buffer in self.buffers(recurse=False):
            buffer.zero_()
        if self.rule == "neighbour":
            self.estimates.fill_(UNKNOWN)

    @torch.no_grad()
    def with_classes(self, keep: Sequence[int | None]) -> PseudoLabeler:
        """A labeller of its own for another set of classes, as :meth:`PrototypeBank.with_classes`: statistics of the classes that
        stay, none of new ones; steps are counted on, and ``expected_positives`` stays what it was."""
        made = self._keep_classes(keep)
        if self.rule == "neighbour":
            made.estimates[:, [place is None for place in keep]] = UNKNOWN
        return made

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

    def _check(
        self, regions: Tensor | TF.Similarities, targets: Tensor, bank: PrototypeBank, text: Tensor | None
    ) -> tuple[Dims, Tensor]:
        dims = Dims(type(self).__name__, C=self.num_classes)
        if isinstance(regions, TF.Similarities):
            for key, value in regions._asdict().items():
                dims.check(key, value, "B C")
            dims.sizes["D"] = bank.dim
        else:
            dims.check("regions", regions, "B C D")
        targets = dims.targets(targets, "B C", validate=self.validate)
        centres = "C D" if bank.visual.ndim == 2 else "C K D"
        dims.check("bank.visual", bank.visual, centres, hint="regions and bank share classes and width")
        if text is not None:
            dims.check("text", text, "C D")
        if self.validate:
            if text is not None:
                check_finite(dims.owner, "text", text)
            for value in regions if isinstance(regions, TF.Similarities) else [regions]:
                check_finite(dims.owner, "regions", value)
        return dims, targets

    @torch.no_grad()
    def forward(
        self,
        regions: Tensor | TF.Similarities,
        targets: Tensor,
        bank: PrototypeBank,
        *,
        text: Tensor | None = None,
        logits: Tensor | None = None,
        ids: Tensor | None = None,
        ema_logits: Tensor | None = None,
    ) -> PseudoLabels:
        """Pseudo-labels of a batch with the current prototypes, without gradient.

        Args:
            regions: (B, C, D) features of the kind that the bank holds, or the :meth:`similarities` of all classes.
            targets: (B, C); entries other than -1 are left alone.
            bank: gives visual and text prototypes and which are seen.
            text: (C, D) in place of the bank's text prototypes.
            logits: (B, C) of the model, for ``rule="logit"``.
            ids: (B,) the places of the images in the training set, for ``rule="neighbour"``.
            ema_logits: (B, C) of an averaged model, whose vote joins the scores of the other rules.
        """
        dims, targets = self._check(regions, targets, bank, text)
        unknown = targets == UNKNOWN
        if self.rule == "neighbour":
            if ema_logits is not None:
                raise ValueError(f"{dims.owner}: ema_logits must be None with rule='neighbour'; give them to refresh")
            return self._from_neighbours(dims, unknown, ids)
        with TF.full_precision(targets):
            if self.rule == "logit":
                if logits is None:
                    raise ValueError(f"{dims.owner}: logits (B, C) must be given for rule='logit'")
                if ema_logits is not None:
                    raise ValueError(f"{dims.owner}: ema_logits must be None with rule='logit'; pass them as logits")
                dims.check("logits", logits, "B C")
                if self.validate:
                    check_finite(dims.owner, "logits", logits)
                level = TF.upcast(logits)
                scores = torch.sigmoid(level)
            else:
                if ema_logits is not None:
                    dims.check("ema_logits", ema_logits, "B C")
                    if self.validate:
                        check_finite(dims.owner, "ema_logits", ema_logits)
                scores = level = self.scores(regions, targets, bank, text=text, ema_logits=ema_logits)
            if self.rule == "quantile":
                positive, negative = self._within_shares(scores, unknown)
            else:
                positive = unknown & (level >= self.threshold_pos)
                negative = unknown & (level <= self.threshold_neg)
            if self.single_positive:
                negative = negative | (self._lowest(scores, unknown) & ~positive)
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
        check_ids(dims.owner, ids, len(self.estimates) if self.validate else None)
        estimates = self.estimates[ids]
        decided = unknown & (estimates >= 0) & (self.step >= self.warmup_steps)
        weights = self.ramp * decided * torch.where(estimates >= 0.5, self.weight_pos, self.weight_neg)
        scores = torch.where(estimates >= 0, estimates, 0.5)
        return PseudoLabels(torch.where(decided, estimates, float(UNKNOWN)), weights, scores)

    @torch.no_grad()
    def refresh(self, regions: Tensor, logits: Tensor, targets: Tensor) -> None:
        """New estimates for ``rule="neighbour"`` from the whole training set, in the order that ``ids`` count.

        Give what averaged weights make of it, and the mean over views where an image has several. Where several processes
        train, each gives the whole set. The regions take N C D numbers (0.2 GB for the 5,011 images of VOC2007 at D = 512, 6.7 GB
        in half precision for the 82,783 of COCO), the comparison 2 N N C D operations, block by block.

        Args:
            regions: (N, C, D) region-level features, half precision welcome. logits, targets: (N, C).
        """
        if self.rule != "neighbour":
            raise ValueError(f"{type(self).__name__}: refresh is of rule='neighbour', this is rule={self.rule!r}")
        dims = Dims(type(self).__name__, N=len(self.estimates), C=self.num_classes)
        dims.check("regions", regions, "N C D", hint="one for each of num_samples")
        dims.check("logits", logits, "N C")
        targets = dims.targets(targets, "N C", validate=self.validate)
        if self.validate:
            check_finite(dims.owner, "regions", regions)
            check_finite(dims.owner, "logits", logits)
        unknown = targets == UNKNOWN
        probabilities = torch.sigmoid(TF.upcast(logits))
        known = targets.to(probabilities.dtype)
        estimates = TF.neighbour_scores(
            regions,
            torch.where(unknown, probabilities, known),
            known=~unknown,
            neighbours=self.neighbours,
            temperature=self.neighbour_temperature,
            steps=self.neighbour_steps,
        ).clamp(0, 1)  # a mean of ones may round to more than one
        if self.expected_positives is not None:
            prior = self._assumed_prior(probabilities.mean(dim=0), torch.ones_like(unknown[0]))
            matched = TF.match_prior(torch.where(unknown, estimates, known), prior, unknown)
            estimates = torch.where(unknown, matched, estimates)
        self.estimates.copy_(estimates)

    @torch.no_grad()
    def similarities(
        self, regions: Tensor, bank: PrototypeBank, *, text: Tensor | None = None, first: int = 0
    ) -> TF.Similarities:
        """What the labeller reads of regions (B, C, D): it takes these in their place, joined from chunks of the classes.

        Args:
            regions: (B, c, D) of the c classes from ``first`` on.
            bank, text: as in the call.
        """
        text = bank.text if text is None else text
        if self.rule in ("logit", "neighbour"):  # these compare with no other class
            visual, textual = TF.intra_similarities(regions, bank.visual, text, bank.absent, first=first)
            return TF.Similarities(visual, textual, torch.zeros_like(visual), torch.zeros_like(textual))
        return self._all_similarities(regions, bank, text, first)

    def _all_similarities(
        self, regions: Tensor, bank: PrototypeBank, text: Tensor, first: int = 0
    ) -> TF.Similarities:
        return TF.prototype_similarities(
            regions,
            bank.visual,
            text,
            seen=bank.seen,
            absent=bank.absent,
            temperature_visual=self.temperature_visual,
            temperature_text=self.temperature_text,
            first=first,
        )

    @torch.no_grad()
    def scores(
        self,
        regions: Tensor | TF.Similarities,
        targets: Tensor,
        bank: PrototypeBank,
        *,
        text: Tensor | None = None,
        ema_logits: Tensor | None = None,
    ) -> Tensor:
        """q (B, C) of the prototype rule for every entry, known ones included; 0.5 where every term abstains.

        The :meth:`similarities` that stand for regions must be those of the prototype or quantile rule.
        """
        text = bank.text if text is None else text
        targets, seen = signed(targets), bank.seen
        if isinstance(regions, TF.Similarities) and self.rule not in ("prototype", "quantile"):
            raise ValueError(
                f"{type(self).__name__}: regions must be (B, C, D) with rule={self.rule!r}, got similarities, which leave out "
                "what this rule does not compare"
            )
        sim = regions if isinstance(regions, TF.Similarities) else self._all_similarities(regions, bank, text)
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
        scores = torch.where(mass > 0, total / torch.where(mass > 0, mass, 1.0), 0.5)
        if ema_logits is not None:
            scores = (1 - self.ema_weight) * scores + self.ema_weight * torch.sigmoid(TF.upcast(ema_logits))
        return self._joined_by_related(scores, targets, bank, text) if self.relation else scores

    def _joined_by_related(self, scores: Tensor, targets: Tensor, bank: PrototypeBank, text: Tensor) -> Tensor:
        """Scores (B, C) with the share of the image's known present classes."""
        with TF.full_precision(scores):
            related = self._related(bank, text).to(scores.dtype)
            speaks = ((targets == 1) & (related.sum(dim=1) > 0)).to(scores.dtype)
            number = speaks.sum(dim=1, keepdim=True)
            moved = (1 - self.relation) * scores + self.relation * (speaks @ related) / number.clamp(min=1)
            return torch.where(number > 0, moved, scores)

    def _related(self, bank: PrototypeBank, text: Tensor) -> Tensor:
        """G (C, C): how much a present class of the row speaks for that of the column, another one; rows sum to 1 or 0."""
        own = torch.eye(self.num_classes, dtype=torch.bool, device=text.device)
        if self.relation_from == "labels":
            counts = self.cooccurrence.float().masked_fill(own, 0.0)
            return counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
        visual = bank.visual if bank.visual.ndim == 2 else bank.visual.mean(dim=1)
        prototypes = TF.unit(torch.where(bank.seen[:, None], visual, text.to(visual.dtype)))
        related = torch.exp((prototypes @ prototypes.T - 1) / _RELATION_TEMPERATURE).masked_fill(own, 0.0)
        return related / related.sum(dim=1, keepdim=True).clamp(min=1e-12)  # of one class alone: no row

    def _calibrated(self, intra: Tensor, unknown: Tensor, modality: int) -> tuple[Tensor, Tensor]:
        """The calibrated similarity (B, C), and whether the class's statistics can be trusted (C,)."""
        sums, mass = self.similarity_sum[modality], self.similarity_mass[modality]
        mean = sums / torch.where(mass > 0, mass, 1.0)  # (absent, present) x C
        pooled = sums.sum(dim=1) / torch.where(mass.sum(dim=1) > 0, mass.sum(dim=1), 1.0)
        # Without any known absent label, unknown entries stand for them: most of them are absent.
        no_absent = mass[0].sum() == 0
        free = unknown.to(intra.dtype)
        group = resolve_group(self.distributed)
        met, number = sum_over_ranks(torch.stack([(intra * free).sum(dim=0), free.sum(dim=0)]), group)
        typical = met / number.clamp(min=1)
        own = (self.known_count[1] >= self.min_positives) & (mass[1] > 0)
        absent = torch.where(no_absent, typical, torch.where(own & (mass[0] > 0), mean[0], pooled[0]))
        own = own & (no_absent | (mass[0] > 0))
        present = torch.where(own, mean[1], pooled[1])
        anywhere = met.sum() / number.sum().clamp(min=1)
        pooled_gap = pooled[1] - torch.where(no_absent, anywhere, pooled[0])
        difference = present - absent
        gap = torch.maximum(difference, 0.5 * pooled_gap).clamp(min=self.min_gap)
        trusted = (mass[1].sum() > 0) & (difference > 0)
        return TF.calibrate(intra, present, absent, gap, steepness=self.steepness), trusted

    def _within_shares(self, scores: Tensor, unknown: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C) bool each: in the top and in the bottom share of the scores of the class."""
        mass = self.histogram.sum(dim=1)
        if self.expected_positives is None:
            ready, prior = (mass > 0) & (self.known_count.sum(dim=0) > 0), self.prior
        else:
            centres = (torch.arange(_BINS, device=mass.device) + 0.5) / _BINS
            mean = self.histogram @ centres / torch.where(mass > 0, mass, 1.0)
            ready = mass > 0
            prior = self._assumed_prior(mean, ready)
        top, bottom = self.quantile_pos * prior, (1 - 2 * prior).clamp(min=0)
        decided = unknown & ready & (scores != 0.5)
        positive = decided & (top > 0) & (scores >= 1 - self._cut(self.histogram.flip(1), top))
        negative = decided & (bottom > 0) & (scores <= self._cut(self.histogram, bottom)) & ~positive
        return positive, negative

    def _assumed_prior(self, mean: Tensor, ready: Tensor) -> Tensor:
        """(C,) k / C times a class's mean score relative to the mean over the classes that are ready."""
        assert self.expected_positives is not None
        overall = (mean * ready).sum() / ready.sum().clamp(min=1)
        return (self.expected_positives / self.num_classes * mean / torch.where(overall > 0, overall, 1.0)).clamp(0, 1)

    @staticmethod
    def _cut(histogram: Tensor, share: Tensor) -> Tensor:
        """(C,) score below which this share of the histogram lies, linear inside a bin."""
        below, wanted = histogram.cumsum(dim=1), share * histogram.sum(dim=1)
        index = (below < wanted[:, None]).sum(dim=1, keepdim=True).clamp(max=_BINS - 1)
        inside = histogram.gather(1, index)
        part = (wanted[:, None] - below.gather(1, index) + inside) / torch.where(inside > 0, inside, 1.0)
        return ((index + part.clamp(0, 1)) / _BINS).squeeze(1)

    def _lowest(self, scores: Tensor, unknown: Tensor) -> Tensor:
        """(B, C) bool: among the lowest scores of the image, up to the share 1 - 2k / C; none once an absent label was met."""
        assert self.expected_positives is not None
        share = max(0.0, 1 - 2 * self.expected_positives / self.num_classes)
        decided = unknown & (scores != 0.5) & (self.known_count[0].sum() == 0)
        rank = self._ranks(torch.where(decided, scores, math.inf))
        return decided & (rank < (share * unknown.sum(dim=1, keepdim=True)).floor())

    def _within_cap(self, scores: Tensor, positive: Tensor, targets: Tensor) -> Tensor:
        """(B, C) bool: among the surest candidates of its image that the cap leaves room for."""
        expected = self.prior.sum() if self.expected_positives is None else self.expected_positives
        room = (2 * expected - (targets == 1).sum(dim=1, keepdim=True)).clamp(min=1).floor()
        return self._ranks(torch.where(positive, -scores, math.inf)) < room

    @staticmethod
    def _ranks(values: Tensor) -> Tensor:
        """(B, C) int64: place of each value in its row, from 0 for the least."""
        order = values.argsort(dim=1, stable=True)
        return torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))

    @torch.no_grad()
    def update(
        self,
        regions: Tensor | TF.Similarities,
        targets: Tensor,
        bank: PrototypeBank,
        *,
        text: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> None:
        """Count a step and take the known entries of a batch into the statistics; before the bank's own update.

        Args:
            regions, targets, bank, text: as in the call.
            scores: (B, C) of the call on this batch, for the histograms of ``rule="quantile"``; None computes them again, without
                the vote of an averaged model.
        """
        dims, targets = self._check(regions, targets, bank, text)
        if scores is not None:
            dims.check("scores", scores, "B C")
            if self.validate:
                check_finite(dims.owner, "scores", scores)
        text = bank.text if text is None else text
        group = resolve_group(self.distributed)
        known = torch.stack([targets == 0, targets == 1])  # (absent, present) x B x C
        counts = known.sum(dim=1)
        with TF.full_precision(targets):
            if isinstance(regions, TF.Similarities):
                intra = regions.intra_visual, regions.intra_text
            else:
                intra = TF.intra_similarities(regions, bank.visual, text, bank.absent)
            similarities = torch.stack(intra).float()
            similarities = torch.where(targets == UNKNOWN, 0.0, similarities)
            sums = torch.einsum("xbc,mbc->xmc", similarities, known.float())
            mass = counts.float().expand(2, -1, -1).clone()
            # A prototype that is still its start value says nothing about what similarities it will have.
            sums[0] *= bank.seen
            mass[0] *= bank.seen
            joined = sum_over_ranks(torch.cat([sums, mass, counts[None].float()]), group)
            if self.rule == "quantile":
                scores = self.scores(regions, targets, bank, text=text) if scores is None else scores
                counted = (targets == UNKNOWN) & (scores != 0.5)
                index = (scores * _BINS).long().clamp(0, _BINS - 1) + _BINS * torch.arange(scores.shape[1], device=scores.device)
                met = torch.zeros_like(self.histogram).flatten().index_add_(0, index.flatten(), counted.flatten().float())
                self.histogram.mul_(self.momentum).add_(sum_over_ranks(met.view_as(self.histogram), group))
            if self.relation and self.relation_from == "labels":
                together = sum_over_ranks(known[1].float().T @ known[1].float(), group)
                self.cooccurrence.add_(together.to(torch.int64))
        self.similarity_sum.mul_(self.momentum).add_(joined[:2])
        self.similarity_mass.mul_(self.momentum).add_(joined[2:4])
        self.known_count.add_(joined[4].to(torch.int64))
        self.step.add_(1)

    def extra_repr(self) -> str:
        thresholds = f"threshold_pos={self.threshold_pos}, threshold_neg={self.threshold_neg}"
        return (
            f"num_classes={self.num_classes}, rule={self.rule!r}, "
            f"{f'quantile_pos={self.quantile_pos}' if self.rule == 'quantile' else thresholds}, "
            f"warmup_steps={self.warmup_steps}, ramp_steps={self.ramp_steps}"
            f"{f', relation={self.relation}' if self.relation else ''}"
        )
