"""Which (image, class) pairs are worth asking about."""

from __future__ import annotations

import torch
from torch import Tensor

from trm_losses.labels import UNKNOWN

__all__ = ["worth_asking"]

DIRECTIONS = 64
"""Of the features that are read, at most: those in which the images differ most."""

SPREAD = 3.0
"""How far a class is expected to move a logit, as in the head of whole images."""

POOL = 50
"""Pairs that are looked at for each one that is asked."""


def worth_asking(features: Tensor, probabilities: Tensor, targets: Tensor, count: int) -> list[tuple[int, int]]:
    r"""Unknown labels whose answers are expected to tell most, one after the other.

    Each class is seen as a logistic regression on :math:`\phi_b` (features, the logit of the class, 1) with the Gaussian prior
    of variance :math:`\tau^2`. With the known labels its weights have the covariance

    .. math::
        \Sigma_c = \Big(\tfrac{1}{\tau^2} I + \sum_{b\ \text{known}} w_{bc}\, \phi_b \phi_b^\top\Big)^{-1}, \qquad
        w = p\,(1 - p)

    and the answer to (b, c) is expected to take :math:`\log(1 + w_{bc}\, \phi_b^\top \Sigma_c \phi_b)` from the uncertainty about
    them. So a pair is worth asking if the model doubts it, and if nothing like it is known. What is asked counts as known for
    the next, which spreads questions over images and classes. Of all unknown pairs those with the highest w are looked at.

    Args:
        features: (N, W) of the images. probabilities: (N, C) of their labels. targets: (N, C) of 1, 0, -1 (unknown).
        count: questions; fewer if fewer labels are unknown.

    Returns:
        Pairs (b, c), the most telling first.

    Reference: expected information of a Laplace approximation, after MacKay 1992; the greedy order and the features are ours.
    """
    unknown = targets == UNKNOWN
    doubt = (probabilities * (1 - probabilities)).double()
    size = min(POOL * count, int(unknown.sum()))
    if size == 0:
        return []
    pool = torch.where(unknown, doubt, -1.0).flatten().topk(size).indices
    rows, classes = pool // targets.shape[1], pool % targets.shape[1]
    common = _directions(features)
    logits = torch.logit(probabilities.double(), eps=1e-6)
    gain = torch.zeros(size, dtype=torch.float64)
    state: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # places in the pool, phi, phi times the covariance
    for c in classes.unique().tolist():
        phi = torch.cat([common, 0.5 * _standard(logits[:, c : c + 1]), torch.ones_like(logits[:, :1])], dim=1)
        known, places = ~unknown[:, c], (classes == c).nonzero()[:, 0]
        seen = phi[known]
        precision = torch.eye(phi.shape[1], dtype=torch.float64) / SPREAD**2 + (seen * doubt[known, c : c + 1]).T @ seen
        own = phi[rows[places]]
        moved = torch.linalg.solve(precision, own.T).T
        state[c] = places, own, moved
        gain[places] = torch.log1p(doubt[rows[places], c] * (own * moved).sum(dim=1))
    asked: list[tuple[int, int]] = []
    for _ in range(min(count, size)):
        best = int(gain.argmax())
        row, c = int(rows[best]), int(classes[best])
        asked.append((row, c))
        places, own, moved = state[c]
        here = int((places == best).nonzero())
        weight = doubt[row, c]
        # The covariance once the answer is known, by Sherman and Morrison; phi times it, of all pairs of the class.
        along = moved @ own[here]
        moved = moved - along[:, None] * moved[here] * (weight / (1 + weight * along[here]))
        state[c] = places, own, moved
        told = gain[places] < 0
        gain[places] = torch.log1p(doubt[rows[places], c] * (own * moved).sum(dim=1).clamp(min=0)).masked_fill(told, -1.0)
        gain[best] = -1.0
    return asked


def _standard(x: Tensor) -> Tensor:
    apart = x - x.mean(dim=0)
    return apart / apart.square().mean(dim=0).sqrt().clamp(min=1e-9)


def _directions(features: Tensor) -> Tensor:
    """The images (N, K) along the directions in which they differ most, each of the same weight; a row has mean square 1."""
    x = _standard(features.double())
    values, vectors = torch.linalg.eigh(x.T @ x / max(1, len(x)))
    kept = vectors[:, -DIRECTIONS:][:, values[-DIRECTIONS:] > 1e-9]
    return _standard(x @ kept) / max(1, kept.shape[1]) ** 0.5
