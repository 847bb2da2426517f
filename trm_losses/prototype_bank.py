"""PrototypeBank: visual and text prototypes of each class, kept over the run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from . import functional as TF
from ._checks import Dims, check_finite, check_ids, check_number
from ._distributed import Distributed, gather_rows, resolve_group, sum_over_ranks
from ._entries import check_regions, take
from ._state import FullPrecisionState

__all__ = ["PrototypeBank"]


def _over_ranks(sums: Tensor, total: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Sums (..., D) and their mass (...) over all ranks, in float32; they travel together."""
    if group is None:
        return sums.float(), total.float()
    joined = sum_over_ranks(torch.cat([sums, total[..., None]], dim=-1).float(), group)
    return joined[..., :-1], joined[..., -1]


def _move(prototypes: Tensor, count: Tensor, sums: Tensor, mass: Tensor, momentum: float) -> None:
    """Prototypes (C, D) and counts (C,) towards the class means, in place; only those that have mass are touched."""
    has = (mass > 0).nonzero().squeeze(1)
    moved, updates = TF.update_prototypes(prototypes[has], count[has], sums[has], mass[has], momentum=momentum)
    prototypes[has], count[has] = moved, updates


class PrototypeBank(FullPrecisionState):
    r"""Multimodal category prototypes: running means of unit region features and of class texts.

    .. math:: P_c \leftarrow \mathrm{normalise}(m_c P_c + (1-m_c)\,\bar z_c),\quad m_c = \min(m, n_c / (n_c + 1))

    where :math:`\bar z_c` is the weighted mean of the unit features of class c in the batch. Until its first update a
    visual prototype is its start value and ``seen`` is False. Call :meth:`update` after the optimiser's step, so that no
    sample votes for itself. The state is float32 in buffers, so it is saved, restored and moved with the module.

    With ``num_prototypes`` K > 1 a class has several centres, and a feature moves the one nearest to it. The first centre
    starts from data; the others start together when the queue of the class is full, each from the feature farthest from
    the centres so far, since centres that start equal stay equal. Until then they are copies of the first, so that the
    maximum over centres needs no mask.

    Args:
        num_classes, dim: C, D.
        momentum: m of the visual prototypes.
        text_momentum: m of the text prototypes.
        init: (C, D) start value of both, such as the features of a prompt template; zeros where it is not given.
        num_prototypes: K, centres of a class; more than one needs a queue of at least K.
        queue_size: Q, last features of each class that are kept with their sample's id; 0 for none.
        absent: also keep prototypes of the entries known to be absent, at most one update in ``absent_every``.
        absent_momentum: m of those. absent_every: see ``absent``.
        distributed: False, True or a process group: batch means are over all ranks, so that all ranks agree.
        validate: check label values and look for NaN in :meth:`update` (waits for the device).

    Attributes:
        visual: (C, D) unit prototypes, (C, K, D) for K > 1. text: (C, D). count: (C,) or (C, K), updates of each visual
        prototype, 0 for a centre that has not started. seen: (C,) bool, the class holds data. absent: (C, D), zeros where
        no absent entry was met, or None. memory: :class:`trm_losses.functional.Memory` of the queue, or None.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes, NaN, settings, each by name; ``ids`` missing where there is a queue.

    Example:
        >>> import torch
        >>> bank = PrototypeBank(2, 3, queue_size=2)
        >>> bank.update(torch.tensor([[[2., 0., 0.], [0., 5., 0.]]]), torch.tensor([[1., -1.]]), ids=torch.tensor([7]))
        >>> bank.visual.tolist(), bank.seen.tolist()
        ([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [True, False])
        >>> bank.memory.ids.tolist()
        [[7, -1], [-1, -1]]

    Reference: visual prototypes in a memory block and text prototypes are TRM-ML's (paper, patent); absent-prototypes and
    a memory bank appear by name in the authors' other code; several centres follow SARB and HST, the offline start SADCL;
    momentum, the growing average at the start, the ring and the farthest point are our choice.
    """

    init: Tensor
    visual: Tensor
    text: Tensor
    count: Tensor
    text_count: Tensor
    absent: Tensor | None
    absent_count: Tensor
    absent_step: Tensor
    queue: Tensor
    queue_ids: Tensor
    queue_cursor: Tensor

    _class_axes = dict.fromkeys(
        ("init", "visual", "text", "count", "absent", "absent_count", "queue", "queue_ids", "queue_cursor"), (0,)
    )

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        momentum: float = 0.99,
        text_momentum: float = 0.99,
        init: Tensor | None = None,
        num_prototypes: int = 1,
        queue_size: int = 0,
        absent: bool = False,
        absent_momentum: float = 0.999,
        absent_every: int = 4,
        distributed: Distributed = False,
        validate: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_number(name, "num_classes", num_classes, 1)
        check_number(name, "dim", dim, 1)
        check_number(name, "momentum", momentum, 0, 1)
        check_number(name, "text_momentum", text_momentum, 0, 1)
        check_number(name, "num_prototypes", num_prototypes, 1)
        check_number(name, "queue_size", queue_size, 0)
        check_number(name, "absent_momentum", absent_momentum, 0, 1)
        check_number(name, "absent_every", absent_every, 1)
        if num_prototypes > 1 and queue_size < num_prototypes:
            raise ValueError(
                f"{name}: queue_size must be at least num_prototypes = {num_prototypes}, from whose features the centres "
                f"start, got {queue_size}"
            )
        self.num_classes, self.dim = num_classes, dim
        self.momentum, self.text_momentum = momentum, text_momentum
        self.num_prototypes, self.queue_size = num_prototypes, queue_size
        self.absent_momentum, self.absent_every = absent_momentum, absent_every
        self.distributed, self.validate = distributed, validate
        start = torch.zeros(num_classes, dim)
        if init is not None:
            Dims(name, C=num_classes, D=dim).check("init", init, "C D")
            check_finite(name, "init", init)
            start = TF.unit(init.detach()).float()
        centres = (num_classes,) if num_prototypes == 1 else (num_classes, num_prototypes)
        self.register_buffer("init", start.to(device))
        self.register_buffer("visual", torch.empty(*centres, dim, device=device))
        self.register_buffer("text", torch.empty_like(self.init))
        self.register_buffer("count", torch.zeros(centres, dtype=torch.int64, device=device))
        self.register_buffer("text_count", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("absent", torch.zeros_like(self.init) if absent else None)
        if absent:
            self.register_buffer("absent_count", torch.zeros(num_classes, dtype=torch.int64, device=device))
            self.register_buffer("absent_step", torch.zeros((), dtype=torch.int64, device=device))
        if queue_size:
            self.register_buffer("queue", torch.zeros(num_classes, queue_size, dim, device=device))
            self.register_buffer("queue_ids", torch.zeros(num_classes, queue_size, dtype=torch.int64, device=device))
            self.register_buffer("queue_cursor", torch.zeros(num_classes, dtype=torch.int64, device=device))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the start values; no class is seen, the queue is empty."""
        for name, buffer in self.named_buffers(recurse=False):
            if name != "init":
                buffer.zero_()
        self.visual.copy_(self.init if self.num_prototypes == 1 else self.init[:, None])
        self.text.copy_(self.init)
        if self.queue_size:
            self.queue_ids.fill_(-1)

    @torch.no_grad()
    def with_classes(self, keep: Sequence[int | None], *, init: Tensor | None = None) -> PrototypeBank:
        """A bank of its own for another set of classes, which goes on where this one stands.

        A class that stays keeps all that is its own: prototypes, counts, start value and queue. A new one has nothing yet: it is
        not seen, and starts from ``init``.

        Args:
            keep: for each class of the new set its place in this one, or None for a new class;
                ``[old.index(name) if name in old else None for name in new]`` from names.
            init: (C, D) start values of the new classes, for C of the new set; rows of others are not read. Zeros where it is
                not given.

        Example:
            >>> import torch
            >>> bank = PrototypeBank(2, 2)
            >>> bank.update(torch.eye(2)[None], torch.ones(1, 2))
            >>> other = bank.with_classes([1, None], init=torch.ones(2, 2))
            >>> other.seen.tolist(), other.visual[0].tolist()
            ([True, False], [0.0, 1.0])
        """
        made = self._keep_classes(keep)
        new = torch.tensor([place is None for place in keep], device=made.init.device)
        if init is not None:
            dims = Dims(type(self).__name__, C=made.num_classes, D=self.dim)
            dims.check("init", init, "C D")
            check_finite(dims.owner, "init", torch.where(new.to(init.device)[:, None], init, 0.0))
            start = TF.unit(init.detach()).to(made.init)
            for buffer in (made.init, made.text, *(made.visual[:, None] if self.num_prototypes == 1 else made.visual).unbind(1)):
                buffer.copy_(torch.where(new[:, None], start, buffer))
        if self.queue_size:
            made.queue_ids[new] = -1
        return made

    @property
    def seen(self) -> Tensor:
        """(C,) bool: the visual prototype holds data."""
        return self.count > 0 if self.count.ndim == 1 else self.count[:, 0] > 0

    @property
    def memory(self) -> TF.Memory | None:
        """The queue: features (C, Q, D) and ids (C, Q), -1 where there is none yet."""
        return TF.Memory(self.queue, self.queue_ids) if self.queue_size else None

    @torch.no_grad()
    def update(
        self,
        regions: Tensor | TF.Entries,
        targets: Tensor,
        *,
        weights: Tensor | None = None,
        text: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> None:
        """Move the prototypes towards a batch.

        Args:
            regions: (B, C, D) features, normalised here, or :class:`trm_losses.functional.Entries` of those that enter.
            targets: (B, C); entries with 1 enter, all others do not (those with 0 enter the absent-prototypes).
            weights: (B, C) confidence of the entries that enter; those of weight 0 stay out.
            text: (C, D) current class texts, where the text prototypes shall follow them.
            ids: (B,) int64, the sample of each row, not negative; must be given where there is a queue.
        """
        dims = Dims(type(self).__name__, C=self.num_classes, D=self.dim)
        check_regions(dims, regions)
        targets = dims.targets(targets, "B C", validate=self.validate)
        mass = (targets == 1).float()
        if weights is not None:
            dims.check("weights", weights, "B C")
            mass = torch.where(targets == 1, weights.float().clamp(min=0), 0.0)
        if text is not None:
            dims.check("text", text, "C D")
        if self.queue_size:
            if ids is None:
                raise ValueError(f"{dims.owner}: ids (B,) must be given where there is a queue: the sample of each row")
            dims.check("ids", ids, "B", floating=False)
            check_ids(dims.owner, ids)
        if self.validate:
            enters = (mass > 0) if self.absent is None else (mass > 0) | (targets == 0)
            check_regions(dims, regions, needed=enters)
            read = take(regions, enters) if isinstance(regions, TF.Entries) else torch.where(enters[..., None], regions, 0.0)
            check_finite(dims.owner, "regions", read)
            check_finite(dims.owner, "weights", mass)
            if text is not None:
                check_finite(dims.owner, "text", text)
            if self.queue_size and ids is not None and (ids < 0).any():
                raise ValueError(f"{dims.owner}: ids must be at least 0 (-1 marks an empty place), got {int(ids.min())}")
        group = resolve_group(self.distributed)
        with TF.full_precision(mass):
            sums, total = self._sums(regions, mass, group)
            centres, count = (x.flatten(0, 1) for x in self._centres)
            _move(centres, count, sums.flatten(0, 1), total.flatten(), self.momentum)
            self._follow_the_first()
            if text is not None:
                n = self.text_count.float()
                m = (n / (n + 1)).clamp(max=self.text_momentum)
                self.text.copy_(F.normalize(m * self.text + (1 - m) * TF.unit(text).float(), dim=-1))
                self.text_count.add_(1)
            if self.absent is not None:
                if int(self.absent_step) % self.absent_every == 0:
                    sums, total = _over_ranks(*TF.class_sums(regions, (targets == 0).float()), group)
                    _move(self.absent, self.absent_count, sums, total, self.absent_momentum)
                self.absent_step.add_(1)
            if ids is not None and self.queue_size:
                self._enqueue(regions, mass > 0, ids, group)
                if self.num_prototypes > 1:
                    self._start_centres()

    @torch.no_grad()
    def start_from(self, batches: Iterable[tuple[Tensor, Tensor, Tensor]], *, min_score: float = 0.85) -> None:
        """Set the visual prototypes to means over a whole pass; :meth:`update` goes on from there.

        A class without an entry stays as it is. With several centres each becomes the mean of the features nearest to it
        so far, so that repeated passes are k-means. Queue, text and absent-prototypes are left alone. Ranks may have
        different numbers of batches.

        Args:
            batches: (regions (B, C, D), targets (B, C), scores (B, C)) each; an entry enters where its target is 1 and its
                score, the model's probability, is above ``min_score``.
            min_score: see ``batches``.
        """
        name = type(self).__name__
        check_number(name, "min_score", min_score, 0, 1)
        centres, count = self._centres
        sums, total = torch.zeros_like(centres), torch.zeros_like(count, dtype=torch.float32)
        for regions, targets, scores in batches:
            dims = Dims(name, C=self.num_classes, D=self.dim)
            dims.check("regions", regions, "B C D")
            targets = dims.targets(targets, "B C", validate=self.validate)
            dims.check("scores", scores, "B C")
            enters = (targets == 1) & (scores > min_score)
            if self.validate:
                check_finite(name, "regions", torch.where(enters[..., None], regions, 0.0))
            with TF.full_precision(regions):
                more, mass = self._sums(regions.to(total.device), enters.to(total), None)
                sums += more
                total += mass
        sums, total = _over_ranks(sums, total, resolve_group(self.distributed))
        has = total > 0
        centres.copy_(torch.where(has[..., None], F.normalize(sums, dim=-1), centres))
        # A mean of n features weighs in the running mean as n updates of one feature would.
        count.copy_(torch.where(has, total.to(count.dtype), count))
        self._follow_the_first()

    @property
    def _centres(self) -> tuple[Tensor, Tensor]:
        """Prototypes (C, K, D) and counts (C, K), also where K is 1."""
        shape = (self.num_classes, self.num_prototypes)
        return self.visual.view(*shape, self.dim), self.count.view(shape)

    def _follow_the_first(self) -> None:
        """Centres that have not started are copies of the first."""
        if self.num_prototypes > 1:
            centres, count = self._centres
            centres.copy_(torch.where((count > 0)[..., None], centres, centres[:, :1]))

    def _sums(self, regions: Tensor | TF.Entries, mass: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
        """Weighted sums (C, K, D) of the features nearest to each started centre, and their mass (C, K)."""
        if self.num_prototypes == 1:
            sums, total = TF.class_sums(regions, mass)
            sums, total = sums[:, None], total[:, None]
        else:
            centres, count = self._centres
            row, own = (mass > 0).nonzero(as_tuple=True)
            features = TF.unit(take(regions, mass > 0))
            near = torch.einsum("nd,nkd->nk", features, centres[own].to(features.dtype))
            near[:, 1:].masked_fill_(count[own, 1:] == 0, -2.0)
            nearest = torch.zeros_like(mass, dtype=torch.int64)
            nearest[row, own] = near.argmax(dim=-1)
            parts = [TF.class_sums(regions, mass * (nearest == k)) for k in range(self.num_prototypes)]
            sums, total = (torch.stack(part, dim=1) for part in zip(*parts, strict=True))
        return _over_ranks(sums, total, group)

    def _enqueue(self, regions: Tensor | TF.Entries, enters: Tensor, ids: Tensor, group: ProcessGroup | None) -> None:
        """Take the entries of all ranks into the rings of their classes, in the order of ranks and rows."""
        row, own = enters.nonzero(as_tuple=True)
        features, real, _ = gather_rows(TF.unit(take(regions, enters)).float(), group)
        labels = gather_rows(torch.stack([own, ids[row]], dim=1), group).rows
        features, (own, sample) = features[real], labels[real].unbind(dim=1)
        new = torch.bincount(own, minlength=self.num_classes)
        # How many of its class come before each entry; of more than Q the last Q stay.
        order = own.argsort(stable=True)
        before = torch.empty_like(order)
        before[order] = torch.arange(len(own), device=own.device) - (new.cumsum(0) - new)[own[order]]
        stays = before >= new[own] - self.queue_size
        own, before = own[stays], before[stays]
        place = (self.queue_cursor[own] + before) % self.queue_size
        self.queue[own, place] = features[stays]
        self.queue_ids[own, place] = sample[stays]
        self.queue_cursor.copy_((self.queue_cursor + new) % self.queue_size)

    def _start_centres(self) -> None:
        """Where the queue of a class is full, its further centres start from the features farthest from those before."""
        centres, count = self._centres
        full = self.seen & (self.queue_ids >= 0).all(dim=1)
        for k in range(1, self.num_prototypes):
            starts = full & (count[:, k] == 0)
            if not starts.any():
                continue
            nearest = torch.einsum("cqd,ckd->cqk", self.queue, centres[:, :k]).amax(dim=-1)
            farthest = self.queue.gather(1, nearest.argmin(dim=1)[:, None, None].expand(-1, 1, self.dim)).squeeze(1)
            centres[:, k] = torch.where(starts[:, None], farthest, centres[:, k])
            count[:, k] += starts
        self._follow_the_first()

    def extra_repr(self) -> str:
        text = f"num_classes={self.num_classes}, dim={self.dim}, momentum={self.momentum}"
        if self.num_prototypes > 1:
            text += f", num_prototypes={self.num_prototypes}"
        if self.queue_size:
            text += f", queue_size={self.queue_size}"
        return text + (", absent=True" if self.absent is not None else "")
