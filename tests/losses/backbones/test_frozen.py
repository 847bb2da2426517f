"""Every tower is frozen for good: in any mode, after a copy, and in half precision."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.helpers.hf_towers import tiny_hf
from tests.helpers.tower_table import TOWERS
from tests.helpers.towers import VIT, assert_near, images, siglip, tiny
from trm_losses.backbones import HFBackbone, OpenClipBackbone, TimmBackbone

ALL = {**TOWERS, "open_clip: SigLIP with `value_path`": lambda: OpenClipBackbone(siglip(), value_path=True)}


def other_size(backbone: Any) -> Tensor:
    """Images that are not square, for which tables of positions are resized."""
    height, width = backbone.image_size
    return images(height + backbone.stride, width + 2 * backbone.stride, batch=2)


@pytest.mark.parametrize("name", ALL)
def test_frozen_in_every_sense(name: str) -> None:
    backbone = ALL[name]()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    x = other_size(backbone).requires_grad_()
    wanted = backbone(x)
    assert not any(part.requires_grad for part in wanted if isinstance(part, Tensor))
    assert not any(p.requires_grad for p in backbone.parameters())
    for module in (backbone, nn.ModuleList([backbone, nn.Dropout()])):
        assert module.train() is module
        assert not any(part.training for part in backbone.modules())
        assert_near(backbone(x).tokens, wanted.tokens)
        assert_near(backbone(x).pooled, wanted.pooled)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())  # of batch norm, too
    other = copy.deepcopy(backbone)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.zero_()
    assert_near(other(x).tokens, wanted.tokens)
    assert_near(other(x).pooled, wanted.pooled)
    assert not torch.equal(backbone(x).tokens, wanted.tokens)


@pytest.mark.skipif(
    "ATEN_CPU_CAPABILITY" in os.environ, reason="torch's attention in bfloat16 asks the processor for AVX512, not this setting"
)
@pytest.mark.parametrize("name", ALL)
def test_half_precision_is_near_float32(name: str) -> None:
    backbone = ALL[name]()
    x = other_size(backbone)
    wanted = backbone(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = [backbone(x)]
    if isinstance(backbone, OpenClipBackbone):
        assert found[0].tokens.dtype == torch.bfloat16  # others may end with a norm, which autocast leaves in float32
    if isinstance(backbone, HFBackbone):
        found.append(copy.deepcopy(backbone).to(torch.bfloat16)(x.bfloat16()))
        assert found[1].tokens.dtype == torch.bfloat16
    for got in found:
        assert_near(got.tokens, wanted.tokens, 0.1)
        assert_near(got.pooled, wanted.pooled, 0.1)


HALF: dict[str, Callable[[], Any]] = {
    "open_clip": lambda: OpenClipBackbone(tiny(VIT).half()),
    "timm": lambda: TimmBackbone(timm.create_model("test_vit").half(), torch.eye(64).half()),
    "Hugging Face": lambda: HFBackbone(tiny_hf("clip").half().train()),
}


@pytest.mark.parametrize("name", HALF)
def test_weights_in_half_precision_become_float32(name: str) -> None:
    backbone = HALF[name]()
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    assert backbone(images(*backbone.image_size)).tokens.dtype == torch.float32
