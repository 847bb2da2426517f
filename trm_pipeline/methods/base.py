"""What every method is built from and what the training loop asks of one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trm_losses import GlobalHead, PromptEmbeddings, PromptLearner, PseudoLabels
from trm_losses.functional import asymmetric_loss
from trm_losses.labels import UNKNOWN
from trm_pipeline import ranks
from trm_pipeline.config.presets import Preset
from trm_pipeline.features.cached import Batch, Features
from trm_pipeline.features.frozen import Encode


@dataclass(eq=False)
class Setting:
    """What a method is built from: the preset, class texts of the frozen model, its scale, the numbers of steps and images."""

    preset: Preset
    text: Tensor
    names: PromptEmbeddings | None
    logit_scale: float
    total_steps: int
    _: KW_ONLY
    single: bool = False
    num_samples: int = 1
    # Labels (N, C) that are left, and the frozen model's cosines (N, C) with the training images, for losses of the grid.
    targets: Tensor | None = None
    similarities: Callable[[], Tensor] | None = None
    # The fitted head of whole images, and what it makes of the training images: probabilities (N, C), for pseudo_rule=teacher.
    global_head: Callable[[], GlobalHead | None] | None = None
    estimates: Callable[[], Tensor | None] | None = None

    @property
    def expected_positives(self) -> float | None:
        """Present labels of an image, as assumed with single positives; labels hidden at random tell it."""
        return self.preset.expected_positives if self.single else None

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.text)

    def prompts(self, mode: str) -> PromptLearner:
        """A fresh prompt learner of this mode, started from the class texts."""
        if mode in ("shared", "csc"):
            return PromptLearner(mode, names=self.names, num_context=self.preset.num_context)  # type: ignore[arg-type]
        return PromptLearner(mode, text=self.text)  # type: ignore[arg-type]

    def negative_prompts(self, mode: str) -> PromptLearner:
        """Prompts for "not this class", started where they do not cancel the positive ones.

        A vector of its own starts opposite to the class text, so that a difference of the two ranks images as zero-shot does.
        Through the text tower it is contexts without the class name: with the name both texts would start almost equal. These
        contexts are never shared, or all classes would have one negative text.
        """
        names = self.names
        if names is not None:
            end = names.embeddings[torch.arange(len(names.eot), device=names.eot.device), names.eot]
            start = names.embeddings[:, :1]
            tokens = [start, end[:, None]] if bool((start == start[:1]).all()) else [end[:, None]]  # SigLIP's has no start token
            names = PromptEmbeddings(torch.cat(tokens, dim=1), torch.full_like(names.eot, len(tokens) - 1))
        return replace(self, text=-self.text, names=names).prompts("csc" if mode == "shared" else mode)


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
        """Start the biases so that the mean probability of each class is ``prior``."""

    def weak_negative_steps(self, preset: Preset, total: int) -> int:
        """Of ``total`` steps those with single positives that have :func:`weak_negatives`."""
        return total

    def pseudo_labels(self) -> PseudoLabels | None:
        """Those of the last loss; None where the method makes none."""
        return None

    def before_epoch(self, epoch: int, features: Features, targets: Tensor, average: Method, encode: Encode) -> None:
        """What comes before epoch ``epoch`` (from 0) over training features with labels (N, C); ``average`` is the one so far."""

    def after_step(self) -> None:
        """What follows the optimiser's step."""

    def finish(self, features: Features, targets: Tensor, text: Tensor, batch_size: int) -> None:
        """What follows the last epoch over training features with labels (N, C), of the average and its text."""


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


@torch.no_grad()
def score(logits: Callable[[Batch], Tensor], features: Features, batch_size: int) -> Tensor:
    """Logits (N, C) of all images in the data set's order; of several ranks each computes its part of every batch."""
    own = [(batch.index, logits(batch).float().cpu()) for batch in ranks.batches(features, batch_size)]
    parts = [part for parts in ranks.gather(own) for part in parts]
    order = torch.cat([index for index, _ in parts])
    return torch.cat([part for _, part in parts])[order.argsort()]
