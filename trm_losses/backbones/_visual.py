"""Tokens in the joint space out of open_clip's visual towers: one small class per family of towers.

A tower object holds a reference to the model's own visual module and calls its parts; it owns no parameter
and changes none. Called on images it returns ``tokens (B, N, D)``, ``pooled (B, D)`` and ``penultimate (B, W)``, none normalised.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from .._precision import upcast
from ._frozen import VisualTower
from ._timm import TimmTower, alone

_OWNER = "OpenClipBackbone"


def resize_positions(table: Tensor, native: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Fit a positional table (1 + h0 * w0, W) to another grid; the first entry (class or mean token) is kept.

    Bicubic with antialiasing and without aligned corners, as open_clip resizes the tables of its ViTs when it
    loads weights into a model of another input size, in float32 at least. At the native grid the table comes back as it is.
    """
    if grid == native:
        return table
    cells = rearrange(table[1:], "(h w) d -> 1 d h w", h=native[0])
    cells = F.interpolate(upcast(cells), size=grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([table[:1], rearrange(cells, "1 d h w -> (h w) d").to(table)])


class ResNetTower:
    """CLIP's ModifiedResNet: ``V = (F Wv + bv) Wc + bc`` on every position of the last map F.

    No positional embedding is added. These are the value and output projections of the attention pool, as in
    DualCoOp: what the pool would return if it looked at this one position only. ``pooled`` is the pool's own
    answer, and ``penultimate`` the mean of F.
    """

    def __init__(self, visual: Any) -> None:
        self.visual = visual
        side = math.isqrt(visual.attnpool.positional_embedding.shape[0] - 1)
        self.native = (side, side)
        self.stride = 32  # stem 4, three stages of 2
        self.image_size = (side * self.stride, side * self.stride)
        self.dim: int = visual.attnpool.c_proj.out_features

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        visual, pool = self.visual, self.visual.attnpool
        feature = visual.stem(images)
        for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            feature = stage(feature)
        tokens = pool.c_proj(pool.v_proj(rearrange(feature, "b c h w -> b (h w) c")))
        table = pool.positional_embedding
        height, width = feature.shape[-2:]
        positions = resize_positions(table, self.native, (height, width))
        penultimate = feature.mean(dim=(2, 3))
        if positions is table:
            return tokens, pool(feature), penultimate
        # the pool reads its own table: lend it the resized one for this call, its parameter stays as it is
        pooled: Tensor = torch.func.functional_call(pool, {"positional_embedding": positions}, (feature,))
        return tokens, pooled, penultimate


class ViTTower:
    """open_clip's VisionTransformer: last-layer patch tokens, then the final layer norm, then the projection.

    This is the head that CLIP puts on its class token (or on the mean of the patches), applied to every
    patch. Where a model pools before that norm, the norm is applied per patch all the same. With ``value_path``
    the last block sees every patch alone; ``pooled`` stays the model's own, and ``penultimate`` is that before the projection.
    """

    def __init__(self, visual: Any, value_path: bool) -> None:
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
        if not isinstance(visual.proj, Tensor):
            raise ValueError(f"{_OWNER}: visual.proj must be a weight (W, D) into the space of the texts, got none")
        self.visual = visual
        self.value_path = value_path
        self.native: tuple[int, int] = tuple(visual.grid_size)
        self.stride: int = patch_height
        self.image_size = (self.native[0] * self.stride, self.native[1] * self.stride)
        self.dim: int = visual.proj.shape[1]

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        visual = self.visual
        patches = visual.conv1(images)
        height, width = patches.shape[-2:]
        x = rearrange(patches, "b d h w -> b (h w) d")
        first = visual.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        positions = resize_positions(visual.positional_embedding, self.native, (height, width))
        x = torch.cat([first, x], dim=1) + positions.to(x.dtype)
        *blocks, last = visual.transformer.resblocks
        x = visual.ln_pre(x)  # patch dropout lies between: nothing at inference
        for block in blocks:
            x = block(x)
        before, x = x, last(x)
        normed = visual.ln_post(x)
        source = x if visual.final_ln_after_pool else normed
        pooled = source[:, 0] if visual.pool_type == "tok" else source[:, 1:].mean(dim=1)
        if visual.final_ln_after_pool:
            pooled = visual.ln_post(pooled)
        tokens = visual.ln_post(alone(last, before[:, 1:])) if self.value_path else normed[:, 1:]
        return tokens @ visual.proj, pooled @ visual.proj, pooled


def visual_tower(open_clip: Any, visual: Any, value_path: bool) -> VisualTower:
    """Choose the class for a model's visual tower; ``open_clip`` is the imported module."""
    if isinstance(visual, open_clip.transformer.VisionTransformer):
        return ViTTower(visual, value_path)
    if isinstance(visual, open_clip.timm_model.TimmModel):
        size: tuple[int, int] = tuple(visual.image_size)
        return TimmTower(_OWNER, visual.trunk, visual.head, size, value_path=value_path)
    if isinstance(visual, open_clip.modified_resnet.ModifiedResNet):
        if value_path:
            raise ValueError(
                f"{_OWNER}: value_path is an option of ViTs; the tokens of a CLIP ResNet take the value path of its "
                "attention pool in any case, so leave it out"
            )
        return ResNetTower(visual)
    raise ValueError(
        f"{_OWNER}: the visual tower {type(visual).__name__} is not known; CLIP ResNets, open_clip's ViTs "
        "and timm towers give tokens"
    )
