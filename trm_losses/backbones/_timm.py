"""Tokens in the joint space out of timm's models, inside open_clip or on their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ._imports import import_timm

# The pools whose answer to a single position is made of that position.
_POOLS = {"avg", "fast", "fastavg", "token", "map", "prr"}

_ROWS = 1 << 15  # at a time: an accelerator's attention kernels number the sequences of a batch in 16 bits


def by_rows(call: Callable[[Tensor], Tensor], cells: Tensor) -> Tensor:
    """Call a function of many short rows on some of them at a time."""
    return torch.cat([call(part) for part in torch.split(cells, _ROWS)])


def alone(block: Any, states: Tensor) -> Tensor:
    """Run a transformer block on every state of (B, N, W) as on a sequence of its own.

    Attention that sees one key gives it the weight 1. So it returns the value and output projection of the state itself,
    whatever its queries, keys and scales are: the value path. Residuals and MLP are those of the block.
    """
    cells = by_rows(block, rearrange(states, "b n w -> (b n) 1 w"))
    return rearrange(cells, "(b n) 1 w -> b n w", b=states.shape[0])


class TimmTower:
    """A timm model (``trunk``) and the projection behind it.

    The token of a position is the model's own head as if the image had this position only. A map is cut into 1x1 maps. Of a
    sequence (B, P + N, C') each token after the P prefix tokens stands in all places of a sequence of its own. Each goes
    through what follows the trunk (pool, norms, projection). Behind an average and a linear head the mean of the tokens is
    the pooled feature. A head with a norm or an activation between pool and projection keeps them, per token. An attention
    pool (SigLIP's "map") that sees one token returns its value and output projection and what
    follows: :math:`v = W_o (W_v x + b_v) + b_o`, then :math:`v + MLP(LN(v))`.

    ``penultimate`` is what the projection reads, or the trunk's own classifier in its place; of a trunk that pools by
    attention, the mean of its patches.

    A ``VisionTransformer`` of timm whose input size is fixed is switched, in place, to the form that timm itself builds
    with ``dynamic_img_size=True``. The positions are interpolated for each call, and no parameter changes.
    """

    def __init__(
        self,
        owner: str,
        trunk: Any,
        projection: nn.Module,
        image_size: tuple[int, int],
        *,
        pre_logits: bool = False,
        value_path: bool = False,
    ) -> None:
        timm = import_timm()
        self.name = f"{owner}: the timm tower {type(trunk).__name__}"
        self.trunk = trunk
        self.projection = projection
        self.pre_logits = pre_logits  # True leaves the classifier out
        self.value_path = value_path
        self.image_size = image_size
        self.prefix: int = getattr(trunk, "num_prefix_tokens", 0)
        pools = {m.pool_type for m in trunk.modules() if isinstance(m, timm.layers.SelectAdaptivePool2d)}
        if isinstance(getattr(trunk, "global_pool", None), str):
            pools.add(trunk.global_pool)
        if hasattr(projection, "pool") or not pools <= _POOLS:
            found = "attention" if hasattr(projection, "pool") else ", ".join(sorted(pools))
            raise ValueError(
                f"{self.name} pools by {found or 'nothing'}, so its head has no meaning for a single position and it "
                "cannot give tokens; use one that pools by 'avg', 'token' or 'map'"
            )
        vit = isinstance(trunk, timm.models.VisionTransformer)
        if vit:
            _take_any_size(trunk)
        if value_path and not (vit and len(trunk.blocks) > 1):
            raise ValueError(
                f"{self.name} has no value path to take: value_path needs a VisionTransformer of two blocks or more; leave it out"
            )
        self.fits: tuple[int, int] | None = None  # until the trunk has taken its own size
        with torch.no_grad():
            feature = self._call(trunk.forward_features, next(trunk.parameters()).new_zeros(1, 3, *image_size))
            self.fits = image_size
            self.channels_last, self.stride = self._layout(feature)
            self.dim: int = self._head(feature).shape[-1]

    def _layout(self, feature: Any) -> tuple[bool, int]:
        """Whether a map has its channels last, and the stride, from what the trunk makes of the native size."""
        width: int = self.trunk.num_features
        last = getattr(self.trunk, "output_fmt", "NCHW") == "NHWC"
        shape = tuple(feature.shape) if isinstance(feature, Tensor) else ()
        if len(shape) not in (3, 4) or shape[-1 if last or len(shape) == 3 else 1] != width:
            raise ValueError(
                f"{self.name} gives {f'features of shape {shape}' if shape else f'a {type(feature).__name__}'} and neither a "
                f"map nor a sequence of width {width}, so it cannot give tokens; use a convolutional tower or a ViT"
            )
        height, side = self.image_size
        cells = (shape[1] - self.prefix,) if len(shape) == 3 else shape[1:3] if last else shape[2:]
        info = getattr(self.trunk, "feature_info", None)
        stride: int = info[-1]["reduction"] if info else round(math.sqrt(height * side / math.prod(cells)))
        wanted = (math.ceil(height / stride), math.ceil(side / stride))
        if cells not in (wanted, (math.prod(wanted),)):
            raise ValueError(
                f"{self.name} turns {self.image_size} pixels into {'a map of ' if len(cells) == 2 else 'tokens '}{cells} "
                f"where its stride {stride} asks for {wanted}, so its cells cannot be laid on the image; use a tower with "
                "padded convolutions or square patches"
            )
        return last, stride

    def _call(self, forward: Any, images: Tensor, **options: Any) -> Any:
        try:
            return forward(images, **options)
        except (AssertionError, IndexError, RuntimeError) as error:  # timm: a size that a table or window does not fit
            size_is_right = tuple(images.shape[2:]) == self.fits
            other = images.dtype != next(self.trunk.parameters()).dtype or not len(images)
            if isinstance(error, torch.cuda.OutOfMemoryError) or size_is_right or other:
                raise
            line = str(error).split("\n")[0]
            if "channels" in line:
                raise ValueError(f"{self.name} must take images of 3 channels ({line}); build it with in_chans=3") from error
            raise ValueError(
                f"{self.name} cannot take images of {images.shape[2]}x{images.shape[3]} ({line}); keep to the size that it "
                "was built for, or build it for this one"
            ) from error

    def _head(self, feature: Tensor) -> Tensor:
        features: Tensor = self.projection(self.trunk.forward_head(feature, pre_logits=self.pre_logits))
        return features

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        trunk = self.trunk
        if self.value_path:
            before = len(trunk.blocks) - 2
            feature, (states,) = self._call(trunk.forward_intermediates, images, indices=[before], output_fmt="NLC")
            states = trunk.norm(alone(trunk.blocks[-1], states))
        else:
            feature = self._call(trunk.forward_features, images)
            states = feature[:, self.prefix :]
        if feature.ndim == 3:
            cells = rearrange(states, "b n c -> (b n) 1 c").expand(-1, self.prefix + 1, -1)
        elif self.channels_last:
            cells = rearrange(feature, "b h w c -> (b h w) 1 1 c")
        else:
            cells = rearrange(feature, "b c h w -> (b h w) c 1 1")
        tokens = rearrange(by_rows(self._head, cells), "(b n) d -> b n d", b=images.shape[0])
        if getattr(trunk, "global_pool", None) == "map":
            penultimate = feature[:, self.prefix :].mean(dim=1)
        else:
            penultimate = trunk.forward_head(feature, pre_logits=True)
        return tokens, self._head(feature), penultimate


def _take_any_size(trunk: Any) -> None:
    """Switch a VisionTransformer with a fixed input size to positions that are interpolated for each call."""
    embed = trunk.patch_embed
    if not trunk.dynamic_img_size and hasattr(embed, "strict_img_size") and hasattr(embed, "output_fmt"):
        trunk.dynamic_img_size = True
        embed.strict_img_size = False
        embed.flatten = False
        embed.output_fmt = type(embed.output_fmt)("NHWC")
