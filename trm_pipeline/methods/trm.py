"""TRM-ML out of the parts of the library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trm_losses import (
    MultimodalContrastiveLoss,
    PrototypeBank,
    PseudoLabeler,
    PseudoLabels,
    RegionDistillationLoss,
    RegionPooler,
    Regions,
    TextRegionMatchingLoss,
    TRMHead,
    TRMObjective,
    TRMOutput,
    param_groups,
)
from trm_losses.pseudo import NeighbourRule, PrototypeRule, Quantiles, Rule, Thresholds
from trm_pipeline.config.presets import Preset, pseudo_schedule
from trm_pipeline.features.cached import Batch, Features
from trm_pipeline.features.frozen import Encode
from trm_pipeline.methods.base import Method, Setting, weak_negatives

__all__ = ["TRM"]


def _rule(setting: Setting) -> Rule:
    """The rule for pseudo-labels that the preset names."""
    preset, classes = setting.preset, setting.num_classes
    if preset.pseudo_rule == "neighbour":
        return NeighbourRule(
            classes,
            setting.num_samples,
            neighbours=preset.neighbours,
            temperature=preset.neighbour_temperature,
            steps=preset.neighbour_steps,
        )
    momentum = preset.statistics_momentum
    if preset.pseudo_rule == "quantile":
        decider: Quantiles | Thresholds = Quantiles(classes, share=preset.quantile_pos, momentum=momentum)
    else:
        decider = Thresholds(preset.threshold_pos, preset.threshold_neg)
    return PrototypeRule(
        classes,
        decider,
        temperature_visual=preset.temperature_visual,
        temperature_text=2 / setting.logit_scale if preset.temperature_text is None else preset.temperature_text,
        momentum=momentum,
    )


class TRM(Method):
    """TRM-ML out of the library's parts."""

    def __init__(self, setting: Setting, *, query_head: bool, pseudo_labels: bool) -> None:
        super().__init__()
        preset, classes, dim = setting.preset, setting.num_classes, setting.text.shape[1]
        if preset.head not in ("query", "region", "mean"):
            raise ValueError(f"head must be 'query', 'region' or 'mean', got {preset.head!r}")
        self.scored = preset.head
        self.prompts = setting.prompts(preset.prompts)
        planned = pseudo_schedule(preset)
        warmup_steps = round(planned.pseudo_warmup * setting.total_steps)
        bank = distillation = contrast = labeler = None
        if pseudo_labels or preset.lambda_contrast:
            bank = PrototypeBank(
                classes,
                dim,
                momentum=preset.prototype_momentum,
                text_momentum=preset.prototype_text_momentum,
                init=setting.text,
                distributed=True,
            )
        if pseudo_labels:
            labeler = PseudoLabeler(
                classes,
                _rule(setting),
                weight_pos=preset.weight_pos,
                weight_neg=preset.weight_neg,
                cap=preset.cap,
                expected_positives=setting.expected_positives,
                warmup_steps=warmup_steps,
                ramp_steps=round(planned.pseudo_ramp * setting.total_steps),
                distributed=True,
            )
        if query_head and preset.lambda_distillation:
            distillation = RegionDistillationLoss(temperature=preset.distillation_temperature, distributed=True)
        if preset.lambda_contrast:
            contrast = MultimodalContrastiveLoss(
                temperature=preset.contrast_temperature,
                temperature_region=preset.contrast_temperature_region,
                anchor_threshold=preset.contrast_anchor_threshold,
                region_region=preset.contrast_region_region,
                region_text=preset.contrast_region_text,
                region_prototype=preset.contrast_region_prototype,
                text_prototype=preset.contrast_text_prototype,
                distributed=True,
            )
        self.objective = TRMObjective(
            RegionPooler(
                classes,
                dim,
                num_heads=preset.num_heads,
                query=preset.query,  # type: ignore[arg-type]
                query_init=setting.text if preset.query == "free" else None,
                query_head=query_head,
                mlp_ratio=preset.mlp_ratio,
                dropout=preset.dropout,
                attention_scale=preset.attention_scale,
            ),
            TextRegionMatchingLoss(
                classes,
                gamma_pos=preset.gamma_pos,
                gamma_neg=preset.gamma_neg,
                margin=preset.margin,
                scale=preset.scale,
                distributed=True,
            ),
            distillation=distillation,
            contrast=contrast,
            bank=bank,
            labeler=labeler,
            lambda_region=preset.lambda_region,
            lambda_pseudo=planned.lambda_pseudo,
            lambda_distillation=preset.lambda_distillation,
            lambda_contrast=preset.lambda_contrast,
            pseudo_per=planned.pseudo_per,  # type: ignore[arg-type]
            anchor_score=preset.anchor_score,
            bank_confidence=preset.bank_confidence,
            bank_pseudo_score=preset.bank_pseudo_score,
        )
        self.batch_size = preset.batch_size
        # Estimates are there when the warm-up ends, inside an epoch too, and whatever steps a scaler has skipped.
        self.first_refresh = warmup_steps // -(-setting.total_steps // preset.epochs)
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

    @property
    def makes_pseudo_labels(self) -> bool:
        return self.objective.labeler is not None

    def pseudo_labels(self) -> PseudoLabels | None:
        return None if self._last is None else self._last.pseudo

    @torch.no_grad()
    def before_epoch(self, epoch: int, features: Features, targets: Tensor, average: Method, encode: Encode) -> None:
        labeler = self.objective.labeler
        if labeler is None or labeler.rule.num_samples is None or epoch < self.first_refresh:
            return
        if not isinstance(average, TRM):
            raise TypeError(f"the average of TRM must be a TRM, got {type(average).__name__}")
        average.eval()
        seen = (
            (self.tokens(batch), targets[batch.index], batch.index)
            for view in range(features.views)
            for batch in features.batches(self.batch_size, view=view)
        )
        self.objective.refresh(seen, encode(average.prompts()), model=average.objective)

    def after_step(self) -> None:
        if self._last is not None:
            self.objective.update(self._last)
            self._last = None

    def groups(self, preset: Preset) -> list[dict[str, Any]]:
        rest = param_groups(self.objective, lr=preset.lr, weight_decay=preset.weight_decay)
        return rest + param_groups(self.prompts, lr=preset.text_lr, weight_decay=0.0)

    @torch.no_grad()
    def calibrate(self, batch: Batch, text: Tensor, prior: float) -> None:
        self.objective.matching.calibrate_bias(self.class_features(batch, text), text, prior)

    def head(self, text: Tensor, class_names: list[str]) -> TRMHead:
        """What inference needs of it."""
        return TRMHead(self.objective.pooler, self.objective.matching, text, class_names, head=self.scored)  # type: ignore[arg-type]
