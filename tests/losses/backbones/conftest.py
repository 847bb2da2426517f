"""Backbones with random weights that several tests read, built once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from tests.helpers.towers import RESNET, SIGLIP_TEXT, SIGLIP_VISION, TEXT, VIT, shake
from trm_losses.backbones import OpenClipBackbone, load_open_clip

FAMILIES: dict[str, dict[str, Any]] = {
    "tiny-resnet": {"embed_dim": 16, "vision_cfg": RESNET, "text_cfg": TEXT},
    "tiny-vit": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT},
    "tiny-custom": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": {**TEXT, "proj_bias": True}, "custom_text": True},
    "tiny-sig": {
        "embed_dim": 32,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": SIGLIP_VISION,
        "text_cfg": SIGLIP_TEXT,
    },
}


@pytest.fixture(scope="session")
def rn50() -> OpenClipBackbone:
    torch.manual_seed(0)
    backbone = load_open_clip("RN50")
    shake(backbone)
    return backbone


@pytest.fixture(scope="session")
def tiny_names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a small model of each family known to open_clip; returns a folder to write in."""
    folder = tmp_path_factory.mktemp("configs")
    for name, config in FAMILIES.items():
        (folder / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(folder)
    return folder
