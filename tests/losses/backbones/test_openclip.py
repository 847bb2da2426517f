"""Backbones: tokens and prompts of open_clip models, against float64 loops written from the equations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from tests.helpers.oracles.towers import norm_oracle, resnet_oracle, vit_oracle
from tests.helpers.towers import RESNET, TEXT, TIMM, VIT, assert_near, images, tiny
from trm_losses.backbones import ImageFeatures, OpenClipBackbone, load_open_clip


def last_map(module: nn.Module, run: Any) -> Tensor:
    """What a module gave while ``run`` was called."""
    seen: list[Tensor] = []
    hook = module.register_forward_hook(lambda _module, _args, output: seen.append(output.detach()))
    run()
    hook.remove()
    return seen[0].double()


# CLIP ResNets


@pytest.mark.parametrize("size", [(128, 128), (192, 160), (64, 96)])  # the native one, a larger and a smaller table
def test_resnet_follows_the_equations(size: tuple[int, int]) -> None:
    model: Any = tiny({**RESNET, "image_size": 128})
    backbone, x = OpenClipBackbone(model), images(*size)
    got: list[ImageFeatures] = []
    feature = last_map(model.visual.layer4, lambda: got.append(backbone(x)))
    tokens, pooled, penultimate = resnet_oracle(model.visual, feature[0], native=4)
    assert got[0].grid == (size[0] // 32, size[1] // 32)
    assert_near(got[0].tokens[0], tokens)
    assert_near(got[0].pooled[0], pooled)
    assert_near(got[0].penultimate[0], penultimate)  # type: ignore[index]
    if size == backbone.image_size:
        assert_near(got[0].pooled, model.encode_image(x))


# ViTs


@pytest.mark.parametrize("pool", ["tok", "avg"])
@pytest.mark.parametrize("norm_after_pool", [False, True])
def test_vit_pools(pool: str, norm_after_pool: bool) -> None:
    model: Any = tiny({**VIT, "pool_type": pool, "final_ln_after_pool": norm_after_pool})
    backbone = OpenClipBackbone(model)
    for size in ((32, 32), (48, 24), (16, 40)):  # native, one side longer and the other shorter, and the reverse
        x = images(*size, batch=2)
        got = backbone(x)
        assert got.grid == (size[0] // 8, size[1] // 8)
        for b in range(2):
            tokens, pooled, penultimate = vit_oracle(model.visual, x[b])
            assert_near(got.tokens[b], tokens)
            assert_near(got.pooled[b], pooled)
            assert_near(got.penultimate[b], penultimate)  # type: ignore[index]
    x = images(32, 32, batch=2)
    assert_near(backbone(x).pooled, model.encode_image(x))


def test_vit_made_for_images_that_are_not_square() -> None:
    model: Any = tiny({**VIT, "image_size": (24, 48)})
    backbone = OpenClipBackbone(model)
    assert backbone.image_size == (24, 48) and backbone.grid(backbone.image_size) == (3, 6)
    for size in ((24, 48), (48, 24), (32, 64)):
        x = images(*size)
        got = backbone(x)
        tokens, pooled, _ = vit_oracle(model.visual, x[0])
        assert_near(got.tokens[0], tokens)
        assert_near(got.pooled[0], pooled)


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
    assert_near(got.penultimate, plain.penultimate)  # type: ignore[arg-type]
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


@pytest.mark.parametrize("vision", [RESNET, VIT], ids=["resnet", "vit"])
def test_half_precision_at_another_size(vision: dict[str, Any]) -> None:
    backbone = OpenClipBackbone(tiny(vision))
    x = images(96, 64)
    wanted = backbone(x).pooled
    assert_near(backbone.half()(x.half()).pooled, wanted, 2e-2)


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
        assert_near(got.penultimate, model.visual.trunk.forward_features(x).mean(dim=(2, 3)))  # type: ignore[arg-type]
        assert_near(model.visual.head(model.visual.trunk.get_classifier()(got.penultimate)), got.pooled)


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
    penultimate = norm_oracle(feature.mean(dim=(1, 2)), norm)
    assert_near(got.penultimate[0], penultimate)  # type: ignore[index]
    assert_near(got.pooled[0], penultimate @ weight.T)
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
    model.visual.patch_size, model.visual.proj = (8, 8), None
    with pytest.raises(ValueError, match="visual.proj must be a weight .W, D. into the space of the texts, got none"):
        OpenClipBackbone(model)
    with pytest.raises(ValueError, match="with both towers, got VisionTransformer; give the whole of such a model"):
        OpenClipBackbone(model.visual)
    with pytest.raises(ValueError, match="with both towers, got CoCa; give"):
        OpenClipBackbone(open_clip.CoCa(16, {"layers": 1}, TEXT, VIT))
    model.visual = nn.Identity()
    with pytest.raises(ValueError, match="visual tower Identity is not known"):
        OpenClipBackbone(model)


# Sizes and other input


def test_grid_and_sizes() -> None:
    resnet, vit = OpenClipBackbone(tiny(RESNET)), OpenClipBackbone(tiny(VIT), image_size=40)
    assert (resnet.stride, vit.stride) == (32, 8)
    assert resnet.grid(448) == (14, 14) and vit.grid((16, 40)) == (2, 5)
    assert resnet.image_size == (64, 64) and vit.image_size == (40, 40)


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ((225, 224), "got 225x224; nearest valid: 224x224 or 256x224$"),
        ((224, 300), "got 224x300; nearest valid: 224x288 or 224x320$"),
        ((20, 40), "got 20x40; nearest valid: 32x32 or 32x64$"),
        ((0, 32), "got 0x32; nearest valid: 32x32$"),
    ],
)
def test_size_errors_name_size_stride_and_nearest(size: tuple[int, int], nearest: str) -> None:
    backbone = OpenClipBackbone(tiny(RESNET))
    for call in (backbone.grid, lambda size: backbone(torch.zeros(1, 3, *size))):
        with pytest.raises(ValueError, match=rf"OpenClipBackbone: image size must be a multiple of the stride 32 .*{nearest}"):
            call(size)


def test_image_errors() -> None:
    with pytest.raises(ValueError, match="multiple of the stride 8"):
        OpenClipBackbone(tiny(VIT), image_size=33)
    backbone = OpenClipBackbone(tiny(VIT))
    with pytest.raises(ValueError, match=r"images must have shape \(B, C, H, W\) = \(B, 3, H, W\), got \(1, 4, 32, 32\)"):
        backbone(torch.zeros(1, 4, 32, 32))
    with pytest.raises(TypeError, match="floating-point"):
        backbone(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_facts_about_the_model(rn50: OpenClipBackbone) -> None:
    assert rn50.dim == 1024 and rn50.context_length == 77
    assert rn50.image_mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert rn50.image_std == pytest.approx((0.26862954, 0.26130258, 0.27577711))
    assert rn50.logit_scale == pytest.approx(1 / 0.07, rel=1e-5)
    assert rn50.extra_repr() == "name='RN50', dim=1024, stride=32, image_size=(224, 224)"
    by_hand = OpenClipBackbone(tiny(VIT))  # no create_model, no preprocessing on the tower
    assert by_hand.image_mean == rn50.image_mean and by_hand.image_std == rn50.image_std
