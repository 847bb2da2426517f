"""Tuned prompts against frozen features: text-image, text-pixel, DualCoOp and DualCoOp++."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trm_losses import PromptEmbeddings, TextRegionMatchingLoss, param_groups
from trm_pipeline.config.presets import Preset
from trm_pipeline.features.cached import Batch
from trm_pipeline.methods.base import Method, Setting, weak_negatives
from trm_pipeline.methods.zero_shot import zero_shot_global, zero_shot_tokens

_COMPETITION = 200.0  # as published, of products of two cosines


def pair_cosines(batch: Batch, text: Tensor, sharpness: Tensor) -> Tensor:
    """Cosines of the tokens with the C positive texts less those with the C negative ones, weighted by the positive ones."""
    similarity = F.normalize(batch.tokens, dim=-1) @ F.normalize(text, dim=-1).T  # (B, N, 2C)
    positive, negative = similarity.chunk(2, dim=-1)
    return (torch.softmax(sharpness * positive, dim=1) * (positive - negative)).sum(dim=1)


class PromptPeer(Method):
    r"""Tuned prompts against frozen features, with a cosine :math:`z_{bc}` or a mean of cosines for each class.

    .. math:: \ell_{bc} = s\, z_{bc} - \beta_c

    Scale and bias are learned; the bias is calibrated, since a cosine says little about presence in absolute terms.
    """

    def __init__(self, setting: Setting, prompts: nn.Module, numbers: Mapping[str, float]) -> None:
        super().__init__()
        self.lr, self.prompts = numbers["lr"], prompts
        options = {**setting.preset.matching, "scale": numbers["scale"]}
        self.matching = TextRegionMatchingLoss(setting.num_classes, **options, distributed=True)
        if "sharpness" in numbers:
            self.log_sharpness = nn.Parameter(torch.tensor(numbers["sharpness"]).log())

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
        return param_groups(self, lr=preset.lr_factor * self.lr, weight_decay=0.0)

    def calibrate(self, batch: Batch, text: Tensor, prior: float) -> None:
        cosines = self.cosines(batch, text)
        # A one-dimensional joint space in which the text is 1: the logit is then scale * cosine - bias.
        self.matching.calibrate_bias(cosines[..., None], torch.ones_like(cosines[0, :, None]), prior)


class TextImage(PromptPeer):
    r"""CoOp for many labels: :math:`z_{bc} = \hat v_b \cdot \hat t_c` of the pooled feature and the tuned text."""

    def __init__(self, setting: Setting) -> None:
        preset = setting.preset
        super().__init__(setting, setting.prompts(preset.prompts), preset.text_image)

    def cosines(self, batch: Batch, text: Tensor) -> Tensor:
        return zero_shot_global(batch, text)


class TextPixel(PromptPeer):
    r"""The text-pixel peer in its strong form: every token votes for every class.

    .. math:: z_{bc} = \sum_n \mathrm{softmax}_n(\kappa\, \hat V_{bn} \cdot \hat t_c)\, \hat V_{bn} \cdot \hat t_c

    with tuned text, unit tokens and learned sharpness; the bias of each class stands in place of DualCoOp's negative prompts.
    """

    def __init__(self, setting: Setting) -> None:
        preset = setting.preset
        super().__init__(setting, setting.prompts(preset.prompts), preset.text_pixel)

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


class Prompts(nn.ModuleDict):
    """Prompts of several kinds for every class."""

    def forward(self) -> Tensor | list[PromptEmbeddings]:
        """C rows of each kind, in their order; as a list where each goes through the tower with its own contexts."""
        found = [kind() for kind in self.values()]
        return torch.cat(found) if isinstance(found[0], Tensor) else found


class DualCoOp(PromptPeer):
    r"""DualCoOp: a positive and a negative prompt for each class, tokens weighted by the positive one.

    .. math:: z_{bc} = \sum_n \mathrm{softmax}_n(\kappa\, \hat V_{bn} \cdot \hat t^+_c)\,
        \hat V_{bn} \cdot (\hat t^+_c - \hat t^-_c)

    Scale and sharpness are learned, as in TaI-DPT; the bias and the start of the negative prompts are our choice.
    """

    def __init__(self, setting: Setting) -> None:
        preset = setting.preset
        kinds = {"positive": setting.prompts(preset.prompts), "negative": setting.negative_prompts(preset.prompts)}
        super().__init__(setting, Prompts(kinds), preset.dual_coop)

    def cosines(self, batch: Batch, text: Tensor) -> Tensor:
        return pair_cosines(batch, text, self.log_sharpness.exp())


def winner_takes_all(positive: Tensor) -> Tensor:
    r"""What a token's cosines m (B, N, C) with the positive texts count: twice for the class that wins it, once for others.

    .. math:: \omega_{bnc} = 1 + \mathrm{softmax}_c(200\, m_{bnc} \max_{c'} m_{bnc'})
    """
    return 1 + torch.softmax(_COMPETITION * positive * positive.amax(dim=-1, keepdim=True), dim=-1)


class DualCoOpPlus(PromptPeer):
    r"""DualCoOp++: a third prompt for each class says where to look, and classes compete for each token.

    .. math:: z_{bc} = \sum_n \mathrm{softmax}_n(\kappa\, \hat V_{bn} \cdot \hat e_c)\,
        \big( \omega_{bnc}\, \hat V_{bn} \cdot \hat t^+_c - r\, \hat V_{bn} \cdot \hat t^-_c \big)

    e is the evidence prompt, :math:`\omega` is that of :func:`winner_takes_all`. The published head has a scale for each of the
    two cosines; here the second is r times the first. Scale, r and :math:`\kappa` are learned, and start from DualCoOp's numbers
    with r = 1. That, the bias and the start of the prompts are our choice: evidence starts like the positive prompt.

    Reference: Hu et al., TPAMI 2024, as another group has it in code.
    """

    def __init__(self, setting: Setting) -> None:
        mode = setting.preset.prompts
        kinds = {"positive": setting.prompts(mode), "negative": setting.negative_prompts(mode), "evidence": setting.prompts(mode)}
        super().__init__(setting, Prompts(kinds), setting.preset.dual_coop)
        self.log_ratio = nn.Parameter(torch.zeros(()))

    def cosines(self, batch: Batch, text: Tensor) -> Tensor:
        similarity = F.normalize(batch.tokens, dim=-1) @ F.normalize(text, dim=-1).T  # (B, N, 3C)
        positive, negative, evidence = similarity.chunk(3, dim=-1)
        weights = torch.softmax(self.log_sharpness.exp() * evidence, dim=1)
        return (weights * (winner_takes_all(positive) * positive - self.log_ratio.exp() * negative)).sum(dim=1)
