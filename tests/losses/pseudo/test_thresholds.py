"""Thresholds: fixed levels of a score."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.cases.labeler import evidence
from trm_losses.pseudo import Thresholds


def test_positives_are_soft_and_negatives_hard() -> None:
    scores = torch.tensor([[0.8, 0.79, 0.11, 0.1, 1.0]])
    found = Thresholds()(scores, evidence([[0, 0]] * 5))
    torch.testing.assert_close(found, torch.tensor([[0.8, -1.0, -1.0, 0.0, 1.0]]))


@pytest.mark.parametrize(
    "settings, message",
    [
        ((0.4, 0.1), "positive must be at least 0.5 and at most 1, got 0.4"),
        ((0.8, -0.1), "negative must be at least 0 and at most 1, got -0.1"),
        ((0.6, 0.6), "negative must be below positive, got 0.6 and 0.6"),
    ],
    ids=str,
)
def test_refuses_settings(settings: tuple[float, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"Thresholds: {message}"):
        Thresholds(*settings)
