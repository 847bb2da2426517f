"""PrototypeBank: visual and text prototypes of each class, kept over the run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import functional as TF
from ._checks import Dims, check_finite, check_numbers
from ._distributed import Distributed, resolve_group, sum_over_ranks
from ._entries import check_regions, take
from ._precision import full_precision, unit
from ._state import FullPrecisionState


class PrototypeBank(FullPrecisionState):
    r"""Multimodal category prototypes: running means of unit region features and of class texts.

    .. math:: P_c \leftarrow \mathrm{normalise}(m_c P_c + (1-m_c)\,\bar z_c),\quad m_c = \min(m, n_c / (n_c + 1))

    where :math:`\bar z_c` is the weighted mean of the unit features of class c in the batch. Until its first update a
    visual prototype is its start value and ``seen`` is False. Call :meth:`update` after the optimizer's step, so that no
    sample votes for itself. The state is float32 in buffers, so it is saved, restored and moved with the module.

    Args:
        num_classes, dim: C, D.
        momentum: m of the visual prototypes.
        text_momentum: m of the text prototypes.
        init: (C, D) start value of both, such as the features of a prompt template; zeros if it is not given.
        distributed: False, True or a process group: batch means are over all ranks, so that all ranks agree.
        validate: check label values and look for NaN in :meth:`update` (waits for the device).

    Attributes:
        visual: (C, D) unit prototypes. text: (C, D). count: (C,) updates of each visual prototype. seen: (C,) bool, the class
        holds data.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes, NaN, settings, each by name.

    Example:
        >>> import torch
        >>> bank = PrototypeBank(2, 3)
        >>> bank.update(torch.tensor([[[2., 0., 0.], [0., 5., 0.]]]), torch.tensor([[1., -1.]]))
        >>> bank.visual.tolist(), bank.seen.tolist()
        ([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], [True, False])

    Reference: visual prototypes in a memory block and text prototypes are TRM-ML's (paper, patent); momentum and the growing
    average at the start are our choice.
    """

    init: Tensor
    visual: Tensor
    text: Tensor
    count: Tensor
    text_count: Tensor

    _class_axes = dict.fromkeys(("init", "visual", "text", "count"), (0,))

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        momentum: float = 0.99,
        text_momentum: float = 0.99,
        init: Tensor | None = None,
        distributed: Distributed = False,
        validate: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_numbers(name, 1, num_classes=num_classes, dim=dim)
        check_numbers(name, 0, 1, momentum=momentum, text_momentum=text_momentum)
        self.num_classes, self.dim = num_classes, dim
        self.momentum, self.text_momentum = momentum, text_momentum
        self.distributed, self.validate = distributed, validate
        start = torch.zeros(num_classes, dim, device=device)
        if init is not None:
            Dims(name, C=num_classes, D=dim).check("init", init, "C D")
            check_finite(name, "init", init)
            start = unit(init.detach())
        self.register_buffer("init", start.to(device))
        self.register_buffer("visual", torch.empty_like(self.init))
        self.register_buffer("text", torch.empty_like(self.init))
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64, device=device))
        self.register_buffer("text_count", torch.zeros((), dtype=torch.int64, device=device))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the start values; no class is seen."""
        self.visual.copy_(self.init)
        self.text.copy_(self.init)
        self.count.zero_()
        self.text_count.zero_()

    @torch.no_grad()
    def with_classes(self, keep: Sequence[int | None], *, init: Tensor | None = None) -> PrototypeBank:
        """A bank of its own for another set of classes, which goes on where this one stands.

        A class that stays keeps all that is its own: prototypes, counts and start value. A new one has nothing yet: it is not
        seen, and starts from ``init``.

        Args:
            keep: for each class of the new set its place in this one, or None for a new class;
                ``[old.index(name) if name in old else None for name in new]`` from names.
            init: (C, D) start values of the new classes, for C of the new set; rows of others are not read. Zeros if it is
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
        if init is not None:
            new = torch.tensor([place is None for place in keep], device=made.init.device)
            dims = Dims(type(self).__name__, C=made.num_classes, D=self.dim)
            dims.check("init", init, "C D")
            check_finite(dims.owner, "init", torch.where(new.to(init.device)[:, None], init, 0.0))
            start = unit(init.detach()).to(made.init)
            for buffer in (made.init, made.text, made.visual):
                buffer.copy_(torch.where(new[:, None], start, buffer))
        return made

    @property
    def seen(self) -> Tensor:
        """(C,) bool: the visual prototype holds data."""
        return self.count > 0

    @torch.no_grad()
    def update(
        self, regions: Tensor | TF.Entries, targets: Tensor, *, weights: Tensor | None = None, text: Tensor | None = None
    ) -> None:
        """Move the prototypes towards a batch.

        Args:
            regions: (B, C, D) features, normalized here, or :class:`trm_losses.functional.Entries` of those that enter.
            targets: (B, C); entries with 1 enter, all others do not.
            weights: (B, C) confidence of the entries that enter; those of weight 0 stay out.
            text: (C, D) current class texts, if the text prototypes shall follow them.
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
        if self.validate:
            enters = mass > 0
            check_regions(dims, regions, needed=enters)
            read = take(regions, enters) if isinstance(regions, TF.Entries) else torch.where(enters[..., None], regions, 0.0)
            check_finite(dims.owner, "regions", read)
            check_finite(dims.owner, "weights", mass)
            if text is not None:
                check_finite(dims.owner, "text", text)
        group = resolve_group(self.distributed)
        with full_precision(mass):
            sums, total = TF.class_sums(regions, mass)
            # Sums and their mass travel together.
            joined = sum_over_ranks(torch.cat([sums, total[:, None]], dim=1).float(), group)
            sums, total = joined[:, :-1], joined[:, -1]
            has = (total > 0).nonzero().squeeze(1)  # only these are touched
            self.visual[has], self.count[has] = TF.update_prototypes(
                self.visual[has], self.count[has], sums[has], total[has], momentum=self.momentum
            )
            if text is not None:
                n = self.text_count.float()
                m = (n / (n + 1)).clamp(max=self.text_momentum)
                self.text.copy_(F.normalize(m * self.text + (1 - m) * unit(text).float(), dim=-1))
                self.text_count.add_(1)
