"""A short text forward, rebuilt so that it starts from embeddings instead of token ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .._checks import Dims, check_number
from ..prompts import PromptEmbeddings
from ._causal import end_states, is_causal, is_known

_KEPT_BYTES = 2**31  # of activations, above which classes go through the tower in chunks


@dataclass(kw_only=True, eq=False)
class TextTower:
    """The parts of a text tower, in the order of its forward; it owns no parameter.

    ``owner`` is the public class that errors name. ``pool`` says which state is the feature: that of the highest id
    ("argmax"), of the first ``eos_id`` ("eos"), or of the last token ("last"). ``mask`` is added to the scores (None: every
    token sees every other), ``causal`` says what it is known to be, and ``known`` that the blocks are those of
    :mod:`._causal`. ``pad_id`` is the token that texts are filled up with; a "last" tower repeats its own last one.
    """

    owner: str
    pool: str
    eos_id: int = -1
    token_embedding: Any
    positions: Tensor  # (context length, Dw)
    transformer: Any = None  # called on (C, L, Dw) with attn_mask=; has resblocks and get_cast_dtype
    mask: Tensor | None = None
    causal: bool = False
    known: bool = False
    norm: Any
    projection: Any  # a matrix, a module, or None
    pad_id: int = 0

    @property
    def any_length(self) -> bool:
        """Whether what follows the end of a text reaches no feature."""
        return self.causal

    def embed(self, ids: Tensor) -> PromptEmbeddings:
        """Look the ids (C, L) up in the token table, and find the position that the feature is read from.

        A tower that is not causal and reads the last token has padding up to there: of that, the first token.
        """
        if not self.any_length:
            hint = "padding reaches the feature of this tower, so give the ids with theirs"
            Dims(self.owner, L=len(self.positions)).check("ids", ids, "C L", floating=False, hint=hint)
        if self.pool == "argmax":  # CLIP's end-of-text token has the highest id of all
            eot = ids.argmax(dim=-1)
        elif self.pool == "eos":
            eot = (ids == self.eos_id).int().argmax(dim=-1)
        elif self.causal:
            eot = torch.full_like(ids[:, 0], ids.shape[1] - 1)
        else:
            eot = ids.shape[1] - (ids == ids[:, -1:]).flip(1).cumprod(dim=1).sum(dim=1)
        return PromptEmbeddings(self.token_embedding(ids), eot)  # the table is frozen: no gradient starts here

    def encode(self, prompts: PromptEmbeddings, chunk_size: int | None = None) -> Tensor:
        """Run the tower on embeddings (C, L, Dw) and read the features (C, D) at ``prompts.eot``."""
        prompts = PromptEmbeddings(*prompts)  # a plain pair will do
        embeddings, eot, _ = prompts
        context, width = self.positions.shape
        dims = Dims(self.owner, Dw=width)
        dims.check("embeddings", embeddings, "C L Dw", hint="take them from embed_prompts of the same model")
        dims.check("eot", eot, "C", floating=False)
        classes, length = embeddings.shape[:2]
        if length > context:
            raise ValueError(f"{self.owner}: prompts must be at most {context} tokens long, got {length}")
        if not self.any_length:  # padding reaches the feature: what was cut of it comes back
            padding = embeddings[:, -1:] if self.pool == "last" else self.token_embedding.weight[self.pad_id]
            embeddings = torch.cat([embeddings, padding.expand(classes, context - length, width)], dim=1)
            eot = torch.full_like(eot, context - 1) if self.pool == "last" else eot
        if chunk_size is not None:
            check_number(self.owner, "chunk_size", chunk_size, 1)
        whole = length == context and not prompts.prefix and not (embeddings.requires_grad and torch.is_grad_enabled())
        if self.mask is None or not self.causal or not self.known or whole or not classes:
            states = self._in_chunks(self._all_states, embeddings, eot, chunk_size or classes or 1)
        else:
            states = self._end_states(self.mask, prompts, chunk_size)
        features: Tensor = self.norm(states)
        if self.projection is None:
            return features
        projected: Tensor = features @ self.projection if isinstance(self.projection, Tensor) else self.projection(features)
        return projected

    def _all_states(self, embeddings: Tensor, eot: Tensor) -> Tensor:
        """States (C, W) at the ends by the model's own modules, on every token there is."""
        length = embeddings.shape[1]
        mask = None if self.mask is None else self.mask[:length, :length]
        x: Tensor = self.transformer(self._placed(embeddings, 0), attn_mask=mask)
        return x[torch.arange(x.shape[0], device=x.device), eot]

    def _end_states(self, mask: Tensor, prompts: PromptEmbeddings, chunk_size: int | None) -> Tensor:
        """The same states, from the tokens that reach them."""
        embeddings, eot, prefix = prompts
        length = embeddings.shape[1]
        if not 0 <= prefix < length or (eot.device.type == "cpu" and int(eot.min()) < prefix):
            raise ValueError(f"{self.owner}: prompts.prefix must end before every eot, got {prefix} of {length} tokens")
        blocks = self.transformer.resblocks
        first, own = torch.split(embeddings, [prefix, length - prefix], dim=1)
        shared = self._placed(first[0], 0)

        def states(own: Tensor, ends: Tensor) -> Tensor:
            return end_states(blocks, shared, self._placed(own, prefix), ends, mask)

        if chunk_size is None:
            kept = own.shape[1] * len(blocks) * 9 * own.shape[2] * self.transformer.get_cast_dtype().itemsize
            chunk_size = max(1, _KEPT_BYTES // kept)
        return self._in_chunks(states, own, eot - prefix, chunk_size)

    def _in_chunks(self, states: Callable[[Tensor, Tensor], Tensor], x: Tensor, ends: Tensor, size: int) -> Tensor:
        """``states(x, ends)``; where that is more than one chunk of classes, each is computed again in the backward pass."""
        if size >= len(x):
            return states(x, ends)
        chunks = zip(torch.split(x, size), torch.split(ends, size), strict=True)
        return torch.cat([checkpoint(states, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks])

    def _placed(self, embeddings: Tensor, start: int) -> Tensor:
        """Add the positions from ``start`` on."""
        dtype = self.transformer.get_cast_dtype()
        return embeddings.to(dtype) + self.positions[start : start + embeddings.shape[-2]].to(dtype)


def open_clip_tower(open_clip: Any, model: nn.Module, *, causal: bool | None = None) -> TextTower:
    """The text tower of open_clip, whether its parts hang on the model (``CLIP``) or on its ``text`` (``CustomTextCLIP``).

    ``causal`` says what its mask is known to be, so that a device is asked once.
    """
    owner = "OpenClipBackbone"
    text: Any = getattr(model, "text", model)
    if not isinstance(text, (open_clip.CLIP, open_clip.transformer.TextTransformer)):
        raise ValueError(
            f"{owner}: prompts cannot pass through the text tower {type(text).__name__}, which is not "
            "open_clip's own transformer; encode_text works on it"
        )
    plain = text is model
    pool: str = text.text_pool_type if plain else text.pool_type
    unreadable = "an added class token" if getattr(text, "cls_emb", None) is not None else None
    if pool not in ("argmax", "eos", "last"):
        unreadable = f"pool type {pool!r}"
    if unreadable is None and getattr(text, "use_pad_mask", False):
        unreadable = "a mask of the padding's token ids"
    if unreadable is not None:
        raise ValueError(
            f"{owner}: prompts cannot pass through a text tower with {unreadable}; its feature must be "
            "read from one token of the prompt (pool type 'argmax', 'eos' or 'last'); encode_text works "
            "on it"
        )
    return TextTower(
        owner=owner,
        pool=pool,
        pad_id=getattr(text, "pad_id", 0),
        eos_id=text.text_eos_id if plain else text.eos_id,
        token_embedding=text.token_embedding,
        positions=text.positional_embedding,
        transformer=text.transformer,
        mask=text.attn_mask,
        causal=is_causal(text.attn_mask) if causal is None else causal,
        known=is_known(open_clip, text.transformer),
        norm=text.ln_final,
        projection=text.text_projection,
    )
