"""Conversions into the label encoding and the ways to hide labels, against numpy and the published files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from trm_losses.labels import (
    UNKNOWN,
    class_weights,
    from_nan,
    from_positive_only,
    from_ternary,
    hide_labels,
    hiding,
    keep_single_positive,
    known_fraction,
    move_positives,
    sample_classes,
)

SHARES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def hide_by_numpy(targets: Tensor, known: float, seed: int) -> Tensor:
    """The original procedure, with numpy's global generator."""
    state = np.random.get_state()
    np.random.seed(seed)
    keep = np.random.uniform(0, 1, tuple(targets.shape)) < known
    np.random.set_state(state)
    out = targets.numpy().copy()
    out[~keep] = -1
    return torch.from_numpy(out)


def random_labels(rows: int, columns: int, positive: float, seed: int) -> Tensor:
    return (torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < positive).long()


# --- conversions ---


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float16, torch.float32, torch.float64])
def test_convention_conversions(dtype: torch.dtype) -> None:
    ternary = torch.tensor([[1, -1, 0], [0, 0, 1]], dtype=dtype)
    out = from_ternary(ternary)
    assert out.dtype == dtype and out.tolist() == [[1, 0, -1], [-1, -1, 1]]
    assert ternary.tolist() == [[1, -1, 0], [0, 0, 1]], "the argument must not change"
    out = from_positive_only(torch.tensor([[1, 0, 0], [0, 1, 1]], dtype=dtype))
    assert out.dtype == dtype and out.tolist() == [[1, -1, -1], [-1, 1, 1]]
    assert UNKNOWN == -1


def test_types_without_minus_one_are_promoted() -> None:
    seen = torch.tensor([[True, False]])
    assert from_positive_only(seen).dtype == torch.int8
    assert from_positive_only(seen).tolist() == [[1, -1]]
    assert hide_labels(seen.to(torch.uint8), 0.5).dtype == torch.int8
    assert keep_single_positive(seen).tolist() == [[1, -1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_nan_is_unknown(dtype: torch.dtype) -> None:
    nan = float("nan")
    out = from_nan(torch.tensor([[1, 0, nan], [nan, -1, 0.5]], dtype=dtype))
    assert out.dtype == dtype and out.tolist() == [[1, 0, -1], [-1, -1, 0.5]]
    assert from_nan(torch.tensor([True, False])).tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"from_nan: labels must be 1 \(present\).*, got 2.0; convert"):
        from_nan(torch.tensor([[2.0, nan]]))


def test_known_fraction() -> None:
    assert known_fraction(torch.tensor([[1.0, 0.3, -1.0, 0.0]])) == 0.75
    assert known_fraction(torch.full((3, 2), -1)) == 0.0
    assert known_fraction(torch.tensor([[True, False]])) == 1.0


# --- hiding ---


@pytest.mark.parametrize("seed", [0, 1, 42, 1200, 2**31, 2**32 - 1])
def test_uniforms_are_numpys_bit_for_bit(seed: int) -> None:
    ours = hiding._numpy_uniform("test", 70_000, seed)  # of which 65,536 are drawn at a time
    numpys = torch.from_numpy(np.random.RandomState(seed).uniform(0, 1, 70_000))
    assert torch.equal(ours, numpys)


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("known", [0.1, 0.55, 1.0])
def test_hide_labels_equals_numpy(known: float, seed: int) -> None:
    soft = torch.rand(37, 11, generator=torch.Generator().manual_seed(1))
    hard = random_labels(37, 11, 0.3, 2).int()
    hard[::5, ::3] = UNKNOWN
    for targets in (soft, hard):
        before = targets.clone()
        out = hide_labels(targets, known, seed)
        assert out.dtype == targets.dtype
        assert torch.equal(out, hide_by_numpy(targets, known, seed))
        assert torch.equal(targets, before), "the argument must not change"


def test_python_and_numpy_generators_are_left_alone() -> None:
    import random

    python, numpys = random.getstate(), np.random.get_state()
    hide_labels(torch.zeros(10, 10))
    assert random.getstate() == python
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpys, strict=True))


def test_published_files_are_reproduced(shared_data: Path) -> None:
    folder = shared_data / "voc2007_labels"

    def read(name: str) -> Tensor:
        return from_ternary(torch.from_numpy(np.loadtxt(folder / name, delimiter=",", dtype=np.int64)))

    full = read("original_train.txt")
    assert full.shape == (5011, 20) and known_fraction(full) == 1.0
    for known in SHARES:
        assert torch.equal(hide_labels(full, known), read(f"train_proportion_{known}.txt")), known


# --- single positive ---


def test_single_positive_equals_a_loop() -> None:
    full = random_labels(60, 9, 0.4, 5)
    full[::7, ::2], full[3] = UNKNOWN, 0
    draws = np.random.RandomState(3).uniform(0, 1, (60, 9))
    expected = torch.full_like(full, UNKNOWN)
    for row in range(60):
        present = [column for column in range(9) if full[row, column] == 1]
        if present:
            expected[row, max(present, key=lambda column: draws[row, column])] = 1
    assert torch.equal(keep_single_positive(full, seed=3), expected)
    assert not torch.equal(keep_single_positive(full, seed=4), expected)
    assert keep_single_positive(full.to(torch.float16)).dtype == torch.float16


# --- wrong labels ---


def moves(before: Tensor, after: Tensor) -> set[tuple[int, int]]:
    """Positives that left their place."""
    return set(map(tuple, ((before == 1) & (after != 1)).nonzero().tolist()))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 1.0])
@pytest.mark.parametrize("known", [0.3, 1.0])
def test_moved_positives_are_counted_exactly(share: float, known: float) -> None:
    full = random_labels(200, 12, 0.25, 4)
    hidden = hide_labels(full, known, seed=5)
    before = hidden.clone()
    out = move_positives(hidden, full, share, seed=5)
    positives = int((hidden == 1).sum())
    wrong = (out == 1) & (full == 0)
    assert torch.equal(hidden, before) and int((out == 1).sum()) == positives
    assert int(wrong.sum()) == len(moves(hidden, out)) == int(share * positives + 0.5)
    left = (hidden == 1) & (out != 1)
    assert bool((out[left] == UNKNOWN).all()), "the class that had the label is unknown"
    assert torch.equal(wrong.sum(dim=1), left.sum(dim=1)), "each stays in its image"
    rest = ~wrong & ~left
    assert torch.equal(out[rest], hidden[rest]), "nothing else changes"
    if share:
        assert known < 1 or not bool((hidden[wrong] == UNKNOWN).any())
        assert known == 1 or {0, UNKNOWN} == set(hidden[wrong].tolist())


def test_moved_positives_of_a_smaller_share_are_among_those_of_a_larger_one() -> None:
    full = random_labels(80, 9, 0.3, 2)
    single = keep_single_positive(full, seed=1)
    less, more = (move_positives(single, full, share, seed=1) for share in (0.2, 0.6))
    assert moves(single, less) < moves(single, more)
    assert bool(((more == 1) & (full == 0))[(less == 1) & (full == 0)].all()), "to the same classes"
    assert torch.equal(less, move_positives(single, full, 0.2, seed=1))
    assert moves(single, less) != moves(single, move_positives(single, full, 0.2, seed=2))
    for dtype in (torch.bool, torch.float32, torch.float16):
        assert torch.equal(move_positives(single, full.to(dtype), 0.2, seed=1), less)


def test_single_positives_stay_single() -> None:
    full = random_labels(300, 9, 0.4, 5)
    full[7] = 0
    single = keep_single_positive(full, seed=3)
    out = move_positives(single, full, 1.0, seed=3)
    movable = (full == 1).any(dim=1) & (full == 0).any(dim=1)
    assert torch.equal((out == 1).sum(dim=1), (single == 1).sum(dim=1))
    assert torch.equal(((out == 1) & (full == 0)).any(dim=1), movable), "all that can move do"


def test_positives_without_an_absent_class_stay_and_others_move() -> None:
    full = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, -1]])
    for seed in range(20):
        out = move_positives(full, full, 0.3, seed=seed)  # 2 of 8, and there are 2
        assert torch.equal(out[[0, 3]], full[[0, 3]]), "an unknown class takes no label"
        assert sorted(out[1].tolist()) == [-1, 1, 1] and int(out[1, 2]) == 1
        assert int(out[2, 0]) == -1 and sorted(out[2, 1:].tolist()) == [0, 1]
    assert torch.equal(move_positives(full, full, 1.0), move_positives(full, full, 0.3)), "more cannot"
    assert torch.equal(move_positives(full[:1], full[:1], 1.0), full[:1])


def test_moves_are_uniform() -> None:
    rows, full = 20000, torch.zeros(20000, 6, dtype=torch.int8)
    full[:, [1, 4]] = 1
    out = move_positives(full, full, 0.25, seed=0)
    left, found = ((out != 1) & (full == 1)).sum(dim=0)[[1, 4]], (out == 1).sum(dim=0)[[0, 2, 3, 5]]
    assert int(left.sum()) == int(found.sum()) == rows // 2
    for counts, bound in ((left.double(), 10.8), (found.double(), 16.3)):  # exceeded once in a thousand seeds
        expected = rows / 2 / len(counts)
        assert float(((counts - expected) ** 2 / expected).sum()) < bound


def test_what_moves_is_drawn_apart_from_what_is_hidden() -> None:
    """Of the labels that are known at 90 %, those known at 10 % move no more often."""
    full = random_labels(4000, 10, 0.3, 6)
    known = hide_labels(full, 0.9, seed=0)
    left = (known == 1) & (move_positives(known, full, 0.2, seed=0) != 1)
    early = (hide_labels(full, 0.1, seed=0) == 1) & (known == 1)
    assert abs(float(left[early].float().mean()) - 0.2) < 0.04


# --- weights of classes ---


def test_class_weights_equal_a_loop() -> None:
    full = random_labels(300, 6, 0.2, 1).double()
    full[:, 1] *= (torch.arange(300) < 40).double()
    full[:, 4] = 0
    full[0, 2] = 0.6
    known = hide_labels(full, 0.5, seed=1)
    known[:, 5] = UNKNOWN
    rates = []
    for column in known.T.tolist():
        told = [y for y in column if y != UNKNOWN]
        rates.append(max(1.0, sum(told)) / len(told) if told else None)
    most = max(rate for rate in rates if rate is not None)
    expected = [1.0 if rate is None else (1 - np.log(rate / most)) ** (1 / 6) for rate in rates]
    weights = class_weights(known)
    assert weights.dtype == torch.float32 and weights.min() == 1 and weights[4] == weights.max() < 2
    torch.testing.assert_close(weights.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


def test_equal_counts_give_ones() -> None:
    for targets in (
        torch.eye(4),
        torch.eye(4) * 2 - 1,
        torch.zeros(3, 4),
        torch.full((3, 4), -1),
        torch.ones(3, 4),
        torch.ones(1, 1),
    ):
        assert class_weights(targets).tolist() == [1.0] * targets.shape[1]
    skewed = torch.tensor([[1, 0], [1, 0], [1, 1]])
    assert class_weights(skewed, power=0.0).tolist() == [1, 1]


def test_a_class_is_not_rare_because_less_is_known_of_it() -> None:
    full = torch.zeros(100, 2, dtype=torch.int64)
    full[::5] = 1
    full[20:, 1] = UNKNOWN
    assert class_weights(full).tolist() == [1, 1]
    single = torch.where(full == 1, full, UNKNOWN)  # which tell nothing but how many there are
    torch.testing.assert_close(class_weights(single, power=1.0), torch.tensor([1, 1 + np.log(5)], dtype=torch.float32))


# --- bad input ---


def moved_in_full(targets: Tensor) -> Tensor:
    return move_positives(targets, targets, 1.0)


moved_in_full.__name__ = "move_positives"


@pytest.mark.parametrize(
    "function",
    [from_ternary, from_positive_only, known_fraction, hide_labels, keep_single_positive, moved_in_full, class_weights],
)
def test_bad_tensors(function: object) -> None:
    assert callable(function)
    name = function.__name__  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=rf"{name}: \w+ must be a torch.Tensor, got list"):
        function([[1, 0]])
    with pytest.raises(TypeError, match=rf"{name}: .*complex64"):
        function(torch.ones(2, 2, dtype=torch.complex64))
    for value in (2.0, -2.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"{name}: \w+ must be .*, got {value}"):
            function(torch.tensor([[1.0, value]]))


@pytest.mark.parametrize("function", [from_ternary, from_positive_only, keep_single_positive, moved_in_full])
def test_soft_labels_where_only_hard_ones_fit(function: object) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match="got 0.5"):
        function(torch.tensor([[1.0, 0.5]]))


Z, FULL = torch.zeros(2, 2), torch.tensor([[1, 0]])
BAD_SHARES = (0.0, -0.1, 1.01, 10, float("nan"))
REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: hide_labels(Z, seed=0.5), "'float' object cannot be interpreted as an integer"),
    (lambda: sample_classes([[1]], 1), "sample_classes: targets must be a torch.Tensor"),
    (lambda: from_positive_only(-FULL), "from_positive_only: .*got -1; .*from_ternary"),
    (lambda: known_fraction(Z[:0]), "known_fraction: .*at least one entry"),
    *((lambda k=k: hide_labels(Z, k), f"hide_labels: known must be a share above 0 and at most 1, got {k}") for k in BAD_SHARES),
    *((lambda s=s: hide_labels(Z, seed=s), "hide_labels: seed must be from 0") for s in (-1, 2**32)),
    (lambda: keep_single_positive(Z, seed=-1), "keep_single_positive: seed must be from 0"),
    (lambda: move_positives(FULL, FULL, 1.1), "move_positives: share must be at least 0 and at most 1, got 1.1"),
    (lambda: move_positives(FULL, Z, 0.1), r"move_positives: truth must have the shape of targets \(1, 2\), got \(2, 2\)"),
    (lambda: move_positives(FULL, FULL / 2, 0.1), "move_positives: truth must be .*, got 0.5"),
    (lambda: move_positives(FULL, FULL, 0.1, seed=-1), "move_positives: seed must be from 0"),
    (lambda: sample_classes(Z, 0), "sample_classes: size must be at least 1, got 0"),
    (lambda: sample_classes(Z[0], 1), r"sample_classes: targets must have shape \(B, C\)"),
]


@pytest.mark.parametrize("call, message", REFUSED, ids=range(len(REFUSED)))
def test_refuses_by_name(call: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call()


@pytest.mark.parametrize("function", [hide_labels, keep_single_positive, moved_in_full, class_weights])
@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 4), (4, 0)])
def test_bad_shapes(function: object, shape: tuple[int, ...]) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match=r"targets must have shape \(B, C\)"):
        function(torch.zeros(shape))


# --- classes of a step ---


def test_sampled_classes_hold_those_present_and_fill_up_with_others() -> None:
    targets = torch.full((3, 50), -1)
    targets[0, 7], targets[1, 30], targets[2, 7], targets[1, 41] = 1, 1, 1, 0
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(50)
    for _ in range(2000):
        classes = sample_classes(targets, 12, generator=generator)
        assert classes.shape == (12,) and classes.dtype == torch.long and {7, 30} <= set(classes.tolist())
        assert (classes.diff() > 0).all(), "ascending, each once"
        counts[classes] += 1
    others = torch.cat([counts[:7], counts[8:30], counts[31:]]) / 2000  # 10 of 48, known absences like unknown ones
    assert others.min() > 10 / 48 - 0.05 and others.max() < 10 / 48 + 0.05


def test_sampled_classes_where_too_many_are_present_and_where_all_fit() -> None:
    targets = torch.zeros(2, 10)
    targets[0, :6] = 0.3  # soft labels count as present
    generator = torch.Generator().manual_seed(0)
    seen = {tuple(sample_classes(targets, 4, generator=generator).tolist()) for _ in range(200)}
    assert len(seen) == 15 and {c for classes in seen for c in classes} == set(range(6))  # 4 of 6
    for size in (10, 11, 1000):
        assert sample_classes(targets, size).tolist() == list(range(10))
    assert sample_classes(torch.full((1, 1), -1), 5).tolist() == [0]


def test_sampled_classes_follow_the_generator() -> None:
    targets = torch.zeros(1, 1000, dtype=torch.bool)
    first, again, other = (sample_classes(targets, 10, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(3)
    drawn = sample_classes(targets, 10)
    assert not torch.equal(drawn, sample_classes(targets, 10))
    torch.manual_seed(3)
    assert torch.equal(drawn, sample_classes(targets, 10))
