"""TextRegionMatchingLoss beyond the table: its scale, its bias, and what it shares with the functions."""

from __future__ import annotations

import math

import pytest
import torch

from tests.helpers.values import labels, normal
from trm_losses import TextRegionMatchingLoss


def test_scale_and_bias_start_where_told() -> None:
    loss = TextRegionMatchingLoss(3, scale=5.0, bias=-2.0)
    assert math.isclose(loss.scale.item(), 5.0, rel_tol=1e-6)
    assert loss.bias.tolist() == [-2.0] * 3
    assert math.isclose(TextRegionMatchingLoss(3).scale.item(), 20.0, rel_tol=1e-6)


def test_logits_without_bias() -> None:
    loss = TextRegionMatchingLoss(4, scale=3.0, bias=1.5).double()
    r, t = normal(2, 4, 8), normal(4, 8, seed=1)
    torch.testing.assert_close(loss.logits(r, t, bias=False), loss.logits(r, t) + 1.5)


def test_loss_of_logits_at_hand() -> None:
    loss = TextRegionMatchingLoss(4).double()
    r, t, y = normal(3, 4, 8), normal(4, 8, seed=1), labels(3, 4)
    w = torch.rand(3, 4, dtype=torch.float64)
    torch.testing.assert_close(loss.loss(loss.logits(r, t), y, w), loss(r, t, y, w))
    entries = loss.loss(loss.logits(r, t), y, w, reduction="none")
    assert entries.shape == (3, 4) and torch.count_nonzero(entries[y == -1]) == 0
    torch.testing.assert_close(entries.sum(), loss.loss(loss.logits(r, t), y, w, reduction="sum"))


@pytest.mark.parametrize("prior", [0.07, 0.5, 0.9])
@pytest.mark.parametrize("size", [0.1, 5.0])
def test_calibrated_bias_gives_every_class_the_prior(prior: float, size: float) -> None:
    r, t = size * normal(30, 4, 8, dtype=torch.float32), normal(4, 8, seed=1, dtype=torch.float32)
    loss = TextRegionMatchingLoss(4)
    loss.calibrate_bias(r, t, prior)
    torch.testing.assert_close(torch.sigmoid(loss.logits(r, t)).mean(dim=0), torch.full((4,), prior), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="prior must be above 0"):
        loss.calibrate_bias(r, t, 0.0)
    with pytest.raises(
        ValueError, match=r"regions must lead to a bias that torch.float16 can hold, got regions of a length up to"
    ):
        loss.half().calibrate_bias(1e6 * r, t, prior)


def test_device_and_dtype_of_the_parameters() -> None:
    assert {p.dtype for p in TextRegionMatchingLoss(2, dtype=torch.float64).parameters()} == {torch.float64}
    assert {p.device.type for p in TextRegionMatchingLoss(2, device="meta").parameters()} == {"meta"}
