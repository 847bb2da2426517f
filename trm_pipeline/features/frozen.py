"""What a frozen model gives a run, whatever model it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from trm_losses import PromptEmbeddings
from trm_pipeline.features.cached import CachedFeatures, Features

Encode = Callable[[Tensor | PromptEmbeddings | list[PromptEmbeddings]], Tensor]
"""The frozen text tower: what prompts give -> text (C, D)."""


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """What a frozen model gives a run, whatever it is: features of both splits, class texts, and its text tower if it has one."""

    model: str  # what it is called over tables
    detail: str  # the same with sizes
    weights: str  # digest of it
    features: Features
    test_features: CachedFeatures
    text: Tensor
    logit_scale: float
    names: PromptEmbeddings | None = None  # without a text tower there are none
    encode: Encode
    image_size: tuple[int, int]  # (height, width) of images in pictures
    grid: tuple[int, int] | None  # of the tokens; none: no pictures
