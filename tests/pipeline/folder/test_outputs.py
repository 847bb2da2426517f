"""Sheets of images."""

import math

import pytest
import torch

from trm_pipeline.folder import outputs


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [3, 24])
def test_a_sheet_shows_the_highest_entries_of_images_and_classes_in_turn(count, seed):
    order = torch.randint(0, 30, (40, 6), generator=torch.Generator().manual_seed(seed)) / 30  # many are equal
    order[:, 5] = 0
    most, chosen = max(2, math.ceil(count / 5)), []
    for value, i, c in sorted((-float(order[i, c]), i, c) for i in range(40) for c in range(6)):
        own = sum(other == c for _, other in chosen)
        if -value >= 0.1 and len(chosen) < count and own < most and all(other != i for other, _ in chosen):
            chosen.append((i, c))
    assert outputs._varied(order, 0.1, count) == chosen
