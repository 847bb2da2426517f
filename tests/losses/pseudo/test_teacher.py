"""TeacherRule: estimates of another classifier, given before training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trm_losses as tl
from tests.helpers.cases.labeler import ESTIMATES, taught_labeler
from tests.helpers.values import BATCH, CLASSES, labels
from trm_losses.pseudo import TeacherRule


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_estimates_are_kept_in_single_precision(dtype: torch.dtype) -> None:
    rule = TeacherRule(ESTIMATES[:, :3].to(dtype).requires_grad_())
    assert rule.estimates.dtype == rule.half().estimates.dtype == torch.float32 and not rule.estimates.requires_grad
    torch.testing.assert_close(rule.estimates, ESTIMATES[:, :3].to(dtype).float().nan_to_num(-1.0))


@pytest.mark.parametrize(
    "estimates, error, message",
    [
        (torch.full((2, 3), 1.5), ValueError, "estimates must be probabilities, NaN or -1, got 1.5; take their sigmoid"),
        (torch.full((2, 3), -0.25), ValueError, "estimates must be probabilities, NaN or -1, got -0.25; take their sigmoid"),
        (torch.full((2, 3), torch.inf), ValueError, "estimates must be finite, got 6 NaN or infinite of 6"),
        (torch.ones(3), ValueError, r"estimates must have shape \(N, C\), got \(3,\)"),
        (torch.ones(2, 3).long(), TypeError, "estimates must be a floating-point tensor, got torch.int64"),
        ([[0.5]], TypeError, "estimates must be a torch.Tensor, got list"),
    ],
    ids=["above", "below", "infinite", "shape", "integers", "list"],
)
def test_estimates_are_checked(estimates: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^TeacherRule: {message}"):
        TeacherRule(estimates)


def test_without_validation_no_device_is_waited_for() -> None:
    """A tensor on the device "meta" has no values: to ask for one is an error."""
    made = tl.PseudoLabeler(3, TeacherRule(torch.ones(6, 3)), validate=False).to("meta")
    y, ids = torch.full((2, 3), -1.0, device="meta"), torch.arange(2, device="meta")
    made(None, y, ids=ids)
    made.update(None, y, ids=ids)


def test_a_reset_forgets_steps_and_no_estimate() -> None:
    made, args = taught_labeler(CLASSES), (None, torch.full((BATCH, CLASSES), -1.0))
    assert ESTIMATES.isnan().any(), "the argument is as it was"
    before = made(*args, ids=torch.arange(BATCH))
    made.update(None, labels(), ids=torch.arange(BATCH))
    assert made.step == 1 and made.known_count.any()
    made.reset()
    assert made.step == 0 and not made.known_count.any()
    for one, two in zip(made(*args, ids=torch.arange(BATCH)), before, strict=True):
        assert torch.equal(one, two)
