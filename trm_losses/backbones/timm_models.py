"""Image models of timm as frozen backbones: tokens, and a pooled feature, through a projection that the caller gives."""

from __future__ import annotations

import difflib
from typing import Any

from torch import Tensor, nn

from ._frozen import FrozenBackbone, freeze, frozen_projection
from ._imports import import_timm
from ._timm import TimmTower

_OWNER = "TimmBackbone"


class TimmBackbone(FrozenBackbone):
    r"""A frozen timm model that gives tokens, projected into the space of your class texts.

    .. math:: V_n = W\, \mathrm{head}(F_n) + b

    where :math:`F` are the model's ``forward_features`` and :math:`\mathrm{head}` is what its ``forward_head`` does before
    the classifier, on this position alone: norms, and an attention pool's value and output projections. Prefix tokens
    (class, registers) are dropped; maps are read in NCHW or NHWC, sequences as (B, N, C). ``pooled`` is ``forward_head(...,
    pre_logits=True)`` of the whole image, projected, and ``penultimate`` the same before it is; of a model that pools by
    attention, the mean of its patches. There is no text side: give class texts (C, D) from elsewhere, or learn them. Frozen as
    :class:`OpenClipBackbone`, the projection included.

    Args:
        model: a timm model, or its name.
        projection: a ``Linear``, or its weight (D, W), from the model's width W to the joint space. Default: none, D = W.
        pretrained: with a name: load timm's weights, which downloads. Default: random weights. For weights in a file build
            the model by ``timm.create_model(..., checkpoint_path=...)``.
        image_size: the size you mean to use, side or (height, width); see :class:`OpenClipBackbone`.

    Attributes:
        dim, stride, image_size, image_mean, image_std: as those of :class:`OpenClipBackbone`.

    Shape:
        - images: (B, 3, H, W), normalised, H and W multiples of ``stride``, not necessarily equal.
        - tokens (B, N, D), pooled (B, D), penultimate (B, W), with N = H/stride * W/stride in row-major order.

    Raises:
        ImportError: timm does not import; the message says what to install.
        ValueError: no such model, a model that cannot give tokens, a projection of another width, or a size that the model
            cannot take.

    Example:
        >>> import torch
        >>> backbone = TimmBackbone("test_vit", torch.eye(64)[:32])
        >>> features = backbone(torch.zeros(1, 3, 64, 96))
        >>> features.tokens.shape, features.pooled.shape, features.grid
        (torch.Size([1, 24, 32]), torch.Size([1, 32]), (4, 6))

    Reference: our choice throughout; TRM-ML names CLIP as its encoder.
    """

    def __init__(
        self,
        model: str | nn.Module,
        projection: nn.Linear | Tensor | None = None,
        *,
        pretrained: bool = False,
        image_size: int | tuple[int, int] | None = None,
    ) -> None:
        timm = import_timm()
        if isinstance(model, str):
            if ":" not in model and not timm.is_model(model):  # "hf-hub:..." and the like name no architecture
                near = ", ".join(difflib.get_close_matches(model, timm.list_models())) or "timm.list_models() names all"
                raise ValueError(f"{_OWNER}: model must be one of timm's, got {model!r}; near it: {near}")
            network: Any = timm.create_model(model, pretrained=pretrained)
            name = model
        elif pretrained:
            raise ValueError(f"{_OWNER}: pretrained goes with a name, got a {type(model).__name__}, which brings its weights")
        elif not all(hasattr(model, part) for part in ("forward_features", "forward_head", "num_features")):
            raise ValueError(
                f"{_OWNER}: model must be a timm model with forward_features and forward_head, got {type(model).__name__}"
            )
        else:
            network = model
            name = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
        config = getattr(network, "pretrained_cfg", {})
        size = getattr(getattr(network, "patch_embed", None), "img_size", None) or config.get("input_size", (3, 224, 224))[1:]
        like = next(network.parameters())
        width: int = getattr(network, "head_hidden_size", network.num_features)
        linear = frozen_projection(_OWNER, projection, width).to(like.device)
        tower = TimmTower(_OWNER, freeze(network), linear, tuple(size), pre_logits=True)
        super().__init__(network, tower, name=name, image_size=image_size)
        self.projection = linear
        self.image_mean: tuple[float, ...] = tuple(config.get("mean", timm.data.IMAGENET_DEFAULT_MEAN))
        self.image_std: tuple[float, ...] = tuple(config.get("std", timm.data.IMAGENET_DEFAULT_STD))
