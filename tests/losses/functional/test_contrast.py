"""The log-sum-exp of the contrast in blocks of rows: the same numbers, without a matrix of all pairs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import oracles
from tests.helpers.compare import close
from tests.helpers.values import normal
from tests.helpers.watch import Watch
from trm_losses import _precision
from trm_losses import functional as TF
from trm_losses._precision import unit_rows
from trm_losses.functional import _log_sums
from trm_losses.functional._log_sums import _plain, log_sum_of_others

TEMPERATURES = [0.005, 0.02, 0.1, 1.0]  # the first takes the maximum of each row out, in blocks too


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return _precision.unit(normal(*shape, seed=seed, dtype=dtype))


def loops(rows: Any, keys: Any, valid: Any, first: int, temperature: float) -> np.ndarray:
    """The sum over keys, entry by entry."""
    rows, keys = oracles.array(rows), oracles.array(keys)
    total = []
    for i, row in enumerate(rows):
        others = [j for j in range(len(keys)) if j != first + i and (valid is None or bool(valid[j]))]
        total.append(oracles.log_sum_exp([float(row @ keys[j]) / temperature for j in others]))
    return np.asarray(total)


@pytest.fixture(params=[1, 3, 4, 100])
def block(request: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows at once: of the symmetric sum, and of others, of which no test has more than 11 keys."""
    monkeypatch.setattr(_log_sums, "_ROWS", request.param)
    monkeypatch.setattr(_log_sums, "BLOCK", 11 * request.param)
    return int(request.param)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("rows", [2, 5, 8, 9])
def test_blocks_of_rows_are_the_loops(block: int, rows: int, temperature: float) -> None:
    """Rows that are the keys, with value and gradient: that of x is by central differences of the loops."""
    x = unit(rows, 4).requires_grad_()
    upstream = normal(rows, seed=1)
    value = log_sum_of_others(x, x, None, 0, temperature)
    close(value, loops(x, x, None, 0, temperature))
    (slope,) = torch.autograd.grad(value, x, upstream)
    step, moved = 1e-6, x.detach().clone()
    for i, d in itertools.product(range(rows), range(4)):
        values = []
        for sign in (1, -1):
            moved[i, d] = x.detach()[i, d] + sign * step
            values.append(float(oracles.array(upstream) @ loops(moved, moved, None, 0, temperature)))
        moved[i, d] = x.detach()[i, d]
        expected = (values[0] - values[1]) / (2 * step)
        assert abs(float(slope[i, d]) - expected) < 1e-4 * max(1, abs(expected))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_rows_among_the_keys_of_all_ranks(block: int, temperature: float) -> None:
    rows, others = unit(5, 4), unit(6, 4, seed=1)
    valid = torch.tensor([True] * 9 + [False, True])
    for first in (0, 3, 6):
        keys = torch.cat([others[:first], rows, others[first:]])
        close(log_sum_of_others(rows, keys, valid, first, temperature), loops(rows, keys, valid, first, temperature))
        close(log_sum_of_others(rows, keys, None, first, temperature), loops(rows, keys, None, first, temperature))
    ours, twins = ((rows.clone().requires_grad_(), keys.clone().requires_grad_()) for _ in range(2))
    log_sum_of_others(*ours, valid, 6, temperature).sin().sum().backward()
    _plain(*twins, valid, 6, temperature).sin().sum().backward()
    for a, b in zip(ours, twins, strict=True):
        close(a.grad, b.grad)


def test_no_key_and_no_other_key(block: int) -> None:
    empty = torch.zeros(0, 4, requires_grad=True)
    assert log_sum_of_others(empty, empty, None, 0, 0.1).shape == (0,)
    alone = unit(1, 4).requires_grad_()
    value = log_sum_of_others(alone, alone, None, 0, 0.1)
    assert torch.isfinite(value).all() and value.exp() == 0


def test_second_derivatives(block: int) -> None:
    x = unit(5, 3).requires_grad_()

    def function(x: Tensor) -> Tensor:
        return log_sum_of_others(x, x, None, 0, 0.5)

    assert torch.autograd.gradcheck(function, (x,)) and torch.autograd.gradgradcheck(function, (x,))


@pytest.mark.parametrize("temperature", [0.005, 0.01, 0.019, 0.02, 0.07])
@pytest.mark.parametrize("arrangement", ["equal", "opposite", "orthogonal"])
def test_the_largest_and_the_smallest_similarities_in_float32(block: int, arrangement: str, temperature: float) -> None:
    """Even where all pairs are equal, or all but the row itself are as far away as can be."""
    x = {"equal": torch.ones(6, 1), "opposite": torch.tensor([[1.0], [-1.0]] * 3), "orthogonal": torch.eye(6)}[arrangement]
    x.requires_grad_()
    value = log_sum_of_others(x, x, None, 0, temperature)
    value.sum().backward()
    close(value, loops(x, x, None, 0, temperature), 1e-5)
    assert x.grad is not None and torch.isfinite(x.grad).all()
    if arrangement == "equal":  # softmax over 5 equal pairs, seen from both ends
        close(x.grad, torch.full_like(x, 2 / temperature), 1e-4)


def test_the_sum_of_many_equal_pairs_stays_within_float32() -> None:
    """The temperature from which no maximum is taken out leaves room for any number of anchors."""
    room = math.log(torch.finfo(torch.float32).max) - 1 / _log_sums.SAFE_TEMPERATURE
    assert room > math.log(1e9)
    assert 2 / torch.tensor(math.log(100.0)).exp().item() >= _log_sums.SAFE_TEMPERATURE  # as for texts of CLIP's scale


def test_unit_rows_have_first_and_second_derivatives() -> None:
    x = normal(3, 4, 5).requires_grad_()
    close(unit_rows(x), [[oracles.unit(row) for row in image] for image in oracles.array(x)])
    assert torch.autograd.gradcheck(unit_rows, (x,)) and torch.autograd.gradgradcheck(unit_rows, (x,))


def test_a_row_of_zeros_stays_zero_and_gets_no_gradient() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    (unit_rows(x) * normal(2, 3, dtype=torch.float32)).sum().backward()
    assert torch.count_nonzero(unit_rows(x)) == 0 and torch.count_nonzero(x.grad) == 0
    assert unit_rows(torch.zeros(0, 3)).shape == (0, 3)


def test_more_classes_than_anchors(block: int) -> None:
    """Texts and sums of the classes present alone, and rows against all classes in blocks; value and gradient."""
    y = torch.full((3, 9), -1.0)
    y[0, [1, 4]], y[1, [1, 8]], y[2, 4], y[2, [0, 1]] = 1, 1, 1, 0
    seen = torch.arange(9) != 8
    given: dict[str, Any] = {
        **{"prototypes": normal(9, 4, seed=6), "seen": seen, "weights": normal(3, 9, seed=5).abs(), "temperature": 0.5}
    }
    f, t = normal(3, 9, 4).requires_grad_(), normal(9, 4, seed=1).requires_grad_()
    for key, value in oracles.contrast(f, t, y, **given).items():
        close(TF.multimodal_contrastive(f, t, y, **given)[key], value)

    def total(f: Tensor, t: Tensor) -> Tensor:
        return torch.stack(list(TF.multimodal_contrastive(f, t, y, **given).values())).sum()

    assert torch.autograd.gradcheck(total, (f, t), fast_mode=True)
    y[:] = -1
    close(total(f, t), sum(oracles.contrast(f, t, y, **given).values()))


@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_no_matrix_of_all_pairs_is_made(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_log_sums, "_ROWS", 8)
    monkeypatch.setattr(_log_sums, "BLOCK", 8 * 200)
    regions = normal(50, 4, 4).requires_grad_()
    with Watch() as seen:
        loss = TF.multimodal_contrastive(
            regions, normal(4, 4, seed=1), torch.ones(50, 4), temperature_region=temperature, only=["region_region"]
        )["region_region"]
        loss.backward()
    assert max(seen.bytes) <= 8 * 8 * 200 < 8 * 200 * 200  # in float64


def test_backward_inside_autocast_keeps_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_log_sums, "_ROWS", 4)
    x = unit(9, 4, dtype=torch.float32).requires_grad_()
    outside, inside = (log_sum_of_others(x, x, None, 0, 0.1).sum() for _ in range(2))
    (expected,) = torch.autograd.grad(outside, x)
    with torch.autocast("cpu", torch.bfloat16):
        (actual,) = torch.autograd.grad(inside, x)
    torch.testing.assert_close(actual, expected)


def test_a_learned_temperature_gets_its_gradient_from_blocks_too(block: int) -> None:
    rows = torch.nn.functional.normalize(normal(50, 8), dim=1)
    slopes = []
    for part in (log_sum_of_others, _plain):
        temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        part(rows, rows, None, 0, temperature).sum().backward()
        slopes.append(temperature.grad)
    torch.testing.assert_close(*slopes)


def test_blocks_pass_through_function_transforms() -> None:
    rows = torch.nn.functional.normalize(normal(400, 8), dim=1)
    fast = rows.clone().requires_grad_()
    log_sum_of_others(fast, fast, None, 0, 0.1).sum().backward()
    slope = torch.func.grad(lambda x: log_sum_of_others(x, x, None, 0, 0.1).sum())(rows)
    torch.testing.assert_close(slope, fast.grad)
