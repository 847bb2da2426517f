"""Questions about the labels of a folder, with where the model looked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from trm_losses import TRMHead
from trm_losses.labels import UNKNOWN
from trm_pipeline.features.cached import CachedFeatures
from trm_pipeline.folder.labels import Labels
from trm_pipeline.folder.review.choice import worth_asking
from trm_pipeline.folder.review.page import Question


def open_questions(labels: Labels, probabilities: Tensor, head: TRMHead, features: CachedFeatures, count: int) -> list[Question]:
    """The unknown labels that nobody answered and that are worth asking about, see :func:`.worth_asking`; at most ``count``."""
    closed = labels.targets.masked_fill(labels.answered, 0.0)  # whatever the answer was
    pairs = worth_asking(probabilities, closed, count)
    return _questions(labels, probabilities, head, features, pairs)


def contradicted(labels: Labels, probabilities: Tensor, head: TRMHead, features: CachedFeatures, count: int) -> list[Question]:
    """The known labels, no answers, that probabilities contradict most and are on the other side of; at most ``count``."""
    targets = torch.where(opposed(labels, probabilities), labels.targets, float(UNKNOWN))
    return _questions(labels, probabilities, head, features, list(islice(doubted(targets, probabilities), count)))


def opposed(labels: Labels, probabilities: Tensor) -> Tensor:
    """Which known labels (N, C), no answers, probabilities are on the other side of."""
    return (labels.targets != UNKNOWN) & ~labels.answered & ((labels.targets - probabilities).abs() > 0.5)


def doubted(targets: Tensor, probabilities: Tensor) -> Iterator[tuple[int, int]]:
    """Known labels (i, c), those that probabilities (N, C) contradict most first, of equal ones by image and class.

    What has no probability (NaN) is left out.
    """
    asked = (targets != UNKNOWN) & probabilities.isfinite()
    places = asked.flatten().nonzero()[:, 0]
    order = places[(targets[asked] - probabilities[asked]).abs().argsort(descending=True, stable=True)]
    for part in order.split(1 << 16):  # as numbers of Python all of them would take many times the memory
        yield from (divmod(place, targets.shape[1]) for place in part.tolist())


def _questions(
    labels: Labels, probabilities: Tensor, head: TRMHead, features: CachedFeatures, pairs: Sequence[tuple[int, int]]
) -> list[Question]:
    """In the order of the pairs; each image passes through the head once."""
    asked: dict[int, list[int]] = {}
    for i, c in pairs:
        asked.setdefault(i, []).append(c)
    heat: dict[tuple[int, int], Any] = {}
    for i, classes in asked.items():
        maps = _saliency(head, features.only(torch.tensor([i])))
        heat |= {(i, c): maps[c].clone().numpy() for c in classes}
    said = {1.0: "present", 0.0: "absent"}
    return [
        Question(
            labels.files[i], labels.class_names[c], float(probabilities[i, c]), heat[i, c], said.get(float(labels.targets[i, c]))
        )
        for i, c in pairs
    ]


@torch.no_grad()
def _saliency(head: TRMHead, image: CachedFeatures) -> Tensor:
    """(C, h, w) over the tokens of a single image."""
    assert image.grid is not None
    batch = next(iter(image.batches(1)))
    return head.pooler(batch.tokens, head.text).saliency[0].unflatten(1, image.grid).float().cpu()  # type: ignore[no-any-return]
