"""Which questions are asked: worth by a plain loop, and what nobody needs to ask."""

import pytest
import torch

from trm_pipeline.folder.review import choice
from trm_pipeline.folder.review.ask import doubted


def slow(probabilities, targets, count):
    asked = []
    for _ in range(count):
        best, chosen = -1.0, None
        for b in range(len(targets)):
            for c in range(targets.shape[1]):
                if targets[b, c] != -1 or (b, c) in asked:
                    continue
                of_image, of_class = sum(i == b for i, _ in asked), sum(k == c for _, k in asked)
                p = float(probabilities[b, c])
                worth = 0.7**of_image * p * (1 - p) / (1 + of_class / 10) ** 0.5
                if worth > best:
                    best, chosen = worth, (b, c)
        asked.append(chosen)
    return asked


@pytest.mark.parametrize("seed", range(5))
def test_questions_are_spread_over_images_and_classes(seed):
    draw = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(12, 5, generator=draw, dtype=torch.float64)
    targets = torch.randint(-1, 2, (12, 5), generator=draw).float()
    targets[:2] = -1
    assert choice.worth_asking(probabilities, targets, 9) == slow(probabilities, targets, 9)


def test_no_more_is_asked_than_is_unknown():
    probabilities, targets = torch.full((3, 2), 0.5), torch.ones(3, 2)
    assert choice.worth_asking(probabilities, targets, 4) == []
    targets[1] = -1
    assert sorted(choice.worth_asking(probabilities, targets, 4)) == [(1, 0), (1, 1)]
    assert choice.worth_asking(probabilities, targets, 0) == []


def test_known_labels_are_doubted_by_what_contradicts_them():
    targets = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, 1.0]])
    scores = torch.tensor([[0.3, 0.9], [0.5, 0.3], [0.1, torch.nan]])
    assert list(doubted(targets, scores)) == [(0, 1), (0, 0), (1, 1), (2, 0)]
