"""Prompts and class texts through the text towers of open_clip, against what the model itself encodes."""

from __future__ import annotations

import warnings
from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from tests.helpers.towers import VIT, assert_near, tiny
from trm_losses import PromptEmbeddings, PromptLearner
from trm_losses.backbones import OpenClipBackbone

TEXTS = ["a photo of a dog.", "a cat", "two people on a sofa, indoors"]


def test_texts_are_read_by_the_tokenizer_of_clip() -> None:
    backbone = OpenClipBackbone(tiny(VIT))
    ids = open_clip.SimpleTokenizer(context_length=12)(TEXTS)
    assert torch.equal(backbone.tokenize(TEXTS), ids)
    wanted = backbone.model.encode_text(ids)
    prompts = backbone.embed_prompts(TEXTS)
    assert prompts.eot.tolist() == [7, 3, 8]
    for got in (backbone.encode_prompts(prompts), backbone.encode_text(TEXTS), backbone.encode_text(ids)):
        assert_near(got, wanted)


def test_a_text_tower_that_gives_its_tokens_too() -> None:
    plain, both = (OpenClipBackbone(tiny(VIT, custom=True, text={"output_tokens": how})) for how in (False, True))
    assert torch.equal(both.encode_text(TEXTS), plain.encode_text(TEXTS))


def test_prompt_errors() -> None:
    backbone = OpenClipBackbone(tiny(VIT))
    embeddings, eot, _ = backbone.embed_prompts(TEXTS)
    with pytest.raises(ValueError, match=r"embeddings must have shape \(C, L, Dw\) = \(C, L, 32\), got \(3, 12, 31\)"):
        backbone.encode_prompts(PromptEmbeddings(embeddings[..., :31], eot))
    with pytest.raises(ValueError, match=r"eot must have shape \(C\) = \(3\), got \(2,\)"):
        backbone.encode_prompts(PromptEmbeddings(embeddings, eot[:2]))
    with pytest.raises(ValueError, match="prompts must be at most 12 tokens long, got 24"):
        backbone.encode_prompts(PromptEmbeddings(embeddings.repeat(1, 2, 1), eot))


@pytest.mark.parametrize("custom", [False, True], ids=["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("mode", ["shared", "csc"])
def test_contexts_that_spell_words_in_a_tower_that_sees_its_padding(mode: Any, custom: bool) -> None:
    backbone = OpenClipBackbone(tiny(VIT, custom=custom, text={"no_causal_mask": True}))
    words = backbone.embed_prompts(["a photo of"]).embeddings[0, 1:4]
    names = backbone.embed_prompts(["dog.", "red cat."])
    prompts = PromptLearner(mode, names=names, num_context=3, context_length=12)
    with torch.no_grad():
        prompts.context.copy_(words)
    assert_near(backbone.encode_prompts(prompts()), backbone.encode_text(["a photo of dog.", "a photo of red cat."]))


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


def test_template_text() -> None:
    backbone = OpenClipBackbone(tiny(VIT))
    names, templates = ["dog", "potted plant"], ["a photo of a {}.", "{}", "a sketch of a {}, {}"]
    got = backbone.template_text(names, templates)
    for c, name in enumerate(names):
        mean = torch.zeros(16, dtype=torch.float64)
        for template in templates:
            feature = backbone.model.encode_text(backbone.tokenize([template.replace("{}", name)]))[0].double()
            mean += feature / feature.square().sum().sqrt() / len(templates)
        assert_near(got[c], mean / mean.square().sum().sqrt(), 1e-5)
    for bad in ([], ["a photo"]):
        with pytest.raises(ValueError, match="templates must be"):
            backbone.template_text(names, bad)


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
