"""Estimates of unknown labels from the most similar images, and a class prior for them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._precision import full_precision, unit, upcast
from ._log_sums import BLOCK
from ._shapes import check_shapes

__all__ = ["match_prior", "neighbour_scores"]


@torch.no_grad()
def match_prior(probabilities: Tensor, prior: Tensor, free: Tensor) -> Tensor:
    r"""Probabilities moved to a class prior: :math:`\sigma(\mathrm{logit}\, q_{ic} + b_c)` with one shift for each class.

    Training without known absent labels leaves probabilities at a level of its own; their order is kept.

    Args:
        probabilities: (N, C), known labels among them. prior: (C,) the mean that a class shall have over its N entries, as near
            as its free entries can bring it. free: (N, C) bool, entries that are moved.

    Returns:
        (N, C) in float32 or the probabilities' own precision; what is not free is as it was.

    Reference: our choice.
    """
    check_shapes("match_prior", probabilities=(probabilities, "N C"), prior=(prior, "C"), free=(free, "N C"))
    with full_precision(probabilities):
        q = upcast(probabilities)
        least = torch.finfo(q.dtype).tiny  # a probability of 0 has a logit too, and keeps its place below all others
        logits = q.clamp(min=least).log() - (1 - q).clamp(min=least).log()
        wanted = prior * len(q) - (q * ~free).sum(dim=0)
        low, high = (logits.new_full((logits.shape[1],), sign * (8.0 - 2 * math.log(least))) for sign in (-1.0, 1.0))
        for _ in range(60):  # each halves the interval: the sum grows with the shift
            middle = 0.5 * (low + high)
            short = (torch.sigmoid(logits + middle) * free).sum(dim=0) < wanted
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        return torch.where(free, torch.sigmoid(logits + high), q)


@torch.no_grad()
def neighbour_scores(
    features: Tensor,
    scores: Tensor,
    *,
    known: Tensor | None = None,
    neighbours: int = 20,
    temperature: float = 0.05,
    steps: int = 1,
) -> Tensor:
    r"""What the images whose region of a class looks most alike say about that class: label propagation over regions.

    .. math:: q_{ic} = \sum_{j \in \mathcal N_{ic}} \mathrm{softmax}_j(\hat r_{ic} \cdot \hat r_{jc} / \tau)\, s_{jc}

    with :math:`\mathcal N_{ic}` the k images other than i whose regions of class c are the most similar. With several steps what
    came out is passed on, and known entries say what they said at first. Classes and blocks of images are taken in turn, so
    memory grows with the number of images, not with its square.

    Args:
        features: (N, C, D) regions of N images, in any floating type. scores: (N, C), known labels or probabilities.
        known: (N, C) bool, entries that keep their score between the steps; None for no entry.
        neighbours: k; all other images where there are fewer. temperature: :math:`\tau`. steps: how often.

    Returns:
        (N, C) in float32 or the scores' own precision; a single image, which has no neighbour, keeps its score.

    Reference: our choice; inter-image relations of one class beside the paper's relations to prototypes. Passing on with known
    labels clamped is label propagation (Zhu and Ghahramani, 2002).
    """
    check_shapes("neighbour_scores", features=(features, "N C D"), scores=(scores, "N C"), known=(known, "N C?"))
    with full_precision(features):
        scores = upcast(scores)
        images, classes = scores.shape
        k = min(neighbours, images - 1)
        if k < 1:
            return scores.clone()
        out = scores.clone()
        for c in range(classes):
            similarity, index = _nearest(unit(features[:, c]), k)
            weight = torch.softmax(similarity / temperature, dim=1).to(out.dtype)
            said = scores[:, c]
            for _ in range(steps):
                out[:, c] = (weight * said[index]).sum(dim=1)
                said = out[:, c] if known is None else torch.where(known[:, c], scores[:, c], out[:, c])
        return out


def _nearest(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(N, k) greatest products of each row of z (N, D) with other rows, and which rows they are."""
    images = len(z)
    blocks = []
    for rows in torch.split(torch.arange(images, device=z.device), max(1, BLOCK // images)):
        similarity = z[rows] @ z.T
        similarity[rows - rows[0], rows] = -float("inf")  # nobody speaks for itself
        blocks.append(similarity.topk(k, dim=1))
    return torch.cat([block.values for block in blocks]), torch.cat([block.indices for block in blocks])
