"""The table of towers in docs/backbones.md: every cell is run, those of the last column with the export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.hf_towers import END, PAD, START
from tests.helpers.tower_table import COLUMNS, TABLE, TOWERS, skip_if_torch_cannot_trace
from tests.helpers.towers import assert_near, images
from trm_losses import PromptLearner
from trm_losses.backbones import HFBackbone, ImageFeatures


def test_the_table_names_every_tower() -> None:
    assert list(TABLE) == list(TOWERS) and {len(cells) for cells in TABLE.values()} == {len(COLUMNS)}


def native(backbone: Any, batch: int = 2) -> Tensor:
    return images(*backbone.image_size, batch=batch)


@pytest.mark.parametrize("name", TOWERS)
def test_tokens(name: str) -> None:
    """One for each place, as wide as the joint space, whatever else is in the batch."""
    assert TABLE[name][0] == "yes"
    backbone = TOWERS[name]()
    x = native(backbone)
    got = backbone(x)
    height, width = backbone.grid(backbone.image_size)
    assert got.tokens.shape == (2, height * width, backbone.dim) and got.grid == (height, width)
    assert got.tokens[0].isfinite().all() and not torch.allclose(got.tokens[0], got.tokens[1])
    assert_near(backbone(x[1:]).tokens, got.tokens[1:], 1e-4)


@pytest.mark.parametrize("name", TOWERS)
def test_pooled(name: str) -> None:
    """In the space of the tokens; "mean of tokens" where it says so, and not where it does not."""
    backbone = TOWERS[name]()
    got = backbone(native(backbone))
    assert got.pooled.shape == (2, backbone.dim)
    is_mean = torch.allclose(got.pooled, got.tokens.mean(dim=1), rtol=1e-4, atol=1e-5)
    assert TABLE[name][1] == ("mean of tokens" if is_mean else "own")


def shown_penultimate(backbone: Any, got: ImageFeatures) -> str:
    """What the penultimate feature is, in the words of the table."""
    penultimate = got.penultimate
    assert penultimate is not None and penultimate.shape[0] == len(got.pooled)
    if isinstance(backbone, HFBackbone):
        tower = backbone._visual
        if hasattr(tower, "projection"):
            assert_near(tower.projection(penultimate), got.pooled, 1e-4)
            return "before projection"
        kept: list[Tensor] = []
        hook = backbone.model.vision_model.post_layernorm.register_forward_hook(lambda _, x, out: kept.append(out))
        backbone(native(backbone))
        hook.remove()
        assert_near(kept[0].mean(dim=1), penultimate)
        return "mean of patches"
    if hasattr(backbone, "projection"):
        assert_near(backbone.projection(penultimate), got.pooled, 1e-4)
        return "before projection"
    visual = backbone.model.visual
    if hasattr(visual, "proj") and isinstance(visual.proj, Tensor):
        assert_near(penultimate @ visual.proj, got.pooled, 1e-4)
        return "before projection"
    if hasattr(visual, "attnpool"):
        feature = visual.stem(native(backbone))
        for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            feature = stage(feature)
        assert_near(feature.mean(dim=(2, 3)), penultimate)
        return "mean of patches"
    if getattr(visual.trunk, "attn_pool", None) is not None:
        assert_near(visual.trunk.forward_features(native(backbone)).mean(dim=1), penultimate)
        return "mean of patches"
    assert_near(visual.head(visual.trunk.get_classifier()(penultimate)), got.pooled, 1e-4)
    return "before projection"


@pytest.mark.parametrize("name", TOWERS)
def test_penultimate(name: str) -> None:
    backbone = TOWERS[name]()
    assert TABLE[name][2] == shown_penultimate(backbone, backbone(native(backbone)))


FIRST_BLOCKS = (
    "transformer.resblocks.0.mlp",
    "text.transformer.resblocks.0.mlp",
    "text_model.encoder.layers.0.mlp",
    "text_model.roberta.encoder.layers.0.intermediate",
    "text_model.roberta.encoder.layer.0.intermediate",  # before transformers 5
)


@pytest.mark.parametrize("mode", ["shared", "csc"])
@pytest.mark.parametrize("name", TOWERS)
def test_prompts(name: str, mode: Any) -> None:
    """Contexts that spell words give the text of these words; the gradient is theirs alone.

    "Shared once" if fewer tokens pass than the rows of prompts have.
    """
    backbone = TOWERS[name]()
    if not getattr(backbone, "has_text", hasattr(backbone, "embed_prompts")):
        assert TABLE[name][3] == "class texts are given"
        return
    end = END if isinstance(backbone, HFBackbone) and "CLIPModel" not in name.split("`") else 99
    rows = [[START, 14, end], [START, 18, 16, end], [START, 15, 14, 11, end]]
    names, words = (torch.tensor([row + [PAD] * (12 - len(row)) for row in part]) for part in (rows, [[20, 21, 22]]))
    context = backbone.embed_prompts(words).embeddings[0, :3]
    learner = PromptLearner(mode, names=backbone.embed_prompts(names), num_context=3, context_length=12)
    with torch.no_grad():
        learner.context.copy_(context)
    wanted = backbone.encode_text(torch.cat([names[:, :1], words[:, :3].expand(3, -1), names[:, 1:]], dim=1)[:, :12])
    seen: list[int] = []
    parts = dict(backbone.model.named_modules())
    first = next(part for part in FIRST_BLOCKS if part in parts)
    parts[first].register_forward_pre_hook(lambda _, x: seen.append(x[0].numel() // x[0].shape[-1]))
    prompts = learner()
    got = backbone.encode_prompts(prompts)
    once = seen[0] < prompts.embeddings.shape[:2].numel()  # type: ignore[union-attr]
    assert TABLE[name][3] == ("shared once" if once else "whole tower")
    assert_near(got, wanted, 1e-5)
    assert_near(backbone.encode_prompts(learner(torch.tensor([2, 0]))), wanted[[2, 0]], 1e-5)
    got.square().sum().backward()
    assert learner.context.grad is not None and (learner.context.grad.abs().amax(dim=-1) > 0).all()
    assert all(parameter.grad is None for parameter in backbone.parameters())


@pytest.mark.parametrize("name", TOWERS)
def test_compiled(name: str) -> None:
    skip_if_torch_cannot_trace(name)
    torch.compiler.reset()
    backbone = TOWERS[name]()
    x = native(backbone)
    run = torch.compile(backbone, fullgraph=True, backend="eager", dynamic=False)
    for got, wanted in zip(run(x), backbone(x), strict=True):
        assert got == wanted if isinstance(got, tuple) else assert_near(got, wanted, 1e-5) is None
    assert TABLE[name][4] == "whole"
