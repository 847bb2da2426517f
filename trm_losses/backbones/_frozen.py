"""What every backbone shares: a frozen model, its tower for images, and the sizes that the tower takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .._checks import Dims

Backbone = TypeVar("Backbone", bound="FrozenBackbone")


class ImageFeatures(NamedTuple):
    """What a backbone gives for a batch of images.

    Attributes:
        tokens: (B, N, D), one vector per grid cell in row-major order, in the joint space, not normalised.
        pooled: (B, D), the model's own global feature, not normalised.
        grid: ``(h, w)`` with ``h * w == N``; ``trm_losses.functional.saliency_map`` lays saliency (B, C, N) on it.
        penultimate: (B, W), what the tower has of the image before its projection to the joint space; None where a tower of
            your own does not tell.
    """

    tokens: Tensor
    pooled: Tensor
    grid: tuple[int, int]
    penultimate: Tensor | None = None


class VisualTower(Protocol):
    """What the backbone asks of a family of towers."""

    stride: int  # pixels per token, in both directions
    dim: int  # width of the joint space
    image_size: tuple[int, int]  # the (height, width) that the weights were made for

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens (B, N, D), pooled (B, D) and penultimate (B, W) of images whose sides are multiples of the stride."""


def freeze(model: nn.Module) -> Any:
    """Turn a model to float32, without gradients and in eval mode, in place: before a tower first looks at it."""
    return model.float().requires_grad_(False).eval()


def frozen_projection(owner: str, projection: nn.Linear | Tensor | None, width: int) -> nn.Module:
    """A ``Linear``, or a weight (D, W) as one, from a model's width W to the joint space; none: D = W. Frozen from here on."""
    if projection is None:
        return nn.Identity()
    if not isinstance(projection, (nn.Linear, Tensor)):
        raise TypeError(
            f"{owner}: projection must be a Linear or its weight (D, W) with W = {width}, got a {type(projection).__name__}; "
            "leave it out, and apply a module of other layers to the tokens and features that come back"
        )
    weight = projection.weight if isinstance(projection, nn.Linear) else projection
    Dims(owner, W=width).check("projection", weight, "D W", hint="its second size is the width of the model's features")
    if isinstance(projection, nn.Linear):
        linear = projection
    else:
        linear = nn.Linear(width, weight.shape[0], bias=False)
        with torch.no_grad():
            linear.weight.copy_(weight)
    frozen: nn.Module = freeze(linear)
    return frozen


def channels(owner: str, what: str, given: Sequence[float] | None, default: Sequence[float]) -> tuple[float, ...]:
    """A statistic of the channels as three numbers."""
    values = tuple(float(value) for value in (default if given is None else given))
    if len(values) != 3:
        raise ValueError(f"{owner}: {what} must be three numbers, one for each channel, got {len(values)}")
    return values


class FrozenBackbone(nn.Module):
    """A frozen model and the tower that turns its images into tokens; see the public classes."""

    def __init__(self, model: Any, tower: VisualTower, *, name: str, image_size: int | tuple[int, int] | None) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self._visual = tower
        self.dim = tower.dim
        self.stride = tower.stride
        self.image_size = tower.image_size if image_size is None else _pair(image_size)
        self.grid(self.image_size)
        self.eval()

    def train(self: Backbone, mode: bool = True) -> Backbone:
        """Stay in eval mode: a frozen model has nothing to train, and batch norm must keep its statistics."""
        return super().train(False)

    def extra_repr(self) -> str:
        height, width = self.image_size
        return f"name={self.name!r}, dim={self.dim}, stride={self.stride}, image_size=({height}, {width})"

    def grid(self, image_size: int | tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens of an image of this side or (height, width)."""
        height, width = _pair(image_size)
        step = self.stride
        if min(height, width) < step or height % step or width % step:
            low = f"{max(height // step, 1) * step}x{max(width // step, 1) * step}"
            high = f"{max(-(-height // step), 1) * step}x{max(-(-width // step), 1) * step}"
            nearest = low if low == high else f"{low} or {high}"
            raise ValueError(
                f"{type(self).__name__}: image size must be a multiple of the stride {step} in height and width, "
                f"got {height}x{width}; nearest valid: {nearest}"
            )
        return height // step, width // step

    def forward(self, images: Tensor) -> ImageFeatures:
        """Encode images (B, 3, H, W) into tokens (B, N, D), pooled (B, D) and penultimate (B, W), without gradient."""
        Dims(type(self).__name__, C=3).check("images", images, "B C H W")
        grid = self.grid((images.shape[2], images.shape[3]))
        with torch.no_grad():
            tokens, pooled, penultimate = self._visual(images)
        return ImageFeatures(tokens, pooled, grid, penultimate)


def _pair(image_size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return height, width
