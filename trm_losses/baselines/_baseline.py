"""What all baselines share: one signature, its checks, and the means of the published codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional as TF
from .._checks import Dims, check_finite, check_ids, check_number, check_targets
from .._state import FullPrecisionState

__all__ = ["Baseline", "cross_entropy", "entropy", "mean"]


class Baseline(FullPrecisionState):
    """A loss of logits and labels; its equation is ``_loss``, its schedule ``_schedule``, and what it keeps comes by ``update``.

    Args:
        num_classes: C, where the loss keeps something for each class.
        num_samples: n, where it keeps something for each training image: ``ids`` must then be given.
        validate: check label values and ids, and look for NaN (waits for the device).
    """

    _class_axes = {"prior": (0,), **dict.fromkeys(("estimates", "soft", "labelled", "flipped", "scores"), (1,))}

    def __init__(self, *, num_classes: int | None = None, num_samples: int | None = None, validate: bool = True) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("num_samples", num_samples)):
            if value is not None:
                check_number(type(self).__name__, name, value, 1)
        self.num_classes, self.num_samples, self.validate = num_classes, num_samples, validate

    def forward(self, logits: Tensor, targets: Tensor, *, ids: Tensor | None = None) -> Tensor:
        """The loss of logits (B, C) with targets (B, C), of the training images ``ids`` (B,); see the class."""
        x, y = self._arguments(logits, targets, ids)
        with TF.full_precision(x):
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
        dims.check("targets", targets, "B C", floating=False)
        if ids is None and self.num_samples is not None:
            raise ValueError(f"{dims.owner}: ids (B,) must be given, the places of the images in the training set")
        if ids is not None:
            dims.check("ids", ids, "B", floating=False)
            check_ids(dims.owner, ids, self.num_samples if self.validate else None)
        if self.validate:
            check_finite(dims.owner, "logits", logits)
            check_targets(dims.owner, targets)
        x = TF.upcast(logits)
        return x, targets.to(x.dtype)


def mean(total: Tensor, x: Tensor) -> Tensor:
    """A sum over entries divided by B * C: entries that give nothing count."""
    return total / max(1, x.numel())


def cross_entropy(x: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """Binary cross-entropy summed over entries with a label, hard or soft; those at -1 give nothing."""
    return TF.asymmetric_loss(x, y, weights, gamma_pos=0.0, gamma_neg=0.0, margin=0.0, reduction="sum")


def entropy(x: Tensor) -> Tensor:
    """Of each probability sigmoid(x), in nats; written for -abs(x), where nothing cancels."""
    size = x.abs()
    return F.softplus(-size) + size * torch.sigmoid(-size)
