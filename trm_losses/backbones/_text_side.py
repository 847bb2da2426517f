"""What every backbone with a text tower offers: texts by names, ids or templates, and prompts in place of ids."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import Dims
from ..prompts import PromptEmbeddings
from ._text import TextTower


class TextSide:
    """Texts of a frozen model; a family says how it tokenizes, how it encodes ids, and what its tower is made of."""

    model: Any

    @property
    def logit_scale(self) -> float:
        """The scale that the model multiplies its cosines with: exp of its learned parameter."""
        return float(self.model.logit_scale.exp())

    @property
    def logit_bias(self) -> float | None:
        """What the model adds to its scaled cosines (SigLIP), or ``None``."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else float(bias)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Turn texts into ids (C, L) on the model's device; a text that would be cut is refused."""
        raise NotImplementedError

    def _encode_ids(self, ids: Tensor) -> Tensor:
        """Features (C, D) of ids (C, L) by the model's own forward."""
        raise NotImplementedError

    def _text(self) -> TextTower:
        """The text tower taken apart."""
        raise NotImplementedError

    def encode_text(self, texts: Sequence[str] | Tensor) -> Tensor:
        """Encode texts, or ids (C, L), into features (C, D) by the model's own forward; no norm, no gradient."""
        ids = self._ids(texts)
        with torch.no_grad():
            return self._encode_ids(ids)

    def embed_prompts(self, texts: Sequence[str] | Tensor) -> PromptEmbeddings:
        """Look up the word embeddings of texts: what a prompt learner puts its contexts into.

        Args:
            texts: C strings, or ids (C, L).

        Returns:
            ``PromptEmbeddings(embeddings, eot)``: (C, L, Dw), without positions, and the position (C,) whose state is the
            feature, or where the text ends in a tower that is not causal and reads its first or its last token (SigLIP).
            ``encode_prompts`` makes ``encode_text`` of it.
        """
        ids = self._ids(texts)
        if not isinstance(texts, Tensor):
            self._warn_of_twins(texts, ids)
        return self._text().embed(ids)

    def encode_prompts(
        self, prompts: PromptEmbeddings | Tensor | list[PromptEmbeddings], *, chunk_size: int | None = None
    ) -> Tensor:
        """Encode prompts given as embeddings into text features (C, D), not normalised.

        The gradient flows to the embeddings, through the frozen tower. They may be shorter than the context length. Mask and
        positions are then cut to fit, or padding comes back where it reaches the feature: in a tower that is not causal. One
        that reads its last token has that repeated, any other the embedding of its padding. A plain tensor is taken for
        finished text features (C, D) and comes back as it is.

        A causal tower of its library's default blocks computes only what reaches a feature. It computes nothing after a
        prompt's end, and the last block for the ends alone. Leading tokens that are the same in all rows
        (``prompts.prefix``) are computed once. :class:`~trm_losses.PromptLearner` gives such prompts. The text is that of
        the whole tower up to rounding (about 1e-6). Whole prompts without a gradient and without a prefix pass through the
        model's own modules and get the bits of ``encode_text``. So do the prompts of any other tower, which costs what it
        costs.

        Args:
            prompts: from :meth:`embed_prompts`, from a prompt learner, or finished text. A list, such as positive and
                negative prompts with contexts of their own, gives the rows of its parts one after the other.
            chunk_size: classes that pass through the tower at once. With more classes each chunk computes what it shares
                for itself, and everything again in the backward pass. Values and gradients are the same, the time is about
                twice, and memory hardly grows with C. Default: as many as keep about 2 GiB for the backward pass, some 1500
                names behind shared contexts in the tower of RN101. In a tower whose blocks are not its library's default
                ones: all.
        """
        if isinstance(prompts, Tensor):
            return prompts
        if isinstance(prompts, list):
            return torch.cat([self.encode_prompts(part, chunk_size=chunk_size) for part in prompts])
        return self._text().encode(prompts, chunk_size)

    def template_text(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Text features of classes over several templates: unit features, averaged, normalised (CLIP).

        Args:
            class_names: C names.
            templates: texts such as ``"a photo of a {}."``, with ``{}`` for the name.

        Returns:
            Text of shape (C, D) with unit rows.
        """
        if not templates or any("{}" not in template for template in templates):
            raise ValueError(
                f"{type(self).__name__}: templates must be a list of texts that hold '{{}}' for the class name, got {templates!r}"
            )
        ids = [self.tokenize([template.replace("{}", name) for name in class_names]) for template in templates]
        self._warn_of_twins(class_names, torch.cat(ids, dim=1))
        features = [F.normalize(self.encode_text(part), dim=-1) for part in ids]
        return F.normalize(torch.stack(features).mean(dim=0), dim=-1)

    def _ids(self, texts: Sequence[str] | Tensor) -> Tensor:
        if not isinstance(texts, Tensor):
            return self.tokenize(texts)
        Dims(type(self).__name__).check("ids", texts, "C L", floating=False)
        return texts

    def _warn_of_twins(self, names: Sequence[str], ids: Tensor) -> None:
        """Name the classes whose ids (C, L) are the same."""
        rows: dict[int, list[int]] = {}
        for row, place in enumerate(torch.unique(ids.cpu(), dim=0, return_inverse=True)[1].tolist()):
            rows.setdefault(place, []).append(row)
        twins = [" and ".join(f"{row} ({names[row]!r})" for row in same) for same in rows.values() if len(same) > 1]
        if twins:
            shown = ", ".join(twins[:3]) + (", ..." if len(twins) > 3 else "")
            warnings.warn(
                f"{type(self).__name__}: classes should differ in their texts, got the same for {shown}; they cannot be told "
                "apart by text: give one of them other words",
                stacklevel=3,
            )


class MissingTokenizer:
    """Stands for a tokenizer that did not load: the model works, and strings raise what happened."""

    def __init__(self, owner: str, reason: str) -> None:
        self.owner = owner
        self.reason = reason

    def __call__(self, texts: list[str], **options: Any) -> Any:
        raise ValueError(
            f"{self.owner}: {self.reason}; give texts as ids (C, L), or a tokenizer to {self.owner}(model, tokenizer=...)"
        )


def refuse_length(owner: str, row: int, text: str, takes: int, length: int) -> None:
    """Raise for a text that takes more tokens than the tower has."""
    raise ValueError(
        f"{owner}: text {row} takes {takes} tokens, that is over the tower's {length}; use a shorter text than "
        f"{text[:60]!r}{'...' if len(text) > 60 else ''}"
    )
