"""Average precision and F1 against slow loops, scikit-learn and torchmetrics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import oracles
from trm_losses.metrics import F1Scores, average_precision, calibration_error, evaluate, f1_scores, mean_average_precision

sklearn_metrics = pytest.importorskip("sklearn.metrics")
torchmetrics_functional = pytest.importorskip("torchmetrics.functional.classification")
precision_recall_fscore_support = sklearn_metrics.precision_recall_fscore_support


def scored(rows: int, columns: int, *, seed: int = 0, decimals: int | None = None, unknown: float = 0.0) -> tuple[Tensor, Tensor]:
    """Random scores that carry some signal, rounded to make ties, and targets with unknown entries."""
    generator = torch.Generator().manual_seed(seed)
    targets = (torch.rand(rows, columns, generator=generator) < 0.2).long()
    scores = torch.randn(rows, columns, generator=generator, dtype=torch.float64) + targets
    if decimals is not None:
        scores = scores.round(decimals=decimals)
    targets[torch.rand(rows, columns, generator=generator) < unknown] = -1
    return scores, targets


# --- oracles: plain Python, one class at a time ---


def curve(scores: list[float], targets: list[int]) -> list[tuple[int, int]]:
    """(found, retrieved) at each distinct score taken as threshold, from the highest down; known entries only."""
    pairs = [(s, t) for s, t in zip(scores, targets, strict=True) if t != -1]
    points = []
    for threshold in sorted({s for s, _ in pairs}, reverse=True):
        retrieved = [t for s, t in pairs if s >= threshold]
        points.append((sum(retrieved), len(retrieved)))
    return points


def loop_raw(scores: list[float], targets: list[int]) -> float:
    positives, total, before = targets.count(1), 0.0, 0
    for found, retrieved in curve(scores, targets):
        total += (found - before) * found / retrieved
        before = found
    return total / positives if positives else math.nan


def loop_interpolated(scores: list[float], targets: list[int]) -> float:
    """The area as the VOC development kit writes it: recall and precision padded, envelope, sum of steps."""
    positives = targets.count(1)
    if not positives:
        return math.nan
    points = curve(scores, targets)
    recall = [0.0] + [found / positives for found, _ in points] + [1.0]
    precision = [0.0] + [found / retrieved for found, retrieved in points] + [0.0]
    for i in range(len(precision) - 2, -1, -1):
        precision[i] = max(precision[i], precision[i + 1])
    return sum((recall[i + 1] - recall[i]) * precision[i + 1] for i in range(len(recall) - 1))


def loop_f1(logits: Tensor, targets: Tensor, thresholds: list[float], top_k: int = 1000) -> list[float]:
    """OP, OR, OF1, CP, CR, CF1, CF1_per_class, SF1; classes and images without a known positive only count in the pooled ones."""
    ranked = [sorted(range(len(row)), key=lambda c, row=row: (-row[c], c)) for row in logits.tolist()]
    pooled = [0, 0, 0]
    images = [[0, 0, 0] for _ in ranked]
    precisions, recalls, f1s = [], [], []
    for column in range(logits.shape[1]):
        hit = predicted = present = 0
        for row in range(logits.shape[0]):
            target = int(targets[row, column])
            if target == -1:
                continue
            says = float(logits[row, column]) > thresholds[column] and column in ranked[row][:top_k]
            hit += says and target == 1
            predicted += says
            present += target
            images[row] = [a + b for a, b in zip(images[row], (says and target == 1, says, target), strict=True)]
        pooled = [pooled[0] + hit, pooled[1] + predicted, pooled[2] + present]
        if present:
            precisions.append(hit / predicted if predicted else 0.0)
            recalls.append(hit / present)
            p, r = precisions[-1], recalls[-1]
            f1s.append(2 * p * r / (p + r) if p + r else 0.0)

    def harmonic(p: float, r: float) -> float:
        return 0.0 if p + r == 0 else 2 * p * r / (p + r)

    op = pooled[0] / pooled[1] if pooled[1] else 0.0
    recall = pooled[0] / pooled[2] if pooled[2] else math.nan
    if not f1s:
        return [op, recall, *[math.nan] * 6]
    sf1s = [2 * hit / (said + present) for hit, said, present in images if present]
    cp, cr, per_class = (sum(x) / len(x) for x in (precisions, recalls, f1s))
    return [op, recall, harmonic(op, recall), cp, cr, harmonic(cp, cr), per_class, sum(sf1s) / len(sf1s)]


# --- average precision ---


@pytest.mark.parametrize("decimals", [None, 1, 0])
@pytest.mark.parametrize("unknown", [0.0, 0.5, 0.95])
@pytest.mark.parametrize(("rows", "columns"), [(60, 37), (1, 5), (2, 1), (40, 16)])
def test_average_precision_equals_loops(rows: int, columns: int, unknown: float, decimals: int | None) -> None:
    scores, targets = scored(rows, columns, unknown=unknown, decimals=decimals)
    pairs = list(zip(scores.T.tolist(), targets.T.tolist(), strict=True))
    raw = torch.tensor([loop_raw(s, t) for s, t in pairs], dtype=torch.float64)
    envelope = torch.tensor([loop_interpolated(s, t) for s, t in pairs], dtype=torch.float64)
    torch.testing.assert_close(average_precision(scores, targets), raw, rtol=0, atol=1e-12, equal_nan=True)
    mean = mean_average_precision(scores, targets)
    assert mean.shape == () and float(mean) == pytest.approx(float(raw.nanmean()), abs=1e-12, nan_ok=True)
    ours = average_precision(scores, targets, interpolated=True)
    torch.testing.assert_close(ours, envelope, rtol=0, atol=1e-12, equal_nan=True)


def test_classes_without_a_known_positive() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.3, 0.4]])
    targets = torch.tensor([[0, 0, -1], [1, 0, -1]])
    ap = average_precision(scores, targets)
    assert ap.isnan().tolist() == [False, True, True] and float(ap[0]) == 0.5
    assert float(mean_average_precision(scores, targets)) == 0.5
    assert float(mean_average_precision(scores, targets, interpolated=True)) == 0.5
    nothing = torch.full_like(targets, -1)
    assert bool(mean_average_precision(scores, nothing).isnan())
    row = evaluate(scores, nothing)
    assert all(math.isnan(row[key]) for key in row)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_scores_equal_their_exact_values(dtype: torch.dtype) -> None:
    scores, targets = scored(300, 5, unknown=0.2)
    half = scores.to(dtype)
    for interpolated in (False, True):
        ours = average_precision(half, targets, interpolated=interpolated)
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, average_precision(half.double(), targets, interpolated=interpolated))
    assert f1_scores(half, targets).OF1.dtype == torch.float64
    assert evaluate(half, targets) == pytest.approx(evaluate(half.double(), targets))


def test_scores_at_the_ends_of_their_range_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torch has no NumPy; zero and minus zero are one score."""
    tiny, huge = torch.finfo(torch.float32).smallest_normal / 4, torch.finfo(torch.float32).max
    ends = torch.tensor([-math.inf, -huge, -1.0, -tiny, -0.0, 0.0, tiny, 1.0, huge, math.inf])
    generator = torch.Generator().manual_seed(0)
    scores = ends[torch.randint(len(ends), (40, 20), generator=generator)]
    targets = torch.randint(-1, 2, (40, 20), generator=generator)
    expected = [loop_raw(s, t) for s, t in zip(scores.T.tolist(), targets.T.tolist(), strict=True)]
    found = average_precision(scores, targets)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(average_precision(scores.double(), targets), found)

    def missing(*_: object) -> None:
        raise RuntimeError("Numpy is not available")

    monkeypatch.setattr(Tensor, "numpy", missing)
    torch.testing.assert_close(average_precision(scores, targets), found)


def test_float64_scores_are_not_rounded() -> None:
    scores = torch.tensor([[1.0 + 1e-12], [1.0]], dtype=torch.float64)
    assert float(average_precision(scores, torch.tensor([[1], [0]]))) == 1.0
    assert float(average_precision(scores.float(), torch.tensor([[1], [0]]))) == 0.5


def test_target_types_and_gradients() -> None:
    scores, targets = scored(50, 4)
    expected = average_precision(scores, targets)
    for dtype in (torch.bool, torch.uint8, torch.int8, torch.float16, torch.float32):
        torch.testing.assert_close(average_precision(scores, targets.to(dtype)), expected)
        torch.testing.assert_close(f1_scores(scores, targets.to(dtype)).CF1, f1_scores(scores, targets).CF1)
    assert not average_precision(scores.requires_grad_(), targets).requires_grad


# --- F1 -------------------------------------------------------------------------------------------------------------


def as_floats(f1: F1Scores) -> list[float]:
    return [float(x) for x in f1]


@pytest.mark.parametrize("threshold", [0.0, 0.7, 9.0, -9.0])
@pytest.mark.parametrize("unknown", [0.0, 0.4, 0.97])
@pytest.mark.parametrize(("rows", "columns"), [(80, 21), (1, 6), (6, 1)])
def test_f1_equals_loop(rows: int, columns: int, unknown: float, threshold: float) -> None:
    logits, targets = scored(rows, columns, unknown=unknown, decimals=1)
    expected = loop_f1(logits, targets, [threshold] * columns)
    assert as_floats(f1_scores(logits, targets, threshold=threshold)) == pytest.approx(expected, abs=1e-12, nan_ok=True)
    each = [threshold - 0.3 * c + 0.05 for c in range(columns)]  # between the scores, which are rounded
    expected = loop_f1(logits, targets, each)
    for levels in (each, tuple(each), torch.tensor(each), torch.tensor(each, dtype=torch.float64)):
        assert as_floats(f1_scores(logits, targets, threshold=levels)) == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("threshold", [None, 0.7])
@pytest.mark.parametrize(("top_k", "decimals"), [(1, None), (3, None), (3, 0), (6, 0)])  # rounded: with ties
def test_top_k_equals_loop(top_k: int, decimals: int | None, threshold: float | None) -> None:
    scores, targets = scored(40, 6, unknown=0.3, decimals=decimals)
    expected = loop_f1(scores, targets, [-math.inf if threshold is None else threshold] * 6, top_k)
    found = f1_scores(scores, targets, threshold=threshold, top_k=top_k)
    assert as_floats(found) == pytest.approx(expected, abs=1e-12)


def test_probabilities_are_not_read_as_logits() -> None:
    logits, targets = scored(60, 5, unknown=0.2)
    probabilities = torch.sigmoid(logits)
    assert evaluate(probabilities, targets, threshold=0.5) == pytest.approx(evaluate(logits, targets), abs=1e-10)
    for function in (f1_scores, evaluate):
        with pytest.raises(ValueError, match="scores look like probabilities, .*threshold=0.5, or threshold=0.0 if they are"):
            function(probabilities, targets)
        function(probabilities, targets, threshold=0.0)
        function(probabilities, torch.full_like(targets, -1))  # of which nothing is said
    f1_scores(probabilities, targets, top_k=2)  # of which nothing but the order counts


@pytest.mark.parametrize("function", [f1_scores, evaluate])
@pytest.mark.parametrize(
    "threshold, error, got",
    [
        ("0.5", TypeError, "'0.5'"),
        ([0.5, None], TypeError, r"\[0.5, None\]"),
        ([0.5] * 3, ValueError, r"shape \(3,\)"),
        (torch.zeros(1, 2), ValueError, r"shape \(1, 2\)"),
        (math.nan, ValueError, "NaN"),
        ([0.5, math.nan], ValueError, "NaN"),
    ],
)
def test_bad_thresholds(function: Any, threshold: Any, error: type[Exception], got: str) -> None:
    with pytest.raises(error, match=rf"{function.__name__}: threshold must be a number or 2 numbers, .*, got {got}$"):
        function(torch.randn(3, 2), torch.ones(3, 2), threshold=threshold)


@pytest.mark.parametrize("top_k", [0, 3, 1.5])
def test_bad_top_k(top_k: Any) -> None:
    with pytest.raises(ValueError, match="f1_scores: top_k must be .*, got"):
        f1_scores(torch.randn(3, 2), torch.ones(3, 2), top_k=top_k)


def test_f1_equals_scikit_learn() -> None:
    logits, targets = scored(200, 9)
    said = logits > 0
    f1 = f1_scores(logits, targets)
    micro = precision_recall_fscore_support(targets, said, average="micro")
    macro = precision_recall_fscore_support(targets, said, average="macro")
    assert as_floats(f1)[:3] == pytest.approx(micro[:3], abs=1e-12)
    assert [float(x) for x in (f1.CP, f1.CR, f1.CF1_per_class)] == pytest.approx(macro[:3], abs=1e-12)
    some = targets.any(dim=1)  # an image that shows nothing is left out here and 0 there
    assert 0 < int((~some).sum()) < 100
    theirs = sklearn_metrics.f1_score(targets[some], said[some], average="samples", zero_division=0)
    assert float(f1.SF1) == pytest.approx(theirs, abs=1e-12)


# --- calibration error ---


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("decimals", [None, 1])  # rounded: many lie on the borders of ten bins
def test_calibration_error_equals_torchmetrics_and_loop(bins: int, decimals: int | None) -> None:
    logits, targets = scored(500, 17, unknown=0.3)
    probabilities = logits.sigmoid().float()
    if decimals is not None:
        probabilities = probabilities.round(decimals=decimals)
    probabilities[0], probabilities[1] = 0.0, 1.0
    ours = calibration_error(probabilities, targets, bins=bins)
    for c in range(17):
        theirs = torchmetrics_functional.binary_calibration_error(
            probabilities[:, c], targets[:, c], n_bins=bins, norm="l1", ignore_index=-1
        )
        assert float(ours[c]) == pytest.approx(float(theirs), abs=1e-6)
        if decimals is None:  # on a border it is the rounding that decides
            loop = oracles.calibration_error(probabilities[:, c].tolist(), targets[:, c].tolist(), bins)
            assert float(ours[c]) == pytest.approx(loop, abs=1e-9)
    assert calibration_error(probabilities, torch.full_like(targets, -1)).isnan().all()


def test_calibration_error_wants_probabilities() -> None:
    targets = torch.ones(2, 1)
    with pytest.raises(
        ValueError, match=r"calibration_error: scores must be probabilities .*, got 1.5; give torch.sigmoid\(scores"
    ):
        calibration_error(torch.tensor([[0.5], [1.5]]), targets)
    for bins in (0, 2.5):
        with pytest.raises(ValueError, match=f"calibration_error: bins must be .*, got {bins}"):
            calibration_error(torch.rand(2, 1), targets, bins=bins)  # type: ignore[arg-type]


# --- rows, invariance, bad input ---


def test_evaluate_is_in_per_cent() -> None:
    logits, targets = scored(90, 18, unknown=0.3, decimals=1)
    row = evaluate(logits, targets)
    f1 = f1_scores(logits, targets)
    expected = {
        "mAP": mean_average_precision(logits, targets),
        "mAP_interpolated": mean_average_precision(logits, targets, interpolated=True),
        "OF1": f1.OF1,
        "CF1": f1.CF1,
        "CF1_per_class": f1.CF1_per_class,
    }
    assert list(row) == list(expected)
    assert all(type(value) is float for value in row.values())
    assert row == pytest.approx({name: 100 * float(value) for name, value in expected.items()}, rel=1e-12)


FUNCTIONS = [average_precision, mean_average_precision, f1_scores, evaluate, calibration_error]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_bad_input(function: object) -> None:
    assert callable(function)
    name = function.__name__  # type: ignore[attr-defined]
    scores, targets = torch.rand(4, 3), torch.ones(4, 3)
    with pytest.raises(TypeError, match=rf"{name}: \w+ must be a torch.Tensor, got list"):
        function([[0.0]], targets)
    with pytest.raises(TypeError, match=rf"{name}: targets must be a torch.Tensor, got ndarray"):
        function(scores, targets.numpy())
    with pytest.raises(TypeError, match=rf"{name}: .* must be a floating-point tensor, got torch.int64"):
        function(scores.long(), targets)
    with pytest.raises(ValueError, match=rf"{name}: targets must have shape \(B, C\) = \(4, 3\), got \(3, 4\)"):
        function(scores, targets.T)
    for shape in ((12,), (0, 3), (3, 0), (2, 2, 3)):
        with pytest.raises(ValueError, match=rf"{name}: \w+ must have shape \(B, C\)"):
            function(torch.zeros(shape), torch.zeros(shape))
    with pytest.raises(ValueError, match=rf"{name}: targets is on meta, the other tensors are on cpu"):
        function(scores, targets.to("meta"))
    with pytest.raises(ValueError, match=rf"{name}: \w+ must not be NaN, got 1 NaN of 12"):
        function(scores.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(math.nan)), targets)
    for value in (0.5, 2.0, -2.0, math.nan):
        with pytest.raises(ValueError, match=rf"{name}: targets must be 1 .*, got {value}"):
            function(scores, torch.full((4, 3), value))
