"""Average precision, F1 scores and calibration error of multi-label predictions, exact, with unknown labels left out.

Scores and targets have shape (B, C). Targets are 1 (present), 0 (absent) or -1 (unknown); an unknown entry
counts neither for nor against its class. A class without a known positive has no recall: its average
precision is NaN, and means over classes leave it out (some research code counts it as 0 instead).

Results are float64 on the CPU, whatever device scores and targets are on: Apple's GPU has no float64.

Labels of a file written as 1/-1/0 must pass through :func:`trm_losses.labels.from_ternary` first: read as
they stand, their absent entries would be unknown here and every class would look perfect.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_number, check_scores
from ._precision import upcast
from .labels import UNKNOWN

__all__ = ["F1Scores", "average_precision", "calibration_error", "evaluate", "f1_scores", "mean_average_precision"]

# Classes sorted or counted at a time: larger chunks leave the processor's cache and need more memory.
_CHUNK = 16

_BEHIND = 1 << 40  # even, and more than any two keys lie apart


class F1Scores(NamedTuple):
    """What :func:`f1_scores` returns: scalar float64 tensors on the CPU, shares from 0 to 1."""

    OP: Tensor
    """Overall precision: true positives over all predicted ones, pooled over classes."""
    OR: Tensor
    """Overall recall: true positives over all known positives, pooled over classes."""
    OF1: Tensor
    """Harmonic mean of OP and OR."""
    CP: Tensor
    """Mean of the classes' precisions."""
    CR: Tensor
    """Mean of the classes' recalls."""
    CF1: Tensor
    """Harmonic mean of CP and CR."""
    CF1_per_class: Tensor
    """Mean of the classes' own F1 scores."""
    SF1: Tensor
    """Mean of the images' own F1 scores: "samples" in scikit-learn, "example-based" in the literature."""


def average_precision(scores: Tensor, targets: Tensor, *, interpolated: bool = False) -> Tensor:
    r"""Average precision of each class.

    With the :math:`P` positives of a class at ranks :math:`r_1 \le \dots \le r_P` of the scores in falling
    order, known entries only, and the precision :math:`p(r)` = positives among the first :math:`r` over
    :math:`r`:

    .. math::
        \text{raw} = \frac{1}{P} \sum_k p(r_k), \qquad
        \text{interpolated} = \frac{1}{P} \sum_k \max_{r \ge r_k} p(r)

    Raw is what scikit-learn computes and ASL, DualCoOp and SCPNet report. Interpolated is VOC's of 2010 and
    later (all points under the monotone envelope), reported by HCP-MLR-PL (SST, SARB, HST); it is never
    lower. The 11-point form of 2007 differs by several points from both and is not offered. Equal scores have
    no order: all of a group get the precision at its last rank.

    Args:
        scores: logits or probabilities, higher means more likely present. Half precision is raised to
            float32.
        targets: 1, 0 or -1 (unknown).
        interpolated: take the monotone envelope.

    Shape:
        scores and targets (B, C); the result (C,).

    Returns:
        float64 on the CPU, from 0 to 1; NaN for a class without a known positive.

    Raises:
        TypeError: an argument is not a tensor, or ``scores`` are not floats.
        ValueError: shapes or devices that do not fit, NaN scores, soft targets or values outside the
            encoding.

    Example:
        >>> scores = torch.tensor([[0.9], [0.8], [0.7], [0.6]])
        >>> targets = torch.tensor([[0], [1], [-1], [1]])
        >>> round(average_precision(scores, targets).item(), 4)  # (1/2 + 2/3) / 2, the third row left out
        0.5833
        >>> round(average_precision(scores, targets, interpolated=True).item(), 4)  # (2/3 + 2/3) / 2
        0.6667

    Reference:
        scikit-learn's ``average_precision_score``; the PASCAL VOC development kit of 2010 and later.
    """
    targets = check_scores("average_precision", scores, targets)
    return _average_precisions(scores, targets)[int(interpolated)]


def mean_average_precision(scores: Tensor, targets: Tensor, *, interpolated: bool = False) -> Tensor:
    """Mean over classes of :func:`average_precision`, leaving out classes without a known positive.

    Args:
        scores: logits or probabilities, higher means more likely present.
        targets: 1, 0 or -1 (unknown).
        interpolated: take the monotone envelope.

    Shape:
        scores and targets (B, C); the result ().

    Returns:
        float64 scalar tensor on the CPU, from 0 to 1; NaN when no class has a known positive.

    Raises:
        TypeError, ValueError: as :func:`average_precision`.

    Example:
        >>> scores = torch.tensor([[0.9, 0.1], [0.8, 0.3]])
        >>> mean_average_precision(scores, torch.tensor([[0, 0], [1, 0]])).item()  # the second class has no positive
        0.5
    """
    targets = check_scores("mean_average_precision", scores, targets)
    return _average_precisions(scores, targets)[int(interpolated)].nanmean()


def f1_scores(
    scores: Tensor, targets: Tensor, *, threshold: float | Sequence[float] | Tensor | None = None, top_k: int | None = None
) -> F1Scores:
    r"""Precision, recall and F1, pooled over all entries (O), averaged over classes (C), and F1 averaged over images (S).

    With true positives :math:`t_c`, predicted :math:`p_c` and known positives :math:`n_c` of class c:

    .. math::
        \text{OP} = \frac{\sum t_c}{\sum p_c}, \quad \text{OR} = \frac{\sum t_c}{\sum n_c}, \quad
        \text{CP} = \operatorname{mean}_c \frac{t_c}{p_c}, \quad
        \text{CR} = \operatorname{mean}_c \frac{t_c}{n_c}, \quad
        F(p, r) = \frac{2 p r}{p + r}

    OF1 = F(OP, OR). The class F1 has two forms under one name: CF1 = F(CP, CR) as in HCP-MLR-PL, and
    CF1_per_class, the mean of F over classes, as in DualCoOp. SF1 is the mean over images of the F1 of their known entries.

    An entry is predicted present if its score is *above* the threshold (DualCoOp's rule; HCP-MLR-PL takes
    "at or above"). With ``top_k`` it is if its class is among the highest scored of its image, at whatever level. Given
    both, it must pass both, which is the top-3 of ML-GCN's code. Of equal scores the class that comes first is taken.
    Unknown entries are ranked too, and then left out.

    If a denominator is zero: a class that is never predicted has precision 0 and F1 0, as in DualCoOp and HCP-MLR-PL. It
    adds nothing to OP (HCP-MLR-PL counts one wrong prediction for it there). Nothing predicted at all gives OP = OF1 = 0. A
    class without a known positive is left out of CP, CR, CF1 and CF1_per_class, as it is out of the mean average precision.
    But its false alarms count in OP. DualCoOp and HCP-MLR-PL keep such a class: DualCoOp as 0, while HCP-MLR-PL's CR
    becomes NaN. Without any known positive OR, OF1 and the class scores are NaN. An image without a known positive is left
    out of SF1 likewise; scikit-learn counts it as 0.

    Args:
        scores: logits or probabilities, higher means more likely present.
        targets: 1, 0 or -1 (unknown).
        threshold: scores above it are predicted present; one number, or one for each class. None (default) is 0, for
            logits, and refuses scores that look like probabilities.
        top_k: number of classes predicted of each image, from 1 to C; many papers report top-3.

    Shape:
        scores and targets (B, C), threshold () or (C,); each result ().

    Returns:
        :class:`F1Scores`, float64 on the CPU, from 0 to 1.

    Raises:
        TypeError: an argument is not a tensor, ``scores`` are not floats, or ``threshold`` is not numbers.
        ValueError: shapes or devices that do not fit, NaN, soft targets or values outside the encoding; scores that
            all lie in [0, 1] where neither ``threshold`` nor ``top_k`` is given; ``top_k`` out of range.

    Example:
        >>> f1 = f1_scores(torch.tensor([[2.0, -1.0], [1.0, -1.0]]), torch.tensor([[1, 1], [0, 0]]))
        >>> f1.OP.item(), f1.OR.item(), f1.CP.item(), f1.CR.item()
        (0.5, 0.5, 0.25, 0.5)

    Reference:
        HCP-MLR-PL and DualCoOp; top-k as in ML-GCN (Chen et al., CVPR 2019) and before it.
    """
    targets = check_scores("f1_scores", scores, targets)
    return _f1_scores(_predicted("f1_scores", scores, targets, threshold, top_k), targets)


def _predicted(
    owner: str, scores: Tensor, targets: Tensor, threshold: float | Sequence[float] | Tensor | None, top_k: int | None = None
) -> Tensor:
    """(B, C) bool: known entries predicted present."""
    predicted, classes = targets != UNKNOWN, scores.shape[1]
    if top_k is not None:
        check_number(owner, "top_k", top_k, 1, classes, whole=True)
        order = scores.argsort(dim=1, descending=True, stable=True)
        predicted = predicted & torch.zeros_like(predicted).scatter_(1, order[:, : int(top_k)], True)
        if threshold is None:
            return predicted
    if threshold is None:
        if bool(((scores >= 0) & (scores <= 1)).all() & (targets != UNKNOWN).any()):
            raise ValueError(
                f"{owner}: scores look like probabilities, all lie in [0, 1]; "
                "say threshold=0.5, or threshold=0.0 if they are logits"
            )
        threshold = 0.0
    wanted = f"{owner}: threshold must be a number or {classes} numbers, one for each class"
    try:
        level = torch.as_tensor(threshold, dtype=scores.dtype, device=scores.device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{wanted}, got {threshold!r}") from error
    if level.shape not in ((), (classes,)):
        raise ValueError(f"{wanted}, got shape {tuple(level.shape)}")
    if bool(level.isnan().any()):
        raise ValueError(f"{wanted}, got NaN")
    return predicted & (scores > level)


def _f1_scores(predicted: Tensor, targets: Tensor) -> F1Scores:
    """Of known entries predicted present, (B, C) bool, and checked targets."""
    positive = targets == 1
    t, p, n = (x.sum(dim=0).cpu().double() for x in (predicted & positive, predicted, positive))
    # 2pr / (p + r) = 2t / (p + n) in counts, where only n = 0 leaves nothing to score.
    overall_precision = t.sum() / p.sum().clamp(min=1)
    overall_f1 = torch.where(n.sum() > 0, 2 * t.sum() / (p.sum() + n.sum()), torch.nan)
    class_precision = torch.where(n > 0, t / p.clamp(min=1), torch.nan).nanmean()
    class_recall = (t / n).nanmean()
    total = class_precision + class_recall
    class_f1 = torch.where(total == 0, total, 2 * class_precision * class_recall / total)
    per_class_f1 = torch.where(n > 0, 2 * t / (p + n), torch.nan).nanmean()
    found, said, present = (x.sum(dim=1).cpu().double() for x in (predicted & positive, predicted, positive))
    sample_f1 = torch.where(present > 0, 2 * found / (said + present), torch.nan).nanmean()
    overall_recall = t.sum() / n.sum()
    return F1Scores(
        overall_precision, overall_recall, overall_f1, class_precision, class_recall, class_f1, per_class_f1, sample_f1
    )


def calibration_error(scores: Tensor, targets: Tensor, *, bins: int = 15) -> Tensor:
    r"""Expected calibration error of each class: how far probabilities are from the shares that came true.

    With the known entries of class c in bins :math:`I_k` of equal width by their probability p:

    .. math::
        \mathrm{ECE}_c = \sum_k \frac{|I_k|}{n_c}
        \Big| \frac{1}{|I_k|} \sum_{b \in I_k} y_b - \frac{1}{|I_k|} \sum_{b \in I_k} p_b \Big|

    It is 0 for perfect probabilities of infinitely many entries. With few known entries it is above 0 for perfect ones too.

    Args:
        scores: probabilities. Half precision is raised to float32.
        targets: 1, 0 or -1 (unknown).
        bins: number of bins; one that holds 0.2 as its lower end takes an entry at 0.2, and 1.0 has a bin of its own.

    Shape:
        scores and targets (B, C); the result (C,).

    Returns:
        float64 on the CPU, from 0 to 1; NaN for a class without a known entry.

    Raises:
        TypeError: as :func:`average_precision`.
        ValueError: as :func:`average_precision`; scores outside [0, 1]; ``bins`` below 1.

    Example:
        >>> scores = torch.tensor([[0.9], [0.9], [0.1], [0.5]])
        >>> targets = torch.tensor([[1], [0], [0], [-1]])
        >>> round(calibration_error(scores, targets).item(), 4)  # (|1 - 1.8| + |0 - 0.1|) / 3, the last row left out
        0.3

    Reference:
        Naeini et al., AAAI 2015; Guo et al., ICML 2017; the bins are those of torchmetrics' ``BinaryCalibrationError``.
    """
    targets = check_scores("calibration_error", scores, targets, probabilities=True)
    check_number("calibration_error", "bins", bins, 1, whole=True)
    scores, targets = upcast(scores).detach().cpu(), targets.detach().cpu()
    ends = torch.linspace(0, 1, int(bins) + 1, dtype=scores.dtype, device="cpu")
    width, errors = int(bins) + 1, []
    for s, y in zip(scores.split(_CHUNK, dim=1), targets.split(_CHUNK, dim=1), strict=True):
        known, classes = y != UNKNOWN, s.shape[1]
        place = torch.bucketize(s.contiguous(), ends, right=True) - 1 + width * torch.arange(classes, device="cpu")
        apart = (y.double() - s.double())[known]
        sums = torch.bincount(place[known], apart, minlength=classes * width).view(classes, width)
        errors.append(sums.abs().sum(dim=1) / known.sum(dim=0))
    return torch.cat(errors)


def evaluate(scores: Tensor, targets: Tensor, *, threshold: float | Sequence[float] | Tensor | None = None) -> dict[str, float]:
    """The scores of a result row, in per cent.

    Args:
        scores: logits, or probabilities with ``threshold=0.5``.
        targets: 1, 0 or -1 (unknown).
        threshold: as in :func:`f1_scores`.

    Shape:
        scores and targets (B, C), threshold () or (C,).

    Returns:
        ``mAP`` and ``mAP_interpolated`` (:func:`mean_average_precision`), ``OF1``, ``CF1`` and
        ``CF1_per_class`` (:func:`f1_scores`), from 0 to 100.

    Raises:
        TypeError, ValueError: as :func:`f1_scores`.

    Example:
        >>> evaluate(torch.tensor([[2.0], [-1.0], [1.0], [-2.0]]), torch.tensor([[1], [1], [0], [0]]))["OF1"]
        50.0
    """
    targets = check_scores("evaluate", scores, targets)
    f1 = _f1_scores(_predicted("evaluate", scores, targets, threshold), targets)
    raw, interpolated = _average_precisions(scores, targets)
    row = {
        "mAP": raw.nanmean(),
        "mAP_interpolated": interpolated.nanmean(),
        "OF1": f1.OF1,
        "CF1": f1.CF1,
        "CF1_per_class": f1.CF1_per_class,
    }
    return {name: 100 * float(value) for name, value in row.items()}


def _average_precisions(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Raw and interpolated average precision of each class, (C,) each, from one sort."""
    scores, targets = upcast(scores).detach().cpu(), targets.cpu()
    raw, interpolated = [], []
    for s, y in zip(torch.split(scores.T, _CHUNK), torch.split(targets.T, _CHUNK), strict=True):
        y = y.contiguous()
        keys = torch.eq(y, 1, out=torch.empty_like(y, dtype=torch.int64))
        count = keys.sum(dim=1)
        # Highest score first; positives last among equals, so that a group of equals ends with them; what is unknown behind all.
        keys.add_(_falling(s), alpha=2)
        keys.add_(torch.eq(y, UNKNOWN, out=torch.empty_like(keys)), alpha=_BEHIND)
        keys = _sorted(keys)
        row, place = (keys & 1).nonzero(as_tuple=True)
        # From here on the positives of each class alone, in the order of their ranks; zeros where a class has fewer.
        width = max(1, int(count.max()))
        found = torch.arange(1, width + 1, dtype=torch.float64, device="cpu").repeat(len(s), 1)
        real = found <= count[:, None]
        rank = torch.ones_like(found).masked_scatter_(real, (place + 1).double())
        key = torch.zeros_like(real, dtype=keys.dtype).masked_scatter_(real, keys[row, place])
        # Only the last rank of a group of equal scores is a point of the precision-recall curve.
        last = real.clone()
        last[:, :-1] &= ~real[:, 1:] | (key[:, 1:] != key[:, :-1])
        found.masked_fill_(~last, 0)
        precision = found / rank
        # Positives that each point adds to the point before it.
        gain = found.cummax(dim=1).values.diff(dim=1, prepend=found.new_zeros(len(found), 1))
        envelope = precision.flip(1).cummax(dim=1).values.flip(1)
        raw.append((gain * precision).sum(dim=1) / count)
        interpolated.append((gain * envelope).sum(dim=1) / count)
    return torch.cat(raw), torch.cat(interpolated)


def _falling(scores: Tensor) -> Tensor:
    """Whole numbers (int64, below 2^32 in size) in the opposite order of the scores, equal where they are equal."""
    turned = 0.0 - scores  # 0 and -0 become one
    if turned.dtype == torch.float64:
        place: Tensor = torch.unique(turned, return_inverse=True)[1]
        return place
    bits = turned.contiguous().view(torch.int32)
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).long()  # those of negative numbers rise as the number falls, but for the sign


def _sorted(keys: Tensor) -> Tensor:
    """Each row in rising order, in place where NumPy is there: torch's sort also finds the order and takes ten times as long."""
    try:
        keys.numpy().sort(axis=1)
        return keys
    except RuntimeError:  # torch without NumPy
        return keys.sort(dim=1).values
