"""The benchmark runs, at sizes that take no time, and times nothing that does not compute the same."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path
from types import ModuleType

import pytest
import torch
from timm.loss import AsymmetricLossMultiLabel

from tests.helpers.runs import read_json

beside_timm = pytest.mark.skipif(
    "reduction" not in signature(AsymmetricLossMultiLabel).parameters, reason="timm's loss can be compared from 1.0.31 on"
)


@pytest.fixture
def losses(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_script("losses")


def tiny(losses: ModuleType) -> list[object]:
    """Every kind of pair."""
    sizes = {
        "asl": (4, 5),
        "matching": (3, 4, 8),
        "contrast": (3, 4, 8),
        "class_contrast": (4, 6, 8, 9),
        "clip": (5, 8),
        "bank": (4, 3, 8),
        "mean": (4, 3, 8, 5),
        "pseudo_label": (3, 4, 8),
        "relation": (3, 4, 8),
        "metric": (40, 3),
    }
    return [(getattr(losses, f"{name}_pairs"), size) for name, size in sizes.items()]


@beside_timm
def test_figures_of_every_pair(losses: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(losses.SIZES, "small", tiny(losses))
    file = tmp_path / "figures.json"
    losses.main(["--rounds", "2", "--warmup", "0", "--threads", str(torch.get_num_threads()), "--json", str(file)])
    found = read_json(file)
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    parts = {row["pair"].split()[0] for row in found["pairs"]}
    assert {"asymmetric", "matching", "contrast", "prototypes", "pseudo-labels", "relations", "average"} <= parts
    peers = {row["peer"] for row in found["pairs"]}
    assert {"timm AsymmetricLossMultiLabel", "open_clip ClipLoss", "torchmetrics", "scikit-learn, a loop"} <= peers
    for row in found["pairs"]:
        low, high = row["time_ratio_quartiles"]
        assert low <= row["time_ratio"] <= high and row["milliseconds"] > 0 and row["peak_mib"] > 0
        assert row["memory_ratio"] > 0 or "scikit-learn" in row["peer"]
        assert row["difference"] is None or row["difference"] < 1e-4


def test_every_size_is_one_that_its_pairs_take(losses: ModuleType) -> None:
    for sizes in losses.SIZES.values():
        for build, size in sizes:
            signature(build).bind(*size)


@beside_timm
def test_only_some_parts(losses: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(losses.SIZES, "small", tiny(losses))
    losses.main(["--rounds", "2", "--warmup", "0", "--threads", str(torch.get_num_threads()), "--only", "asym"])
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]} == {"asymmetric"}


def test_a_peer_that_does_not_import_is_said_to_be_left_out(
    losses: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("timm.loss", "pytorch_metric_learning.losses", "sklearn.metrics", "open_clip"):
        monkeypatch.setitem(sys.modules, module, None)
    pairs = [*losses.asl_pairs(4, 5), *losses.contrast_pairs(3, 4, 8), *losses.metric_pairs(9, 2), *losses.clip_pairs(3, 8)]
    assert [pair.peer_name for pair in pairs] == ["published formula", "published N x N formula", "torchmetrics"]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 and all("left out: " in line for line in said)


def test_both_sides_of_the_prototypes_agree_update_after_update(losses: ModuleType) -> None:
    pair, other = losses.mean_pairs(4, 3, 8, 7)
    for _ in range(4):
        torch.testing.assert_close(pair.ours(), pair.peer())
    assert other.tolerance is None


def test_compiled_forms_stand_beside_the_eager_and_the_compiled_peer(losses: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses.torch, "compile", partial(torch.compile, backend="aot_eager"))
    for pairs in (losses.asl_pairs(4, 5, compiled=True), losses.contrast_pairs(3, 4, 8, compiled=True)):
        assert [pair.peer_name.endswith(", compiled") for pair in pairs] == [False, True]
        assert all(pair.name.endswith(", compiled") and losses.difference(pair) < 1e-4 for pair in pairs)


@beside_timm
def test_what_differs_is_not_timed(losses: ModuleType) -> None:
    pair = losses.asl_pairs(4, 5)[0]
    with pytest.raises(SystemExit, match="asymmetric loss 4x5 and published formula differ by .* not timed"):
        losses.measure(pair._replace(ours=lambda: tuple(2 * x for x in pair.ours())), 2, 0)
    assert losses.difference(pair) < 1e-4


def test_peak_memory_counts_what_a_call_holds(losses: ModuleType) -> None:
    held = losses.peak_memory(lambda: [torch.zeros(1 << 20), torch.zeros(1 << 20)])
    assert 8 << 20 <= held < 9 << 20
