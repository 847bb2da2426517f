"""EM with asymmetric pseudo-labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import check_number, check_numbers
from .._distributed import Distributed
from ._baseline import Baseline, cross_entropy, entropy


class EMAPLLoss(Baseline):
    r"""EM with APL: in the second part of the training the least probable unknown labels become soft labels.

    .. math:: L = \frac{1}{BC} \Big[ \sum_{bc:\,y \ge 0} \mathrm{BCE}(y_{bc}, p_{bc}) - \alpha \sum_{bc \in U} H(p_{bc})
        + \beta \sum_{bc \in S} \mathrm{BCE}(r_{bc}, p_{bc}) \Big]

    S are the unknown entries with a soft label r, U the others. A labelling pass gives to the
    :math:`\lfloor \theta n_c / (T - w) \rfloor` least probable entries of U, of the :math:`n_c` unknown ones of class c, their
    own probability as r, for good. There are T - w passes, before the published epochs w to T - 1 counted from 0, so that in the
    end a share :math:`\theta` is labelled. They keep their places as shares of a training of another length; a pass that falls
    into an epoch is made before the next one, and one that falls into the last is not made. With the defaults that costs a fifth
    of the labels in five to nine epochs, and more in fewer.

    The probabilities are those last given to :meth:`update`, and the passes are made by :meth:`begin_epoch`. Published is an
    ``update`` over the whole training set in eval mode at the end of each epoch from the w-th; the logits of the steps
    themselves cost nothing.

    Args:
        num_samples, num_classes: n, C of the training set.
        alpha: :math:`\alpha`, as in :class:`EMLoss`.
        beta: :math:`\beta`; published are 0.02 (VOC), 0.9 (COCO), 0.2 (NUS) and 0.4 (CUB).
        label_share: :math:`\theta`.
        warmup: w; published are 5 (VOC, COCO), 4 (NUS) and 3 (CUB).
        published_epochs: T.

    Shape:
        logits, targets (B, C), ids (B,) int64 -> scalar.

    Raises:
        ValueError: a pass before the first :meth:`update`.

    Example:
        >>> loss = EMAPLLoss(2, 1, label_share=0.5, warmup=1, published_epochs=2)
        >>> logits, targets, ids = torch.tensor([[1.], [-1.]]), torch.tensor([[-1.], [-1.]]), torch.arange(2)
        >>> loss.update(logits, targets, ids=ids)
        >>> loss.begin_epoch(1, 2)
        >>> loss.labelled.flatten()  # half of the class, the least probable
        tensor([False,  True])

    Reference: Zhou et al., "Acknowledging the Unknown", ECCV 2022, for single positives; the term of known absent labels, and
    the passes by shares of the training, are ours. Published runs also end at the first epoch without a new best score.
    """

    soft: Tensor
    labelled: Tensor
    passes: Tensor
    _never = -2.0

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        alpha: float = 0.1,
        beta: float = 0.9,
        label_share: float = 0.9,
        warmup: int = 5,
        published_epochs: int = 10,
        distributed: Distributed = False,
        validate: bool = True,
    ) -> None:
        super().__init__(num_samples=num_samples, num_classes=num_classes, distributed=distributed, validate=validate)
        name = type(self).__name__
        check_numbers(name, 0, alpha=alpha, beta=beta)
        check_number(name, "label_share", label_share, 0, 1)
        check_number(name, "published_epochs", published_epochs, 2)
        check_number(name, "warmup", warmup, 1, published_epochs - 1)
        self.alpha, self.beta, self.label_share = alpha, beta, label_share
        self.warmup, self.published_epochs = warmup, published_epochs
        # Soft labels, and where there is none the last probability; -1 where the label is known.
        self.register_buffer("soft", torch.full((num_samples, num_classes), self._never))
        self.register_buffer("labelled", torch.zeros(num_samples, num_classes, dtype=torch.bool))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def _loss(self, x: Tensor, y: Tensor, ids: Tensor | None) -> Tensor:
        unknown = y == -1
        taught = unknown & self.labelled[ids]
        undecided = torch.where(unknown & ~taught, entropy(x), 0.0).sum()
        weights = torch.ones_like(x).masked_fill(taught, self.beta)
        known = cross_entropy(x, torch.where(taught, self.soft[ids].to(x.dtype), y), weights)
        return self._mean(known - self.alpha * undecided, x)

    @torch.no_grad()
    def update(self, logits: Tensor, targets: Tensor, *, ids: Tensor | None = None) -> None:
        """Keep the probabilities of the images ``ids`` for the next labelling pass; see the class."""
        x, y = self._arguments(logits, targets, ids)
        assert ids is not None
        ids, said = self._of_all_ranks(ids, torch.where(y == -1, torch.sigmoid(x), -1.0).to(self.soft.dtype))
        # Of an image that is there twice, as samplers for several ranks fill them up, the last.
        place = torch.arange(len(ids), device=ids.device)
        last = place.new_zeros(len(self.soft)).scatter_reduce(0, ids, place, "amax")[ids] == place
        ids, said = ids[last], said[last]
        self.soft[ids] = torch.where(self.labelled[ids], self.soft[ids], said)

    def _schedule(self, epoch: int, epochs: int) -> None:
        count = self.published_epochs - self.warmup
        due = min(max(epoch * self.published_epochs // epochs - self.warmup + 1, 0), count)
        due -= int(self.passes)
        if due <= 0:
            return
        if bool((self.soft == self._never).all()):
            raise ValueError(
                f"{type(self).__name__}: update(logits, targets, ids=...) must be called over the training set before epoch "
                f"{epoch} of {epochs}, whose start labels the least probable entries; got no call"
            )
        unknown = self.soft >= 0
        candidates = torch.where(unknown & ~self.labelled, self.soft, math.inf)
        for c, total in enumerate(unknown.sum(dim=0).tolist()):
            take = due * math.floor(self.label_share * total / count + 1e-6)  # a whole number may have come out just below
            place = candidates[:, c].argsort(stable=True)[:take]
            self.labelled[place[candidates[place, c] < math.inf], c] = True
        self.passes += due
