"""Calibration and thresholds: known numbers are found again, unknown labels say nothing, promises hold on fresh images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trm_losses as tl
from tests.helpers import oracles
from tests.helpers.cases.calibration import calibration, held_out, random_numbers, with_single_positives
from tests.helpers.values import CLASSES, generator, normal
from trm_losses.calibration import LEAST
from trm_losses.metrics import average_precision, calibration_error, f1_scores
from trm_losses.thresholds import _SPLITS

SCALE, SHIFT = 2.5, -0.8


def drawn(classes: int, images: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits that are off by a scale and a shift, what they should be, and labels by it."""
    right = 2 * normal(images, classes, seed=seed) - 1
    return (right - SHIFT) / SCALE, right, (random_numbers(images, classes, seed=1000 + seed) < right.sigmoid()).double()


def keep(targets: Tensor, known: int, seed: int) -> Tensor:
    """So many entries, drawn from all of them; the others are unknown."""
    hidden = torch.randperm(targets.numel(), generator=generator(seed))[known:]
    return targets.flatten().index_fill(0, hidden, -1).view(targets.shape)


def state(module: tl.Calibration) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


# Platt ------------------------------------------------------------------------------------------------------------------


def test_it_lowers_the_calibration_error_and_keeps_average_precision() -> None:
    logits, _, labels = drawn(6, 4000, 50)
    module = tl.Calibration(6).fit(logits[:2000], keep(labels[:2000], 3000, 0))
    with torch.no_grad():
        after = module(logits[2000:])
    before, labels = logits[2000:], labels[2000:]
    assert (calibration_error(after.sigmoid(), labels) < 0.4 * calibration_error(before.sigmoid(), labels)).all()
    torch.testing.assert_close(average_precision(after, labels), average_precision(before, labels), rtol=0, atol=0)


def test_before_fit_it_changes_nothing() -> None:
    logits = normal(4, 3, dtype=torch.float32)
    assert torch.equal(tl.Calibration(3)(logits), logits)


def test_unknown_entries_change_nothing_bit_for_bit() -> None:
    logits, targets = held_out()
    unknown = targets == -1
    moved = torch.where(unknown, 50 * normal(*logits.shape, seed=9), logits)
    more = torch.cat([moved, normal(7, CLASSES, seed=8)]), torch.cat([targets, torch.full((7, CLASSES), -1.0)])
    one, two = state(tl.Calibration(CLASSES).fit(logits, targets)), state(tl.Calibration(CLASSES).fit(*more))
    assert unknown.any() and all(torch.equal(one[key], two[key]) for key in one)
    one, two = (
        dict(zip("tvlhc", tl.choose_thresholds(scores.sigmoid(), y), strict=True)) for scores, y in ((logits, targets), more)
    )
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("few", [0, 1])
def test_a_class_with_few_labels_of_a_kind_takes_the_pooled_numbers(few: int) -> None:
    logits, _, labels = drawn(4, 80, 0)
    for count, own in ((LEAST - 1, False), (LEAST, True)):
        targets = labels.clone()
        rows = (targets[:, 2] == few).nonzero().flatten()
        targets[rows[count:], 2] = -1
        module = tl.Calibration(4).fit(logits, targets)
        numbers = torch.stack([module.scale, module.shift], dim=1)
        assert [torch.equal(numbers[c], module.pooled) for c in range(4)] == [False, False, not own, False]


@pytest.mark.parametrize("images, classes", [(1, 2), (2, 1), (30, 1), (30, 3)])
def test_logits_that_separate_the_labels_get_a_finite_scale(images: int, classes: int) -> None:
    logits = normal(images, classes).abs() * torch.tensor([1.0, -1.0]).repeat(images * classes)[: images * classes].view(
        images, classes
    )
    module = tl.Calibration(classes).fit(logits, (logits > 0).long())
    assert (module.scale > 0).all() and (module.scale < 1000).all() and torch.isfinite(module.shift).all()
    assert ((module(logits) > 0) == (logits > 0)).float().mean() > 0.9
    wrong = tl.Calibration(classes).fit(logits, (logits < 0).long())
    assert (wrong.scale > 0).all() and torch.isfinite(wrong.shift).all()


def test_constant_logits_and_one_entry_of_each_kind() -> None:
    module = tl.Calibration(1).fit(torch.full((8, 1), 3.0), torch.tensor([[1], [0], [0], [0]]).repeat(2, 1))
    assert float(module(torch.tensor([[3.0]])).sigmoid()) == pytest.approx(0.25, abs=0.01)
    assert torch.isfinite(tl.Calibration(2).fit(torch.tensor([[1.0, 2.0]]), torch.tensor([[1, 0]])).scale).all()


@pytest.mark.parametrize("single", [False, True])
def test_the_units_of_the_logits_do_not_matter(single: bool) -> None:
    logits, targets = held_out()
    options: dict[str, float] = {}
    if single:
        targets, options = torch.where(targets == 1, 1.0, -1.0), {"expected_positives": 2.0}
    one = tl.Calibration(CLASSES).fit(logits, targets, **options)(logits)
    for scale, shift in ((100.0, 0.0), (0.02, 5.0)):
        other = scale * logits + shift
        two = tl.Calibration(CLASSES).fit(other, targets, **options)(other)
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_numbers_of_its_values(dtype: torch.dtype) -> None:
    logits, targets = held_out()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        half = tl.Calibration(CLASSES).fit(logits.to(dtype), targets)
        assert half(logits.to(dtype)).dtype == torch.float32
    full = tl.Calibration(CLASSES).fit(logits.to(dtype).double(), targets)
    assert all(torch.equal(value, state(half)[key]) for key, value in state(full).items())


def test_entries_are_taken_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [state(calibration()), state(with_single_positives())]
    monkeypatch.setattr("trm_losses.calibration._BLOCK", 7)
    torch.testing.assert_close([state(calibration()), state(with_single_positives())], whole)


def test_other_classes() -> None:
    """One that stays keeps its numbers, a new one has the pooled ones."""
    old = calibration()
    other = old.with_classes([3, None, 0])
    logits = normal(4, 3)
    expected = torch.stack([old.scale[3] * logits[:, 0] + old.shift[3], old.pooled[0] * logits[:, 1] + old.pooled[1]], dim=1)
    torch.testing.assert_close(other(logits)[:, :2], expected, check_dtype=False)
    assert other.num_classes == 3 and old.num_classes == CLASSES and torch.equal(other.pooled, old.pooled)
    assert not torch.equal(old.pooled[0], old.scale[3])


# Single positives -----------------------------------------------------------------------------------------------------------


def test_single_positives_of_one_class_and_of_a_class_always_on_top() -> None:
    logits = normal(30, 1)
    one = tl.Calibration(1).fit(logits, torch.where(logits > 0, 1, -1), expected_positives=0.3)
    assert float(one(logits).sigmoid().mean()) == pytest.approx(0.3, rel=1e-4) and torch.isfinite(one.scale).all()
    logits = normal(30, 4)
    top = torch.full((30, 4), -1).scatter(1, logits.argmax(dim=1, keepdim=True), 1)
    sure = tl.Calibration(4).fit(logits, top, expected_positives=1.0)
    assert float(sure.scale[0]) > 3 and torch.isfinite(sure.scale).all()


# Refusals -------------------------------------------------------------------------------------------------------------------

L, Y = normal(3, 2), torch.tensor([[1, 0], [0, -1], [1, 1]])
ONES = torch.where(Y == 1, 1, -1)
REFUSED: list[tuple[Any, Any, float | None, type[Exception], str]] = [
    (L.tolist(), Y, None, TypeError, "logits must be a torch.Tensor, got list"),
    (L, Y.tolist(), None, TypeError, "targets must be a torch.Tensor, got list"),
    (L[:, :1], Y[:, :1], None, ValueError, r"logits must have shape \(B, C\) = \(B, 2\), got \(3, 1\)"),
    (L, Y[:2], None, ValueError, r"targets must have shape \(B, C\) = \(3, 2\), got \(2, 2\)"),
    (L.long(), Y, None, TypeError, "logits must be a floating-point tensor, got torch.int64"),
    (L.log(), Y, None, ValueError, "logits must be finite, got . NaN or infinite of 6 values"),
    (L / 0, Y, None, ValueError, "logits must be finite, got 6 NaN or infinite of 6 values"),
    (L * 1e300, Y, None, ValueError, "logits must be of a size that float32 holds, got up to "),
    (L, Y * 0.5, None, ValueError, r"targets must be 1 \(present\), .*, got 0.5; a soft label is neither"),
    (L, Y * 3, None, ValueError, r"targets must be 1 \(present\), .*, got 3"),
    (L, -torch.ones(3, 2), None, ValueError, "targets must hold known present labels, got 0 present and 0 absent"),
    (L, -torch.ones(3, 2), 1.0, ValueError, "targets must hold known present labels, got 0 present and 0 absent"),
    (L, torch.zeros(3, 2), None, ValueError, "targets must hold known present labels, got 0 present and 6 absent"),
    (L[:0], Y[:0], None, ValueError, "targets must hold known present labels, got 0 present and 0 absent"),
    (L, ONES, None, ValueError, "targets must hold known absent labels, got 3 present and 0 absent; give expected_positives"),
    (L, Y, 1.0, ValueError, "expected_positives is for targets without a known absent label, got 2 absent; leave it out"),
    (L, ONES, 0.0, ValueError, "expected_positives must be above 0, got 0.0"),
    (L, ONES, 2.0, ValueError, "expected_positives must be below num_classes = 2, got 2.0"),
    (L, ONES, float("nan"), ValueError, "expected_positives must be above 0, got nan"),
]


@pytest.mark.parametrize("logits, targets, expected, error, message", REFUSED, ids=range(len(REFUSED)))
def test_a_refused_fit_says_why_and_changes_nothing(
    logits: Any, targets: Any, expected: float | None, error: type[Exception], message: str
) -> None:
    module = calibration(2)
    before = copy.deepcopy(state(module))
    with pytest.raises(error, match=f"^Calibration: {message}"):
        module.fit(logits, targets, expected_positives=expected)
    assert all(torch.equal(value, state(module)[key]) for key, value in before.items())


# Thresholds -----------------------------------------------------------------------------------------------------------------

METRICS: Any = ("f1", "precision", "recall", "cost")


def rated(images: int, classes: int, seed: int, decimals: int | None = None) -> tuple[Tensor, Tensor]:
    z = 2 * normal(images, classes, seed=seed) - 1
    scores = z.sigmoid() if decimals is None else z.sigmoid().round(decimals=decimals)
    return scores, (random_numbers(images, classes, seed=1000 + seed) < z.sigmoid()).long()


@pytest.mark.parametrize("decimals", [None, 1])
@pytest.mark.parametrize("metric", METRICS)
def test_threshold_and_promise_are_those_of_the_loops(metric: Any, decimals: int | None) -> None:
    pytest.importorskip("scipy.stats")
    scores, labels = rated(30, 2, 3, decimals)
    if decimals:
        scores[:2] = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    found = tl.choose_thresholds(scores, labels, metric=metric, at_least=0.75, miss=3.0)
    halves = torch.rand(_SPLITS, 30, generator=generator(0)) < 0.5
    assert bool(found.chosen.all())
    for c in range(2):
        falling = scores[:, c].sort(descending=True).indices  # the loops see equal scores in the same order
        expected = oracles.promise(
            metric, scores[falling, c].tolist(), labels[falling, c].tolist(), halves, at_least=0.75, miss=3.0
        )
        got = [float(part[c]) for part in found[:4]]
        assert got[0] == pytest.approx(expected[0], abs=1e-12)
        assert got[1] == pytest.approx(expected[1], abs=1e-9)
        assert got[2:] == pytest.approx(expected[2:], abs=3e-3)  # quantiles by a grid
        assert got[2] <= got[1] <= got[3]


def skewed(images: int, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """Scores, and true probabilities that they do not say: nowhere above 0.93."""
    z = 2 * normal(images, draws, seed=seed) - 1.5
    return z.sigmoid(), 0.93 * torch.sigmoid(1.5 * z)


def plain(images: int, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    z = 2 * normal(images, draws, seed=seed) - 1
    return z.sigmoid(), z.sigmoid()


@pytest.mark.parametrize("world", [plain, skewed])
@pytest.mark.parametrize("images", [60, 300])
def test_the_promised_precision_comes_true(world: Callable[..., tuple[Tensor, Tensor]], images: int) -> None:
    """Of 200 draws, each a class, at least 90 % have the precision on fresh images within the interval."""
    scores, p = world(images, 200, 11)
    labels = (random_numbers(images, 200, seed=12) < p).long()
    found = tl.choose_thresholds(scores, labels, metric="precision", at_least=0.8)
    fresh, share = (x.flatten() for x in world(100_000, 1, 13))
    said = fresh[:, None] > found.threshold
    real = (said * share[:, None]).sum(dim=0) / said.sum(dim=0)
    held = (found.low <= real) & (real <= found.high)
    assert int(found.chosen.sum()) > 190 and float(held[found.chosen].double().mean()) >= 0.9
    assert abs(float((found.value - real)[found.chosen].mean())) < 0.04
    assert float((found.high - found.low)[found.chosen].mean()) < (0.5 if images == 60 else 0.25)


@pytest.mark.parametrize("metric", METRICS)
def test_a_tenth_of_the_thresholds_does_nearly_as_well(metric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, labels = rated(2000, 1, 8)
    found = tl.choose_thresholds(scores, labels, metric=metric)
    monkeypatch.setattr("trm_losses.thresholds._LEVELS", 200)
    fewer = tl.choose_thresholds(scores, labels, metric=metric)
    assert 0 < abs(float(fewer.value - found.value)) < 0.01


def test_few_labels_take_the_threshold_of_all_classes() -> None:
    scores, labels = rated(40, 3, 5)
    labels[:, 1] = -1
    labels[(labels[:, 2] == 1).nonzero().flatten()[LEAST - 1 :], 2] = -1
    found = tl.choose_thresholds(scores, labels)
    known = labels != -1
    together = tl.choose_thresholds(scores[known][:, None], labels[known][:, None])
    assert found.chosen.tolist() == [True, False, False]
    for one, two in zip(found[:4], together[:4], strict=True):
        assert torch.equal(one[1:], two.expand(2)) and not torch.equal(one[0], two[0])


def test_one_label_of_each_kind_is_enough_for_an_answer() -> None:
    for metric in METRICS:
        found = tl.choose_thresholds(torch.tensor([[0.2], [0.7]]), torch.tensor([[0], [1]]), metric=metric)
        assert not found.chosen.any() and all(torch.isfinite(part).all() for part in found)
        assert float(found.low) < 0.5 < float(found.high) or metric == "cost"


def test_equal_thresholds_and_those_at_the_ends() -> None:
    """The nearest to 0.5; and a class that is always present, or for which nothing should be said, gets what does it."""
    scores = torch.tensor([0.0, 0.0, 0.1, 0.2, 0.3, 0.9, 0.9, 0.95, 0.97, 1.0])[:, None]
    assert tl.choose_thresholds(scores, (scores > 0.5).long()).threshold.item() == pytest.approx(0.6)
    labels = torch.tensor([1, 1, 0, 0, 0, 1, 1, 1, 0, 0])[:, None]
    everything = tl.choose_thresholds(scores, labels, metric="recall", at_least=1.0)
    assert (scores > everything.threshold).all()
    nothing = tl.choose_thresholds(scores, labels, metric="cost", false_alarm=100.0)
    assert not (scores > nothing.threshold).any()
    assert (scores > tl.choose_thresholds(scores, labels, metric="cost", miss=100.0).threshold).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_thresholds_part_neighbouring_numbers(dtype: torch.dtype) -> None:
    """Scores that have nothing between them, with :func:`f1_scores` in their own type."""
    low = torch.tensor(0.7, dtype=dtype)
    high = torch.nextafter(low, torch.tensor(1.0, dtype=dtype)) if dtype in (torch.float32, torch.float64) else low + 2**-7
    scores = torch.stack([low, high]).repeat_interleave(6)[:, None]
    labels = torch.tensor([0, 1]).repeat_interleave(6)[:, None]
    for metric in METRICS:
        found = tl.choose_thresholds(scores, labels, metric=metric)
        assert float(f1_scores(scores, labels, threshold=found.threshold).OF1) == 1


def test_other_classes_do_not_move_a_threshold() -> None:
    scores, labels = rated(50, 4, 6)
    alone = [tl.choose_thresholds(scores[:, c : c + 1], labels[:, c : c + 1]) for c in range(4)]
    for part, parts in zip(tl.choose_thresholds(scores, labels), zip(*alone, strict=True), strict=True):
        assert torch.equal(part, torch.cat(parts))
    before = torch.get_rng_state()
    tl.choose_thresholds(scores, labels)
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_no_probability_and_other_refusals() -> None:
    scores, labels = rated(6, 2, 0)

    def refused(message: str, error: type[Exception] = ValueError, x: Any = scores, y: Any = labels, **options: Any) -> None:
        with pytest.raises(error, match=f"^choose_thresholds: {message}"):
            tl.choose_thresholds(x, y, **options)

    refused(r"scores must be probabilities from 0 to 1, got .*; give torch.sigmoid\(scores\) of logits", x=scores - 2)
    refused("scores must be a torch.Tensor, got list", TypeError, x=scores.tolist())
    refused("scores must not be NaN, got 12 NaN of 12", x=scores * np.nan)
    refused(r"targets must have shape \(B, C\) = \(6, 2\), got \(5, 2\)", y=labels[:5])
    refused("targets must be 1 .*, got 0.5; a soft label", y=torch.full((6, 2), 0.5))
    refused("targets must hold known present and known absent labels, got 0 present and 0 absent", y=torch.full((6, 2), -1))
    refused("targets must hold known present and known absent labels, got 12 present and 0 absent", y=torch.ones(6, 2))
    refused("metric must be one of 'f1', 'precision', 'recall', 'cost', got 'F1'", metric="F1")
    refused("at_least must be above 0 and at most 1, got 1.5", metric="recall", at_least=1.5)
    refused("at_least must be above 0 and at most 1, got 0.0", metric="recall", at_least=0.0)
    refused("false_alarm must be above 0, got 0.0", metric="cost", false_alarm=0.0)
    refused("miss must be above 0, got -1", metric="cost", miss=-1)
