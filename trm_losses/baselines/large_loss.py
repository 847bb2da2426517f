"""LargeLoss: an unknown label taken for absent whose loss is among the largest is probably present."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_choice, check_number
from .._distributed import Distributed
from ._baseline import Baseline, cross_entropy

# The authors' best share in one epoch on COCO.
_DELTA = {"reject": 0.004, "correct": 0.002, "correct_permanently": 0.002}


class LargeLoss(Baseline):
    r"""LL-R, LL-Ct and LL-Cp: assume negative, and reject or flip the unknown labels of the largest loss.

    .. math::
        u_{bc} &= -\log(1 - p_{bc}) \text{ where } y_{bc} = -1, \text{ else } 0, \qquad
        G = \{bc: y_{bc} = -1,\ u_{bc} \ge \text{the } \lceil BC\,r \rceil\text{-th largest of } u\} \\
        \text{reject:}\quad & L = \frac{1}{BC} \sum_{bc \notin G} \mathrm{BCE}(\tilde y_{bc}, p_{bc}), \qquad
        \tilde y = y \text{ where known, else } 0 \\
        \text{correct:}\quad & L = \frac{1}{BC} \Big[ \sum_{bc \notin G} \mathrm{BCE}(\tilde y_{bc}, p_{bc})
            + \sum_{bc \in G} -\log p_{bc} \Big]

    ``"correct_permanently"`` is the second with labels that :meth:`update`, called after each step, turns into present ones for
    good. The share r is a share of all B * C entries, known ones included; :meth:`begin_epoch` sets it,

    .. math:: r = \delta\, \lfloor s T \rfloor, \qquad \text{correct\_permanently:}\quad r = \delta\, [\lfloor s T \rfloor > 0]

    at share s of the training; before any call r is 0 and the loss that of :class:`AssumeNegativeLoss`.

    Args:
        scheme: ``"reject"`` (LL-R), ``"correct"`` (LL-Ct) or ``"correct_permanently"`` (LL-Cp).
        delta: :math:`\delta` as a share; the authors give per cent: 0.2 / 0.2 / 0.1 for the three (VOC), 0.4 / 0.2 / 0.2
            (COCO, NUS), 0.4 / 0.4 / 0.2 (CUB). Default: that of COCO.
        num_samples, num_classes: n, C of the training set, for ``"correct_permanently"``.
        published_epochs: T.

    Shape:
        logits, targets (B, C), ids (B,) int64, where the scheme keeps labels -> scalar.

    Example:
        >>> loss = LargeLoss(scheme="reject", delta=0.5)
        >>> loss.begin_epoch(1, 10)
        >>> loss(torch.tensor([[0., 3.]]), torch.tensor([[-1., -1.]]))  # log 2 / 2: the second is rejected
        tensor(0.3466)

    Reference: Kim et al., "Large Loss Matters", CVPR 2022; known absent labels as in the code of its successor (BoostLU,
    CVPR 2023). In the published code more entries than there are unknown ones reject or flip known ones too, and the released
    LL-Cp writes nothing back; that G holds unknown entries alone is ours, and so are schedules by shares of the training.
    """

    rate: Tensor
    flipped: Tensor

    def __init__(
        self,
        *,
        scheme: Literal["reject", "correct", "correct_permanently"] = "reject",
        delta: float | None = None,
        num_samples: int | None = None,
        num_classes: int | None = None,
        published_epochs: int = 10,
        distributed: Distributed = False,
        validate: bool = True,
    ) -> None:
        name = type(self).__name__
        check_choice(name, "scheme", scheme, tuple(_DELTA))
        permanent = scheme == "correct_permanently"
        if (num_samples is not None, num_classes is not None) != (permanent, permanent):
            raise ValueError(
                f"{name}: num_samples and num_classes must be given where scheme='correct_permanently' and there alone, "
                f"got {num_samples} and {num_classes} with scheme={scheme!r}"
            )
        super().__init__(num_samples=num_samples, num_classes=num_classes, distributed=distributed, validate=validate)
        delta = _DELTA[scheme] if delta is None else delta
        check_number(name, "delta", delta, 0, 1)
        check_number(name, "published_epochs", published_epochs, 1)
        self.scheme, self.delta, self.published_epochs = scheme, delta, published_epochs
        self.register_buffer("rate", torch.zeros(()))
        if num_samples is not None and num_classes is not None:
            self.register_buffer("flipped", torch.zeros(num_samples, num_classes, dtype=torch.bool))

    def _loss(self, x: Tensor, y: Tensor, ids: Tensor | None) -> Tensor:
        y = self._current(y, ids)
        large = self._large(x, y)
        return self._mean(cross_entropy(x, y.clamp(min=0).masked_fill(large, -1 if self.scheme == "reject" else 1)), x)

    def _current(self, y: Tensor, ids: Tensor | None) -> Tensor:
        """The labels with those that were flipped for good."""
        return y if self.num_samples is None else y.masked_fill((y == -1) & self.flipped[ids], 1)

    def _large(self, x: Tensor, y: Tensor) -> Tensor:
        """G as a mask. With one process the number of entries stays a tensor: nothing waits for the device."""
        unknown = y == -1
        loss = torch.where(unknown, F.softplus(x.detach()), 0.0)
        entries = self._rows(x) * x.shape[1]
        # Float32 may lift a whole number a little, and the ceiling then by one.
        count = (self.rate * entries * (1 - 1e-6)).ceil().long().clamp(max=entries)
        ranked = loss.flatten().sort(descending=True).values
        if self._group is not None:  # a rank's own largest are all that can be among those of all
            ranked = self._of_all_ranks(ranked[: int(count)])[0].sort(descending=True).values
        threshold = F.pad(ranked, (0, 1)).gather(0, (count - 1).clamp(min=0).view(1))
        return unknown & (loss >= threshold) & (count > 0)

    @torch.no_grad()
    def update(self, logits: Tensor, targets: Tensor, *, ids: Tensor | None = None) -> None:
        """With ``"correct_permanently"``, turn the entries of G into present labels for good."""
        if self.num_samples is not None:
            x, y = self._arguments(logits, targets, ids)
            row, own = self._large(x, self._current(y, ids)).nonzero(as_tuple=True)
            assert ids is not None
            row, own = self._of_all_ranks(ids[row], own)
            self.flipped[row, own] = True

    def _schedule(self, epoch: int, epochs: int) -> None:
        step = epoch * self.published_epochs // epochs
        self.rate.fill_(self.delta * (min(step, 1) if self.scheme == "correct_permanently" else step))
