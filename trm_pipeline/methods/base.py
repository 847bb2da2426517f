"""What is compared: zero-shot CLIP, linear probes, tuned prompts and TRM-ML, on the same features and labels."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trm_losses import (
    MultimodalContrastiveLoss,
    PromptEmbeddings,
    PromptLearner,
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
from trm_losses.functional import asymmetric_loss
from trm_losses.labels import UNKNOWN
from trm_losses.pseudo import NeighbourRule, PrototypeRule, Quantiles, Rule, Thresholds
from trm_pipeline import ranks
from trm_pipeline.config.presets import Preset, pseudo_schedule
from trm_pipeline.features.cached import Batch, Features
from trm_pipeline.features.frozen import Encode

__all__ = [
    "METHODS",
    "ZERO_SHOT",
    "Encode",
    "Method",
    "Setting",
    "pair_cosines",
    "weak_negatives",
    "zero_shot_global",
    "zero_shot_tokens",
]


class Setting:
    """What a method is built from: the preset, class texts of the frozen model, its scale, the numbers of steps and images."""

    def __init__(
        self,
        preset: Preset,
        text: Tensor,
        names: PromptEmbeddings | None,
        logit_scale: float,
        total_steps: int,
        *,
        single: bool = False,
        num_samples: int = 1,
        targets: Tensor | None = None,
        similarities: Callable[[], Tensor] | None = None,
    ) -> None:
        self.num_samples = num_samples
        # Labels (N, C) that are left, and the frozen model's cosines (N, C) with the training images, for losses of the grid.
        self.targets, self.similarities = targets, similarities
        self.preset, self.text, self.names = preset, text, names
        self.logit_scale, self.total_steps = logit_scale, total_steps
        self.head = ""  # of the method that is built, see under
        # With labels hidden at random the known ones tell it; with single positives they cannot.
        self.single, self.expected_positives = single, preset.expected_positives if single else None

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.text)

    def under(self, head: str) -> Setting:
        """The same for a method with the head of this name."""
        other = copy.copy(self)
        other.head = head
        return other

    def options(self, loss: str) -> dict[str, float]:
        """Numbers of a loss of the grid under the head."""
        return self.preset.loss_options(self.head, loss, single=self.single)

    def prompts(self, mode: str) -> PromptLearner:
        """A fresh prompt learner of this mode, started from the class texts."""
        if mode in ("shared", "csc"):
            return PromptLearner(mode, names=self.names, num_context=self.preset.num_context)  # type: ignore[arg-type]
        return PromptLearner(mode, text=self.text)  # type: ignore[arg-type]

    def negative_prompts(self, mode: str) -> PromptLearner:
        """Prompts for "not this class", started where they do not cancel the positive ones.

        A vector of its own starts opposite to the class text, so that a difference of the two ranks images as zero-shot does.
        Through the text tower it is contexts without the class name: with the name both texts would start almost equal.
        """
        names = self.names
        if names is not None:
            end = names.embeddings[torch.arange(len(names.eot), device=names.eot.device), names.eot]
            names = PromptEmbeddings(torch.stack([names.embeddings[:, 0], end], dim=1), torch.ones_like(names.eot))
        return Setting(self.preset, -self.text, names, self.logit_scale, self.total_steps).prompts(mode)


class Method(nn.Module, ABC):
    """Something that learns from batches of frozen features and gives a logit for each class.

    ``text`` is what the frozen text tower makes of ``prompts()``, computed by the training loop, so that a method holds
    no frozen weights and can be copied for the average of its own.
    """

    prompts: nn.Module

    @abstractmethod
    def loss(self, batch: Batch, text: Tensor, targets: Tensor, weak_negative: float = 0.0) -> dict[str, Tensor]:
        """Terms to be summed and minimised; above 0 ``weak_negative`` adds :func:`weak_negatives`."""

    @abstractmethod
    def logits(self, batch: Batch, text: Tensor) -> Tensor:
        """(B, C)."""

    def heads(self, batch: Batch, text: Tensor) -> list[tuple[float, Tensor]]:
        """Logits (B, C) that a loss of labels is taken of, each with its factor."""
        return [(1.0, self.logits(batch, text))]

    @abstractmethod
    def groups(self, preset: Preset) -> list[dict[str, Any]]:
        """Parameter groups of the optimiser."""

    @abstractmethod
    def calibrate(self, batch: Batch, text: Tensor, prior: float) -> None:
        """Start the biases so that the mean probability is ``prior``."""

    @property
    def makes_pseudo_labels(self) -> bool:
        """Whether the method makes any, after a warm-up of their own."""
        return False

    def pseudo_labels(self) -> PseudoLabels | None:
        """Those of the last loss; None where the method makes none."""
        return None

    def before_epoch(self, epoch: int, features: Features, targets: Tensor, average: Method, encode: Encode) -> None:
        """What comes before epoch ``epoch`` (from 0) over training features with labels (N, C); ``average`` is the one so far."""

    def after_step(self) -> None:
        """What follows the optimiser's step."""


def weak_negatives(targets: Tensor, weight: float, *heads: tuple[float, Tensor]) -> dict[str, Tensor]:
    r"""Every unknown entry taken for an absent one, at a weight w, for each head's factor f and logits (B, C).

    .. math:: \frac{w C}{B} \sum_h f_h \sum_{bc:\, y_{bc} = -1} -\log(1 - \sigma(\ell^h_{bc}))

    With one known label an image, whose loss is C times its mean, an unknown entry weighs w of a known one: as much at 1,
    where absence is assumed. Nothing at weight 0.

    Reference: WAN (Cole et al. 2021) has w = 1 / (C - 1).
    """
    if not weight:
        return {}
    absent = torch.where(targets == UNKNOWN, 0.0, float(UNKNOWN))
    losses = [
        factor * asymmetric_loss(logits, absent, gamma_pos=0, gamma_neg=0, margin=0, reduction="sum", group=ranks.group())
        for factor, logits in heads
    ]
    total = torch.stack(losses).sum()
    return {"weak_negative": weight * targets.shape[1] / ranks.total(total.new_tensor(float(len(targets)))) * total}


def zero_shot_global(batch: Batch, text: Tensor) -> Tensor:
    """CLIP's own classifier: the cosine of the pooled feature and the class text."""
    return F.normalize(batch.pooled, dim=-1) @ F.normalize(text, dim=-1).T


def zero_shot_tokens(batch: Batch, text: Tensor, sharpness: Tensor | float = 8.0) -> Tensor:
    """Cosines of the tokens, averaged with their own softmax over tokens."""
    cosines = F.normalize(batch.tokens, dim=-1) @ F.normalize(text, dim=-1).T  # (B, N, C)
    return (torch.softmax(sharpness * cosines, dim=1) * cosines).sum(dim=1)


def pair_cosines(batch: Batch, text: Tensor, sharpness: Tensor) -> Tensor:
    """Cosines of the tokens with the C positive texts less those with the C negative ones, weighted by the positive ones."""
    similarity = F.normalize(batch.tokens, dim=-1) @ F.normalize(text, dim=-1).T  # (B, N, 2C)
    positive, negative = similarity.chunk(2, dim=-1)
    return (torch.softmax(sharpness * positive, dim=1) * (positive - negative)).sum(dim=1)


ZERO_SHOT: dict[str, Callable[[Batch, Tensor], Tensor]] = {
    "zero-shot-global": zero_shot_global,
    "zero-shot-tokens": zero_shot_tokens,
}


class LinearProbe(Method):
    """A linear layer on the pooled feature that starts as the zero-shot classifier.

    Unit features of one model lie close together and differ in few directions; standardised by the mean and deviation of
    the first batch they can be learned from at a common rate. Weights and biases are converted with them, so the start
    stays the zero-shot classifier.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, setting: Setting, *, assume_negative: bool) -> None:
        super().__init__()
        self.prompts = setting.prompts("fixed")
        self.linear = nn.Linear(setting.text.shape[1], setting.num_classes)
        self.scale = setting.preset.scale
        self.assume_negative = assume_negative
        self.register_buffer("mean", torch.zeros(setting.text.shape[1]))
        self.register_buffer("deviation", torch.ones(setting.text.shape[1]))

    @torch.no_grad()
    def calibrate(self, batch: Batch, text: Tensor, prior: float) -> None:
        unit = F.normalize(batch.pooled, dim=-1)
        self.mean.copy_(unit.mean(dim=0))
        self.deviation.copy_(unit.std(dim=0).clamp(min=1e-4))
        matching = TextRegionMatchingLoss(len(text), scale=self.scale).to(text.device)
        matching.calibrate_bias(unit[:, None].expand(-1, len(text), -1), text, prior)
        weight = self.scale * F.normalize(text, dim=-1)
        self.linear.weight.copy_(weight * self.deviation)
        self.linear.bias.copy_(weight @ self.mean - matching.bias)

    def logits(self, batch: Batch, text: Tensor) -> Tensor:
        linear: Tensor = self.linear((F.normalize(batch.pooled, dim=-1) - self.mean) / self.deviation)
        return linear

    def loss(self, batch: Batch, text: Tensor, targets: Tensor, weak_negative: float = 0.0) -> dict[str, Tensor]:
        targets = targets.clamp(min=0) if self.assume_negative else targets
        logits = self.logits(batch, text)
        loss = asymmetric_loss(logits, targets, gamma_pos=0, gamma_neg=0, margin=0, group=ranks.group())
        # Where absent is assumed nothing is unknown, and the weak term is 0.
        return {"bce": targets.shape[1] * loss, **weak_negatives(targets, weak_negative, (1.0, logits))}

    def groups(self, preset: Preset) -> list[dict[str, Any]]:
        return param_groups(self, lr=preset.linear_lr, weight_decay=preset.weight_decay)


class PromptPeer(Method):
    r"""Tuned prompts against frozen features, with a cosine :math:`z_{bc}` or a mean of cosines for each class.

    .. math:: \ell_{bc} = s\, z_{bc} - \beta_c

    Scale and bias are learned; the bias is calibrated, since a cosine says little about presence in absolute terms.
    """

    def __init__(self, setting: Setting, prompts: nn.Module, *, lr: float, scale: float) -> None:
        super().__init__()
        preset = setting.preset
        self.lr, self.prompts = lr, prompts
        self.matching = TextRegionMatchingLoss(
            setting.num_classes,
            gamma_pos=preset.gamma_pos,
            gamma_neg=preset.gamma_neg,
            margin=preset.margin,
            scale=scale,
            distributed=True,  # nothing else where one process trains
        )

    @abstractmethod
    def cosines(self, batch: Batch, text: Tensor) -> Tensor:
        """z (B, C)."""

    def logits(self, batch: Batch, text: Tensor) -> Tensor:
        return self.matching.scale * self.cosines(batch, text) - self.matching.bias

    def loss(self, batch: Batch, text: Tensor, targets: Tensor, weak_negative: float = 0.0) -> dict[str, Tensor]:
        logits = self.logits(batch, text)
        loss = targets.shape[1] * self.matching.loss(logits, targets)
        return {"matching": loss, **weak_negatives(targets, weak_negative, (1.0, logits))}

    def groups(self, preset: Preset) -> list[dict[str, Any]]:
        return param_groups(self, lr=self.lr, weight_decay=0.0)

    def calibrate(self, batch: Batch, text: Tensor, prior: float) -> None:
        cosines = self.cosines(batch, text)
        # A one-dimensional joint space in which the text is 1: the logit is then scale * cosine - bias.
        self.matching.calibrate_bias(cosines[..., None], torch.ones_like(cosines[0, :, None]), prior)


class TextImage(PromptPeer):
    r"""CoOp for many labels: :math:`z_{bc} = \hat v_b \cdot \hat t_c` of the pooled feature and the tuned text."""

    def __init__(self, setting: Setting) -> None:
        preset = setting.preset
        super().__init__(setting, setting.prompts(preset.prompts), lr=preset.text_image_lr, scale=preset.text_image_scale)

    def cosines(self, batch: Batch, text: Tensor) -> Tensor:
        return zero_shot_global(batch, text)


class TextPixel(PromptPeer):
    r"""The text-pixel peer in its strong form: every token votes for every class.

    .. math:: z_{bc} = \sum_n \mathrm{softmax}_n(\kappa\, \hat V_{bn} \cdot \hat t_c)\, \hat V_{bn} \cdot \hat t_c

    with tuned text, unit tokens and learned sharpness; the bias of each class stands in place of DualCoOp's negative prompts.
    """

    def __init__(self, setting: Setting) -> None:
        preset = setting.preset
        super().__init__(setting, setting.prompts(preset.prompts), lr=preset.text_pixel_lr, scale=preset.scale)
        self.log_sharpness = nn.Parameter(torch.tensor(preset.attention_scale).log())

    def cosines(self, batch: Batch, text: Tensor) -> Tensor:
        return zero_shot_tokens(batch, text, self.log_sharpness.exp())

    def class_features(self, batch: Batch, text: Tensor) -> Tensor:
        """(B, C, D): the mean of the unit tokens by the weights of each class."""
        tokens, rows = F.normalize(batch.tokens, dim=-1), F.normalize(text, dim=-1)
        weights = torch.softmax(self.log_sharpness.exp() * tokens @ rows.T, dim=1)
        return weights.transpose(1, 2) @ tokens

    def classify(self, features: Tensor, text: Tensor) -> Tensor:
        """Logits (B, C) of class features."""
        return self.matching.scale * (features * F.normalize(text, dim=-1)).sum(dim=-1) - self.matching.bias


class PromptPair(nn.Module):
    """Positive and negative prompts of every class."""

    def __init__(self, positive: PromptLearner, negative: PromptLearner) -> None:
        super().__init__()
        self.positive, self.negative = positive, negative

    def forward(self) -> Tensor | list[PromptEmbeddings]:
        """The C positive rows, then the C negative ones; as a list where each goes through the tower with its own contexts."""
        positive, negative = self.positive(), self.negative()
        if isinstance(positive, Tensor) or isinstance(negative, Tensor):
            return torch.cat([positive, negative])
        return [positive, negative]


class DualCoOp(PromptPeer):
    r"""DualCoOp: a positive and a negative prompt for each class, tokens weighted by the positive one.

    .. math:: z_{bc} = \sum_n \mathrm{softmax}_n(\kappa\, \hat V_{bn} \cdot \hat t^+_c)\,
        \hat V_{bn} \cdot (\hat t^+_c - \hat t^-_c)

    Scale and sharpness are learned, as in TaI-DPT; the bias and the start of the negative prompts are our choice.
    """

    def __init__(self, setting: Setting) -> None:
        preset = setting.preset
        prompts = PromptPair(setting.prompts(preset.prompts), setting.negative_prompts(preset.prompts))
        super().__init__(setting, prompts, lr=preset.dual_coop_lr, scale=preset.dual_coop_scale)
        self.log_sharpness = nn.Parameter(torch.tensor(preset.attention_scale).log())

    def cosines(self, batch: Batch, text: Tensor) -> Tensor:
        return pair_cosines(batch, text, self.log_sharpness.exp())


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
            distributed=True,
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


METHODS: dict[str, Callable[[Setting], Method]] = {
    "linear": lambda setting: LinearProbe(setting, assume_negative=False),
    "linear-assume-negative": lambda setting: LinearProbe(setting, assume_negative=True),
    "text-image": TextImage,
    "dual-coop": DualCoOp,
    "text-pixel": TextPixel,
    "trm-region": lambda setting: TRM(setting, query_head=False, pseudo_labels=False),
    "trm-region-pseudo": lambda setting: TRM(setting, query_head=False, pseudo_labels=True),
    "trm-query": lambda setting: TRM(setting, query_head=True, pseudo_labels=False),
    "trm": lambda setting: TRM(setting, query_head=True, pseudo_labels=True),
}
