"""Prompts through a causal text tower: what is computed once or not at all gives what the whole tower gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import open_clip
import pytest
import torch
from torch import Tensor, nn

from tests.helpers.towers import TEXT, VIT, assert_near
from trm_losses import PromptEmbeddings, PromptLearner
from trm_losses.backbones import OpenClipBackbone, _causal, _text

Mode = Literal["shared", "csc"]
CONTEXT = 3
TOWERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "quick_gelu": {"quick_gelu": True},
    "layer scale": {"ls_init_value": 0.5},
    "eos": {"pool_type": "eos", "eos_id": 99},
    "last": {"pool_type": "last"},
    "linear projection": {"proj_bias": True},
    "no projection": {"proj_type": "none"},
    "one block": {"layers": 1},
    "custom blocks": {"qk_norm": True},
}


def tower(*, custom: bool = False, dtype: torch.dtype = torch.float64, quick_gelu: bool = False, **text: Any) -> OpenClipBackbone:
    """A tower whose every parameter matters, biases and layer scales included, and whose attention is not flat."""
    torch.manual_seed(0)
    build = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    model = build(16, VIT, {**TEXT, "vocab_size": 100, "layers": 3, **text}, quick_gelu=quick_gelu)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.5)
    return OpenClipBackbone(model).to(dtype)


def ids(backbone: OpenClipBackbone, classes: int = 4, length: int | None = None) -> Tensor:
    """Start, names of 2, 4, 1, 3, ... tokens, end; what follows is anything."""
    generator = torch.Generator().manual_seed(classes)
    out = torch.randint(1, 98, (classes, length or backbone.context_length), generator=generator)
    for c in range(classes):
        out[c, 0], out[c, 1 + (2, 4, 1, 3)[c % 4]] = 98, 99
    return out


def learner(backbone: OpenClipBackbone, mode: Mode, classes: int = 4) -> PromptLearner:
    torch.manual_seed(1)
    length = backbone.context_length - CONTEXT if backbone._text().pool == "last" else None
    names = backbone.embed_prompts(ids(backbone, classes, length))
    made = PromptLearner(mode, names=names, num_context=CONTEXT, context_length=backbone.context_length)
    nn.init.normal_(made.context, std=0.5)
    return made.to(names.embeddings.dtype)


def whole_tower(backbone: OpenClipBackbone, prompts: PromptEmbeddings) -> Tensor:
    """Every token up to the context length through open_clip's modules; anything stands after the end."""
    text: Any = getattr(backbone.model, "text", backbone.model)
    embeddings, eot, _ = prompts
    room = text.positional_embedding.shape[0] - embeddings.shape[1]
    dtype = text.transformer.get_cast_dtype()
    x = torch.cat([embeddings, torch.ones_like(embeddings[:, :1]).expand(-1, room, -1)], dim=1).to(dtype)
    x = text.ln_final(text.transformer(x + text.positional_embedding.to(dtype), attn_mask=text.attn_mask))
    x = x[torch.arange(len(x)), eot]
    projection = text.text_projection
    if projection is None:
        return x
    result: Tensor = projection(x) if isinstance(projection, nn.Linear) else x @ projection
    return result


def text_and_slope(text: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    """The text, and the gradient of a sum in which every entry counts differently."""
    weights = torch.linspace(-1, 2, text.numel(), dtype=text.dtype).view(text.shape)
    return text.detach(), torch.autograd.grad((text * weights).sum(), leaf)[0]


def agree(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert_near(a, b, tolerance)
        assert b.abs().max() > 1e-3


class Rows:
    """How many tokens pass through the MLP of each block, and how often."""

    def __init__(self, backbone: OpenClipBackbone) -> None:
        text: Any = getattr(backbone.model, "text", backbone.model)
        self.calls: list[list[int]] = [[] for _ in text.transformer.resblocks]
        for block, calls in zip(text.transformer.resblocks, self.calls, strict=True):
            block.mlp.register_forward_pre_hook(lambda _, x, calls=calls: calls.append(x[0].numel() // x[0].shape[-1]))

    def clear(self) -> None:
        for calls in self.calls:
            calls.clear()


@pytest.mark.parametrize("mode", ["shared", "csc"])
@pytest.mark.parametrize("custom", [False, True], ids=["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("name", TOWERS)
def test_text_and_gradient_are_those_of_the_whole_tower(name: str, custom: bool, mode: Mode) -> None:
    backbone = tower(custom=custom, **TOWERS[name])
    assert backbone._text().known == (name != "custom blocks")
    assert_near(backbone.encode_prompts(backbone.embed_prompts(ids(backbone))), backbone.model.encode_text(ids(backbone)), 1e-10)
    for classes in (4, 1):
        prompts = learner(backbone, mode, classes)
        wanted = text_and_slope(whole_tower(backbone, prompts()), prompts.context)
        agree(text_and_slope(backbone.encode_prompts(prompts()), prompts.context), wanted)
        agree(text_and_slope(backbone.encode_prompts(prompts(), chunk_size=3), prompts.context), wanted)
    assert all(p.grad is None for p in backbone.parameters())


def test_only_what_reaches_the_features_is_computed() -> None:
    for mode, prefix in (("shared", 1 + CONTEXT), ("csc", 1)):
        backbone = tower()
        prompts = learner(backbone, mode)  # type: ignore[arg-type]
        rows = Rows(backbone)
        backbone.encode_prompts(prompts())
        tokens = int((prompts.eot + 1 - prefix).sum())
        assert rows.calls == [[prefix + tokens], [prefix + tokens], [4]]
        rows.clear()
        backbone.encode_prompts(prompts()._replace(prefix=0))
        tokens += 4 * prefix
        assert rows.calls == [[tokens], [tokens], [4]]  # nobody said that a prefix is shared


@pytest.mark.parametrize("prefix", range(7))
def test_any_prefix_that_is_shared_gives_the_same(prefix: int) -> None:
    """From nothing to all but the end of the shortest prompt; the gradient of what is shared arrives as a sum."""
    backbone = tower()
    torch.manual_seed(2)
    shared, own = torch.randn(6, 32, dtype=torch.float64), torch.randn(3, 6, 32, dtype=torch.float64)
    embeddings = torch.cat([shared.expand(3, -1, -1), own], dim=1).requires_grad_()
    eot = torch.tensor([8, 6, 10])
    wanted = text_and_slope(whole_tower(backbone, PromptEmbeddings(embeddings, eot)), embeddings)
    text, slope = text_and_slope(backbone.encode_prompts(PromptEmbeddings(embeddings, eot, prefix)), embeddings)
    assert_near(text, wanted[0], 1e-10)
    torch.testing.assert_close(slope[:, :prefix].sum(dim=0), wanted[1][:, :prefix].sum(dim=0), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(slope[:, prefix:], wanted[1][:, prefix:], rtol=1e-9, atol=1e-11)


def test_a_prefix_must_end_before_the_ends() -> None:
    backbone = tower()
    embeddings, eot, _ = learner(backbone, "shared")()
    for prefix in (-1, int(eot.min()) + 1, embeddings.shape[1]):
        with pytest.raises(ValueError, match=f"^OpenClipBackbone: prompts.prefix must end before every eot, got {prefix} of"):
            backbone.encode_prompts(PromptEmbeddings(embeddings, eot, prefix))


@pytest.mark.parametrize("mode", ["shared", "csc"])
def test_no_class_at_all(mode: Mode) -> None:
    backbone = tower()
    text = backbone.encode_prompts(learner(backbone, mode)(torch.arange(0)))
    assert text.shape == (0, 16)


@pytest.mark.parametrize("mode", ["shared", "csc"])
def test_padded_as_on_an_accelerator(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form that never asks how many tokens there are; here it runs on the CPU."""
    backbone = tower()
    prompts = learner(backbone, mode)
    wanted = text_and_slope(backbone.encode_prompts(prompts()), prompts.context)
    monkeypatch.setattr(_causal, "_packs", lambda x: False)
    rows = Rows(backbone)
    agree(text_and_slope(backbone.encode_prompts(prompts()), prompts.context), wanted)
    given = prompts()
    assert isinstance(given, PromptEmbeddings)
    assert rows.calls[0] == [given.prefix + 4 * (given.embeddings.shape[1] - given.prefix)]


@pytest.mark.parametrize("mode", ["shared", "csc"])
@pytest.mark.parametrize("name", ["plain", "custom blocks"])
@pytest.mark.parametrize("chunk_size", [1, 2, 5, 7, 8])
def test_chunks_change_nothing(chunk_size: int, name: str, mode: Mode) -> None:
    backbone = tower(**TOWERS[name])
    prompts = learner(backbone, mode, 7)
    wanted = text_and_slope(backbone.encode_prompts(prompts()), prompts.context)
    rows = Rows(backbone)
    agree(text_and_slope(backbone.encode_prompts(prompts(), chunk_size=chunk_size), prompts.context), wanted)
    chunks = -(-7 // chunk_size)
    assert len(rows.calls[-1]) == (chunks if chunks == 1 else 2 * chunks)  # once more in the backward pass
    with torch.no_grad():
        assert_near(backbone.encode_prompts(prompts(), chunk_size=chunk_size), wanted[0], 1e-10)


def kept_bytes(backbone: OpenClipBackbone, prompts: PromptEmbeddings, chunk_size: int | None) -> int:
    """What the forward pass leaves for the backward pass, parameters aside."""
    known = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = backbone.encode_prompts(prompts, chunk_size=chunk_size)
    assert result.requires_grad
    return sum(x.untyped_storage().nbytes() for pointer, x in kept.items() if pointer not in known)


def test_memory_of_chunks_hardly_grows() -> None:
    backbone = tower()
    few, many = (learner(backbone, "shared", classes) for classes in (8, 80))
    assert kept_bytes(backbone, many(), None) > 5 * kept_bytes(backbone, few(), None)
    assert kept_bytes(backbone, many(), 4) < kept_bytes(backbone, few(), None)


def test_chunks_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default the classes of one chunk keep a bounded number of bytes: 9 widths a token and block."""
    backbone = tower()
    prompts = learner(backbone, "shared", 7)
    wanted = text_and_slope(backbone.encode_prompts(prompts()), prompts.context)
    tokens = prompts().embeddings.shape[1] - 1 - CONTEXT
    monkeypatch.setattr(_text, "_KEPT_BYTES", 4 * tokens * 3 * 9 * 32 * 8 - 1)
    rows = Rows(backbone)
    agree(text_and_slope(backbone.encode_prompts(prompts()), prompts.context), wanted)
    assert rows.calls[-1] == [3, 3, 1, *reversed([3, 3, 1])]
    monkeypatch.setattr(_text, "_KEPT_BYTES", 1)
    assert backbone.encode_prompts(prompts()).shape == (7, 16)


def test_refuses_no_chunk_size() -> None:
    backbone = tower()
    with pytest.raises(ValueError, match="^OpenClipBackbone: chunk_size must be at least 1, got 0"):
        backbone.encode_prompts(learner(backbone, "shared")(), chunk_size=0)


class OwnBlock(open_clip.transformer.ResidualAttentionBlock):  # type: ignore[misc, name-defined]
    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return 2 * x


class Twice(nn.MultiheadAttention):
    def forward(self, q: Tensor, *_: Any, **__: Any) -> Any:
        return 2 * q, None


# What is done to a block that must not be passed by.
TOUCHED: dict[str, Callable[[Any], Any]] = {
    "hook on block": lambda block: block.register_forward_hook(lambda _, x, out: 2 * out),
    "hook on attention": lambda block: block.attn.register_forward_pre_hook(lambda _, x: (2 * x[0], *x[1:])),
    "other class": lambda block: setattr(block, "__class__", OwnBlock),
    "replaced forward": lambda block: setattr(block, "forward", lambda x, attn_mask=None: 2 * x),
    "replaced attention": lambda block: setattr(block, "attention", lambda q_x, **_: 2 * q_x),
    "added part": lambda block: setattr(block, "adapter", nn.Identity()),
    "other attention": lambda block: setattr(block, "attn", Twice(32, 2)),
    "zero attention": lambda block: setattr(block.attn, "add_zero_attn", True),
}


@pytest.mark.parametrize("how", TOUCHED)
def test_a_tower_that_is_not_known_is_run_as_it_is(how: str) -> None:
    backbone = tower()
    TOUCHED[how](backbone.model.transformer.resblocks[1])
    backbone.double().requires_grad_(False)
    prompts = learner(backbone, "shared")
    wanted = text_and_slope(whole_tower(backbone, prompts()), prompts.context)
    agree(text_and_slope(backbone.encode_prompts(prompts()), prompts.context), wanted)
    assert not backbone._text().known
    untouched = tower().encode_prompts(prompts()).detach()
    assert torch.allclose(untouched, wanted[0]) == (how == "added part")  # what was done makes a difference


def test_a_tower_that_is_not_causal_ignores_the_prefix() -> None:
    backbone = tower(no_causal_mask=True)
    embeddings, eot, _ = plain = backbone.embed_prompts(ids(backbone))
    assert_near(backbone.encode_prompts(plain), backbone.model.encode_text(ids(backbone)), 1e-10)
    embeddings = torch.cat([embeddings[:1, :4].expand(4, -1, -1), embeddings[:, 4:]], dim=1).requires_grad_()
    wanted = text_and_slope(backbone.encode_prompts(PromptEmbeddings(embeddings, eot)), embeddings)
    got = text_and_slope(backbone.encode_prompts(PromptEmbeddings(embeddings, eot, 3)), embeddings)
    agree(got, wanted)
    assert_near(wanted[0], whole_tower(backbone, PromptEmbeddings(embeddings, eot)), 1e-10)


@pytest.mark.parametrize("mode", ["shared", "csc"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_half_precision_is_as_near_as_the_whole_tower(way: str, dtype: torch.dtype, mode: Mode) -> None:
    exact = tower()
    double = learner(exact, mode)
    wanted = text_and_slope(exact.encode_prompts(double()), double.context)
    backbone = tower(dtype=dtype if way == "weights" else torch.float32)
    prompts = copy.deepcopy(double).to(backbone.model.positional_embedding.dtype)
    distances = []
    for encode in (backbone.encode_prompts, lambda given: whole_tower(backbone, given)):
        with torch.autocast("cpu", dtype, enabled=way == "autocast"):
            text = encode(prompts())
        assert text.dtype == dtype
        got = text_and_slope(text, prompts.context)
        distances.append([float((a.double() - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True)])
    for own, whole in zip(*distances, strict=True):
        assert own < 4 * whole + 1e-3 and whole < 0.2


def test_prompts_that_stay_as_they_are_take_the_way_of_encode_text() -> None:
    backbone = tower(dtype=torch.float32)
    prompts = backbone.embed_prompts(ids(backbone))
    wanted = backbone.encode_text(ids(backbone))
    assert_near(backbone.encode_prompts(prompts), wanted, 1e-5)
    rows = Rows(backbone)
    trained = PromptEmbeddings(prompts.embeddings.requires_grad_(), prompts.eot)
    assert_near(backbone.encode_prompts(trained), wanted, 1e-5)
    assert rows.calls[-1] == [4]  # with a gradient, only what reaches the features
    with torch.no_grad():
        assert_near(backbone.encode_prompts(trained), wanted, 1e-5)
        rows.clear()
        assert_near(backbone.encode_prompts(prompts._replace(prefix=1)), wanted, 1e-5)
        assert rows.calls[-1] == [4]  # and where a prefix says so


def test_a_list_of_prompts_gives_its_rows_one_after_the_other() -> None:
    backbone = tower()
    positive, negative = learner(backbone, "shared", 4), learner(backbone, "shared", 3)
    nn.init.normal_(negative.context)
    rows = Rows(backbone)
    text = backbone.encode_prompts([positive(), negative()], chunk_size=5)
    tokens = [1 + CONTEXT + int((prompts.eot - CONTEXT).sum()) for prompts in (positive, negative)]
    assert rows.calls == [tokens, tokens, [4, 3]]
    assert_near(text[:4], backbone.encode_prompts(positive()), 1e-10)
    assert_near(text[4:], backbone.encode_prompts(negative()), 1e-10)


@pytest.mark.parametrize("mode", ["fixed", "residual"])
def test_finished_text_needs_no_tower(mode: Any) -> None:
    backbone = tower(dtype=torch.float32)
    prompts = PromptLearner(mode, text=backbone.encode_text(ids(backbone)))
    rows = Rows(backbone)
    text = prompts()
    assert isinstance(text, Tensor) and backbone.encode_prompts(text) is text and rows.calls == [[], [], []]


@pytest.mark.parametrize("mask", ["open", "banded", "bool"])
def test_other_masks_take_the_models_own_way(mask: str) -> None:
    backbone = tower()
    plain = backbone.model.attn_mask
    backbone.model.attn_mask = {
        "open": torch.zeros_like(plain),
        "banded": torch.full_like(plain, -torch.inf).triu(1) + torch.full_like(plain, -torch.inf).tril(-4),
        "bool": plain < 0,
    }[mask]
    prompts = backbone.embed_prompts(ids(backbone))
    trained = PromptEmbeddings(prompts.embeddings.requires_grad_(), prompts.eot)
    assert_near(backbone.encode_prompts(trained), whole_tower(backbone, trained), 1e-10)
    assert not backbone._text().causal


def test_checkpointing_and_hooks_on_all_modules_take_the_models_own_way() -> None:
    backbone = tower()
    assert backbone._text().known
    backbone.model.set_grad_checkpointing(True)
    assert not backbone._text().known
    backbone.model.set_grad_checkpointing(False)
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert not backbone._text().known
    assert backbone._text().known


def test_a_plain_pair_is_taken_for_prompts() -> None:
    backbone = tower()
    embeddings, eot, _ = backbone.embed_prompts(ids(backbone))
    assert_near(backbone.encode_prompts((embeddings, eot)), backbone.encode_prompts(PromptEmbeddings(embeddings, eot)), 1e-10)
