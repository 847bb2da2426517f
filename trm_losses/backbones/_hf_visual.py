"""Tokens in the joint space out of image models of transformers: one small class per kind of head.

A tower object holds references to the model's own parts; it owns no parameter and changes none. Called on images it returns
``tokens (B, N, D)``, ``pooled (B, D)`` and ``penultimate (B, W)``, none normalised.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ._timm import by_rows


class SizedTower:
    """What all of them share: square patches, and the size that the weights were made for."""

    def __init__(self, owner: str, config: Any, dim: int) -> None:
        patch, side = config.patch_size, config.image_size
        if not isinstance(patch, int):
            height, width = patch
            if height != width:
                raise ValueError(f"{owner}: patches must be square, got {height}x{width}; use a model with square patches")
            patch = height
        self.stride: int = patch
        self.dim = dim
        height, width = (side, side) if isinstance(side, int) else side
        # a patch that does not fit into the image is cut off by the convolution
        self.image_size = (height // patch * patch, width // patch * patch)


class ClassTokenTower(SizedTower):
    """CLIP and its kin: final norm and projection on the class token, and the same on every patch."""

    def __init__(self, owner: str, model: Any) -> None:
        self.visual: Any = model.vision_model
        self.projection: Any = model.visual_projection
        if not isinstance(self.projection, nn.Linear):
            raise ValueError(
                f"{owner}: model.visual_projection must be a Linear into the space of the texts, got a "
                f"{type(self.projection).__name__}; fold its layers into one"
            )
        super().__init__(owner, self.visual.config, self.projection.out_features)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self.visual(images, interpolate_pos_encoding=True)
        patches = self.visual.post_layernorm(found.last_hidden_state[:, 1:])
        penultimate: Tensor = found.pooler_output
        return self.projection(patches), self.projection(penultimate), penultimate


class AttentionPoolTower(SizedTower):
    """SigLIP: what its attention pool returns if it looks at one position only; ``penultimate`` is the mean of the patches."""

    def __init__(self, owner: str, model: Any) -> None:
        self.visual: Any = model.vision_model
        if not getattr(self.visual, "use_head", True):
            raise ValueError(
                f"{owner}: {type(model).__name__} without the attention pool of its image tower (vision_use_head=false) has no "
                "feature in the space of its texts; use one that has it"
            )
        super().__init__(owner, self.visual.config, self.visual.config.hidden_size)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self._found(images)
        states: Tensor = found.last_hidden_state
        cells = by_rows(self.visual.head, rearrange(states, "b n w -> (b n) 1 w"))
        return rearrange(cells, "(b n) d -> b n d", b=len(states)), found.pooler_output, states.mean(dim=1)

    def _found(self, images: Tensor) -> Any:
        return self.visual(images, interpolate_pos_encoding=True)


class PatchedTower(AttentionPoolTower):
    """SigLIP 2 as ``Siglip2Model``, which takes patches (B, N, 3 P P) of any grid: images are cut into them here."""

    def __init__(self, owner: str, model: Any) -> None:
        super().__init__(owner, model)
        side = round(self.visual.config.num_patches**0.5) * self.stride
        self.image_size = (side, side)

    def _found(self, images: Tensor) -> Any:
        step = self.stride
        grid = (images.shape[2] // step, images.shape[3] // step)
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=step, q=step)
        shapes = torch.tensor([grid], device=images.device).expand(len(images), 2)
        seen = torch.ones(patches.shape[:2], dtype=torch.long, device=images.device)
        return self.visual(patches, seen, shapes)  # by place: their names differ between versions


class PlainTower(SizedTower):
    """DINOv2 and DINOv3: states after the final norm, projected as the caller says; ``pooled`` is that of the class token."""

    def __init__(self, owner: str, model: Any, projection: nn.Module) -> None:
        self.model = model
        self.projection = projection
        self.prefix = 1 + getattr(model.config, "num_register_tokens", 0)
        width: int = model.config.hidden_size
        super().__init__(owner, model.config, getattr(projection, "out_features", width))

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self.model(images)
        penultimate: Tensor = found.pooler_output
        return self.projection(found.last_hidden_state[:, self.prefix :]), self.projection(penultimate), penultimate
