"""Backbones with random weights that several tests read, built once."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch

from tests.helpers.towers import RESNET, TEXT, VIT, shake
from trm_losses.backbones import OpenClipBackbone, load_open_clip


@pytest.fixture(scope="session")
def rn50() -> OpenClipBackbone:
    torch.manual_seed(0)
    backbone = load_open_clip("RN50")
    shake(backbone)
    return backbone


@pytest.fixture(scope="session")
def vit_b_32() -> OpenClipBackbone:
    torch.manual_seed(0)
    backbone = load_open_clip("ViT-B-32")
    shake(backbone)
    return backbone


@pytest.fixture(scope="session")
def tiny_names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make "tiny-vit" and "tiny-resnet" known to open_clip; returns a folder to write in."""
    folder = tmp_path_factory.mktemp("configs")
    for name, vision in (("tiny-vit", VIT), ("tiny-resnet", RESNET)):
        config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}
        (folder / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(folder)
    return folder
