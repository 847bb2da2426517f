"""TRM-ML out of the parts of the library."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from trm_losses import PseudoLabels, Regions, TRMHead, TRMObjective, TRMOutput, param_groups
from trm_losses.pseudo import PrototypeRule, Rule, TeacherRule
from trm_pipeline.config.presets import PSEUDO_RULES, Preset
from trm_pipeline.features.cached import Batch
from trm_pipeline.methods.base import Method, Setting, weak_negatives


def _rule(setting: Setting, name: str) -> Rule | None:
    """The rule for pseudo-labels of regions by its name; None: there is nothing to teach by."""
    if name not in PSEUDO_RULES:
        raise ValueError(f"pseudo_rule must be one of {', '.join(PSEUDO_RULES)}, got {name!r}")
    if name in ("merged", "none"):
        return None
    if name == "teacher":
        if setting.estimates is None:
            raise ValueError("pseudo_rule=teacher needs what a head of whole images makes of the training images")
        estimates = setting.estimates()
        return None if estimates is None else TeacherRule(estimates)
    return PrototypeRule(setting.num_classes, **{"temperature_text": 2 / setting.logit_scale, **setting.preset.prototype})


class TRM(Method):
    """TRM-ML out of the library's parts."""

    def __init__(
        self,
        setting: Setting,
        *,
        pseudo_labels: bool,
        query_head: bool | None = None,
        recipe: Literal["default", "paper"] = "default",
    ) -> None:
        super().__init__()
        preset, paper = setting.preset, recipe == "paper"
        pooler = preset.pooler if query_head is None else {**preset.pooler, "query_head": query_head}
        if preset.head not in ("query", "region", "mean"):
            raise ValueError(f"head must be 'query', 'region' or 'mean', got {preset.head!r}")
        self.scored = preset.head
        self.prompts = setting.prompts(preset.prompts)
        shares = {"warmup_steps": preset.pseudo_warmup, "ramp_steps": preset.pseudo_ramp}
        steps = {name: round(share * setting.total_steps) for name, share in shares.items() if share is not None}
        taught = pseudo_labels and preset.objective.get("lambda_pseudo", 1.0) > 0
        rule = _rule(setting, "prototype" if paper else preset.pseudo_rule) if taught else None
        contrasted = preset.objective.get("lambda_contrast", paper)
        self.objective = TRMObjective.from_text(
            setting.text,
            total_steps=setting.total_steps,
            rule=rule,
            recipe=recipe,
            expected_positives=None if rule is None else setting.expected_positives,
            logit_scale=setting.logit_scale,
            pooler=pooler,
            matching={} if paper else preset.matching,
            # Settings of parts that this method leaves out are another method's.
            distillation=preset.distillation if pooler.get("query_head", paper) else {},
            contrast=preset.contrast if contrasted else {},
            bank=preset.bank if contrasted or rule is not None and "bank" in rule.needs else {},
            labeler=None if rule is None else {**preset.labeler, **steps},
            objective=preset.objective,
            distributed=True,
        )
        self.region_learning = preset.region_learning
        self._last: TRMOutput | None = None

    def tokens(self, batch: Batch) -> Tensor:
        """What regions are pooled from; of a single token, the image's feature, every region is that feature."""
        return batch.tokens if self.region_learning else batch.pooled[:, None]

    def logits(self, batch: Batch, text: Tensor) -> Tensor:
        regions = self.objective.pooler(self.tokens(batch), text)
        if self.scored == "mean":
            return 0.5 * (self.classify(regions.query, text) + self.classify(regions.region, text))
        return self.classify(regions.query if self.scored == "query" else regions.region, text)

    def class_features(self, batch: Batch, text: Tensor) -> Tensor:
        """(B, C, D): what is scored of the regions."""
        regions: Regions = self.objective.pooler(self.tokens(batch), text)
        return regions.region if self.scored == "region" else regions.query

    def classify(self, features: Tensor, text: Tensor) -> Tensor:
        """Logits (B, C) of class features."""
        logits: Tensor = self.objective.matching.logits(features, text)
        return logits

    def loss(self, batch: Batch, text: Tensor, targets: Tensor, weak_negative: float = 0.0) -> dict[str, Tensor]:
        ids = batch.index.to(text.device)
        self._last = output = self.objective(self.tokens(batch), text, targets, ids=ids)
        heads = self._with_factors(output.logits, output.region_logits)
        return {**output.terms, **weak_negatives(targets, weak_negative, *heads)}

    def heads(self, batch: Batch, text: Tensor) -> list[tuple[float, Tensor]]:
        regions = self.objective.pooler(self.tokens(batch), text)
        logits = self.classify(regions.query, text)
        if regions.region is regions.query:
            return self._with_factors(logits, logits)
        return self._with_factors(logits, self.classify(regions.region, text))

    def _with_factors(self, query: Tensor, region: Tensor) -> list[tuple[float, Tensor]]:
        """The logits of both heads with their factors; without a query head there is one."""
        return [(1.0, query)] if query is region else [(1.0, query), (self.objective.lambda_region, region)]

    def weak_negative_steps(self, preset: Preset, total: int) -> int:
        labeler = self.objective.labeler
        if labeler is None or preset.single_negative_until == "end":
            return total
        # A soft rule says something of every unknown entry, so that nothing need be assumed once it speaks.
        return labeler.warmup_steps if preset.single_negative_until == "warmup" or labeler.rule.soft else total

    def pseudo_labels(self) -> PseudoLabels | None:
        return None if self._last is None else self._last.pseudo

    def after_step(self) -> None:
        if self._last is not None:
            self.objective.update(self._last)
            self._last = None

    def groups(self, preset: Preset) -> list[dict[str, Any]]:
        matching = self.objective.matching
        rest = [part for part in self.objective.children() if part is not matching]
        # Texts, and scale and biases beside them, ask for rates that differ by data set; the other parts do not.
        texts = param_groups(self.prompts, matching, lr=preset.lr_factor * preset.text_lr, weight_decay=0.0)
        return param_groups(*rest, lr=preset.lr, weight_decay=preset.weight_decay) + texts

    @torch.no_grad()
    def calibrate(self, batch: Batch, text: Tensor, prior: float) -> None:
        self.objective.matching.calibrate_bias(self.class_features(batch, text), text, prior)

    def head(self, text: Tensor, class_names: list[str], **whole: Any) -> TRMHead:
        """What inference needs of it; ``whole`` are global_head, rate and calibration, where it is merged with one."""
        return TRMHead(self.objective.pooler, self.objective.matching, text, class_names, head=self.scored, **whole)  # type: ignore[arg-type]
