"""Rule: how unknown labels are estimated; and what goes in and comes out of one."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import functional as TF
from .._state import FullPrecisionState
from ..prototypes import PrototypeBank


class PseudoLabels(NamedTuple):
    """Decisions over unknown entries, all (B, C): targets (-1 where known or undecided), loss weights, scores in [0, 1]."""

    targets: Tensor
    weights: Tensor
    scores: Tensor


class Evidence(NamedTuple):
    """What a rule decides from: what the labeler was given, checked, and the known labels that it has met.

    Args:
        regions: (B, C, D); or their similarities, or None, if the classes are taken in chunks.
        targets: (B, C).
        bank: prototypes, or None.
        logits: (B, C) of the model, or None.
        ids: (B,) int64 places of the images in the training set, or None.
        known_count: (2, C) known absent and known present labels so far.
        group: process group of the statistics, or None.
    """

    regions: Tensor | TF.Similarities | None
    targets: Tensor
    bank: PrototypeBank | None
    logits: Tensor | None
    ids: Tensor | None
    known_count: Tensor
    group: ProcessGroup | None


class Decision(NamedTuple):
    """A rule's answer for every entry, all (B, C): labels in [0, 1], -1 if undecided; and scores in [0, 1]."""

    labels: Tensor
    scores: Tensor


class Rule(FullPrecisionState):
    """How unknown labels are estimated. Subclasses write :meth:`decide`; those that learn from known labels, :meth:`update`.

    A label of at least one half is a pseudo-positive. Known entries are left alone, whatever the rule says of them. Buffers are
    state: saved, moved, kept in float32, zeroed by :meth:`reset`. ``_class_axes`` names those of classes and the axes of these.
    A rule that is asked for chunks of the classes has no regions to read, unless it defines :meth:`similarities`.

    Example:
        >>> import torch
        >>> from trm_losses.pseudo import Decision, PseudoLabeler, Rule
        >>> class LogitRule(Rule):
        ...     needs = ("logits",)
        ...     def decide(self, evidence):
        ...         labels = torch.where(evidence.logits >= 0.9, 1.0, torch.where(evidence.logits <= -0.9, 0.0, -1.0))
        ...         return Decision(labels, torch.sigmoid(evidence.logits))
        >>> labeler, unknown = PseudoLabeler(2, LogitRule()), torch.full((1, 2), -1.0)
        >>> labeler(None, unknown, logits=torch.tensor([[2.0, 0.0]])).targets
        tensor([[ 1., -1.]])

    Reference: the example is the rule in the authors' other code; the split into rules is our choice.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    """What must be given besides targets: any of ``"regions"``, ``"bank"``, ``"logits"``, ``"ids"``."""

    soft: ClassVar[bool] = False
    """Every unknown entry gets a label, sure or not: then nothing is capped, and both kinds weigh the same by default."""

    @torch.no_grad()
    def reset(self) -> None:
        """Forget everything learned."""
        for buffer in self.buffers():
            buffer.zero_()

    def decide(self, evidence: Evidence) -> Decision:
        """Labels and scores of a batch."""
        raise NotImplementedError(f"{type(self).__name__} must define decide(evidence) -> Decision")

    def update(self, evidence: Evidence) -> None:
        """Take the known entries of a batch into statistics."""

    def similarities(self, regions: Tensor, bank: PrototypeBank | None, first: int = 0) -> TF.Similarities | None:
        """What the rule reads of the regions (B, c, D) of c classes from ``first`` on; None: nothing."""
        return None
