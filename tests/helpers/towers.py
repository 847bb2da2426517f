"""Tiny models of open_clip with random weights, and images for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")

TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VIT = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 4, "head_width": 32}
SIGLIP_TEXT = {
    **TEXT,
    "vocab_size": 100,
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
}
SIGLIP_VISION = {"timm_model_name": "tiny_siglip", "timm_pool": "map", "timm_proj": "none", "image_size": 32}
TIMM = {"image_size": 64, "timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"}


# Models: random weights, and no part of them that an error could hide behind (zero branches, fresh batch norm)


def shake(model: nn.Module, seed: int = 0) -> None:
    """Give norms random scales, shifts and statistics; open_clip starts a ResNet's last ones at zero."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            with torch.no_grad():
                module.weight.copy_(0.5 + 0.5 * torch.rand(module.weight.shape, generator=generator))
                module.bias.copy_(0.2 * torch.randn(module.bias.shape, generator=generator))
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.1 * torch.randn(module.running_mean.shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))


def stir(model: nn.Module) -> Any:
    """Move every parameter, so that no bias, scale or table is left out unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator) * (1 if parameter.dim() < 2 else 0.3))
    return model.eval()


def tiny(vision: dict[str, Any], *, custom: bool = False, text: dict[str, Any] | None = None) -> nn.Module:
    torch.manual_seed(0)
    build = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    model: nn.Module = build(16, vision, {**TEXT, **(text or {})})
    shake(model)
    return model


@timm.models.register_model
def tiny_siglip(pretrained: bool = False, **options: Any) -> Any:
    """What ViT-B-16-SigLIP is, small: no class token, a pool with a learned query."""
    options.pop("pretrained_cfg", None), options.pop("pretrained_cfg_overlay", None), options.pop("cache_dir", None)
    base = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": False}
    return timm.models.VisionTransformer(**{**base, **options})


def siglip() -> Any:
    torch.manual_seed(0)
    return stir(open_clip.CustomTextCLIP(32, SIGLIP_VISION, SIGLIP_TEXT, init_logit_scale=2.0, init_logit_bias=-10.0))


def images(*size: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def assert_near(got: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    """Largest difference below a share of the largest value; shapes must be equal."""
    assert got.shape == wanted.shape
    got, wanted = got.detach().double(), wanted.detach().double()
    assert float((got - wanted).abs().max()) < tolerance * float(wanted.abs().max())
