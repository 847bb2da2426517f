"""The benchmark runs, at sizes that take no time, and times nothing that does not compute the same."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def losses() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "losses.py"
    spec = importlib.util.spec_from_file_location("benchmark_losses", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def tiny(losses: ModuleType) -> list[object]:
    sizes = {"asl": (4, 5), "matching": (3, 4, 8), "contrast": (3, 4, 8), "pooler": (2, 3, 5, 8), "bank": (4, 3, 8)}
    return [*((getattr(losses, f"{name}_pairs"), size) for name, size in sizes.items()), (losses.metric_pairs, (40, 3))]


def test_figures_of_every_pair(losses: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(losses.SIZES, "small", tiny(losses))
    file = tmp_path / "figures.json"
    losses.main(["--rounds", "2", "--warmup", "0", "--threads", str(torch.get_num_threads()), "--json", str(file)])
    found = json.loads(file.read_text())
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    parts = {row["pair"].split()[0] for row in found["pairs"]}
    assert {"asymmetric", "matching", "contrast", "pooler", "prototypes"} <= parts
    for row in found["pairs"]:
        low, high = row["time_ratio_quartiles"]
        assert low <= row["time_ratio"] <= high and row["milliseconds"] > 0 and row["memory_ratio"] > 0
        assert row["difference"] is None or row["difference"] < 1e-4


def test_only_some_parts(losses: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(losses.SIZES, "small", tiny(losses))
    losses.main(["--rounds", "2", "--warmup", "0", "--threads", str(torch.get_num_threads()), "--only", "asym"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["asymmetric"]


def test_what_differs_is_not_timed(losses: ModuleType) -> None:
    pair = losses.asl_pairs(4, 5)[0]
    with pytest.raises(SystemExit, match="asymmetric loss 4x5 and published formula differ by .* not timed"):
        losses.measure(pair._replace(ours=lambda: tuple(2 * x for x in pair.ours())), 2, 0)
    assert losses.difference(pair) < 1e-4


def test_peak_memory_counts_what_a_call_holds(losses: ModuleType) -> None:
    held = losses.peak_memory(lambda: [torch.zeros(1 << 20), torch.zeros(1 << 20)])
    assert 8 << 20 <= held < 9 << 20
