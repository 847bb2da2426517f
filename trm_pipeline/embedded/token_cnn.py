"""The visual tower of the embedded model: a small CNN that timm, and through it open_clip, can build by name."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import register_model
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

WIDTHS = (48, 96, 224)
BLOCKS = (1, 1, 2)


class TokenCNN(nn.Module):
    """A 7x7 stem of stride 4 and three stages of basic blocks; 16 pixels a token.

    There is nothing after the last stage but an average: with a linear projection behind it, the global feature is
    exactly the mean of the projected tokens, so a token and the image live in the same space.

    Args:
        in_chans: Channels of the image.
        global_pool: ``"avg"``, or ``""`` for a feature map.

    Shape:
        images (B, 3, H, W) with sides that are multiples of 16; features (B, 224), or (B, 224, H/16, W/16) without a
        pool.
    """

    def __init__(self, *, in_chans: int = 3, global_pool: str = "avg") -> None:
        super().__init__()
        self.num_features = self.head_hidden_size = WIDTHS[-1]
        self.num_classes = 0
        self.global_pool = global_pool
        self.default_cfg: dict[str, Any] = {"pool_size": (14, 14), "input_size": (3, 224, 224), "first_conv": "stem.0"}
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, WIDTHS[0], 7, stride=4, padding=3, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU()
        )
        blocks: list[nn.Module] = []
        width = WIDTHS[0]
        for stage, (out, count) in enumerate(zip(WIDTHS, BLOCKS, strict=True)):
            for at in range(count):
                stride = 2 if stage and at == 0 else 1
                shortcut = None
                if stride > 1 or width != out:
                    shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))
                blocks.append(BasicBlock(width, out, stride=stride, downsample=shortcut))
                width = out
        self.blocks = nn.Sequential(*blocks)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """timm's way to choose the pool; there is no classifier to reset."""
        if num_classes:
            raise ValueError(f"TokenCNN: it has no classifier, so num_classes must be 0, got {num_classes}")
        if global_pool is not None:
            self.global_pool = global_pool

    def forward_features(self, images: Tensor) -> Tensor:
        """Feature map (B, 224, H/16, W/16)."""
        return torch.as_tensor(self.blocks(self.stem(images)))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """The pool."""
        return features.mean(dim=(2, 3)) if self.global_pool == "avg" else features

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


@register_model
def drawn_token_cnn(pretrained: bool = False, **kwargs: Any) -> TokenCNN:
    """timm's entry point. The weights come with the whole open_clip model, so there are none to fetch here."""
    if pretrained:
        raise ValueError("drawn_token_cnn: there are no weights of the tower alone; use load_embedded()")
    return TokenCNN(**{key: value for key, value in kwargs.items() if key in ("in_chans", "global_pool")})
