"""Text towers of transformers in the parts that prompts pass through."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..prompts import PromptEmbeddings
from ._causal import is_touched
from ._text import TextTower

_PARTS = {"self_attn", "layer_norm1", "mlp", "layer_norm2"}
_LAYERS = {
    ("transformers.models.clip.modeling_clip", "CLIPEncoderLayer"),
    ("transformers.models.metaclip_2.modeling_metaclip_2", "MetaClip2EncoderLayer"),
}
_LINEAR = ("q_proj", "k_proj", "v_proj", "out_proj")


class Blocks:
    """The blocks of a CLIP or SigLIP text tower, whose parts have the names that open_clip gives them."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder

    def __call__(self, x: Tensor, *, attn_mask: Tensor | None) -> Tensor:
        mask = None if attn_mask is None else attn_mask.to(x.dtype)[None, None]
        states: Tensor = self.encoder(inputs_embeds=x, attention_mask=mask).last_hidden_state
        return states

    def get_cast_dtype(self) -> torch.dtype:
        """That of the weights."""
        dtype: torch.dtype = self.encoder.layers[0].layer_norm1.weight.dtype
        return dtype

    @functools.cached_property
    def resblocks(self) -> list[Any]:
        """One after the other; the weights of queries, keys and values in one matrix."""
        nothing = nn.Identity()
        return [
            SimpleNamespace(
                ln_1=layer.layer_norm1,
                attn=_attention(layer.self_attn),
                ls_1=nothing,
                ln_2=layer.layer_norm2,
                mlp=layer.mlp,
                ls_2=nothing,
            )
            for layer in self.encoder.layers
        ]


def _attention(attn: Any) -> Any:
    parts = (attn.q_proj, attn.k_proj, attn.v_proj)
    return SimpleNamespace(
        in_proj_weight=torch.cat([part.weight for part in parts]),
        in_proj_bias=torch.cat([part.bias for part in parts]),
        out_proj=attn.out_proj,
        embed_dim=attn.embed_dim,
        num_heads=attn.num_heads,
        head_dim=attn.head_dim,
    )


def _is_known(text: Any) -> bool:
    """Whether the layers are those of transformers, as they were built: see :func:`._causal.is_known`."""
    if nn.modules.module._has_any_global_hook() or is_touched(text.encoder):
        return False
    for layer in text.encoder.layers:
        kind, parts = (type(layer).__module__, type(layer).__name__), {name for name, _ in layer.named_children()}
        if kind not in _LAYERS or parts != _PARTS:
            return False
        attn = getattr(layer, "self_attn", None)
        projections = [getattr(attn, name, None) for name in _LINEAR]
        if any(type(part) is not nn.Linear or part.bias is None for part in projections):
            return False
        if any(is_touched(part) for part in (layer, attn, *projections)):
            return False
    return True


def clip_tower(owner: str, model: Any) -> TextTower:
    """A causal tower whose feature is the state of the end token."""
    text = model.text_model
    positions: Tensor = text.embeddings.position_embedding.weight
    length = len(positions)
    legacy = text.eos_token_id == 2 and model.config.model_type == "clip"  # configs of the first years name a wrong id
    return TextTower(
        owner=owner,
        pool="argmax" if legacy else "eos",
        eos_id=text.eos_token_id,
        token_embedding=text.embeddings.token_embedding,
        positions=positions,
        transformer=Blocks(text.encoder),
        mask=torch.full((length, length), -math.inf, device=positions.device).triu(1),
        causal=True,
        known=_is_known(text),
        norm=text.final_layer_norm,
        projection=model.text_projection,
    )


def siglip_tower(owner: str, model: Any) -> TextTower:
    """A tower whose tokens see each other, and whose feature is the state of the last one."""
    text = model.text_model
    return TextTower(
        owner=owner,
        pool="last",
        token_embedding=text.embeddings.token_embedding,
        positions=text.embeddings.position_embedding.weight,
        transformer=Blocks(text.encoder),
        norm=text.final_layer_norm,
        projection=text.head,
    )


@dataclass(kw_only=True, eq=False)
class PaddedTower(TextTower):
    """A tower whose tokens see each other up to the end of the text, and whose feature is the state of the first one.

    ``eot`` is where a text ends; contexts that come between move it.
    """

    text: Any

    @property
    def any_length(self) -> bool:
        """Yes: what follows the end is masked."""
        return True

    def embed(self, ids: Tensor) -> PromptEmbeddings:
        """Look the ids (C, L) up in the token table, and find the last that is no padding."""
        return PromptEmbeddings(self.token_embedding(ids), (ids != self.pad_id).long().cumsum(dim=1).argmax(dim=1))

    def _all_states(self, embeddings: Tensor, eot: Tensor) -> Tensor:
        """States (C, W) of the first tokens."""
        seen = torch.arange(embeddings.shape[1], device=eot.device) <= eot[:, None]
        embeddings = embeddings.to(self.token_embedding.weight.dtype)
        states: Tensor = self.text(inputs_embeds=embeddings, attention_mask=seen.long()).last_hidden_state
        return states[:, 0]


def padded_tower(owner: str, model: Any) -> TextTower:
    """The tower of AltCLIP, a RoBERTa."""
    text = model.text_model
    words = text.roberta.embeddings.word_embeddings
    pad: int = model.config.text_config.pad_token_id
    return PaddedTower(
        owner=owner,
        pool="first",
        token_embedding=words,
        positions=text.roberta.embeddings.position_embeddings.weight[pad + 1 :],  # the first ones are those of padding
        norm=nn.Identity(),
        projection=model.text_projection,
        text=text,
        pad_id=pad,
    )
