"""ChunkedTRMObjective: the step of TRMObjective for thousands of classes, some of them at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import functional as TF
from ._checks import check_number
from .matching import TextRegionMatchingLoss
from .objective import TRMObjective, TRMOutput
from .pseudo import PseudoLabels
from .regions import Prepared, RegionPooler, Regions, class_chunk


class ChunkedTRMObjective(TRMObjective):
    """:class:`TRMObjective` with less memory and more time: no value of the size (B, C, D) is held.

    A chunk of the classes is pooled at a time, and again in the backward pass. Loss, gradients and state are the same. With
    dropout, contrast and prototypes have a draw of their own. A rule that reads regions is shown their similarities. Contrast and
    bank read the positives alone, and where these are is asked of the device once a step. Compiled code takes all classes at
    once, and so do regions that are given.

    Args:
        pooler, matching, options: of :class:`TRMObjective`.
        class_chunk: classes in a chunk; None: :func:`trm_losses.regions.class_chunk` of each batch. It may be set at any time.

    Shape:
        of :class:`TRMObjective`; ``features`` of the output are :class:`trm_losses.functional.Entries`.

    Raises:
        ValueError, TypeError: of :class:`TRMObjective`; a rule that needs regions and defines no similarities.

    Example:
        >>> import torch
        >>> text = torch.randn(3000, 8)
        >>> objective = ChunkedTRMObjective.from_text(text, total_steps=100)
        >>> objective.class_chunk = 500
        >>> output = objective(torch.randn(2, 4, 8), text, torch.ones(2, 3000))
        >>> output.loss.backward()
        >>> objective.update(output)

    Reference: our choice; recomputation follows Chen et al. (2016).
    """

    def __init__(
        self, pooler: RegionPooler, matching: TextRegionMatchingLoss, *, class_chunk: int | None = None, **options: Any
    ) -> None:
        super().__init__(pooler, matching, **options)
        if class_chunk is not None:
            check_number(type(self).__name__, "class_chunk", class_chunk, 1)
        self.class_chunk = class_chunk

    def forward(
        self,
        tokens: Tensor | Regions,
        text: Tensor,
        targets: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> TRMOutput:
        """Losses of a batch, as of :class:`TRMObjective`."""
        if not isinstance(tokens, Tensor) or (size := self._chunk(tokens)) >= self.pooler.num_classes:
            return super().forward(tokens, text, targets, key_padding_mask=key_padding_mask, ids=ids)
        targets = self._checked(text, targets, ids)
        prepared = self.pooler.prepare(tokens, text, key_padding_mask=key_padding_mask)
        unbiased, compared = self._in_chunks(prepared, text, size)
        logits = {head: value - self.matching.bias for head, value in unbiased.items()}
        query, region = logits["query"], logits.get("region", logits["query"])
        pseudo = None if self.labeler is None else self.labeler(compared, targets, self.bank, logits=query, ids=ids)
        entries = self._entries(prepared, targets, pseudo)
        terms = self._terms(unbiased, logits, entries, text, targets, pseudo)
        loss = torch.stack(list(terms.values())).sum()
        return TRMOutput(loss, terms, entries, compared, text, targets, query, region, pseudo, ids)

    def _chunk(self, tokens: Tensor) -> int:
        """How many classes to take at once."""
        classes = self.pooler.num_classes
        if torch.compiler.is_compiling() or tokens.ndim != 3:
            return classes
        return self.class_chunk or class_chunk(tokens.shape[0], classes, tokens.shape[1], self.pooler.dim)

    def _in_chunks(self, prepared: Prepared, text: Tensor, size: int) -> tuple[dict[str, Tensor], TF.Similarities | None]:
        """Logits (B, C) of each head without the bias, and what the labeler's rule reads of the regions, if it reads any."""

        def use(regions: Regions, classes: slice) -> dict[str, Tensor]:
            found = self._unbiased(regions, text, classes)
            if self.labeler is not None:  # without gradient: last
                compared = self.labeler.similarities(regions.query, self.bank, first=classes.start)
                found |= {} if compared is None else compared._asdict()
            return found

        found = self.pooler.map_classes(use, prepared, size)
        compared = {key: found.pop(key) for key in TF.Similarities._fields if key in found}
        return found, TF.Similarities(**compared) if compared else None

    def _entries(self, prepared: Prepared, targets: Tensor, pseudo: PseudoLabels | None) -> TF.Entries:
        """The regions that contrast and bank read: of positives, known or sure."""
        positives = self._positives(targets, pseudo)
        read = torch.zeros_like(targets, dtype=torch.bool)
        if self.contrast is not None:
            read |= positives >= self.contrast.anchor_threshold
        if self.bank is not None:
            read |= positives == 1
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.contrast is not None):
            return self.pooler.entries(prepared, read)
