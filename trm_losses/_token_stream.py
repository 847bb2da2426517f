"""What a training-free classifier keeps of a stream of tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from . import functional as TF
from ._distributed import gather_rows
from ._entries import Entries
from ._precision import unit

_BLOCK = 1 << 22  # elements of the similarities of some images, and of their tokens, taken at a time


class TokenStream:
    """What is kept of a stream of tokens: the least doubtful ones of each class, and sums in float64 on the CPU."""

    def __init__(self, text: Tensor, k: int, scale: float) -> None:
        classes, dim = text.shape
        self.text, self.k, self.scale = text, k, scale
        self.doubt = torch.full((classes, k), torch.inf, dtype=torch.float32, device=text.device)  # inf: nothing is kept there
        self.weight = torch.zeros_like(self.doubt)
        self.tokens: Tensor | None = None
        zeros = torch.zeros((), dtype=torch.float64, device="cpu").new_zeros
        self.total, self.number = zeros(dim), zeros((), dtype=torch.int64)
        self.square = zeros(dim, dim)
        self.label_sums, self.labels = zeros(classes, dim), zeros(classes)
        self.has_targets: bool | None = None

    def add(self, tokens: Tensor, targets: Tensor | None, padding: Tensor | None) -> None:
        """A batch, some images at a time."""
        given = targets is not None
        if self.has_targets not in (None, given):
            raise ValueError("GaussianDiscriminant: every batch must have targets, or none; -1 stands for an unknown label")
        self.has_targets = given
        if not tokens.shape[1]:
            return
        step = max(1, _BLOCK // (tokens.shape[1] * max(self.text.shape)))
        for start in range(0, len(tokens), step):
            some = slice(start, start + step)
            self._add(tokens[some], *(None if part is None else part[some] for part in (targets, padding)))

    def _add(self, tokens: Tensor, targets: Tensor | None, padding: Tensor | None) -> None:
        x = unit(tokens)
        real = torch.ones_like(x[..., 0], dtype=torch.bool) if padding is None else ~padding
        cosines = x @ self.text.to(x).T
        logs = torch.log_softmax(self.scale * cosines, dim=-1)  # (B, N, C)
        best, own = logs.max(dim=-1)
        doubt = -(logs.exp() * logs).sum(dim=-1) if logs.shape[-1] > 1 else -cosines[..., 0]
        enters = real & (doubt < self.doubt.amax(dim=1)[own])
        if targets is not None:
            enters &= targets.gather(1, own) != 0
            self._look(x, logs.masked_fill(~real[..., None], -torch.inf), targets == 1)
            rows = x[real]
            self.square += (rows.T @ rows).cpu().double()
        self.total += torch.where(real[..., None], x, 0.0).sum(dim=(0, 1)).cpu().double()
        self.number += int(real.sum())
        self._keep(x[enters], own[enters], doubt[enters].float(), best[enters].exp().float())

    def _look(self, x: Tensor, logs: Tensor, present: Tensor) -> None:
        """The regions of classes that images are known to show; one of padding alone shows nothing."""
        present = present & torch.isfinite(logs.amax(dim=1))
        row, own = present.nonzero(as_tuple=True)
        if not len(row):
            return
        # An image after another, so that no token is copied for each of its labels.
        regions = [
            torch.softmax(logs[b][:, present[b]].T, dim=-1) @ x[b] for b in present.any(dim=1).nonzero().squeeze(1).tolist()
        ]
        sums, mass = TF.class_sums(Entries(torch.cat(regions), row, own), present.to(x.dtype))
        self.label_sums += sums.cpu().double()
        self.labels += mass.cpu().double()

    def _keep(self, tokens: Tensor, own: Tensor, doubt: Tensor, weight: Tensor) -> None:
        """Take in tokens that are less doubtful than those of their class so far; of equal ones the earlier stay."""
        if self.tokens is None:
            self.tokens = tokens.new_zeros(*self.doubt.shape, tokens.shape[1])
        if not len(own):
            return
        order = doubt.argsort(stable=True)
        order = order[own[order].argsort(stable=True)]  # by class, and by doubt within it
        counts = own.bincount(minlength=len(self.doubt))
        rank = torch.arange(len(own), device=own.device) - (counts.cumsum(0) - counts)[own[order]]
        order, rank = order[rank < self.k], rank[rank < self.k]
        touched, place = own[order].unique(return_inverse=True)
        new = self.doubt.new_full((len(touched), int(rank.max()) + 1), torch.inf)
        source = torch.zeros_like(new, dtype=torch.int64)
        new[place, rank], source[place, rank] = doubt[order], order
        both = torch.cat([self.doubt[touched], new], dim=1)
        stays = torch.zeros_like(both, dtype=torch.bool).scatter_(1, both.argsort(dim=1, stable=True)[:, : self.k], True)
        # As many come into a class as leave it: newcomers take their slots.
        leaves, slot = (~stays[:, : self.k]).nonzero(as_tuple=True)
        source = source[stays[:, self.k :]]
        at = touched[leaves], slot
        self.doubt[at], self.weight[at], self.tokens[at] = doubt[source], weight[source], tokens[source].to(self.tokens)

    def kept(self, group: torch.distributed.ProcessGroup | None) -> Tensor:
        """(C, k) bool: what is among the k least doubtful tokens of its class over all ranks."""
        joined = gather_rows(self.doubt, group)
        every = joined.rows.unflatten(0, (-1, len(self.doubt))).transpose(0, 1).flatten(1)  # (C, ranks * k)
        kept = torch.zeros_like(every, dtype=torch.bool).scatter_(1, every.argsort(dim=1, stable=True)[:, : self.k], True)
        rank = joined.first // len(self.doubt)
        return kept[:, rank * self.k : (rank + 1) * self.k] & torch.isfinite(self.doubt)

    def chunks(self, kept: Tensor) -> Iterable[tuple[slice, Tensor, Tensor]]:
        """Some classes at a time: tokens (c, k, D) and their weights (c, k), 0 where nothing is kept, in float64 on the CPU."""
        dim = self.text.shape[1]
        step = max(1, _BLOCK // (self.k * dim))
        for start in range(0, len(kept), step):
            part = slice(start, start + step)
            weight = torch.where(kept[part], self.weight[part], 0.0).cpu().double()
            held = weight.new_zeros(*weight.shape, dim) if self.tokens is None else self.tokens[part].cpu().double()
            yield part, held, weight
