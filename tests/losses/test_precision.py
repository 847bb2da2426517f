"""Every loss in half precision, with and without autocast, at the edges of its settings, against float64 on the same numbers.

The whole grid, and ranks, compiled code and saved state beside it, are run by benchmarks/trust.py, whose parts these are.
"""

from __future__ import annotations

import math

import pytest
import torch

import trm_losses as tl
from tests.helpers import oracles, trust
from tests.helpers.values import CLASSES, WIDTH, normal
from trm_losses import functional as TF


def edges(part: trust.Part) -> list[trust.Setting]:
    """The first setting, and for each further value of it the first with this one changed."""
    changed = [{**part.setting, key: value} for key, values in part.grid.items() for value in values[1:]]
    return [part.setting, *changed, *({**s, "unknown": 1.0} for s in changed if s.get("classes") == 1 and "unknown" in s)]


@pytest.mark.parametrize("precision", trust.PRECISIONS, ids=lambda p: str(p).replace(" ", "-"))
@pytest.mark.parametrize("part", trust.PARTS, ids=lambda part: part.name.replace(" ", "-"))
def test_close_to_float64(part: trust.Part, precision: trust.Precision) -> None:
    """Value and gradient, at one setting after another: temperatures, scales, classes, sizes, shares of unknown labels."""
    for setting in edges(part):
        row = trust.in_precision(part, precision, [setting])
        assert trust.passed(row, part), row


def test_what_is_not_close_does_not_pass() -> None:
    part, precision = trust.PARTS[0], trust.PRECISIONS[0]
    limits = dict(zip(("value", "gradient"), trust.tolerance(part, precision), strict=True))
    row = trust.in_precision(part, precision, [part.setting])
    assert trust.passed({**row, **limits}, part)
    for key, limit in limits.items():
        for spoilt in (2 * limit, math.inf):
            assert not trust.passed({**row, key: spoilt}, part)


def test_errors_are_those_of_the_worst_entry() -> None:
    exact = trust.Run(torch.tensor(4.0), {"a": torch.tensor([8.0, -1.0]), "b": torch.zeros(2)})
    actual = trust.Run(torch.tensor(5.0), {"a": torch.tensor([8.0, 1.0]), "b": torch.zeros(2)})
    assert trust.errors(actual, exact) == (0.25, 0.25)
    assert trust.errors(trust.Run(torch.tensor(0.5), exact.gradients), exact._replace(value=torch.tensor(0.0))) == (0.5, 0.0)
    broken = trust.Run(torch.tensor(4.0), {"a": torch.tensor([8.0, float("nan")]), "b": torch.zeros(2)})
    assert trust.errors(broken, exact) == (0.0, math.inf)


def test_a_device_that_autocast_does_not_know() -> None:
    """Here the device of sizes without values."""
    logits, targets = torch.zeros(2, CLASSES, device="meta", requires_grad=True), torch.ones(2, CLASSES, device="meta")
    loss = TF.asymmetric_loss(logits, targets)
    loss.backward()
    assert loss.shape == () and logits.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("above", [0.0, 0.02, 3.0])
def test_a_scale_past_its_limit_comes_back(above: float, dtype: torch.dtype) -> None:
    """Its value stops at 100; its gradient is that of a scale of 100, so that the loss can bring it down again.

    log(100) rounds up in float32: a clamp after exp() would cut its gradient for good.
    """
    matching = tl.TextRegionMatchingLoss(CLASSES, scale=100.0).to(dtype)
    regions, text = 0.05 * normal(4, CLASSES, WIDTH, seed=1), normal(CLASSES, WIDTH, seed=2)
    targets = (TF.text_region_logits(regions, text, 1.0) < 0).double()  # all wrong: the less sure the better
    with torch.no_grad():
        matching.log_scale.add_(above)
    value = matching(regions.to(dtype), text.to(dtype), targets)
    value.backward()

    def at(scale: float) -> float:
        return float(oracles.asymmetric(oracles.matching_logits(regions, text, scale), targets).mean())

    rel = 1e-5 if dtype == torch.float64 else 1e-4
    assert float(value.detach()) == pytest.approx(at(100.0), rel=rel / 100)
    slope = (at(100.0 * math.exp(1e-5)) - at(100.0 * math.exp(-1e-5))) / 2e-5
    assert matching.log_scale.grad is not None and slope > 0.01
    assert float(matching.log_scale.grad) == pytest.approx(slope, rel=rel)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scale_of_a_half_model(dtype: torch.dtype) -> None:
    """exp() and the limit are taken in float32: in bfloat16 log(100) rounds to a scale of 99 or 102."""
    matching = tl.TextRegionMatchingLoss(CLASSES, scale=7.0).to(dtype)
    assert matching.scale.dtype == torch.float32
    assert float(matching.scale.detach()) == pytest.approx(math.exp(float(matching.log_scale.detach().double())), rel=1e-6)
    with torch.no_grad():
        matching.log_scale.fill_(6.0)
    assert float(matching.scale.detach()) == pytest.approx(100.0, rel=1e-6)
