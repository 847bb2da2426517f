"""Which (image, class) pairs are worth asking about."""

from __future__ import annotations

import torch
from torch import Tensor

from trm_losses.labels import UNKNOWN

POOL = 50  # pairs that are looked at for each one that is asked
AGAIN = 0.7  # of the worth of an image, for each question about it
ENOUGH = 10  # questions about a class after which the next is worth less


def worth_asking(probabilities: Tensor, targets: Tensor, count: int) -> list[tuple[int, int]]:
    r"""Unknown labels that the model doubts, spread over images and classes.

    .. math:: \frac{0.7^{n_b}}{\sqrt{1 + m_c / 10}}\; p_{bc}\,(1 - p_{bc})

    is the worth of a pair (b, c), of which the highest is asked next; n and m count what was asked of the image and of the class
    so far. Of all unknown pairs those with the highest :math:`p\,(1 - p)` are looked at.

    Args:
        probabilities: (N, C), calibrated.
        targets: (N, C) of 1, 0, -1 (unknown).
        count: questions; fewer if fewer labels are unknown.

    Returns:
        Pairs (b, c), in the order in which they are asked.

    Reference: uncertainty sampling (Lewis and Gale 1994); how questions are spread is our choice.
    """
    unknown = targets == UNKNOWN
    doubt = torch.where(unknown, probabilities * (1 - probabilities), -1.0).flatten()
    size = min(POOL * count, int(unknown.sum()))
    worth, pool = doubt.topk(size)
    rows, classes = pool // targets.shape[1], pool % targets.shape[1]
    asked: list[tuple[int, int]] = []
    of_class = torch.zeros(targets.shape[1])
    for _ in range(min(count, size)):
        best = int((worth / (1 + of_class[classes] / ENOUGH).sqrt()).argmax())
        row, c = int(rows[best]), int(classes[best])
        asked.append((row, c))
        worth[rows == row] *= AGAIN
        worth[best] = -1.0
        of_class[c] += 1
    return asked
