"""open_clip's short text forward, rebuilt so that it starts from embeddings instead of token ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._checks import Dims
from ..prompts import PromptEmbeddings

__all__ = ["TextTower"]

_OWNER = "OpenClipBackbone"


class TextTower:
    """The parts of an open_clip text tower, in the order of ``encode_text``.

    Holds references to the model's own parts, whether they hang on the model (``CLIP``) or on its ``text``
    (``CustomTextCLIP``); owns no parameter.
    """

    def __init__(self, open_clip: Any, model: nn.Module) -> None:
        text: Any = getattr(model, "text", model)
        if not isinstance(text, (open_clip.CLIP, open_clip.transformer.TextTransformer)):
            raise ValueError(
                f"{_OWNER}: prompts cannot pass through the text tower {type(text).__name__}, which is not "
                "open_clip's own transformer; encode_text works on it"
            )
        plain = text is model
        self.pool: str = text.text_pool_type if plain else text.pool_type
        self.eos_id: int = text.text_eos_id if plain else text.eos_id
        unreadable = "an added class token" if getattr(text, "cls_emb", None) is not None else None
        if self.pool not in ("argmax", "eos", "last"):
            unreadable = f"pool type {self.pool!r}"
        if unreadable is None and getattr(text, "use_pad_mask", False):
            unreadable = "a mask of the padding's token ids"
        if unreadable is not None:
            raise ValueError(
                f"{_OWNER}: prompts cannot pass through a text tower with {unreadable}; its feature must be "
                "read from one token of the prompt (pool type 'argmax', 'eos' or 'last'); encode_text works "
                "on it"
            )
        self.token_embedding: Any = text.token_embedding
        self.positions: Tensor = text.positional_embedding
        self.transformer: Any = text.transformer
        self.mask: Tensor | None = text.attn_mask  # None: every token sees every other
        self.norm: Any = text.ln_final
        self.projection: Any = text.text_projection  # a matrix, a linear layer, or None

    def embed(self, ids: Tensor) -> PromptEmbeddings:
        """Look the ids (C, L) up in the token table, and find the position that the feature is read from."""
        if self.pool == "argmax":  # CLIP's end-of-text token has the highest id of all
            eot = ids.argmax(dim=-1)
        elif self.pool == "eos":
            eot = (ids == self.eos_id).int().argmax(dim=-1)
        else:
            eot = torch.full_like(ids[:, 0], ids.shape[1] - 1)
        return PromptEmbeddings(self.token_embedding(ids), eot)  # the table is frozen: no gradient starts here

    def encode(self, prompts: PromptEmbeddings) -> Tensor:
        """Run the tower on embeddings (C, L, Dw) and read the features (C, D) at ``prompts.eot``."""
        embeddings, eot = prompts
        context, width = self.positions.shape
        dims = Dims(_OWNER, Dw=width)
        dims.check("embeddings", embeddings, "C L Dw", hint="take them from embed_prompts of the same model")
        dims.check("eot", eot, "C", floating=False)
        length = embeddings.shape[1]
        if length > context or (length < context and self.mask is None):
            bound = "at most" if self.mask is not None else "for a tower that is not causal exactly"
            raise ValueError(f"{_OWNER}: prompts must be {bound} {context} tokens long, got {length}")
        dtype = self.transformer.get_cast_dtype()
        x = embeddings.to(dtype) + self.positions[:length].to(dtype)
        x = self.transformer(x, attn_mask=None if self.mask is None else self.mask[:length, :length])
        x = self.norm(x)
        features: Tensor = x[torch.arange(x.shape[0], device=x.device), eot]
        if isinstance(self.projection, nn.Linear):
            features = self.projection(features)
        elif self.projection is not None:
            features = features @ self.projection
        return features
