"""What all baselines share: one signature, its checks, and the means of the published codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import functional as TF
from .._checks import Dims, check_finite, check_ids, check_number
from .._distributed import Distributed, count_per_rank, gather_rows, resolve_group, sum_over_ranks, sum_per_rank
from .._precision import full_precision, upcast
from .._state import FullPrecisionState


class Baseline(FullPrecisionState):
    """A loss of logits and labels; its equation is ``_loss``, its schedule ``_schedule``, and what it keeps comes by ``update``.

    Args:
        num_classes: C, where the loss keeps something for each class.
        num_samples: n, where it keeps something for each training image: ``ids`` must then be given.
        distributed: False, True or a process group: everything is then of the joined batch of all ranks, once DDP has averaged
            their gradients; and so is what is kept, the same on all ranks.
        validate: check label values and ids, and look for NaN (waits for the device).
    """

    _class_axes = {"prior": (0,), **dict.fromkeys(("estimates", "soft", "labelled", "flipped", "scores"), (1,))}

    def __init__(
        self,
        *,
        num_classes: int | None = None,
        num_samples: int | None = None,
        distributed: Distributed = False,
        validate: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("num_samples", num_samples)):
            if value is not None:
                check_number(type(self).__name__, name, value, 1)
        self.num_classes, self.num_samples = num_classes, num_samples
        self.distributed, self.validate = distributed, validate

    def forward(self, logits: Tensor, targets: Tensor, *, ids: Tensor | None = None) -> Tensor:
        """The loss of logits (B, C) with targets (B, C), of the training images ``ids`` (B,); see the class."""
        x, y = self._arguments(logits, targets, ids)
        with full_precision(x):
            return self._loss(x, y, ids)

    def update(self, logits: Tensor, targets: Tensor, *, ids: Tensor | None = None) -> None:
        """Take in what the model says of the images ``ids``; does nothing where the method keeps no state."""

    @torch.no_grad()
    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Say that epoch ``epoch`` of ``epochs``, counted from 0, begins; does nothing where the method has no schedule."""
        owner = type(self).__name__
        check_number(owner, "epochs", epochs, 1)
        check_number(owner, "epoch", epoch, 0, epochs - 1)
        self._schedule(epoch, epochs)

    def _loss(self, x: Tensor, y: Tensor, ids: Tensor | None) -> Tensor:
        """The equation, of checked arguments in at least float32."""
        raise NotImplementedError

    def _schedule(self, epoch: int, epochs: int) -> None:
        pass

    def _arguments(self, logits: Tensor, targets: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits in at least float32, and targets in their dtype, once they are checked."""
        dims = Dims(type(self).__name__, **({} if self.num_classes is None else {"C": self.num_classes}))
        dims.check("logits", logits, "B C")
        targets = dims.targets(targets, "B C", validate=self.validate)
        if ids is None and self.num_samples is not None:
            raise ValueError(f"{dims.owner}: ids (B,) must be given, the places of the images in the training set")
        if ids is not None:
            dims.check("ids", ids, "B", floating=False)
            check_ids(dims.owner, ids, self.num_samples if self.validate else None)
        if self.validate:
            check_finite(dims.owner, "logits", logits)
        x = upcast(logits)
        return x, targets.to(x.dtype)

    @property
    def _group(self) -> ProcessGroup | None:
        return resolve_group(self.distributed)

    def _mean(self, total: Tensor, x: Tensor) -> Tensor:
        """A sum over entries divided by B * C: entries that give nothing count."""
        count = count_per_rank(x.new_full((), x.numel()), self._group)
        return total / torch.where(count > 0, count, 1.0)

    def _reduced(self, total: Tensor, x: Tensor, reduction: str) -> Tensor:
        """A sum over entries as it is, or the mean."""
        return sum_per_rank(total, self._group) if reduction == "sum" else self._mean(total, x)

    def _rows(self, x: Tensor) -> int:
        """B; over ranks it waits for the device."""
        rows = len(x)
        return rows if self._group is None else int(sum_over_ranks(torch.tensor(rows, device=x.device), self._group))

    def _of_all_ranks(self, *rows: Tensor) -> list[Tensor]:
        """Rows (n, ...) of all ranks in their order."""
        if self._group is None:
            return list(rows)
        found = [gather_rows(part, self._group) for part in rows]
        return [joined.rows[joined.real] for joined in found]


def cross_entropy(x: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """Binary cross-entropy summed over entries with a label, hard or soft; those at -1 give nothing."""
    return TF.asymmetric_loss(x, y, weights, gamma_pos=0.0, gamma_neg=0.0, margin=0.0, reduction="sum")


def entropy(x: Tensor) -> Tensor:
    """Of each probability sigmoid(x), in nats; written for -abs(x), where nothing cancels."""
    size = x.abs()
    return F.softplus(-size) + size * torch.sigmoid(-size)


def power_loss(x: Tensor, q: float) -> Tensor:
    """(1 - p^q) / q of each probability sigmoid(x): at most 1 / q, 1 - p at q = 1, and its limit -log p at q = 0."""
    log_p = F.logsigmoid(x)
    return -torch.expm1(q * log_p) / q if q else -log_p
