"""What the pipeline asks of a frozen model, and class texts that are given in place of a text tower."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from torch import Tensor

from trm_losses import PromptEmbeddings
from trm_losses.backbones import ImageFeatures

CLIP_SCALE = 100.0
"""What CLIP multiplies its cosines with: the scale of texts of which none is known."""


class ImageTower(Protocol):
    """A frozen image model that gives tokens (B, N, D) and a pooled feature (B, D), such as ``TimmBackbone``.

    Features are cached by name, weights, sizes and channel statistics: whatever else changes them belongs into the name.
    """

    name: str  # of tables and of the cache
    dim: int  # D
    image_size: tuple[int, int]  # (height, width) that images are resized to
    image_mean: tuple[float, ...]  # of the channels, which images are normalised with
    image_std: tuple[float, ...]

    def __call__(self, images: Tensor) -> ImageFeatures:
        """Images (B, 3, H, W) -> tokens (B, N, D), pooled (B, D) and the grid (h, w) with h * w = N; no gradient."""

    def grid(self, image_size: int | tuple[int, int]) -> tuple[int, int]:
        """The grid (h, w) of the tokens of an image of this size; an error for a size that the tower cannot take."""

    def state_dict(self) -> dict[str, Any]:
        """All weights: features are computed again if any of them changes."""


class Backbone(ImageTower, Protocol):
    """An image tower with class texts in the space of its tokens, such as ``OpenClipBackbone`` or :class:`GivenTexts`."""

    @property
    def logit_scale(self) -> float:
        """What the model multiplies its cosines with."""

    def template_text(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Texts (C, D) of classes."""

    def embed_prompts(self, texts: Sequence[str]) -> PromptEmbeddings:
        """What learned contexts stand in front of; an error if there is no text tower for them to pass through."""

    def encode_prompts(self, prompts: Tensor | PromptEmbeddings | list[PromptEmbeddings]) -> Tensor:
        """Prompts -> texts (C, D) with a gradient; a tensor (C, D) is finished and comes back as it is."""


class GivenTexts:
    """An image tower beside class texts (C, D) that came from elsewhere: a :class:`Backbone` without a text tower."""

    def __init__(self, tower: ImageTower, text: Tensor) -> None:
        self.tower, self.text, self.logit_scale = tower, text, CLIP_SCALE
        self.name, self.dim, self.image_size = tower.name, tower.dim, tower.image_size
        self.image_mean, self.image_std = tower.image_mean, tower.image_std

    def __call__(self, images: Tensor) -> ImageFeatures:
        return self.tower(images)

    def grid(self, image_size: int | tuple[int, int]) -> tuple[int, int]:
        """See :class:`ImageTower`."""
        return self.tower.grid(image_size)

    def state_dict(self) -> dict[str, Any]:
        """Those of the tower, whose features do not depend on the texts."""
        return self.tower.state_dict()

    def template_text(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """The given texts (C, D), whatever the words are."""
        if len(class_names) != len(self.text):
            raise ValueError(f"{self.name}: texts are given of {len(self.text)} classes, got {len(class_names)} names")
        return self.text

    def embed_prompts(self, texts: Sequence[str]) -> PromptEmbeddings:
        """There is no text tower."""
        raise ValueError(f"{self.name} has no text tower that prompts could pass through; learn residuals of the texts")

    def encode_prompts(self, prompts: Tensor | PromptEmbeddings | list[PromptEmbeddings]) -> Tensor:
        """See :func:`finished_texts`."""
        return finished_texts(prompts)


def finished_texts(prompts: Tensor | PromptEmbeddings | list[PromptEmbeddings]) -> Tensor:
    """Residual prompts, which are texts (C, D) already, as they are."""
    if not isinstance(prompts, Tensor):
        raise TypeError(f"prompts must be texts (C, D), got {type(prompts).__name__}: there is no text tower")
    return prompts


def needs_text_tower(prompts: str, what: str) -> None:
    """Refuse prompts that pass through a text tower, of ``what`` has none."""
    if prompts not in ("fixed", "residual"):
        fix = "give --set prompts=residual, and rates that suit it, such as text_lr=1e-3"
        raise ValueError(f"prompts={prompts} needs a text tower, and {what} have none; {fix}")


def with_texts(tower: ImageTower, model: str, path: Path | None, class_names: Sequence[str], device: torch.device) -> Backbone:
    """The tower with the texts of its own text side or, if it has none, with those of the file ``--class-texts``."""
    if has_texts(tower):
        if path is not None:
            raise ValueError(f"--class-texts is for a model without a text tower, and --model {model} has one; leave it out")
        return tower
    if path is None:
        raise ValueError(
            f"--model {model} has no text tower: --class-texts must be a .npy or .pt file of class texts of shape "
            f"({len(class_names)}, {tower.dim}), got none"
        )
    return GivenTexts(tower, read_texts(path, class_names, tower.dim, model).to(device))


def has_texts(tower: ImageTower) -> TypeGuard[Backbone]:
    """Whether it has a text side of its own."""
    return hasattr(tower, "template_text") and getattr(tower, "has_text", True)


def read_texts(path: Path, class_names: Sequence[str], width: int, model: str) -> Tensor:
    """Class texts (C, D) in single precision out of a .npy or .pt file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no matrix of numbers, not a row for each class, another width than the tokens of the tower, NaN,
            infinity, or a row of zeros.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--class-texts: {path} not found; wanted a .npy or .pt file of class texts (C, D)")
    try:
        if path.suffix == ".npy":
            found = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever bytes may lead to
        line = str(error).split("\n")[0]
        wanted = "must be a .npy or .pt file of class texts (C, D)"
        raise ValueError(f"--class-texts: {path} {wanted}, and cannot be read as one ({line})") from error
    if not isinstance(found, Tensor) or found.ndim != 2 or not found.is_floating_point():
        got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ValueError(
            f"--class-texts: {path} must hold one tensor of floats (C, D) = ({len(class_names)}, {width}), got {got}"
        )
    if tuple(found.shape) != (len(class_names), width):
        fix = f"--model {model} gives tokens of width {width}: take texts that were made for this model, or another model"
        if len(found) != len(class_names):
            shown = ", ".join(class_names[:5]) + (", …" if len(class_names) > 5 else "")
            fix = f"give a row for each class in this order: {shown}"
        raise ValueError(
            f"--class-texts: {path} must have shape (C, D) = ({len(class_names)}, {width}), got {tuple(found.shape)}; {fix}"
        )
    found = found.float()
    if (bad := ~(found.isfinite().all(dim=1) & (found != 0).any(dim=1))).any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"--class-texts: {path} must have finite rows that are not 0, got another one of {class_names[row]!r}")
    return found.detach()
