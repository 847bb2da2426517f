"""Backbones: timm models inside open_clip (ViTs, SigLIP) and on their own, against float64 loops written from the equations."""

from __future__ import annotations

import copy
import math
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn

from tests.helpers.oracles.towers import attention_oracle, linear, norm_oracle, scaled, table_oracle
from tests.helpers.towers import TEXT, VIT, assert_near, images, siglip, stir
from trm_losses.backbones import OpenClipBackbone, TimmBackbone

SIZES = [(32, 32), (48, 24), (16, 40)]  # the native one, and two that are not square


# Models


def vit(**options: Any) -> Any:
    torch.manual_seed(0)
    base = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    return stir(timm.models.VisionTransformer(**{**base, **options}))


def in_open_clip(trunk: Any, *, proj: str = "none", **options: Any) -> Any:
    """A ``CustomTextCLIP`` around this trunk, as a config of open_clip with ``timm_model_name`` builds it."""
    torch.manual_seed(0)
    vision = {"timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": proj, "image_size": 32}
    model = open_clip.CustomTextCLIP(16 if proj != "none" else 32, vision, {**TEXT, "vocab_size": 100}, **options)
    model.visual.trunk = trunk
    if proj != "none":
        model.visual.head.proj = nn.Linear(32, 16, bias=False)
    return stir(model)


KINDS: dict[str, dict[str, Any]] = {
    "token": {},
    "token_norm_before": {"pre_norm": True, "init_values": 0.5, "reg_tokens": 2},
    "token_patch_positions": {"no_embed_class": True},
    "avg": {"global_pool": "avg", "class_token": False},
    "avg_registers": {"global_pool": "avg", "reg_tokens": 2, "fc_norm": False},
    "avg_all": {"global_pool": "avg", "pool_include_prefix": True},
    "map": {"global_pool": "map", "class_token": False},  # SigLIP
    "map_class": {"global_pool": "map"},
    "map_all": {"global_pool": "map", "reg_tokens": 1, "class_token": False, "pool_include_prefix": True},
    "dynamic": {"dynamic_img_size": True},
    "no_positions": {"pos_embed": "none"},
}


# Oracles


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def norm(x: Tensor, layer: Any) -> Tensor:
    return x if isinstance(layer, nn.Identity) else norm_oracle(x, layer)


def states_oracle(trunk: Any, image: Tensor, value_path: bool = False) -> tuple[Tensor, Tensor]:
    """States after the trunk's last norm of one image (3, H, W): all of them, and those of the patches for the tokens."""
    kernel, step, extra = trunk.patch_embed.proj, 8, trunk.num_prefix_tokens
    grid = (image.shape[1] // step, image.shape[2] // step)
    x = []
    for i in range(grid[0]):
        for j in range(grid[1]):
            patch = image[:, i * step : (i + 1) * step, j * step : (j + 1) * step].double()
            value = (kernel.weight.double() * patch).sum(dim=(1, 2, 3))
            x.append(value if kernel.bias is None else value + kernel.bias.double())
    states = torch.stack(x)
    prefix = [p[0].double() for p in (trunk.cls_token, trunk.reg_token) if p is not None]
    if trunk.pos_embed is not None:
        table = trunk.pos_embed[0].double()
        own = 0 if trunk.no_embed_class else extra
        first = torch.zeros(1, table.shape[1])
        cells = table_oracle(torch.cat([first, table[own:]]), trunk.patch_embed.grid_size, grid)[1:]
        states = states + cells
        if own:
            prefix = [torch.cat(prefix) + table[:own]]
    states = norm(torch.cat([*prefix, states]), trunk.norm_pre)
    alone = states
    for block in trunk.blocks:
        q, k, v = linear(norm(states, block.norm1), block.attn.qkv).chunk(3, dim=1)
        after = []
        for mixed in (attention_oracle(q, k, v, block.attn.num_heads), v):
            y = states + scaled(linear(mixed, block.attn.proj), block.ls1)
            after.append(y + scaled(linear(gelu(linear(norm(y, block.norm2), block.mlp.fc1)), block.mlp.fc2), block.ls2))
        states, alone = after
    patches = (alone if value_path else states)[extra:]
    return norm(states, trunk.norm), norm(patches, trunk.norm)


def latent_pool_oracle(pool: Any, states: Tensor) -> Tensor:
    """A learned query over states (N, W)."""
    query = linear(pool.latent[0].double(), pool.q)
    k, v = linear(states, pool.kv).chunk(2, dim=1)
    x = linear(attention_oracle(query, k, v, pool.num_heads), pool.proj)[0]
    return x + linear(gelu(linear(norm(x, pool.norm), pool.mlp.fc1)), pool.mlp.fc2)


def timm_vit_oracle(trunk: Any, image: Tensor, value_path: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and pooled feature before any projection, and the penultimate feature."""
    states, patches = states_oracle(trunk, image, value_path)
    if trunk.global_pool == "map":
        value = patches @ trunk.attn_pool.kv.weight[32:].double().T + trunk.attn_pool.kv.bias[32:].double()
        x = linear(value, trunk.attn_pool.proj)
        mlp = trunk.attn_pool.mlp
        tokens = x + linear(gelu(linear(norm(x, trunk.attn_pool.norm), mlp.fc1)), mlp.fc2)
        pooled = latent_pool_oracle(trunk.attn_pool, states if trunk.pool_include_prefix else states[trunk.num_prefix_tokens :])
    else:
        tokens = patches
        whole = states if trunk.pool_include_prefix else states[trunk.num_prefix_tokens :]
        pooled = states[0] if trunk.global_pool == "token" else whole.mean(dim=0)
    pooled = norm(pooled, trunk.fc_norm)
    penultimate = states[trunk.num_prefix_tokens :].mean(dim=0) if trunk.global_pool == "map" else pooled
    return norm(tokens, trunk.fc_norm), pooled, penultimate


# ViTs of timm


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value_path", [False, True], ids=["full", "value"])
def test_timm_vit_inside_open_clip_follows_the_equations(kind: str, value_path: bool) -> None:
    trunk = vit(**KINDS[kind])
    model = in_open_clip(copy.deepcopy(trunk), proj="linear")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wanted = model.encode_image(images(32, 32, batch=2))
    backbone = OpenClipBackbone(model, value_path=value_path)
    assert backbone.stride == 8 and backbone.image_size == (32, 32) and backbone.dim == 16
    weight = model.visual.head.proj.weight.double()
    for size in SIZES:
        x = images(*size, batch=2)
        got = backbone(x)
        assert got.grid == (size[0] // 8, size[1] // 8) and got.tokens.shape == (2, got.grid[0] * got.grid[1], 16)
        for b in range(2):
            tokens, pooled, penultimate = timm_vit_oracle(model.visual.trunk, x[b], value_path)
            assert_near(got.tokens[b], tokens @ weight.T, 1e-4)
            assert_near(got.pooled[b], pooled @ weight.T, 1e-4)
            assert_near(got.penultimate[b], penultimate, 1e-4)  # type: ignore[index]
    assert_near(backbone(images(32, 32, batch=2)).pooled, wanted)  # of the model before it was wrapped
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_timm_vit_on_its_own_follows_the_equations(kind: str) -> None:
    trunk = vit(**KINDS[kind], **{"num_classes": 5})
    projection = nn.Linear(32, 7)
    backbone = TimmBackbone(trunk, projection)
    assert (backbone.dim, backbone.stride, backbone.image_size) == (7, 8, (32, 32))
    for size in SIZES:
        x = images(*size)
        got, (tokens, pooled, penultimate) = backbone(x), timm_vit_oracle(trunk, x[0])
        assert got.grid == (size[0] // 8, size[1] // 8)
        assert_near(got.tokens[0], linear(tokens, projection), 1e-4)
        assert_near(got.pooled[0], linear(pooled, projection), 1e-4)
        assert_near(got.penultimate[0], penultimate, 1e-4)  # type: ignore[index]
    head = trunk.forward_head(trunk.forward_features(images(32, 32)), pre_logits=True)
    assert_near(backbone(images(32, 32)).pooled, projection(head))


def test_many_tokens_are_taken_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for backbone in (OpenClipBackbone(siglip(), value_path=True), TimmBackbone(swin())):
        x = images(*backbone.image_size, batch=2)
        wanted = backbone(x).tokens
        with monkeypatch.context() as patch:
            patch.setattr("trm_losses.backbones._timm._ROWS", 5)
            assert_near(backbone(x).tokens, wanted, 1e-6)


def test_errors_that_are_not_about_the_size_keep_their_words() -> None:
    backbone = TimmBackbone(vit())
    with pytest.raises(RuntimeError, match=r"dtype|type"):
        backbone(images(32, 32).double())


def test_value_path_needs_two_blocks_of_a_timm_vit() -> None:
    assert OpenClipBackbone(in_open_clip(vit(depth=1))).stride == 8
    with pytest.raises(ValueError, match="VisionTransformer has no value path to take: .* two blocks or more"):
        OpenClipBackbone(in_open_clip(vit(depth=1)), value_path=True)


def test_a_vit_whose_patches_are_not_square_is_refused() -> None:
    with pytest.raises(ValueError, match=r"turns \(32, 32\) pixels into .* where its stride 8 asks for \(4, 4\)"):
        TimmBackbone(vit(patch_size=(8, 4)))


# SigLIP


IDS = torch.tensor([[5, 9, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [5, 17, 23, 1, 1, 1, 1, 1, 1, 1, 1, 1]])


def test_scale_and_bias_of_the_logits() -> None:
    model = siglip()
    backbone = OpenClipBackbone(model)
    assert backbone.logit_scale == pytest.approx(math.exp(float(model.logit_scale)))
    assert backbone.logit_bias == float(model.logit_bias) and abs(backbone.logit_bias + 10) < 2
    x = images(32, 32, batch=2)
    with torch.no_grad():
        wanted, _ = model.get_logits(x, IDS)
    pooled, text = backbone(x).pooled, backbone.encode_text(IDS)
    cosine = torch.stack([torch.stack([torch.cosine_similarity(p, t, dim=0) for t in text]) for p in pooled])
    assert_near(backbone.logit_scale * cosine + backbone.logit_bias, wanted, 1e-5)
    assert OpenClipBackbone(open_clip.CLIP(16, VIT, TEXT)).logit_bias is None


def test_siglip_text_takes_ids_and_names_the_missing_tokenizer() -> None:
    backbone = OpenClipBackbone(siglip())
    wanted = backbone.model.encode_text(IDS)
    prompts = backbone.embed_prompts(IDS)
    assert prompts.embeddings.shape == (2, 12, 32) and prompts.eot.tolist() == [2, 3]
    assert_near(backbone.encode_text(IDS), wanted)
    assert_near(backbone.encode_prompts(prompts), wanted)
    assert not torch.equal(wanted[0], wanted[1])
    with pytest.raises(ValueError, match=r"tokenizer must be given for a vocabulary of 100; .* ids \(C, L\)"):
        backbone.encode_text(["a cat"])
    own = OpenClipBackbone(siglip(), tokenizer=lambda texts: IDS[: len(texts)])
    assert_near(own.encode_text(["one", "two"]), wanted)


# On their own


def swin() -> Any:
    torch.manual_seed(0)
    options = {"img_size": 64, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4, "num_classes": 3}
    return stir(timm.models.SwinTransformer(**options))


def test_maps_with_channels_last() -> None:
    trunk = swin()
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    backbone = TimmBackbone(trunk, weight)
    x = images(64, 64, batch=2)
    feature = trunk.forward_features(x).double()
    assert feature.shape == (2, 8, 8, 16) and backbone.stride == 8 and backbone(x).grid == (8, 8)
    got = backbone(x)
    for b in range(2):
        cells = torch.stack([feature[b, i, j] for i in range(8) for j in range(8)])
        assert_near(got.tokens[b], cells @ weight.double().T)
        assert_near(got.pooled[b], cells.mean(dim=0) @ weight.double().T)
        assert_near(got.penultimate[b], cells.mean(dim=0))  # type: ignore[index]
    with pytest.raises(ValueError, match=r"SwinTransformer cannot take images of 96x64 \(Input height .*\); keep to the size"):
        backbone(images(96, 64))
    with pytest.raises(ValueError, match=r"OpenClipBackbone: the timm tower SwinTransformer cannot take images of 32x32 \("):
        OpenClipBackbone(in_open_clip(trunk))  # whose config says 32


@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_maps_with_channels_first(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    trunk = stir(timm.create_model("test_resnet", num_classes=3))
    backbone = TimmBackbone(trunk)
    x = images(*size)
    feature, got = trunk.forward_features(x).double()[0], backbone(x)
    assert backbone.dim == trunk.num_features and got.grid == (size[0] // 32, size[1] // 32)
    cells = torch.stack([feature[:, i, j] for i in range(got.grid[0]) for j in range(got.grid[1])])
    assert_near(got.tokens[0], cells)
    assert_near(got.pooled[0], cells.mean(dim=0))
    assert_near(got.penultimate[0], cells.mean(dim=0))  # type: ignore[index]


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_model_of_other_channels_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"images of 3 channels \(.* to have 1 channels, .*\); build it with in_chans=3"):
        TimmBackbone(timm.create_model(name, in_chans=1))


def test_sequence_with_rotary_positions() -> None:
    """Fixed at its own size unless timm builds it for any."""
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "use_rot_pos_emb": True}
    torch.manual_seed(0)
    fixed = stir(timm.models.Eva(**options, num_classes=0, global_pool="token"))
    backbone = TimmBackbone(fixed)
    x = images(32, 32)
    states = fixed.forward_features(x)
    got = backbone(x)
    assert_near(got.tokens[0], fixed.fc_norm(states[0, 1:]), 1e-6)
    assert_near(got.pooled, fixed.forward_head(states))
    assert_near(got.penultimate, fixed.forward_head(states))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"TimmBackbone: the timm tower Eva cannot take images of 48x24 \(Input height"):
        backbone(images(48, 24))
    free = timm.models.Eva(**options, num_classes=0, global_pool="token", dynamic_img_size=True)
    free.load_state_dict(fixed.state_dict())
    other = TimmBackbone(free)
    assert_near(other(x).tokens, got.tokens)
    assert other(images(48, 24)).grid == (6, 3)


def test_names_and_statistics() -> None:
    backbone = TimmBackbone("test_vit", image_size=(64, 96))
    assert backbone.extra_repr() == "name='test_vit', dim=64, stride=16, image_size=(64, 96)"
    assert backbone.image_mean == (0.5, 0.5, 0.5) and backbone.image_std == (0.5, 0.5, 0.5)
    assert TimmBackbone(timm.create_model("test_resnet")).name == "test_resnet"
    by_hand = TimmBackbone(vit())
    assert by_hand.name == "VisionTransformer" and by_hand.image_mean == (0.485, 0.456, 0.406)
    assert TimmBackbone(vit(img_size=(24, 48))).image_size == (24, 48)


def test_projections() -> None:
    x, trunk = images(32, 32), vit()
    plain = TimmBackbone(trunk)(x)
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    got = TimmBackbone(trunk, weight)
    assert_near(got(x).tokens[0], plain.tokens[0].double() @ weight.double().T)
    assert_near(got(x).pooled[0], plain.pooled[0].double() @ weight.double().T)
    assert got.dim == 5 and torch.equal(got.state_dict()["projection.weight"], weight)
    weight.zero_()
    assert got(x).tokens.abs().sum() > 0  # its own copy
    for bad in (torch.zeros(32, 5), nn.Linear(31, 5), torch.zeros(32)):
        with pytest.raises(ValueError, match=r"TimmBackbone: projection must have shape .* = \(D, 32\), got .*; its second"):
            TimmBackbone(trunk, bad)
    with pytest.raises(TypeError, match=r"projection must be a Linear or its weight \(D, W\) with W = 32, got a Conv2d"):
        TimmBackbone(trunk, nn.Conv2d(1, 1, 1))  # type: ignore[arg-type]


class TwoScales(nn.Module):
    """What gives a list of features."""

    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward_features(self, images: Tensor) -> list[Tensor]:
        return [images, images]

    def forward_head(self, features: list[Tensor], pre_logits: bool = False) -> Tensor:
        return features[0]


def test_models_that_cannot_be_wrapped() -> None:
    with pytest.raises(ValueError, match=r"TimmBackbone: model must be one of timm's, got 'resnet5O'; near it: .*resnet50"):
        TimmBackbone("resnet5O")
    with pytest.raises(ValueError, match="the timm tower ResNet pools by nothing"):
        TimmBackbone(timm.create_model("test_resnet", num_classes=0, global_pool=""))
    with pytest.raises(ValueError, match="forward_features and forward_head, got Linear"):
        TimmBackbone(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="pretrained goes with a name, got a VisionTransformer"):
        TimmBackbone(vit(), pretrained=True)
    with pytest.raises(ValueError, match="TwoScales gives a list and neither a map nor a sequence of width 4"):
        TimmBackbone(TwoScales())
    for pool, word in (("max", "max"), ("avgmax", "avgmax"), ("", "nothing")):
        with pytest.raises(ValueError, match=f"VisionTransformer pools by {word}, .* use one that pools by 'avg'"):
            TimmBackbone(vit(global_pool=pool))
    with pytest.raises(ValueError, match="TimmBackbone: image size must be a multiple of the stride 8 .* got 33x33"):
        TimmBackbone(vit(), image_size=33)
    with pytest.raises(ValueError, match=r"TimmBackbone: images must have shape \(B, C, H, W\)"):
        TimmBackbone(vit())(torch.zeros(3, 32, 32))
