"""Backbones: tokens and prompts of open_clip models, against float64 loops written from the equations."""

from __future__ import annotations

import copy
import importlib.abc
import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import ROOT
from tests.helpers.oracles.towers import linear, norm_oracle, resnet_oracle, vit_oracle
from tests.helpers.towers import RESNET, TEXT, TIMM, VIT, assert_near, images, shake, tiny
from trm_losses import PromptEmbeddings, PromptLearner
from trm_losses.backbones import ImageFeatures, OpenClipBackbone, TimmBackbone, load_open_clip

open_clip = pytest.importorskip("open_clip")

TEXTS = ["a photo of a dog.", "a cat", "two people on a sofa, indoors"]


@pytest.fixture(scope="module")
def rn50() -> OpenClipBackbone:
    torch.manual_seed(0)
    backbone = load_open_clip("RN50")
    shake(backbone)
    return backbone


@pytest.fixture(scope="module")
def vit_b_32() -> OpenClipBackbone:
    torch.manual_seed(0)
    backbone = load_open_clip("ViT-B-32")
    shake(backbone)
    return backbone


@pytest.fixture(scope="module")
def tiny_names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make "tiny-vit" and "tiny-resnet" known to open_clip; returns a folder to write in."""
    folder = tmp_path_factory.mktemp("configs")
    for name, vision in (("tiny-vit", VIT), ("tiny-resnet", RESNET)):
        config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}
        (folder / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(folder)
    return folder


def last_map(module: nn.Module, run: Any) -> Tensor:
    """What a module gave while ``run`` was called."""
    seen: list[Tensor] = []
    hook = module.register_forward_hook(lambda _module, _args, output: seen.append(output.detach()))
    run()
    hook.remove()
    return seen[0].double()


# CLIP ResNets


@pytest.mark.parametrize("size", [(224, 224), (448, 448), (224, 288)])
def test_rn50_tokens_and_pooled_follow_the_equations(rn50: OpenClipBackbone, size: tuple[int, int]) -> None:
    got: list[ImageFeatures] = []
    feature = last_map(rn50.model.visual.layer4, lambda: got.append(rn50(images(*size))))
    tokens, pooled = resnet_oracle(rn50.model.visual, feature[0], native=7)
    grid = (size[0] // 32, size[1] // 32)
    assert got[0].grid == grid and got[0].tokens.shape == (1, grid[0] * grid[1], 1024)
    assert_near(got[0].tokens[0], tokens)
    assert_near(got[0].pooled[0], pooled)


def test_rn50_pooled_is_encode_image_at_native_size(rn50: OpenClipBackbone) -> None:
    x = images(224, 224, batch=2)
    assert_near(rn50(x).pooled, rn50.model.encode_image(x))


def test_resnet_table_can_shrink() -> None:
    model: Any = tiny({**RESNET, "image_size": 128})
    backbone = OpenClipBackbone(model)
    got: list[ImageFeatures] = []
    feature = last_map(model.visual.layer4, lambda: got.append(backbone(images(64, 96))))
    assert_near(got[0].pooled[0], resnet_oracle(model.visual, feature[0], native=4)[1])


def test_other_sizes_leave_the_positional_tables_alone() -> None:
    for vision in (RESNET, VIT):
        model = tiny(vision)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        parameters = {k: id(v) for k, v in model.named_parameters()}
        OpenClipBackbone(model)(images(96, 128))
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert {k: id(v) for k, v in model.named_parameters()} == parameters


# ViTs


@pytest.mark.parametrize("size", [(224, 224), (288, 224)])
def test_vit_b_32_tokens_and_pooled_follow_the_equations(vit_b_32: OpenClipBackbone, size: tuple[int, int]) -> None:
    x = images(*size)
    got = vit_b_32(x)
    tokens, pooled = vit_oracle(vit_b_32.model.visual, x[0])
    assert got.grid == (size[0] // 32, size[1] // 32) and got.tokens.shape == (1, size[0] * size[1] // 1024, 512)
    assert_near(got.tokens[0], tokens)
    assert_near(got.pooled[0], pooled)


def test_vit_b_32_pooled_is_encode_image_at_native_size(vit_b_32: OpenClipBackbone) -> None:
    x = images(224, 224, batch=2)
    assert_near(vit_b_32(x).pooled, vit_b_32.model.encode_image(x))


@pytest.mark.parametrize("pool", ["tok", "avg"])
@pytest.mark.parametrize("norm_after_pool", [False, True])
def test_vit_pools(pool: str, norm_after_pool: bool) -> None:
    model: Any = tiny({**VIT, "pool_type": pool, "final_ln_after_pool": norm_after_pool})
    backbone = OpenClipBackbone(model)
    for size in ((32, 32), (48, 24), (16, 40)):  # native, one side longer and the other shorter, and the reverse
        x = images(*size, batch=2)
        got = backbone(x)
        for b in range(2):
            tokens, pooled = vit_oracle(model.visual, x[b])
            assert_near(got.tokens[b], tokens)
            assert_near(got.pooled[b], pooled)
    x = images(32, 32, batch=2)
    assert_near(backbone(x).pooled, model.encode_image(x))


def test_vit_made_for_images_that_are_not_square() -> None:
    model: Any = tiny({**VIT, "image_size": (24, 48)})
    backbone = OpenClipBackbone(model)
    assert backbone.image_size == (24, 48) and backbone.grid(backbone.image_size) == (3, 6)
    for size in ((24, 48), (48, 24), (32, 64)):
        x = images(*size)
        got = backbone(x)
        tokens, pooled = vit_oracle(model.visual, x[0])
        assert_near(got.tokens[0], tokens)
        assert_near(got.pooled[0], pooled)


def test_vit_tokens_are_the_model_s_own_token_output() -> None:
    model: Any = tiny({**VIT, "output_tokens": True})
    x = images(32, 32, batch=2)
    got = OpenClipBackbone(model)(x)
    pooled, tokens = model.visual(x)
    assert_near(got.pooled, pooled)
    assert_near(got.tokens, tokens @ model.visual.proj)


def test_vit_at_another_size_is_open_clip_s_model_of_that_size(tiny_names: Path) -> None:
    model = tiny(VIT)
    path = tiny_names / "vit.pt"
    torch.save(model.state_dict(), path)
    wanted = open_clip.create_model("tiny-vit", pretrained=str(path), force_image_size=(48, 24)).eval()
    got = load_open_clip("tiny-vit", path, image_size=(48, 24))
    assert got.image_size == (48, 24) and got.model.visual.image_size == (32, 32)
    x = images(48, 24)
    assert_near(got(x).pooled, wanted.encode_image(x).detach(), 1e-6)


@pytest.mark.parametrize("change", [{}, {"pool_type": "avg", "final_ln_after_pool": True}, {"ls_init_value": 0.5}, {"layers": 1}])
@pytest.mark.parametrize("size", [(32, 32), (48, 24)])
def test_value_path_of_the_last_block(change: dict[str, Any], size: tuple[int, int]) -> None:
    model: Any = tiny({**VIT, **change})
    x = images(*size, batch=2)
    plain, got = OpenClipBackbone(model)(x), OpenClipBackbone(model, value_path=True)(x)
    assert_near(got.pooled, plain.pooled)
    assert got.grid == plain.grid
    for b in range(2):
        assert_near(got.tokens[b], vit_oracle(model.visual, x[b], value_path=True)[0])
        assert_near(plain.tokens[b], vit_oracle(model.visual, x[b])[0])


def test_value_path_looks_at_its_own_place_only() -> None:
    """With one block, a patch that changes changes its own token and no other."""
    backbone = OpenClipBackbone(tiny({**VIT, "layers": 1}), value_path=True)
    x = images(32, 32)
    other = x.clone()
    other[..., 8:16, 16:24] += 1  # row 1, column 2 of four
    moved = (backbone(x).tokens != backbone(other).tokens).any(dim=2)[0]
    assert moved.nonzero().flatten().tolist() == [6]


@pytest.mark.parametrize("block", [{"qk_norm": True}, {"scale_heads": True, "scale_attn": True}])
def test_value_path_needs_no_queries_and_keys(block: dict[str, Any]) -> None:
    model: Any = tiny({**VIT, **block})
    backbone, x = OpenClipBackbone(model, value_path=True), images(32, 32)
    wanted = backbone(x).tokens
    last = model.visual.transformer.resblocks[-1].attn
    with torch.no_grad():
        last.in_proj_weight[: 2 * 32] += 1
    assert_near(backbone(x).tokens, wanted, 1e-6)
    assert not torch.allclose(OpenClipBackbone(model)(x).tokens, wanted, atol=1e-3)


def test_value_path_is_an_option_of_vits() -> None:
    with pytest.raises(ValueError, match="OpenClipBackbone: value_path is an option of ViTs; .* CLIP ResNet"):
        OpenClipBackbone(tiny(RESNET), value_path=True)
    with pytest.raises(ValueError, match="timm tower ResNet has no value path to take"):
        OpenClipBackbone(tiny(TIMM), value_path=True)


# timm towers


@pytest.mark.parametrize("projection", ["linear", "", "none"])
@pytest.mark.parametrize("bias", [False, True])
def test_timm_mean_of_tokens_is_pooled(projection: str, bias: bool) -> None:
    model: Any = tiny({**TIMM, "timm_proj": projection, "timm_proj_bias": bias}, custom=True)
    backbone = OpenClipBackbone(model)
    assert backbone.stride == 32 and backbone.image_size == (64, 64)
    assert backbone.dim == (model.visual.trunk.num_features if projection == "none" else 16)
    for size in ((64, 64), (96, 160)):
        x = images(*size, batch=2)
        got = backbone(x)
        assert got.tokens.shape == (2, size[0] * size[1] // 1024, backbone.dim)
        assert_near(got.tokens.mean(dim=1), got.pooled, 1e-5)
        assert_near(got.pooled, model.encode_image(x))


def test_timm_tokens_are_the_projection_per_position() -> None:
    model: Any = tiny({**TIMM, "timm_proj_bias": True})
    backbone = OpenClipBackbone(model)
    got = backbone(images(64, 96, batch=2))
    feature = model.visual.trunk.forward_features(images(64, 96, batch=2)).double()
    for b in range(2):
        cells = [feature[b, :, i, j] for i in range(2) for j in range(3)]
        assert_near(got.tokens[b], torch.stack([linear(cell, model.visual.head.proj) for cell in cells]))


def test_timm_norm_between_pool_and_projection_is_kept_per_token() -> None:
    model: Any = tiny({**TIMM, "timm_model_name": "test_convnext"})
    backbone = OpenClipBackbone(model)
    x = images(64, 96)
    got = backbone(x)
    feature = model.visual.trunk.forward_features(x).double()[0]
    weight = model.visual.head.proj.weight.double()
    norm = model.visual.trunk.head.norm
    cells = [norm_oracle(feature[:, i, j], norm) @ weight.T for i in range(2) for j in range(3)]
    assert_near(got.tokens[0], torch.stack(cells))
    assert_near(got.pooled[0], norm_oracle(feature.mean(dim=(1, 2)), norm) @ weight.T)
    assert_near(got.pooled, model.encode_image(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"timm_model_name": "test_vit", "timm_pool": "max"}, "pools by max"),
        ({"timm_pool": "max"}, "pools by max"),
        ({"timm_model_name": "resnet10t", "timm_pool": "rot_attn", "timm_proj": ""}, "pools by attention"),
    ],
)
def test_timm_towers_that_cannot_give_tokens(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"OpenClipBackbone: the timm tower \w+ {words}.* cannot give tokens"):
        OpenClipBackbone(tiny({**TIMM, **change}))


def test_timm_tower_without_padding_is_refused() -> None:
    model: Any = tiny(TIMM)
    model.visual.trunk.feature_info = [{"num_chs": 1, "reduction": 16, "module": "x"}]
    with pytest.raises(ValueError, match=r"a map of \(2, 2\) where its stride 16 asks for \(4, 4\)"):
        OpenClipBackbone(model)


def test_towers_of_open_clip_that_cannot_give_tokens() -> None:
    with pytest.raises(ValueError, match="attentional pool.* cannot give tokens"):
        OpenClipBackbone(tiny({**VIT, "attentional_pool": True, "attn_pooler_heads": 2}))
    with pytest.raises(ValueError, match="pools by 'none'"):
        OpenClipBackbone(tiny({**VIT, "pool_type": "none"}))
    model: Any = tiny(VIT)
    model.visual.patch_size = (8, 4)
    with pytest.raises(ValueError, match="patches must be square, got 8x4"):
        OpenClipBackbone(model)
    model.visual = nn.Identity()
    with pytest.raises(ValueError, match="visual tower Identity is not known"):
        OpenClipBackbone(model)


# Sizes and other input


def test_grid_and_sizes(rn50: OpenClipBackbone, vit_b_32: OpenClipBackbone) -> None:
    assert rn50.stride == vit_b_32.stride == 32
    assert rn50.grid(448) == (14, 14) and vit_b_32.grid((224, 320)) == (7, 10)
    assert rn50.image_size == vit_b_32.image_size == (224, 224)
    assert OpenClipBackbone(tiny(VIT), image_size=40).image_size == (40, 40)


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ((225, 224), "got 225x224; nearest valid: 224x224 or 256x224$"),
        ((224, 300), "got 224x300; nearest valid: 224x288 or 224x320$"),
        ((20, 40), "got 20x40; nearest valid: 32x32 or 32x64$"),
        ((0, 32), "got 0x32; nearest valid: 32x32$"),
    ],
)
def test_size_errors_name_size_stride_and_nearest(
    rn50: OpenClipBackbone, vit_b_32: OpenClipBackbone, size: tuple[int, int], nearest: str
) -> None:
    message = rf"OpenClipBackbone: image size must be a multiple of the stride 32 .*{nearest}"
    for backbone in (rn50, vit_b_32):
        with pytest.raises(ValueError, match=message):
            backbone.grid(size)
        with pytest.raises(ValueError, match=message):
            backbone(torch.zeros(1, 3, *size))


def test_image_errors() -> None:
    with pytest.raises(ValueError, match="multiple of the stride 8"):
        OpenClipBackbone(tiny(VIT), image_size=33)
    backbone = OpenClipBackbone(tiny(VIT))
    with pytest.raises(ValueError, match=r"images must have shape \(B, C, H, W\) = \(B, 3, H, W\), got \(1, 4, 32, 32\)"):
        backbone(torch.zeros(1, 4, 32, 32))
    with pytest.raises(TypeError, match="floating-point"):
        backbone(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


# Frozen for good


@pytest.mark.parametrize("vision", [RESNET, TIMM], ids=["resnet", "timm"])
def test_train_does_not_move_batch_norm(vision: dict[str, Any]) -> None:
    backbone = OpenClipBackbone(tiny(vision))
    x = images(64, 64, batch=4)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    wanted = backbone(x)
    for module in (backbone, nn.ModuleList([backbone, nn.Dropout()])):
        assert module.train() is module
        assert not any(part.training for part in backbone.modules())
        got = backbone(x)
        assert_near(got.tokens, wanted.tokens)
        assert_near(got.pooled, wanted.pooled)
    assert any(k.endswith("num_batches_tracked") for k in before)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_images_are_encoded_without_gradient(rn50: OpenClipBackbone) -> None:
    assert not any(p.requires_grad for p in rn50.parameters())
    got = rn50(images(64, 64).requires_grad_())
    assert not got.tokens.requires_grad and not got.pooled.requires_grad


def test_a_half_precision_model_becomes_float32() -> None:
    backbone = OpenClipBackbone(tiny(VIT).half())
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    assert backbone(images(32, 32)).tokens.dtype == torch.float32


@pytest.mark.skipif(
    "ATEN_CPU_CAPABILITY" in os.environ, reason="torch's attention in bfloat16 asks the processor for AVX512, not this setting"
)
@pytest.mark.parametrize("vision", [RESNET, VIT, TIMM], ids=["resnet", "vit", "timm"])
def test_autocast_is_near_float32(vision: dict[str, Any]) -> None:
    backbone = OpenClipBackbone(tiny(vision))
    wanted = backbone(images(96, 64))
    with torch.autocast("cpu", torch.bfloat16):
        got = backbone(images(96, 64))
    assert got.tokens.dtype == torch.bfloat16
    assert_near(got.tokens, wanted.tokens, 0.1)
    assert_near(got.pooled, wanted.pooled, 0.1)


def test_a_copy_stands_on_its_own() -> None:
    backbone = OpenClipBackbone(tiny(RESNET))
    other = copy.deepcopy(backbone)
    wanted = backbone(images(96, 64))
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.zero_()
    got = other(images(96, 64))
    assert_near(got.tokens, wanted.tokens)
    assert_near(got.pooled, wanted.pooled)
    assert not torch.equal(backbone(images(96, 64)).tokens, wanted.tokens)


def test_facts_about_the_model(rn50: OpenClipBackbone) -> None:
    assert rn50.dim == 1024 and rn50.context_length == 77
    assert rn50.image_mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert rn50.image_std == pytest.approx((0.26862954, 0.26130258, 0.27577711))
    assert rn50.logit_scale == pytest.approx(1 / 0.07, rel=1e-5)
    assert rn50.extra_repr() == "name='RN50', dim=1024, stride=32, image_size=(224, 224)"
    by_hand = OpenClipBackbone(tiny(VIT))  # no create_model, no preprocessing on the tower
    assert by_hand.image_mean == rn50.image_mean and by_hand.image_std == rn50.image_std


# Prompts


def test_prompts_of_whole_words_are_encode_text(rn50: OpenClipBackbone, vit_b_32: OpenClipBackbone) -> None:
    for backbone in (rn50, vit_b_32):
        ids = open_clip.get_tokenizer("RN50")(TEXTS)
        assert torch.equal(backbone.tokenize(TEXTS), ids)
        wanted = backbone.model.encode_text(ids)
        prompts = backbone.embed_prompts(TEXTS)
        assert prompts.embeddings.shape == (3, 77, backbone.model.token_embedding.embedding_dim)
        assert prompts.eot.tolist() == [7, 3, 8]
        for got in (backbone.encode_prompts(prompts), backbone.encode_prompts(backbone.embed_prompts(ids))):
            assert_near(got, wanted)
        assert_near(backbone.encode_text(TEXTS), wanted)
        assert_near(backbone.encode_text(ids), wanted)
        assert not torch.equal(wanted[0], wanted[1])


@pytest.mark.parametrize("custom", [False, True], ids=["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize(
    "text",
    [
        {},
        {"pool_type": "eos", "eos_id": 49407},
        {"pool_type": "last"},
        {"proj_bias": True},
        {"proj_type": "none"},
        {"no_causal_mask": True},
        {"ls_init_value": 0.5},
        {"qk_norm": True},
    ],
    ids=lambda text: next(iter(text), "plain"),
)
def test_prompts_are_encode_text_in_every_supported_tower(custom: bool, text: dict[str, Any]) -> None:
    backbone = OpenClipBackbone(tiny(VIT, custom=custom, text=text))
    wanted = backbone.model.encode_text(backbone.tokenize(TEXTS))
    prompts = backbone.embed_prompts(TEXTS)
    assert_near(backbone.encode_prompts(prompts), wanted)
    assert len({tuple(row) for row in wanted.tolist()}) == len(TEXTS)
    trained = PromptEmbeddings(prompts.embeddings.requires_grad_(), prompts.eot)
    assert_near(backbone.encode_prompts(trained), wanted, 1e-5)  # torch may choose another kernel with gradients


def test_prompts_cut_after_their_end_give_the_same_features(rn50: OpenClipBackbone) -> None:
    backbones = [rn50, OpenClipBackbone(tiny(VIT, custom=True))]
    for backbone in backbones:
        embeddings, eot, _ = backbone.embed_prompts(TEXTS)
        cut = PromptEmbeddings(embeddings[:, : int(eot.max()) + 1], eot)
        assert cut.embeddings.shape[1] < backbone.context_length
        assert_near(backbone.encode_prompts(cut), backbone.encode_text(TEXTS), 1e-5)


def test_learned_contexts_that_spell_words_give_the_features_of_these_words(rn50: OpenClipBackbone) -> None:
    for backbone in (rn50, OpenClipBackbone(tiny(VIT, custom=True))):
        words = backbone.embed_prompts(["a photo of a"]).embeddings[0, 1:5]
        names = backbone.embed_prompts(["dog.", "potted plant."])
        wanted = backbone.encode_text(["a photo of a dog.", "a photo of a potted plant."])
        for mode in ("shared", "csc"):
            length = backbone.context_length
            learner = PromptLearner(mode, names=names, num_context=4, context_init=words, context_length=length)
            assert_near(backbone.encode_prompts(learner()), wanted, 1e-5)


def test_gradient_reaches_embeddings_and_nothing_frozen(rn50: OpenClipBackbone) -> None:
    embeddings, eot, _ = rn50.embed_prompts(TEXTS)
    assert not embeddings.requires_grad
    embeddings.requires_grad_()
    rn50.encode_prompts(PromptEmbeddings(embeddings, eot)).square().sum().backward()
    assert embeddings.grad is not None
    size = embeddings.grad.abs().amax(dim=2)
    for c, end in enumerate(eot.tolist()):
        assert (size[c, : end + 1] > 0).all()
        assert (size[c, end + 1 :] == 0).all()  # the tower is causal
    assert all(p.grad is None for p in rn50.parameters())


def test_gradient_is_right() -> None:
    backbone = OpenClipBackbone(tiny(VIT, custom=True)).double()
    embeddings, eot, _ = backbone.embed_prompts(["a cat", "dog"])
    cut = embeddings[:, : int(eot.max()) + 1].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: backbone.encode_prompts(PromptEmbeddings(x, eot)), (cut,))


def test_finished_text_passes_through(rn50: OpenClipBackbone) -> None:
    text = torch.randn(3, 1024)
    assert rn50.encode_prompts(text) is text


def test_prompt_errors() -> None:
    backbone = OpenClipBackbone(tiny(VIT))
    embeddings, eot, _ = backbone.embed_prompts(TEXTS)
    with pytest.raises(ValueError, match=r"embeddings must have shape \(C, L, Dw\) = \(C, L, 32\), got \(3, 12, 31\)"):
        backbone.encode_prompts(PromptEmbeddings(embeddings[..., :31], eot))
    with pytest.raises(ValueError, match=r"eot must have shape \(C\) = \(3\), got \(2,\)"):
        backbone.encode_prompts(PromptEmbeddings(embeddings, eot[:2]))
    with pytest.raises(ValueError, match="prompts must be at most 12 tokens long, got 24"):
        backbone.encode_prompts(PromptEmbeddings(embeddings.repeat(1, 2, 1), eot))
    both_ways = OpenClipBackbone(tiny(VIT, text={"no_causal_mask": True}))
    with pytest.raises(ValueError, match="not causal exactly 12 tokens long, got 11"):
        both_ways.encode_prompts(PromptEmbeddings(embeddings[:, :11], eot))


@pytest.mark.parametrize(
    ("text", "words"), [({"pool_type": "first"}, "pool type 'first'"), ({"embed_cls": True}, "an added class token")]
)
def test_text_towers_that_take_no_prompts_still_encode_text(text: dict[str, Any], words: str) -> None:
    backbone = OpenClipBackbone(tiny(VIT, custom=True, text=text))
    assert backbone.encode_text(TEXTS).shape == (3, 16)
    with pytest.raises(ValueError, match=f"prompts cannot pass through a text tower with {words}"):
        backbone.embed_prompts(TEXTS)


def test_foreign_and_padding_aware_text_towers_take_no_prompts() -> None:
    backbone = OpenClipBackbone(tiny(VIT, custom=True, text={"no_causal_mask": True}))
    backbone.model.text.use_pad_mask = True
    with pytest.raises(ValueError, match="a mask of the padding's token ids"):
        backbone.embed_prompts(TEXTS)
    backbone.model.text = nn.Identity()
    with pytest.raises(ValueError, match="text tower Identity, which is not open_clip's own"):
        backbone.embed_prompts(TEXTS)


def test_template_text(rn50: OpenClipBackbone) -> None:
    names, templates = ["dog", "potted plant"], ["a photo of a {}.", "{}", "a sketch of a {}, {}"]
    got = rn50.template_text(names, templates)
    for c, name in enumerate(names):
        mean = torch.zeros(1024, dtype=torch.float64)
        for template in templates:
            feature = rn50.model.encode_text(rn50.tokenize([template.replace("{}", name)]))[0].double()
            mean += feature / feature.square().sum().sqrt() / len(templates)
        assert_near(got[c], mean / mean.square().sum().sqrt(), 1e-5)
    for bad in ([], ["a photo"]):
        with pytest.raises(ValueError, match="templates must be"):
            rn50.template_text(names, bad)


def test_a_text_that_would_be_cut_is_refused() -> None:
    """Ten words and the two marks fill the tower's 12 tokens; a tokenizer that cannot be asked is trusted."""
    backbone = OpenClipBackbone(tiny(VIT))
    fits, cut = "dog " * 10, "dog " * 10 + "cat"
    assert backbone.encode_text([fits]).shape == (1, 16)
    calls = (backbone.encode_text, backbone.embed_prompts, lambda texts: backbone.template_text(texts, ["{}"]))
    for call in calls:
        with pytest.raises(ValueError, match="OpenClipBackbone: text 1 takes 13 tokens, that is over the tower's 12; use a "):
            call([fits, cut, cut])
    own = backbone.tokenizer
    backbone.tokenizer = lambda texts: own(texts)
    assert torch.equal(backbone.encode_text([cut]), backbone.encode_text([fits]))


def test_classes_of_the_same_text_are_named() -> None:
    """CLIP reads no capitals."""
    backbone = OpenClipBackbone(tiny(VIT))
    wanted = r"^OpenClipBackbone: classes .* got the same for 0 \('dog'\) and 2 \('Dog'\); "
    with pytest.warns(UserWarning, match=wanted):
        backbone.template_text(["dog", "cat", "Dog"], ["{}", "a {}."])
    with pytest.warns(UserWarning, match=wanted):
        backbone.embed_prompts(["dog", "cat", "Dog"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone.template_text(["dog", "cat"], ["{}", "a {}."])


def test_tokenizer() -> None:
    small = tiny(VIT, text={"vocab_size": 50})
    without = OpenClipBackbone(small)
    for call in (without.tokenize, without.encode_text, without.embed_prompts):
        with pytest.raises(ValueError, match=r"tokenizer must be given for a vocabulary of 50; .* has 49408; or give .* ids"):
            call(TEXTS)
    with pytest.raises(ValueError, match=r"OpenClipBackbone: ids must have shape \(C, L\)"):
        without.encode_text(torch.zeros(12, dtype=torch.long))
    own = OpenClipBackbone(small, tokenizer=lambda texts: torch.tensor([[1, len(t) % 40, 49] + [0] * 9 for t in texts]))
    assert_near(own.encode_prompts(own.embed_prompts(TEXTS)), own.encode_text(TEXTS))


# Loading


def test_load_weights_files(tiny_names: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = tiny(RESNET)
    state = model.state_dict()
    torch.save(state, tiny_names / "resnet.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tiny_names / "trained.pt")
    safetensors.save_file(state, tiny_names / "resnet.safetensors")
    for name in ("resnet.pt", "trained.pt", "resnet.safetensors"):
        backbone = load_open_clip("tiny-resnet", str(tiny_names / name), image_size=96)
        assert backbone.name == "tiny-resnet" and backbone.image_size == (96, 96) and backbone.context_length == 12
        loaded = backbone.model.state_dict()
        assert loaded.keys() == state.keys() and all(torch.equal(loaded[k], state[k]) for k in state)
        assert_near(backbone(images(64, 64)).pooled, OpenClipBackbone(model)(images(64, 64)).pooled)


@pytest.mark.filterwarnings("ignore")  # TorchScript announces its end; the files that are out there remain
def test_load_torchscript_archive(tiny_names: Path) -> None:
    model = tiny(VIT).half().eval()
    path = tiny_names / "archive.pt"
    torch.jit.save(torch.jit.script(model), path)
    backbone = load_open_clip("tiny-vit", path)
    assert all(torch.equal(v, model.state_dict()[k].float()) for k, v in backbone.model.state_dict().items())
    with pytest.raises(ValueError, match=r"archive\.pt are not those of tiny-resnet: .*missing"):
        load_open_clip("tiny-resnet", path)


def test_load_with_the_value_path(tiny_names: Path) -> None:
    torch.save(tiny(VIT).state_dict(), tiny_names / "value.pt")
    got = load_open_clip("tiny-vit", tiny_names / "value.pt", value_path=True)(images(32, 32))
    assert_near(got.tokens, OpenClipBackbone(tiny(VIT), value_path=True)(images(32, 32)).tokens)


def test_load_folder(tiny_names: Path) -> None:
    folder = tiny_names / "folder"
    folder.mkdir()
    model = tiny(VIT)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT}, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="pretrained must be None, got 'openai'; 'local-dir:.*' brings its own weights"):
        load_open_clip(f"local-dir:{folder}", "openai")
    backbone = load_open_clip(f"local-dir:{folder}")
    assert torch.equal(backbone.model.visual.proj, model.state_dict()["visual.proj"])
    assert backbone.image_mean == (0.1, 0.2, 0.3) and backbone.tokenize(["a"]).shape == (1, 12)


@pytest.mark.parametrize("quick", [False, True])
def test_a_tag_brings_its_activation(tiny_names: Path, monkeypatch: pytest.MonkeyPatch, quick: bool) -> None:
    torch.save(tiny(VIT).state_dict(), tiny_names / "tag.pt")
    tag = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "quick_gelu": quick}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-vit", {"tag": tag})
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(tiny_names / "tag.pt"))
    backbone = load_open_clip("tiny-vit", "tag")
    for tower in (backbone.model.transformer, backbone.model.visual.transformer):
        assert isinstance(tower.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU if quick else nn.GELU)
    assert backbone.image_mean == (0.5,) * 3 and backbone.image_std == (0.25,) * 3


def test_tags_of_openai_are_known_to_need_quickgelu() -> None:
    assert open_clip.get_pretrained_cfg("RN101", "openai")["quick_gelu"]
    assert not open_clip.get_model_config("RN101").get("quick_gelu", False)  # open_clip would load it with a warning


def test_a_file_of_another_model_is_refused(tiny_names: Path) -> None:
    other = tiny_names / "other.pt"
    torch.save(tiny({**VIT, "width": 48}).state_dict(), other)
    with pytest.raises(ValueError) as caught:
        load_open_clip("tiny-vit", other)
    message = str(caught.value)
    assert str(other) in message and "not those of tiny-vit" in message
    assert "first visual.class_embedding: (48,) in the file, (32,) in the model" in message

    torch.save(tiny(RESNET).state_dict(), other)
    with pytest.raises(ValueError, match=r"not those of tiny-vit: .* missing \(first visual\.\w+.*unknown \(first visual\."):
        load_open_clip("tiny-vit", other)

    torch.save(tiny(VIT, text={"width": 64}).state_dict(), other)
    with pytest.raises(ValueError, match=r"positional_embedding: \(12, 64\) in the file, \(12, 32\) in the model"):
        load_open_clip("tiny-vit", other)


def test_what_is_no_weights_file_is_refused(tiny_names: Path) -> None:
    for name, content in (("a.txt", b"hello"), ("b.safetensors", b"hello"), ("c.pt", b"")):
        (tiny_names / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"load_open_clip: .*{name} cannot be read as weights .* of tiny-vit"):
            load_open_clip("tiny-vit", str(tiny_names / name))
    buffer = io.BytesIO()
    torch.save([1, 2], buffer)
    (tiny_names / "d.pt").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match=r"d\.pt cannot be read as weights"):
        load_open_clip("tiny-vit", str(tiny_names / "d.pt"))


def test_names_that_are_not_there(tiny_names: Path) -> None:
    with pytest.raises(ValueError, match=r"model must be one of open_clip's, got 'RN5O'; near it: .*RN50"):
        load_open_clip("RN5O")
    with pytest.raises(ValueError, match=r"got '~'; near it: open_clip.list_models\(\) names all"):
        load_open_clip("~")
    with pytest.raises(ValueError, match=r"existing weights file or a tag of ViT-B-32 \(openai, .*got 'nowhere.pt'"):
        load_open_clip("ViT-B/32", "nowhere.pt")
    with pytest.raises(ValueError, match=r"tag of tiny-vit \(none\), got ''"):
        load_open_clip("tiny-vit", "")


# Imports


class BrokenTorchvision(importlib.abc.MetaPathFinder):
    """open_clip and timm as they are beside a torchvision that was built for another torch."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname in ("open_clip", "timm"):
            raise RuntimeError("operator torchvision::nms does not exist")


@pytest.mark.parametrize("broken", [False, True], ids=["missing", "broken"])
def test_import_error_says_why_and_what_to_install(monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    model = tiny(VIT)
    for name in ("open_clip", "timm"):
        if broken:
            monkeypatch.delitem(sys.modules, name)
        else:
            monkeypatch.setitem(sys.modules, name, None)
    if broken:
        monkeypatch.setattr(sys, "meta_path", [BrokenTorchvision(), *sys.meta_path])
    for call, name in (
        (lambda: load_open_clip("RN50"), "open_clip"),
        (lambda: OpenClipBackbone(model), "open_clip"),
        (lambda: TimmBackbone("test_vit"), "timm"),
    ):
        with pytest.raises(ImportError, match=f"trm_losses.backbones needs {name}, whose import failed") as caught:
            call()
        message = str(caught.value)
        assert 'pip install "trm-losses[backbones]"' in message
        assert f"torchvision that matches the installed torch {torch.__version__}" in message
        assert ("RuntimeError: operator torchvision::nms does not exist" in message) == broken
        assert ("ModuleNotFoundError" in message) != broken


def test_the_package_imports_without_open_clip() -> None:
    code = (
        "import sys\n"
        "for name in ('open_clip', 'timm', 'torchvision'): sys.modules[name] = None\n"
        "import trm_losses.backbones as b\n"
        "print(*b.__all__)"
    )
    root = ROOT
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.split() == ["ImageFeatures", "OpenClipBackbone", "TimmBackbone", "load_open_clip"]
