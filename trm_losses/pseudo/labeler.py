"""PseudoLabeler: when the decisions of a rule count, and how much."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import functional as TF
from .._checks import Dims, check_finite, check_ids, check_number, check_numbers
from .._distributed import Distributed, resolve_group, sum_over_ranks
from .._precision import full_precision, upcast
from .._state import FullPrecisionState
from ..labels import UNKNOWN
from ..prototypes import PrototypeBank
from .prototype import PrototypeRule
from .rule import Evidence, PseudoLabels, Rule


class PseudoLabeler(FullPrecisionState):
    """Turns unknown labels into pseudo-labels, or leaves them unknown.

    A rule decides. Nothing counts in the first ``warmup_steps``; the weights then grow linearly over ``ramp_steps``. Steps are
    counted by :meth:`update`, which is called after the optimizer's step and before the bank's. Known labels are never changed.

    Args:
        num_classes: C.
        rule: a :class:`Rule`; :class:`PrototypeRule` by default.
        weight_pos: factor of pseudo-positives in the loss, the labels of at least one half.
        weight_neg: factor of pseudo-negatives; None: 1 for a soft rule, 0.5 for others.
        cap: keep only the surest pseudo-positives of an image, at most max(1, 2k - its known positives); None: unless the rule
            is soft.
        expected_positives: k, the mean number of present classes; None estimates it from the known labels, which is only right
            if labels are hidden at random (not with single positives).
        warmup_steps: updates without pseudo-labels; 10 % of training is a good start.
        ramp_steps: updates in which their weights grow.
        distributed: False, True or a process group: statistics are over all ranks. Every rank must then ask when one does.
        validate: check label values and ids, and look for NaN (waits for the device).

    Shape:
        regions (B, C, D), targets (B, C), logits (B, C), ids (B,) -> :class:`PseudoLabels` of (B, C).

    Raises:
        ValueError, TypeError: shapes, devices, label values, settings, each by name; what the rule needs and was not given.

    Example:
        >>> import torch
        >>> bank, labeler = PrototypeBank(2, 4), PseudoLabeler(2)
        >>> regions, targets = torch.eye(4)[:2][None], torch.tensor([[1.0, -1.0]])
        >>> pseudo = labeler(regions, targets, bank)
        >>> pseudo.targets.tolist()  # nothing is known yet
        [[-1.0, -1.0]]

    Reference: pseudo-labels from multimodal prototypes are TRM-ML's (paper); ramp, weights and cap are our choice.
    """

    step: Tensor
    known_count: Tensor

    _class_axes = {"known_count": (1,)}

    def __init__(
        self,
        num_classes: int,
        rule: Rule | None = None,
        *,
        weight_pos: float = 1.0,
        weight_neg: float | None = None,
        cap: bool | None = None,
        expected_positives: float | None = None,
        warmup_steps: int = 0,
        ramp_steps: int = 0,
        distributed: Distributed = False,
        validate: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_number(name, "num_classes", num_classes, 1)
        rule = PrototypeRule(num_classes, device=device) if rule is None else rule
        if not isinstance(rule, Rule):
            raise TypeError(f"{name}: rule must be a trm_losses.pseudo.Rule, got {type(rule).__name__}; try PrototypeRule(C)")
        if not isinstance(rule.needs, tuple) or not set(rule.needs) <= {"regions", "bank", "logits", "ids"}:
            raise ValueError(
                f"{name}: needs of a rule must be a tuple of 'regions', 'bank', 'logits' or 'ids', got {rule.needs!r}"
            )
        if getattr(rule, "num_classes", num_classes) != num_classes:
            raise ValueError(f"{name}: rule must have num_classes = {num_classes}, got {rule.num_classes}")
        weight_neg = (1.0 if rule.soft else 0.5) if weight_neg is None else weight_neg
        check_numbers(name, 0, weight_pos=weight_pos, weight_neg=weight_neg, warmup_steps=warmup_steps, ramp_steps=ramp_steps)
        if expected_positives is not None:
            check_number(name, "expected_positives", expected_positives, 0, strict=True)
        self.num_classes, self.rule = num_classes, rule
        self.weight_pos, self.weight_neg = weight_pos, weight_neg
        self.cap = not rule.soft if cap is None else cap
        self.expected_positives = expected_positives
        self.warmup_steps, self.ramp_steps = warmup_steps, ramp_steps
        self.distributed, self.validate = distributed, validate
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device))
        # Known labels met so far: (absent, present) x C.
        self.register_buffer("known_count", torch.zeros(2, num_classes, dtype=torch.int64, device=device))

    @torch.no_grad()
    def reset(self) -> None:
        """Forget statistics and steps."""
        self.step.zero_()
        self.known_count.zero_()
        self.rule.reset()

    @torch.no_grad()
    def with_classes(self, keep: Sequence[int | None]) -> PseudoLabeler:
        """A labeler of its own for another set of classes, as :meth:`PrototypeBank.with_classes`: statistics of the classes
        that stay, none of new ones. Steps are counted on, and ``expected_positives`` stays what it was."""
        return self._keep_classes(keep)

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

    def _evidence(
        self,
        regions: Tensor | TF.Similarities | None,
        targets: Tensor,
        bank: PrototypeBank | None,
        logits: Tensor | None,
        ids: Tensor | None,
    ) -> Evidence:
        """What the rule may look at, checked."""
        self._need(regions=regions, bank=bank)
        dims = Dims(type(self).__name__, C=self.num_classes)
        looked_at: list[Tensor] = []
        if isinstance(regions, TF.Similarities):
            for key, value in regions._asdict().items():
                dims.check(key, value, "B C")
            looked_at = [*regions]
        elif regions is not None:
            dims.check("regions", regions, "B C D")
            looked_at = [regions]
        if bank is not None:
            dims.check("bank.visual", bank.visual, "C D", hint="regions and bank share classes and width")
        targets = dims.targets(targets, "B C", validate=self.validate)
        if logits is not None:
            dims.check("logits", logits, "B C")
        if ids is not None:
            dims.check("ids", ids, "B", floating=False)
            check_ids(dims.owner, ids, getattr(self.rule, "num_samples", None) if self.validate else None)
        if self.validate:
            for value in looked_at:
                check_finite(dims.owner, "regions", value)
            if logits is not None and "logits" in self.rule.needs:
                check_finite(dims.owner, "logits", logits)
        return Evidence(
            regions=regions,
            targets=targets,
            bank=bank,
            logits=None if logits is None else upcast(logits),
            ids=ids,
            known_count=self.known_count,
            group=resolve_group(self.distributed),
        )

    def _need(self, **given: object) -> None:
        """Refuse what the rule needs and was not given."""
        for key, value in given.items():
            if key in self.rule.needs and value is None:
                hint = "; take all classes at once, or define its similarities" if key == "regions" else ""
                owner, rule = type(self).__name__, type(self.rule).__name__
                raise ValueError(f"{owner}: {key} must be given for {rule}, got None{hint}")

    @torch.no_grad()
    def forward(
        self,
        regions: Tensor | TF.Similarities | None,
        targets: Tensor,
        bank: PrototypeBank | None = None,
        *,
        logits: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> PseudoLabels:
        """Pseudo-labels of a batch with the current statistics, without gradient.

        Args:
            regions: (B, C, D) features of the kind that the bank holds; or the :meth:`similarities` of all classes.
            targets: (B, C); entries other than -1 are left alone.
            bank: prototypes, if the rule needs them.
            logits: (B, C) of the model.
            ids: (B,) int64, places of the images in the training set.
        """
        self._need(logits=logits, ids=ids)
        evidence = self._evidence(regions, targets, bank, logits, ids)
        targets = evidence.targets
        with full_precision(targets):
            labels, scores = self.rule.decide(evidence)
            dims = Dims(type(self.rule).__name__, B=targets.shape[0], C=self.num_classes)
            dims.check("labels", labels, "B C", hint="decide(evidence) gives a Decision for every entry")
            dims.check("scores", scores, "B C", hint="decide(evidence) gives a Decision for every entry")
            decided = (targets == UNKNOWN) & (labels >= 0) & (self.step >= self.warmup_steps)
            positive = decided & (labels >= 0.5)
            negative = decided & ~positive
            if self.cap:
                positive = positive & self._within_cap(scores, positive, targets)
            labels = torch.where(positive | negative, labels, float(UNKNOWN))
            weights = self.ramp * (positive * self.weight_pos + negative * self.weight_neg)
            return PseudoLabels(labels, weights.to(scores.dtype), scores)

    def _within_cap(self, scores: Tensor, positive: Tensor, targets: Tensor) -> Tensor:
        """(B, C) bool: among the surest candidates of its image that the cap leaves room for."""
        expected = self.prior.sum() if self.expected_positives is None else self.expected_positives
        room = (2 * expected - (targets == 1).sum(dim=1, keepdim=True)).clamp(min=1).floor()
        order = torch.where(positive, -scores, math.inf).argsort(dim=1, stable=True)
        places = torch.arange(order.shape[1], device=order.device).expand_as(order)
        return torch.empty_like(order).scatter_(1, order, places) < room

    @torch.no_grad()
    def similarities(self, regions: Tensor, bank: PrototypeBank | None, *, first: int = 0) -> TF.Similarities | None:
        """What the rule reads of regions, and takes in their place once joined from chunks of the classes; None: nothing.

        Args:
            regions: (B, c, D) of the c classes from ``first`` on.
            bank: prototypes, if the rule needs them.
            first: the first class of the chunk.
        """
        return self.rule.similarities(regions, bank, first)

    @torch.no_grad()
    def update(
        self,
        regions: Tensor | TF.Similarities | None,
        targets: Tensor,
        bank: PrototypeBank | None = None,
        *,
        logits: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> None:
        """Count a step and take the known entries of a batch into the statistics; before the bank's own update.

        Args:
            regions, targets, bank: as in the call.
            logits, ids: as in the call, if the rule learns from them.
        """
        evidence = self._evidence(regions, targets, bank, logits, ids)
        targets = evidence.targets
        with full_precision(targets):
            self.rule.update(evidence)
            counts = torch.stack([targets == 0, targets == 1]).sum(dim=1)
            self.known_count.add_(sum_over_ranks(counts.float(), evidence.group).to(torch.int64))
        self.step.add_(1)
