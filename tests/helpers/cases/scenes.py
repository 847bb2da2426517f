"""Scenes that the contrast of regions is taken in: its options, and labels on both sides of the thresholds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.helpers.values import labels, normal

# Contrast -------------------------------------------------------------------------------------------------------------

SCENES: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights": {"weights": normal(6, 4, seed=5).abs()},
    "prototypes": {"prototypes": normal(4, 8, seed=6)},
    "seen": {"prototypes": normal(4, 8, seed=6), "seen": torch.tensor([True, False, True, False])},
    "none seen": {"prototypes": normal(4, 8, seed=6), "seen": torch.zeros(4, dtype=torch.bool)},
    "settings": {"temperature": 0.3, "temperature_region": 0.2, "anchor_threshold": 0.95},
    "everything": {
        "weights": normal(6, 4, seed=5).clamp(min=0),
        "prototypes": normal(4, 8, seed=6),
        "seen": torch.tensor([True, True, True, False]),
        "temperature": 0.15,
        "anchor_threshold": 0.5,
    },
}


def pseudo_positives() -> Tensor:
    """Known labels, and soft labels on both sides of the thresholds."""
    y = labels(6, 4, seed=3)
    y[3, :3] = torch.tensor([0.93, 0.97, 0.6], dtype=torch.float64)
    return y
