"""The towers of the table in docs/backbones.md, tiny and with random weights, and what it says of them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch

from tests.helpers import ROOT
from tests.helpers.hf_towers import tiny_hf
from tests.helpers.towers import RESNET, TIMM, VIT, shake, siglip, tiny
from trm_losses.backbones import HFBackbone, OpenClipBackbone, TimmBackbone

COLUMNS = ("tokens", "pooled", "penultimate", "prompts", "compiled", "exported")


def timm_model(name: str) -> TimmBackbone:
    torch.manual_seed(0)
    model = timm.create_model(name)
    shake(model)
    return TimmBackbone(model)


SMALL: dict[str, Any] = {"vocab_size": 100}
TOWERS: dict[str, Callable[[], Any]] = {
    "open_clip: CLIP ResNets": lambda: OpenClipBackbone(tiny(RESNET, text=SMALL)),
    "open_clip: CLIP ViTs": lambda: OpenClipBackbone(tiny(VIT, text=SMALL)),
    "open_clip: ViTs with `value_path`": lambda: OpenClipBackbone(tiny(VIT, text=SMALL), value_path=True),
    "open_clip: timm towers that average": lambda: OpenClipBackbone(tiny(TIMM, custom=True, text=SMALL)),
    "open_clip: SigLIP": lambda: OpenClipBackbone(siglip()),
    "timm: ViTs": partial(timm_model, "test_vit"),
    "timm: convolutional": partial(timm_model, "test_resnet"),
    "Hugging Face: `CLIPModel`": lambda: HFBackbone(tiny_hf("clip")),
    "Hugging Face: `MetaClip2Model`": lambda: HFBackbone(tiny_hf("metaclip_2")),
    "Hugging Face: `AltCLIPModel`": lambda: HFBackbone(tiny_hf("altclip")),
    "Hugging Face: `SiglipModel`": lambda: HFBackbone(tiny_hf("siglip")),
    "Hugging Face: `Siglip2Model`": lambda: HFBackbone(tiny_hf("siglip2")),
    "Hugging Face: `Dinov2Model`": lambda: HFBackbone(tiny_hf("dinov2")),
    "Hugging Face: `Dinov2WithRegistersModel`": lambda: HFBackbone(tiny_hf("dinov2_with_registers")),
    "Hugging Face: `DINOv3ViTModel`": lambda: HFBackbone(tiny_hf("dinov3_vit")),
}


def skip_if_torch_cannot_trace(name: str) -> None:
    """transformers 4 and 5.0 read the grid of SigLIP 2 out of a tensor, and do not say that it is positive."""
    if "Siglip2" in name and "torch_compilable_check" not in inspect.getsource(sys.modules[tiny_hf("siglip2").__module__]):
        pytest.skip("this transformers cannot be traced on Siglip2Model")


def table() -> dict[str, tuple[str, ...]]:
    lines = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8").splitlines()
    start = lines.index(f"| tower | {' | '.join(COLUMNS)} |") + 2
    rows = [line.strip("| ").split(" | ") for line in lines[start:]]
    found: dict[str, tuple[str, ...]] = {}
    for line, (name, *cells) in zip(lines[start:], rows, strict=True):
        if not line.startswith("|"):
            break
        found[name] = tuple(cell.strip() for cell in cells)
    return found


TABLE = table()
