"""Tiny models of transformers with random weights, and a tokenizer for their texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.towers import stir

transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402  (transformers brings it)

PAD, START, END, UNKNOWN = 0, 1, 2, 3
WORDS = ["a", "photo", "of", "the", "cat", "dog", "car", "cow", "small", "red", "."]
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 12,
    "bos_token_id": START,
    "eos_token_id": END,
    "pad_token_id": PAD,
}
EYES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
WITH_TEXT = ("clip", "metaclip_2", "altclip", "siglip", "siglip2")
IMAGES_ALONE = ("dinov2", "dinov2_with_registers", "dinov3_vit")
FAMILIES = (*WITH_TEXT, *IMAGES_ALONE)


def config(family: str, **eyes: Any) -> Any:
    """The config of a tiny model, with other settings of its image tower."""
    vision = {**EYES, **eyes}
    if family == "clip":  # 99 is the highest id: with it both ways to find the end agree
        text = {**TEXT, "eos_token_id": 99}
        return transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    if family == "metaclip_2":
        return transformers.MetaClip2Config(text_config=TEXT, vision_config=vision, projection_dim=16)
    if family == "altclip":
        text = {**TEXT, "max_position_embeddings": 13, "project_dim": 24}
        return transformers.AltCLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    if family == "siglip":
        return transformers.SiglipConfig(text_config={**TEXT, "projection_size": 32}, vision_config=vision)
    if family == "siglip2":
        return transformers.Siglip2Config(
            text_config={**TEXT, "projection_size": 32}, vision_config={**vision, "num_patches": 16}
        )
    if family == "dinov3_vit":
        return transformers.DINOv3ViTConfig(**vision, num_register_tokens=3)
    vision["mlp_ratio"] = vision.pop("intermediate_size") // 32
    if family == "dinov2":
        return transformers.Dinov2Config(**vision)
    return transformers.Dinov2WithRegistersConfig(**vision, num_register_tokens=2)


CLASSES = {
    "clip": "CLIPModel",
    "metaclip_2": "MetaClip2Model",
    "altclip": "AltCLIPModel",
    "siglip": "SiglipModel",
    "siglip2": "Siglip2Model",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
}


def tiny_hf(family: str, **eyes: Any) -> Any:
    torch.manual_seed(0)
    return stir(getattr(transformers, CLASSES[family])(config(family, **eyes)))


def tokenizer(end: int = END, *, words: Sequence[str] = WORDS, length: int = 12, marks: bool = True) -> Any:
    """Words by their places in a list, between a start and an end token; padded at the right."""
    vocabulary = {"<pad>": PAD, "<s>": START, "<unk>": UNKNOWN, "</s>": end}
    vocabulary |= {word: place for place, word in enumerate(words, start=10)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if marks:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", START), ("</s>", end)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
        padding_side="right",
    )


def tokenizer_of(family: str) -> Any:
    return tokenizer(99 if family == "clip" else END)


def own_image_features(model: Any, family: str, images: Tensor, projection: Any = None) -> Tensor:
    """What transformers itself gives for images: a tensor before version 5, and an object from then on."""
    if family in IMAGES_ALONE:
        found = model(images).pooler_output
        return found if projection is None else found @ projection.T
    if family == "siglip2":
        patches = torch.stack([cut(image) for image in images])
        shape = torch.tensor([[images.shape[2] // 8, images.shape[3] // 8]]).repeat(len(images), 1)
        mask = torch.ones(patches.shape[:2], dtype=torch.int32)
        found = model.get_image_features(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shape)
    else:
        found = model.get_image_features(pixel_values=images, interpolate_pos_encoding=True)
    return found if isinstance(found, Tensor) else found.pooler_output


def own_text_features(model: Any, **inputs: Any) -> Tensor:
    found = model.get_text_features(**inputs)
    return found if isinstance(found, Tensor) else found.pooler_output


def cut(image: Tensor, step: int = 8) -> Tensor:
    """Patches (N, P P 3) of an image (3, H, W), as the processor cuts it, which took (H, W, 3) before version 5."""
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

    try:
        found = convert_image_to_patches(image, step)
    except (ValueError, RuntimeError, TypeError):
        found = convert_image_to_patches(image.permute(1, 2, 0).numpy(), step)
    return torch.as_tensor(found).reshape(-1, 3 * step * step)
