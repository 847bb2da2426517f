"""The benchmarks of questions and of calibration, on a tiny folder of features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.runs import read_json


def test_answers_help_and_wrong_labels_are_found(
    benchmark_script: Callable[[str], Any], drawn_features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = benchmark_script("asking")
    small = ["--rounds", "2", "--count", "30", "--seeds", "1", "2", "--share", "0.1"]
    benchmark.main(["--features", str(drawn_features), *small, "--json", str(tmp_path / "figures.json")])
    figures = read_json(tmp_path / "figures.json")
    assert list(figures["curves"]) == ["ours", "nearest to one half", "random"]
    starts = {rows[0] for found in figures["curves"].values() for rows in found[:1]}
    assert len(starts) == 1  # all begin with the same labels
    assert all(len(rows) == 3 and min(rows) > 0 and max(rows) <= 100 for found in figures["curves"].values() for rows in found)
    # Moved positives are some 4 % of the labels; a random order would find them at that precision.
    assert all(value > 15 for values in figures["suspects"].values() for value in values)
    assert "finding the wrong labels" in capsys.readouterr().out


def test_answers_are_those_of_the_truth_and_asked_once(benchmark_script: Callable[[str], Any]) -> None:
    benchmark = benchmark_script("asking")
    targets = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 0.0, -1.0]])
    scores = torch.tensor([[0.5, 0.4, 0.9], [0.1, 0.5, 0.52]])
    for ask in benchmark.WAYS.values():
        pairs = ask(scores, targets, 4, torch.Generator().manual_seed(0))
        assert sorted(pairs) == [(0, 1), (0, 2), (1, 0), (1, 2)]
    assert benchmark.WAYS["nearest to one half"](scores, targets, 2, torch.Generator())[:2] == [(1, 2), (0, 1)]


def test_calibration_keeps_the_order(
    benchmark_script: Callable[[str], Any], drawn_features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = benchmark_script("calibration")
    small = ["--known", "0.8", "single", "--methods", "linear", "trm", "--seeds", "1", "--set", "epochs=2", "pooler.num_heads=2"]
    benchmark.main(["--features", str(drawn_features), *small, "--json", str(tmp_path / "figures.json")])
    figures = read_json(tmp_path / "figures.json")
    assert [(row["method"], row["known"]) for row in figures] == [
        ("linear", 0.8),
        ("trm", 0.8),
        ("linear", "single"),
        ("trm", "single"),
    ]
    for row in figures:
        assert row["mAP after"] == pytest.approx(row["mAP before"], abs=1e-6)
        assert 0 < row["floor"] < 100 and 0 < row["error after"] < 100 and row["error after"] != row["error before"]
    assert "error of perfect scores" in capsys.readouterr().out


def test_promises_are_held_against_the_truth(benchmark_script: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = benchmark_script("promises")
    together, alone, shared = (
        sum(values) for values in zip(*(benchmark.apart(20, 50, (0.3, 1.5), s) for s in range(8)), strict=True)
    )
    assert shared < together and shared < alone
    for metric in benchmark.METRICS:
        inside, width = benchmark.held("calibrated", metric, 60, 100, seed=1)
        assert inside >= 85 and 0 < width < 1
    benchmark.WORLDS["liar"] = lambda z: (z.sigmoid(), torch.where(torch.tensor(len(z) > 1000), 0.01, 0.9 * z.sigmoid()))
    assert benchmark.held("liar", "precision", 60, 100, seed=1)[0] < 20  # another truth on fresh images
    del benchmark.WORLDS["liar"]
    benchmark.main(["--draws", "20", "--images", "40"])
    assert "How often the interval holds" in capsys.readouterr().out
