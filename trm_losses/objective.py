"""TRMObjective: the parts wired as the method wires them; the order of a training step can be read here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import functional as TF
from ._checks import Dims, check_choice, check_number
from ._distributed import Distributed, resolve_group, sum_over_ranks
from ._state import PerClassState
from .contrast import MultimodalContrastiveLoss
from .distillation import RegionDistillationLoss
from .labels import UNKNOWN
from .matching import TextRegionMatchingLoss
from .prototypes import PrototypeBank
from .pseudo import PrototypeRule, PseudoLabeler, PseudoLabels, Rule
from .regions import RegionPooler, Regions

Options = Mapping[str, Any]
_AS_HERE: Options = MappingProxyType({})

Objective = TypeVar("Objective", bound="TRMObjective")


class TRMOutput(NamedTuple):
    """One training step: the loss to call backward on, its weighted terms by name, and what :meth:`TRMObjective.update` needs.

    logits and region_logits (B, C) belong to the query head and the region head; pseudo is None without a labeler; ids (B,)
    are the samples, if they were given. features are the query-level ones (B, C, D), and compared is what the labeler's rule was
    shown, the same. If the classes were taken in chunks, features hold the entries alone that contrast and bank read, and
    compared is their :class:`trm_losses.functional.Similarities`, or None.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    features: Tensor | TF.Entries
    compared: Tensor | TF.Similarities | None
    text: Tensor
    targets: Tensor
    logits: Tensor
    region_logits: Tensor
    pseudo: PseudoLabels | None
    ids: Tensor | None


class TRMObjective(PerClassState):
    r"""Text-region matching with missing labels, as one loss.

    .. math::
        L = M(\ell^q; Y) + \lambda_r M(\ell^r; Y) + \lambda_{pl} [M(\ell^q; \tilde Y) + \lambda_r M(\ell^r; \tilde Y)]
            + \lambda_{kd} L_{kd} + \lambda_{con} L_{con}

    M is the matching loss. Over known labels Y it is scaled as C / #known, so that its size does not depend on their share.
    Over pseudo-labels :math:`\tilde Y` it is scaled as C / #entries, so that a pseudo-label never weighs more than a known
    label. With C / #unknown it would, at 90 % known labels, weigh nine times as much. It is not divided by the weights of
    the pseudo-labels, which would cancel the ramp. Without a query head, or with a part left out, its terms are left out.
    Contrast, prototypes and pseudo-labels take the query-level features.

    A step::

        output = objective(tokens, text, targets)      # pooling, logits, pseudo-labels, losses
        output.loss.backward(); optimizer.step()
        objective.update(output)                       # never before: no sample votes for itself

    Under gradient accumulation :meth:`update` may be called once, with the last output.

    Args:
        pooler, matching: always there. Counts are over the ranks of ``matching.distributed``; give the other parts the same.
        distillation, contrast: optional losses.
        bank, labeler: optional; contrast uses the bank's prototypes if there is one; some rules of a labeler need a bank.
        lambda_region, lambda_pseudo, lambda_distillation, lambda_contrast: the factors :math:`\lambda`.

    Shape:
        tokens (B, N, D) or :class:`Regions`, text (C, D), targets (B, C), ids (B,) int64 -> :class:`TRMOutput`.

    Raises:
        ValueError, TypeError: of the parts, each by name; ``ids`` missing if the labeler's rule needs them.

    Reference: the four parts and which teaches which are TRM-ML's (paper, patent); factors, gates and the scale-free
    normalisers are our choice, gates after SADCL.
    """

    sure = 0.9  # least score of a pseudo-positive that is an anchor of the contrast and enters the bank
    confident = 0.8  # least probability of a known positive that enters the bank, once the labeler has begun

    def __init__(
        self,
        pooler: RegionPooler,
        matching: TextRegionMatchingLoss,
        *,
        distillation: RegionDistillationLoss | None = None,
        contrast: MultimodalContrastiveLoss | None = None,
        bank: PrototypeBank | None = None,
        labeler: PseudoLabeler | None = None,
        lambda_region: float = 1.0,
        lambda_pseudo: float = 1.0,
        lambda_distillation: float = 1.0,
        lambda_contrast: float = 0.1,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.lambda_region, self.lambda_pseudo = lambda_region, lambda_pseudo
        self.lambda_distillation, self.lambda_contrast = lambda_distillation, lambda_contrast
        for key in ("lambda_region", "lambda_pseudo", "lambda_distillation", "lambda_contrast"):
            check_number(name, key, getattr(self, key), 0)
        if labeler is not None and bank is None and "bank" in labeler.rule.needs:
            rule = type(labeler.rule).__name__
            raise ValueError(
                f"{name}: bank must be given for {rule}, which compares with prototypes; pass bank=PrototypeBank(...)"
            )
        sizes = {
            key: part.num_classes
            for key, part in (("pooler", pooler), ("matching", matching), ("bank", bank), ("labeler", labeler))
            if part is not None
        }
        if len(set(sizes.values())) > 1:
            raise ValueError(f"{name}: all parts must have the same num_classes, got {sizes}")
        for key, loss in (("matching", matching), ("distillation", distillation)):
            if loss is not None and loss.reduction != "mean":
                raise ValueError(f"{name}: {key} must have reduction='mean', got {loss.reduction!r}")
        if bank is not None and bank.dim != pooler.dim:
            raise ValueError(f"{name}: bank must have the pooler's dim = {pooler.dim}, got {bank.dim}")
        self.pooler, self.matching, self.distillation, self.contrast = pooler, matching, distillation, contrast
        self.bank, self.labeler = bank, labeler

    @classmethod
    def from_text(
        cls: type[Objective],
        text: Tensor,
        *,
        total_steps: int,
        rule: Rule | None = None,
        recipe: Literal["default", "paper"] = "default",
        expected_positives: float | None = None,
        logit_scale: float = 100.0,
        pooler: Options = _AS_HERE,
        matching: Options = _AS_HERE,
        distillation: Options | None = _AS_HERE,
        contrast: Options | None = _AS_HERE,
        bank: Options = _AS_HERE,
        labeler: Options | None = _AS_HERE,
        objective: Options = _AS_HERE,
        distributed: Distributed = False,
        validate: bool = True,
    ) -> Objective:
        """The parts of a recipe, sized by and started from class text (C, D).

        Args:
            text: (C, D) class texts of the frozen model.
            total_steps: optimizer steps of the whole run, of which warm-up and ramp of the pseudo-labels are shares; a soft rule
                has neither.
            rule: how unknown labels are estimated for the regions; None: they are not. Regions that stay alone gain by a
                :class:`trm_losses.pseudo.TeacherRule`; those merged with a :class:`trm_losses.GlobalHead` do not, and
                :meth:`trm_losses.TRMHead.finish` gives that one pseudo-labels.
            recipe: ``"default"``: the README's table, a region head with one head of attention. ``"paper"``: all that is known of
                TRM-ML: query head, distillation, contrast, and, without another rule, pseudo-labels from prototypes.
            expected_positives: mean number of present classes of an image, if nothing is known to be absent. Pseudo-labels alone
                use it.
            logit_scale: of the frozen model (CLIP's is 100); sets the temperature of text similarities, 2 / logit_scale.
            pooler, matching, distillation, contrast, bank, labeler, objective: what a part takes in place of the settings
                here, such as ``pooler={"dropout": 0.3}`` or ``objective={"lambda_contrast": 0.1}``. ``None`` leaves
                distillation, contrast or labeler out; so does a factor of 0 in objective.
            distributed: False, True or a process group, for all parts.
            validate: of all parts.

        Raises:
            ValueError, TypeError: of the parts, each by name; settings of a part that is left out, a rule or
                ``expected_positives`` without pseudo-labels.

        Reference: the recipe of the paper, as far as it is known; all numbers of the default are our choice.
        """
        check_number(cls.__name__, "total_steps", total_steps, 1)
        Dims(cls.__name__).check("text", text, "C D")
        classes, dim = text.shape
        check_choice(cls.__name__, "recipe", recipe, ("default", "paper"))
        paper = recipe == "paper"
        off = "labeler=None" if labeler is None else "" if objective.get("lambda_pseudo", 1.0) else "lambda_pseudo=0"
        if rule is not None and off:
            raise ValueError(f"{cls.__name__}: rule needs a labeler that asks it, got {off}; leave one of both out")
        if labeler and "rule" in labeler:
            got = type(labeler["rule"]).__name__
            raise ValueError(f"{cls.__name__}: labeler must be settings beside the rule, got a {got} in it; give it as rule=")
        if paper and rule is None and not off:
            rule = PrototypeRule(classes, temperature_text=2 / logit_scale)
        if rule is None and labeler:
            fix = "leave one of both out" if off else "give a TeacherRule or PrototypeRule"
            raise ValueError(f"{cls.__name__}: labeler needs a rule to ask, got {off or 'rule=None'}; {fix}")
        if rule is None and expected_positives is not None:
            raise ValueError(
                f"{cls.__name__}: expected_positives needs a rule that uses it, got {off or 'rule=None'}; "
                "GlobalHead.fit and TRMHead.finish take it too"
            )
        share = 0.0 if rule is not None and rule.soft else 0.1  # what a teacher says was known before training
        # With single positives nothing but what is estimated says "absent": it has to weigh as much as the known labels.
        expected = (labeler or {}).get("expected_positives", expected_positives)
        weight = classes / 2 if expected is not None and rule is not None and rule.soft else 1.0
        schedule = dict.fromkeys(("warmup_steps", "ramp_steps"), round(share * total_steps))
        factors = {"lambda_contrast": 0.1 if paper else 0.0, "lambda_pseudo": weight, **objective}
        if not paper:
            # The maps of several heads, each of a part of the vectors, average to one that sees more of the whole image: what a
            # merged global head knows already.
            pooler = {"query_head": False, "num_heads": 1, **pooler}
            matching = {"gamma_pos": 0.0, "gamma_neg": 0.0, "margin": 0.0, **matching}
        same: dict[str, Any] = {"distributed": distributed, "validate": validate}
        if pooler.get("query") == "free":
            pooler = {"query_init": text, **pooler}
        if not factors["lambda_contrast"]:
            if contrast:
                raise ValueError(f"{cls.__name__}: contrast needs a factor, such as objective={{'lambda_contrast': 0.1}}")
            contrast = None
        if not factors.get("lambda_distillation", 1.0) or not pooler.get("query_head", True):
            if distillation:
                raise ValueError(f"{cls.__name__}: distillation needs a factor and two heads: pooler={{'query_head': True}}")
            distillation = None
        banked = contrast is not None or rule is not None and "bank" in rule.needs
        if bank and not banked:
            raise ValueError(
                f"{cls.__name__}: bank needs contrast or a rule to read it; give contrast a factor, or rule=PrototypeRule(...)"
            )
        return cls(
            RegionPooler(classes, dim, **{"validate": validate, **pooler}),
            TextRegionMatchingLoss(classes, **{**same, **matching}),
            distillation=None if distillation is None else RegionDistillationLoss(**{**same, **distillation}),
            contrast=None if contrast is None else MultimodalContrastiveLoss(**{**same, **contrast}),
            bank=PrototypeBank(classes, dim, **{"init": text, **same, **bank}) if banked else None,
            labeler=None
            if rule is None
            else PseudoLabeler(
                classes, rule, **{"expected_positives": expected_positives, **schedule, **same, **(labeler or {})}
            ),
            **factors,
        ).to(text.device)

    def forward(
        self,
        tokens: Tensor | Regions,
        text: Tensor,
        targets: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> TRMOutput:
        """Losses of a batch; see the class. ids are the places of the samples in the training set, for the labeler's rule."""
        targets = self._checked(text, targets, ids)
        regions = tokens if isinstance(tokens, Regions) else self.pooler(tokens, text, key_padding_mask=key_padding_mask)
        unbiased = self._unbiased(regions, text)
        logits = {head: value - self.matching.bias for head, value in unbiased.items()}
        query, region = logits["query"], logits.get("region", logits["query"])
        pseudo = None if self.labeler is None else self.labeler(regions.query, targets, self.bank, logits=query, ids=ids)
        terms = self._terms(unbiased, logits, regions.query, text, targets, pseudo)
        loss = torch.stack(list(terms.values())).sum()
        return TRMOutput(loss, terms, regions.query, regions.query, text, targets, query, region, pseudo, ids)

    def _checked(self, text: Tensor, targets: Tensor, ids: Tensor | None) -> Tensor:
        """The targets, once all that is not for the pooler has been checked."""
        dims = Dims(type(self).__name__, C=self.pooler.num_classes)
        dims.check("text", text, "C D", hint="one row for each class of num_classes")
        targets = dims.targets(targets, "B C", validate=self.matching.validate)
        if ids is not None:
            dims.check("ids", ids, "B", floating=False)
        return targets

    def _unbiased(self, regions: Regions, text: Tensor, classes: slice = slice(None)) -> dict[str, Tensor]:
        """Logits (B, c) of each head without the bias, which distillation would let compete in its softmax."""
        heads = {"query": regions.query}
        if regions.query is not regions.region:
            heads["region"] = regions.region
        text = text[classes]
        return {head: self.matching.logits(value, text, bias=False, classes=classes) for head, value in heads.items()}

    def _terms(
        self,
        unbiased: dict[str, Tensor],
        logits: dict[str, Tensor],
        features: Tensor | TF.Entries,
        text: Tensor,
        targets: Tensor,
        pseudo: PseudoLabels | None,
    ) -> dict[str, Tensor]:
        """What the sum is of: matching over known labels and over pseudo-labels, distillation, contrast."""
        terms: dict[str, Tensor] = {}
        factors, classes = {"query": 1.0, "region": self.lambda_region}, targets.shape[1]
        for head, value in logits.items():
            loss = self.matching.loss(value, targets, reduction="mean")
            terms[f"matching_{head}"] = factors[head] * classes * loss
        if pseudo is not None:
            entries = logits["query"].new_full((), targets.numel())
            per_entry = classes / sum_over_ranks(entries, resolve_group(self.matching.distributed)).clamp(min=1)
            for head, value in logits.items():
                loss = self.matching.loss(value, pseudo.targets, pseudo.weights, reduction="sum")
                terms[f"pseudo_{head}"] = self.lambda_pseudo * factors[head] * per_entry * loss
        if self.distillation is not None and "region" in unbiased:
            terms["distillation"] = self.lambda_distillation * self.distillation(unbiased["query"], unbiased["region"])
        if self.contrast is not None:
            terms["contrast"] = self.lambda_contrast * self.contrast(
                features,
                text,
                self._positives(targets, pseudo),
                prototypes=None if self.bank is None else self.bank.visual,
                seen=None if self.bank is None else self.bank.seen,
                weights=None if pseudo is None else torch.where(targets == UNKNOWN, pseudo.weights, 1.0),
            )
        return terms

    def _positives(self, targets: Tensor, pseudo: PseudoLabels | None) -> Tensor:
        """Known targets, and 1 where a pseudo-positive is sure (unknown elsewhere)."""
        if pseudo is None:
            return targets
        sure = (pseudo.targets > 0) & (pseudo.scores >= self.sure)
        return torch.where(sure, 1.0, targets.to(pseudo.scores.dtype))

    @torch.no_grad()
    def update(self, output: TRMOutput) -> None:
        """Take a finished step into statistics and prototypes; after the optimiser's step, not where that was skipped."""
        targets, logits, pseudo = output.targets, output.logits.detach(), output.pseudo
        gate = confidence = torch.sigmoid(logits)
        if self.labeler is not None:
            # First the statistics: they compare with prototypes that these samples have not moved yet.
            started = self.labeler.step >= self.labeler.warmup_steps
            self.labeler.update(output.compared, targets, self.bank, logits=logits, ids=output.ids)
            # Before it has begun all known positives enter, or rare classes would never start.
            gate = confidence * (~started | (confidence >= self.confident) | (targets == UNKNOWN))
        if self.bank is not None:
            entering = self._positives(targets, pseudo)
            self.bank.update(output.features, entering, weights=gate, text=output.text)
