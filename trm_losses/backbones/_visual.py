"""Tokens in the joint space out of open_clip's visual towers: one small class per family of towers.

A tower object holds a reference to the model's own visual module and calls its parts; it owns no parameter
and changes none. Called on images it returns ``tokens (B, N, D)`` and ``pooled (B, D)``, neither normalised.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ImageFeatures", "VisualTower", "visual_tower"]

_OWNER = "OpenClipBackbone"


class ImageFeatures(NamedTuple):
    """What a backbone gives for a batch of images.

    Attributes:
        tokens: (B, N, D), one vector per grid cell in row-major order, in the joint space, not normalised.
        pooled: (B, D), the model's own global feature, not normalised.
        grid: ``(h, w)`` with ``h * w == N``.
    """

    tokens: Tensor
    pooled: Tensor
    grid: tuple[int, int]


class VisualTower(Protocol):
    """What the backbone asks of a family of towers."""

    stride: int  # pixels per token, in both directions
    dim: int  # width of the joint space
    image_size: tuple[int, int]  # the (height, width) that the weights were made for

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (B, N, D) and pooled (B, D) of images whose sides are multiples of the stride."""


def resize_positions(table: Tensor, native: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Fit a positional table (1 + h0 * w0, W) to another grid; the first entry (class or mean token) is kept.

    Bicubic with antialiasing and without aligned corners, as open_clip resizes the tables of its ViTs when it
    loads weights into a model of another input size. At the native grid the table comes back as it is.
    """
    if grid == native:
        return table
    cells = rearrange(table[1:], "(h w) d -> 1 d h w", h=native[0])
    cells = F.interpolate(cells, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([table[:1], rearrange(cells, "1 d h w -> (h w) d")])


class ResNetTower:
    """CLIP's ModifiedResNet: ``V = (F Wv + bv) Wc + bc`` on every position of the last map F.

    No positional embedding is added. These are the value and output projections of the attention pool, as in
    DualCoOp: what the pool would return if it looked at this one position only. ``pooled`` is the pool's own
    answer.
    """

    def __init__(self, visual: Any) -> None:
        self.visual = visual
        side = math.isqrt(visual.attnpool.positional_embedding.shape[0] - 1)
        self.native = (side, side)
        self.stride = 32  # stem 4, three stages of 2
        self.image_size = (side * self.stride, side * self.stride)
        self.dim: int = visual.attnpool.c_proj.out_features

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        visual, pool = self.visual, self.visual.attnpool
        feature = visual.stem(images)
        for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            feature = stage(feature)
        tokens = pool.c_proj(pool.v_proj(rearrange(feature, "b c h w -> b (h w) c")))
        table = pool.positional_embedding
        height, width = feature.shape[-2:]
        positions = resize_positions(table, self.native, (height, width))
        if positions is table:
            return tokens, pool(feature)
        # the pool reads its own table: lend it the resized one for this call, its parameter stays as it is
        pooled: Tensor = torch.func.functional_call(pool, {"positional_embedding": positions}, (feature,))
        return tokens, pooled


class ViTTower:
    """open_clip's VisionTransformer: last-layer patch tokens, then the final layer norm, then the projection.

    This is the head that CLIP puts on its class token (or on the mean of the patches), applied to every
    patch. Where a model pools before that norm, the norm is applied per patch all the same.
    """

    def __init__(self, visual: Any) -> None:
        patch_height, patch_width = visual.patch_size
        if visual.attn_pool is not None:
            raise ValueError(
                f"{_OWNER}: this ViT ends in an attentional pool, whose outputs belong to learned queries "
                "and not to places in the image, so it cannot give tokens; use a ViT that pools by class "
                "token or mean"
            )
        if visual.pool_type not in ("tok", "avg"):
            raise ValueError(
                f"{_OWNER}: this ViT pools by {visual.pool_type!r}, so it has no global feature; use one "
                "that pools by 'tok' or 'avg'"
            )
        if patch_height != patch_width:
            raise ValueError(f"{_OWNER}: patches must be square, got {patch_height}x{patch_width}")
        self.visual = visual
        self.native: tuple[int, int] = tuple(visual.grid_size)
        self.stride: int = patch_height
        self.image_size = (self.native[0] * self.stride, self.native[1] * self.stride)
        self.dim: int = visual.proj.shape[1]

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        visual = self.visual
        patches = visual.conv1(images)
        height, width = patches.shape[-2:]
        x = rearrange(patches, "b d h w -> b (h w) d")
        first = visual.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        positions = resize_positions(visual.positional_embedding, self.native, (height, width))
        x = torch.cat([first, x], dim=1) + positions.to(x.dtype)
        x = visual.transformer(visual.ln_pre(x))  # patch dropout lies between: nothing at inference
        normed = visual.ln_post(x)
        source = x if visual.final_ln_after_pool else normed
        pooled = source[:, 0] if visual.pool_type == "tok" else source[:, 1:].mean(dim=1)
        if visual.final_ln_after_pool:
            pooled = visual.ln_post(pooled)
        return normed[:, 1:] @ visual.proj, pooled @ visual.proj


class TimmTower:
    """A timm tower inside open_clip that ends in a map (B, C', h, w) and global average pooling.

    The token of a position is the model's own head on that position alone: the map is cut into 1x1 maps, and
    each goes through what follows the trunk (pool, norms, projection). With a linear head the mean of the
    tokens is the pooled feature; a head with a norm or an activation between pool and projection keeps them,
    per token.
    """

    def __init__(self, visual: Any) -> None:
        from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d

        trunk, head = visual.trunk, visual.head
        pools = {m.pool_type for m in trunk.modules() if isinstance(m, SelectAdaptivePool2d)}
        if hasattr(head, "pool") or not pools <= {"avg", "fast", "fastavg"}:
            found = "attention" if hasattr(head, "pool") else ", ".join(sorted(pools))
            raise ValueError(
                f"{_OWNER}: the timm tower {type(trunk).__name__} pools by {found or 'nothing'}, so its head "
                "has no meaning for a single position and it cannot give tokens; use timm_pool 'avg'"
            )
        self.visual = visual
        self.image_size: tuple[int, int] = tuple(visual.image_size)
        like = next(trunk.parameters())
        with torch.no_grad():
            feature = trunk.forward_features(like.new_zeros(1, 3, *self.image_size))
            if feature.ndim != 4 or feature.shape[1] != trunk.num_features:
                raise ValueError(
                    f"{_OWNER}: the timm tower {type(trunk).__name__} gives features of shape "
                    f"{tuple(feature.shape)} and not a map (1, {trunk.num_features}, h, w), so it cannot "
                    "give tokens yet; use a convolutional timm tower, or a ViT or ResNet of open_clip's own"
                )
            self.dim: int = self._head(feature).shape[-1]
        info = getattr(trunk, "feature_info", None)
        self.stride: int = info[-1]["reduction"] if info else self.image_size[0] // feature.shape[2]
        wanted = tuple(math.ceil(side / self.stride) for side in self.image_size)
        if tuple(feature.shape[2:]) != wanted:
            raise ValueError(
                f"{_OWNER}: the timm tower {type(trunk).__name__} turns {self.image_size} pixels into a map "
                f"of {tuple(feature.shape[2:])} where its stride {self.stride} asks for {wanted}, so its "
                "cells cannot be laid on the image; use a tower with padded convolutions"
            )

    def _head(self, feature: Tensor) -> Tensor:
        features: Tensor = self.visual.head(self.visual.trunk.forward_head(feature))
        return features

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.visual.trunk.forward_features(images)
        cells = rearrange(feature, "b c h w -> (b h w) c 1 1")
        tokens = rearrange(self._head(cells), "(b n) d -> b n d", b=images.shape[0])
        return tokens, self._head(feature)


def visual_tower(open_clip: Any, visual: nn.Module) -> VisualTower:
    """Choose the class for a model's visual tower; ``open_clip`` is the imported module."""
    if isinstance(visual, open_clip.modified_resnet.ModifiedResNet):
        return ResNetTower(visual)
    if isinstance(visual, open_clip.transformer.VisionTransformer):
        return ViTTower(visual)
    if isinstance(visual, open_clip.timm_model.TimmModel):
        return TimmTower(visual)
    raise ValueError(
        f"{_OWNER}: the visual tower {type(visual).__name__} is not known; CLIP ResNets, open_clip's ViTs "
        "and convolutional timm towers give tokens"
    )
