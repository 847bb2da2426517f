"""Backbones out of transformers: against its own features, and against equations."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.helpers import hf_towers
from tests.helpers.hf_towers import (
    END,
    FAMILIES,
    IMAGES_ALONE,
    PAD,
    START,
    WITH_TEXT,
    config,
    own_image_features,
    own_text_features,
    tiny_hf,
    tokenizer,
    tokenizer_of,
    transformers,
)
from tests.helpers.towers import assert_near, images, stir
from trm_losses import PromptEmbeddings, PromptLearner
from trm_losses.backbones import HFBackbone, _hf_text, load_hf

SIZES = [(32, 32), (48, 24), (16, 40)]  # the native one, and two that are not square
WIDTH = {"clip": 16, "metaclip_2": 16, "altclip": 16}  # of the joint space; 32 elsewhere
TEXTS = ["a photo of the cat.", "dog", "a small red car."]


def backbone_of(family: str, **options: Any) -> HFBackbone:
    words = tokenizer_of(family) if family in WITH_TEXT else None
    return HFBackbone(tiny_hf(family), tokenizer=words, **options)


# Images


@pytest.mark.parametrize("family", FAMILIES)
def test_pooled_is_the_model_s_own_image_feature(family: str) -> None:
    model = tiny_hf(family)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    backbone = HFBackbone(model)
    assert (backbone.stride, backbone.image_size, backbone.dim) == (8, (32, 32), WIDTH.get(family, 32))
    for size in SIZES:
        x = images(*size, batch=2)
        got = backbone(x)
        assert got.grid == (size[0] // 8, size[1] // 8)
        assert got.tokens.shape == (2, got.grid[0] * got.grid[1], backbone.dim)
        assert got.penultimate is not None and got.penultimate.shape == (2, 32)
        with torch.no_grad():
            assert_near(got.pooled, own_image_features(model, family, x), 1e-5)
        assert not any(part.requires_grad for part in (got.tokens, got.pooled, got.penultimate))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("family", ["clip", "metaclip_2", "altclip"])
def test_tokens_are_what_the_class_token_goes_through(family: str) -> None:
    backbone = backbone_of(family)
    model = backbone.model
    x = images(48, 24, batch=2)
    with torch.no_grad():
        states = model.vision_model(x, interpolate_pos_encoding=True).last_hidden_state.double()
    norm, weight = model.vision_model.post_layernorm, model.visual_projection.weight.double()
    centred = states - states.mean(dim=-1, keepdim=True)
    scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()
    normed = scaled * norm.weight.double() + norm.bias.double()
    got = backbone(x)
    assert_near(got.tokens, normed[:, 1:] @ weight.T)
    assert_near(got.penultimate, normed[:, 0])  # type: ignore[arg-type]
    assert_near(got.pooled, normed[:, 0] @ weight.T)


@pytest.mark.parametrize("family", ["siglip", "siglip2"])
def test_tokens_are_the_attention_pool_on_one_position(family: str) -> None:
    backbone = backbone_of(family)
    head = backbone.model.vision_model.head.double()
    kept: list[Tensor] = []
    backbone.model.vision_model.post_layernorm.register_forward_hook(lambda _, x, out: kept.append(out.double()))
    head.float()
    got = backbone(images(48, 24, batch=2))
    head.double()
    states = kept[0]
    value = states @ head.attention.in_proj_weight[64:].T + head.attention.in_proj_bias[64:]
    u = value @ head.attention.out_proj.weight.T + head.attention.out_proj.bias
    assert_near(got.tokens, u + head.mlp(head.layernorm(u)), 1e-5)
    assert_near(got.penultimate, states.mean(dim=1), 1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", IMAGES_ALONE)
def test_dino_tokens_go_through_the_projection_that_is_given(family: str) -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    backbone, x = backbone_of(family, projection=weight), images(48, 24, batch=2)
    states = backbone.model(x).last_hidden_state.double()
    prefix = {"dinov2": 1, "dinov2_with_registers": 3, "dinov3_vit": 4}[family]
    got = backbone(x)
    assert got.tokens.shape == (2, 18, 6) and backbone.dim == 6
    assert_near(got.tokens, states[:, prefix:] @ weight.double().T)
    assert_near(got.pooled, states[:, 0] @ weight.double().T)
    assert_near(got.penultimate, states[:, 0])  # type: ignore[arg-type]
    linear = nn.Linear(32, 6)
    assert_near(backbone_of(family, projection=linear)(x).pooled, linear(states[:, 0].float()))
    assert not backbone.has_text and backbone.context_length == 0 and "projection.weight" in backbone.state_dict()


def test_a_size_that_patches_do_not_fill_is_cut() -> None:
    backbone = HFBackbone(tiny_hf("siglip", image_size=38))
    assert backbone.image_size == (32, 32) and backbone(images(32, 32)).grid == (4, 4)
    assert backbone_of("dinov2", image_size=(48, 24)).image_size == (48, 24)
    with pytest.raises(ValueError, match=r"HFBackbone: image size must be a multiple of the stride 8 .*got 33x33"):
        backbone_of("clip", image_size=33)
    with pytest.raises(ValueError, match=r"HFBackbone: images must have shape \(B, C, H, W\) = \(B, 3, H, W\)"):
        backbone(torch.zeros(1, 1, 32, 32))


# Text


@pytest.mark.parametrize("family", WITH_TEXT)
def test_text_is_the_model_s_own_text_feature(family: str) -> None:
    backbone = backbone_of(family)
    inputs = backbone.tokenizer(TEXTS, padding="max_length", max_length=12, return_tensors="pt")
    assert (inputs["input_ids"] == PAD).any(dim=1).all()
    mask = {} if "siglip" in family else {"attention_mask": inputs["attention_mask"]}  # SigLIP sees its padding
    with torch.no_grad():
        wanted = own_text_features(backbone.model, input_ids=inputs["input_ids"], **mask)
    for given in (TEXTS, inputs["input_ids"]):
        assert_near(backbone.encode_text(given), wanted, 1e-5)
        names = backbone.embed_prompts(given)
        assert_near(backbone.encode_prompts(names), wanted, 1e-5)
        trained = names._replace(embeddings=names.embeddings.requires_grad_())
        assert_near(backbone.encode_prompts(trained), wanted, 1e-5)
        assert_near(backbone.encode_prompts([names, trained], chunk_size=2), torch.cat([wanted, wanted]), 1e-5)
    assert backbone.context_length == 12 and backbone.has_text
    bias = pytest.approx(float(backbone.model.logit_bias)) if "siglip" in family else None
    assert backbone.logit_bias == bias
    assert backbone.logit_scale == pytest.approx(math.exp(float(backbone.model.logit_scale)), rel=1e-5)


def test_the_highest_id_ends_a_text_where_a_config_names_a_wrong_one() -> None:
    """As those of the first years do."""
    made = config("clip")
    made.text_config.eos_token_id = END
    backbone, ids = HFBackbone(stir(transformers.CLIPModel(made))), torch.tensor([[1, 5, 6, 99, 0, 0], [1, 7, 99, 0, 0, 0]])
    with torch.no_grad():
        wanted = own_text_features(backbone.model, input_ids=ids)
    names = backbone.embed_prompts(ids)
    for got in (backbone.encode_text(ids), backbone.encode_prompts(names._replace(embeddings=names.embeddings.requires_grad_()))):
        assert_near(got, wanted, 1e-5)


@pytest.mark.parametrize("family", ["clip", "metaclip_2"])
def test_only_what_reaches_the_features_of_a_causal_tower_is_computed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = backbone_of(family)
    names = backbone.embed_prompts(TEXTS)
    learner = PromptLearner("shared", names=names, num_context=3, context_length=12)
    prompts = learner()
    assert isinstance(prompts, PromptEmbeddings) and prompts.prefix == 4 and backbone._text().known
    calls: list[int] = []
    for layer in backbone.model.text_model.encoder.layers:
        layer.mlp.register_forward_pre_hook(lambda _, x: calls.append(x[0].numel() // 32))
    short = backbone.encode_prompts(prompts)
    assert calls == [4 + int((prompts.eot - 3).sum()), 3]
    slope = torch.autograd.grad(short.square().sum(), learner.context)[0]
    monkeypatch.setattr(_hf_text, "_is_known", lambda text: False)
    whole = backbone.encode_prompts(learner())
    assert_near(short, whole, 1e-5)
    assert_near(slope, torch.autograd.grad(whole.square().sum(), learner.context)[0], 1e-4)


class OwnLayer(transformers.models.clip.modeling_clip.CLIPEncoderLayer):  # type: ignore[misc]
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = super().forward(x, *args, **kwargs)
        return 2 * result


@pytest.mark.parametrize("how", ["hook", "other class", "other attention", "replaced forward", "hook on the encoder"])
def test_a_tower_that_is_not_known_is_run_as_it_is(how: str) -> None:
    backbone = backbone_of("clip")
    encoder = backbone.model.text_model.encoder
    layer = encoder.layers[1]
    if how == "hook":
        layer.register_forward_hook(lambda _, x, out: 2 * out)
    elif how == "other class":
        layer.__class__ = OwnLayer
    elif how == "other attention":
        layer.self_attn.q_proj = nn.Sequential(layer.self_attn.q_proj)
    elif how == "replaced forward":
        forward = layer.forward
        layer.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)
    else:
        encoder.register_forward_pre_hook(lambda _, args, kwargs: None, with_kwargs=True)
    assert not backbone._text().known
    names = backbone.embed_prompts(TEXTS)
    got = backbone.encode_prompts(names._replace(embeddings=names.embeddings.requires_grad_()))
    assert_near(got, backbone.encode_text(TEXTS), 1e-5)


def test_prompts_of_a_wrong_length() -> None:
    with pytest.raises(ValueError, match=r"HFBackbone: ids must have shape \(C, L\) = \(C, 12\), got \(2, 8\); padding reaches"):
        backbone_of("siglip").embed_prompts(torch.full((2, 8), 14))
    long = PromptEmbeddings(torch.zeros(2, 13, 32), torch.tensor([3, 3]))
    for family in ("clip", "altclip", "siglip"):
        with pytest.raises(ValueError, match="HFBackbone: prompts must be at most 12 tokens long, got 13"):
            backbone_of(family).encode_prompts(long)


# In half precision


@pytest.mark.parametrize("family", WITH_TEXT)
def test_prompts_in_half_precision(family: str) -> None:
    backbone = backbone_of(family)
    names = backbone.embed_prompts(TEXTS)
    wanted = backbone.encode_prompts(names)
    leaf = names._replace(embeddings=names.embeddings.requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        got = backbone.encode_prompts(leaf)
    assert_near(got, wanted, 0.1)
    low = backbone.to(torch.bfloat16)
    assert_near(low.encode_prompts(low.embed_prompts(TEXTS)), wanted, 0.1)


def test_the_same_weights_with_another_activation_are_told_apart() -> None:
    """Whatever digests the state sees it: features would differ."""
    plain, other = tiny_hf("clip"), tiny_hf("clip", hidden_act="gelu")
    states = [HFBackbone(model).state_dict() for model in (plain, other)]
    differ = [key for key in states[0] if not torch.equal(states[0][key], states[1][key])]
    assert differ == ["settings"]
    torch.testing.assert_close(HFBackbone(tiny_hf("clip")).state_dict(), states[0])


# Folders


def saved(folder: Path, family: str, *, words: bool = True, processor: dict[str, Any] | None = None) -> Any:
    model = tiny_hf(family)
    model.save_pretrained(folder)
    if words and family in WITH_TEXT:
        tokenizer_of(family).save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_brings_model_tokenizer_and_statistics(family: str, tmp_path: Path) -> None:
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "image_processor_type": "CLIPImageProcessor"}
    model = saved(tmp_path, family, processor=statistics)
    backbone = load_hf(tmp_path, image_size=(48, 24))
    assert backbone.name == str(tmp_path) and backbone.image_size == (48, 24)
    assert backbone.image_mean == (0.1, 0.2, 0.3) and backbone.image_std == (0.4, 0.5, 0.6)
    wanted = HFBackbone(model, tokenizer=transformers.AutoTokenizer.from_pretrained(tmp_path) if family in WITH_TEXT else None)
    x = images(32, 32)
    assert_near(backbone(x).tokens, wanted(x).tokens, 1e-6)
    if family in WITH_TEXT:
        assert_near(backbone.encode_text(TEXTS), wanted.encode_text(TEXTS), 1e-6)
    own = backbone.state_dict()
    assert own.keys() == wanted.state_dict().keys() and all(torch.equal(v, own[k]) for k, v in wanted.state_dict().items())


def test_statistics_without_a_processor_and_without_normalisation(tmp_path: Path) -> None:
    saved(tmp_path, "siglip")
    assert load_hf(tmp_path).image_mean == (0.5, 0.5, 0.5)
    assert HFBackbone(tiny_hf("clip")).image_mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert HFBackbone(tiny_hf("dinov2")).image_std == pytest.approx((0.229, 0.224, 0.225))
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": false, "image_mean": [9, 9, 9]}', encoding="utf-8")
    assert load_hf(tmp_path).image_mean == (0.0, 0.0, 0.0) and load_hf(tmp_path).image_std == (1.0, 1.0, 1.0)
    (tmp_path / "preprocessor_config.json").write_text("no json", encoding="utf-8")
    with pytest.raises(ValueError, match="must hold a preprocessor_config.json or none, got one that cannot be read .*; fetch"):
        load_hf(tmp_path)
    with pytest.raises(ValueError, match="HFBackbone: image_mean must be three numbers, one for each channel, got 1"):
        HFBackbone(tiny_hf("clip"), image_mean=[0.5])


# What does not fit


def one_line(error: pytest.ExceptionInfo[Exception]) -> bool:
    return "\n" not in str(error.value)


def test_models_that_give_no_tokens(tmp_path: Path) -> None:
    resnet = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    names = r"one of CLIPModel, .*, DINOv3ViTModel, got"
    with pytest.raises(ValueError, match=rf"^HFBackbone: model must be {names} ResNetModel; TimmBackbone takes") as caught:
        HFBackbone(resnet)
    assert one_line(caught)
    resnet.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"^load_hf: {tmp_path} must hold {names} model_type 'resnet'; Timm") as caught:
        load_hf(tmp_path)
    assert one_line(caught)
    for model in (nn.Linear(2, 2), tiny_hf("clip").vision_model, tiny_hf("clip").text_model):
        with pytest.raises(ValueError, match=rf"must be {names} {type(model).__name__};"):
            HFBackbone(model)
    with pytest.raises(ValueError, match="SiglipModel without the attention pool of its image tower .*use one that has it"):
        HFBackbone(tiny_hf("siglip", vision_use_head=False))
    with pytest.raises(ValueError, match="HFBackbone: patches must be square, got 8x4"):
        HFBackbone(tiny_hf("dinov2", patch_size=(8, 4)))


def test_projections_that_are_whole_modules() -> None:
    deep = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    with pytest.raises(
        TypeError, match=r"^HFBackbone: projection must be a Linear or its weight \(D, W\) with W = 32, got a Seq"
    ):
        backbone_of("dinov2", projection=deep)
    with pytest.raises(ValueError, match=r"projection must have shape .* = \(D, 32\), got \(6, 31\)"):
        backbone_of("dinov2", projection=torch.zeros(6, 31))
    with pytest.raises(
        ValueError, match="projection is for models without a text tower, and CLIPModel has its own; leave it out"
    ):
        backbone_of("clip", projection=torch.eye(32))
    model = tiny_hf("clip")
    model.visual_projection = deep
    with pytest.raises(
        ValueError, match="visual_projection must be a Linear into the space of the texts, got a Sequential; fold"
    ):
        HFBackbone(model)


@pytest.mark.parametrize("family", IMAGES_ALONE)
def test_texts_of_a_model_without_a_text_tower(family: str) -> None:
    backbone = backbone_of(family)
    message = (
        rf"^HFBackbone: {hf_towers.CLASSES[family]} has no text tower .*give class texts \(C, D\), in the pipeline by --class-t"
    )
    for call in (
        lambda: backbone.template_text(["cat"], ["{}"]),
        lambda: backbone.encode_text(torch.zeros(1, 3, dtype=torch.long)),
        lambda: backbone.embed_prompts(["cat"]),
        lambda: backbone.logit_scale,
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert backbone.logit_bias is None
    with pytest.raises(ValueError, match=message):
        HFBackbone(tiny_hf(family), tokenizer=tokenizer())


@pytest.mark.parametrize("family", WITH_TEXT)
def test_a_tokenizer_that_is_not_there(family: str, tmp_path: Path) -> None:
    """transformers makes an empty one up for some families, which would read every word as unknown."""
    saved(tmp_path, family, words=False)
    backbone = load_hf(tmp_path)
    assert (
        backbone.encode_text(torch.tensor([[START, 14, 99, END]]) if "siglip" not in family else torch.full((1, 12), 14)).shape[0]
        == 1
    )
    with pytest.raises(
        ValueError, match=rf"^HFBackbone: the tokenizer of {tmp_path} did not load \(.*give texts as ids"
    ) as caught:
        backbone.template_text(["cat"], ["{}"])
    assert one_line(caught)
    with pytest.raises(ValueError, match="HFBackbone: tokenizer must be given to read texts, got none; or give texts as ids"):
        HFBackbone(tiny_hf(family)).tokenize(["cat"])


def test_tokenizers_of_other_models() -> None:
    with pytest.raises(ValueError, match="tokenizer must have ids below 100, as many as the model has words, got 120; give"):
        HFBackbone(tiny_hf("clip"), tokenizer=tokenizer(120))
    with pytest.raises(ValueError, match="tokenizer must be a tokenizer of transformers .*, got a function; .* give ids"):
        HFBackbone(tiny_hf("clip"), tokenizer=lambda texts: texts)
    for words in (tokenizer(), tokenizer(99, marks=False)):
        with pytest.raises(ValueError, match=r"tokenizer must end a text with the id 99, .* got none in \["):
            HFBackbone(tiny_hf("clip"), tokenizer=words).encode_text(TEXTS)
    with pytest.raises(
        ValueError, match=r"^HFBackbone: text 1 takes 13 tokens, that is over the tower's 12; use a shorter .*'cat "
    ):
        backbone_of("clip").tokenize(["cat", "cat " * 11])


def test_folders_that_are_none(tmp_path: Path) -> None:
    for path, said in (
        (tmp_path / "gone", "must be a folder, or the id of a model on the hub that can be fetched"),
        (tmp_path, "must hold the config.json of a model, as save_pretrained writes it"),
    ):
        with pytest.raises(ValueError, match=rf"^load_hf: {path} {said}") as caught:
            load_hf(path)
        assert one_line(caught)
    (tmp_path / "config.json").write_text('{"model_type": "own"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"must hold one of CLIPModel, .*, got model_type 'own'"):
        load_hf(tmp_path)


def test_an_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no network\nand more lines")

    monkeypatch.setattr(transformers.PretrainedConfig, "get_config_dict", offline)
    with pytest.raises(ValueError, match=r"load_hf: own/model must be .*\(OSError: no network\); download it once") as caught:
        load_hf("own/model")
    assert one_line(caught)


def test_weights_that_are_not_those_of_the_config(tmp_path: Path) -> None:
    saved(tmp_path, "clip")
    (tmp_path / "part").mkdir()
    shutil.copy(tmp_path / "config.json", tmp_path / "part")
    state = {key: value for key, value in load_file(tmp_path / "model.safetensors").items() if "text" not in key}
    save_file(state, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"part must hold all weights of a CLIPModel, got none for \d+ entries \(first .*whole"):
        load_hf(tmp_path / "part")
    tiny_hf("clip", patch_size=4).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "config.json", tmp_path / "other")
    with pytest.raises(ValueError, match=r"other must hold the weights of the CLIPModel in its config.json, .*; fetch") as caught:
        load_hf(tmp_path / "other")
    assert one_line(caught)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"must hold the weights of the CLIPModel in its config.json, which cannot be loaded"):
        load_hf(tmp_path)


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_hf("clip")
    monkeypatch.setitem(sys.modules, "transformers", None)
    for call in (lambda: load_hf(tmp_path), lambda: HFBackbone(model)):
        with pytest.raises(ImportError, match=r'needs transformers, .*pip install "trm-losses\[huggingface\]"') as caught:
            call()
        assert one_line(caught)
