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
        figures = read_json(tmp_path / "figures.json")["prompts"]
        assert [(row["mode"], row["classes"], row["chunk_size"]) for row in figures] == [
            ("shared", 5, None),
            ("shared", 5, 2),
            ("csc", 3, None),
        ]
        for row in figures:
            low, high = row["time_ratio_range"]
            assert 0 < low <= row["time_ratio"] <= high and row["memory_ratio"] > 0 and row["relative_error"] < 1e-4
        benchmark.main(["--rounds", "1", "--only", "csc", "--classes", "3"])
        monkeypatch.setattr(benchmark, "every_token", lambda model, prompts, names: prompts.context.sum() * torch.ones(3, 512))
        with pytest.raises(RuntimeError, match="text or gradient is off"):
            benchmark.run(benchmark.small_model({**TEXT, "vocab_size": 50}), small[1], 1)
    finally:
        torch.set_num_threads(threads)
