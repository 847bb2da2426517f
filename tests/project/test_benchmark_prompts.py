"""The benchmark of the text tower, on a tiny one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.runs import read_json
from tests.helpers.towers import TEXT


def test_the_benchmark_compares_what_it_times(
    benchmark_script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a tiny tower; the figures are there, the forms agree, and one that does not stops the run."""
    benchmark = benchmark_script("prompts")
    small = [benchmark.Setting("shared", 5, (None, 2), 3), benchmark.Setting("csc", 3, num_context=3)]
    monkeypatch.setattr(benchmark, "SETTINGS", small)
    monkeypatch.setattr(benchmark, "RN101_TEXT", {**TEXT, "vocab_size": 50})
    threads = torch.get_num_threads()
    try:
        benchmark.main(["--rounds", "2", "--json", str(tmp_path / "figures.json")])
        figures = read_json(tmp_path / "figures.json")["pairs"]
        assert [row["pair"] for row in figures] == [
            "text tower, shared contexts 5 classes",
            "text tower, shared contexts 5 classes, chunks of 2",
            "text tower, a context for each class 3 classes",
        ]
        assert all(row["time_ratio"] > 0 and row["memory_ratio"] > 0 and row["difference"] < 1e-4 for row in figures)
        every_token = benchmark.every_token
        monkeypatch.setattr(benchmark, "every_token", lambda *given: 1.01 * every_token(*given))
        with pytest.raises(SystemExit, match="text tower, shared contexts 5 classes and .* differ by .* not timed"):
            benchmark.main(["--rounds", "2"])
    finally:
        torch.set_num_threads(threads)
