"""The curves of the benchmarks and their tables, at sizes that take no time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from timm.loss import AsymmetricLossMultiLabel

from tests.helpers import ROOT
from tests.helpers.runs import read_json

beside_timm = pytest.mark.skipif(
    "reduction" not in signature(AsymmetricLossMultiLabel).parameters, reason="timm's loss can be compared from 1.0.31 on"
)

CURVES = ("asymmetric loss", "matching", "contrast", "step", "step with labeller", "sampled step")


@pytest.fixture
def scaling(benchmark_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    made = benchmark_script("scaling")
    short = [curve._replace(sizes=(8, 16, 32)) for curve in made.CURVES]
    monkeypatch.setattr(made, "CURVES", short)
    return made


@pytest.fixture
def tables(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_script("tables")


@beside_timm
def test_a_row_for_every_size(scaling: ModuleType, tables: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    threads = str(torch.get_num_threads())
    shared = ["--rounds", "2", "--warmup", "0", "--threads", threads, "--json", str(tmp_path / "scaling.json")]
    scaling.main([*shared, "--only", "match"])
    assert {row["curve"] for row in read_json(tmp_path / "scaling.json")["scaling"]} == {"matching"}
    scaling.main(shared)
    rows = read_json(tmp_path / "scaling.json")["scaling"]
    assert [(row["curve"], row["size"]) for row in rows] == [(curve, size) for curve in CURVES for size in (8, 16, 32)]
    for row in rows:
        assert "step" in row["curve"] or row["difference"] < 1e-4  # steps have dropout, and are compared without
        assert row["milliseconds"] > 0 and row["peer_milliseconds"] > 0
        assert row["memory_ratio"] == pytest.approx(row["peak_mib"] / row["peer_peak_mib"])
    tables.main([str(tmp_path)])
    assert {file.name for file in tmp_path.glob("*.png")} == {f"scaling-{curve.replace(' ', '-')}.png" for curve in CURVES}
    tables = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^\| (8|16|32) +\|", tables, re.MULTILINE)) == 3 * len(CURVES)


def test_what_would_not_fit_is_left_out(scaling: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told from the peak before: four times the memory at twice the anchors."""
    contrast = scaling.CURVES[2]
    first, second, _ = scaling.points(contrast, 2, 0)
    monkeypatch.setattr(scaling, "LIMIT", 3.9 * 2**20 * first["peer_peak_mib"])
    only, *others = scaling.points(contrast, 2, 0)
    assert "time_ratio" in only and not any("time_ratio" in row for row in others)
    assert all(row["milliseconds"] > 0 and row["peak_mib"] > 0 for row in others)
    monkeypatch.setattr(scaling, "LIMIT", 4.1 * 2**20 * first["peer_peak_mib"])
    assert "time_ratio" in scaling.points(contrast, 2, 0)[1]


def test_tables_say_what_was_measured(tables: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = {"pair": "matching 64x20x512", "peer": "formula", "milliseconds": 1.234, "time_ratio": 0.1234, "memory_ratio": 0.05}
    (tmp_path / "a.json").write_text(json.dumps({"pairs": [{**pair, "time_ratio_quartiles": [0.1, 0.2]}]}), encoding="utf-8")
    prompts = {"pair": "text tower, shared contexts 80 classes, chunks of 16", "peer": "all tokens", "milliseconds": 1234.0}
    prompts |= {"time_ratio": 2.04, "memory_ratio": 1, "time_ratio_quartiles": [0.9, 12.3]}
    (tmp_path / "b.json").write_text(json.dumps({"pairs": [prompts]}), encoding="utf-8")
    part = {"part": "pooler", "seconds": 0.5, "peer_seconds": 1.5, "share": 0.25, "time_ratio": 0.333}
    part |= {"peak_mib": 2.0, "peer_peak_mib": 8.0}
    (tmp_path / "c.json").write_text(json.dumps({"parts": [part]}), encoding="utf-8")
    tables.main([str(tmp_path)])
    lines = re.sub(" +", " ", capsys.readouterr().out).splitlines()
    assert "| matching | 64x20x512 | formula | 0.12 (0.1–0.2) | 0.05 | 1.2 ms |" in lines
    assert "| text tower, shared contexts | 80 classes, chunks of 16 | all tokens | 2.0 (0.9–12) | 1 | 1234 ms |" in lines
    assert "| pooler | 1.500 s | 0.500 s | 25 % | 0.33 | 8.0 MiB | 2.0 MiB | 0.25 |" in lines
    one = {"curve": "contrast", "axis": "anchors", "milliseconds": 5.0, "peak_mib": 2.0}
    usual = {"peer_milliseconds": 10.0, "peer_peak_mib": 8.0, "time_ratio": 0.5, "memory_ratio": 0.25}
    made = re.sub(" +", " ", tables.scaling_tables([{**one, "size": 100, **usual}, {**one, "size": 16384}]))
    assert "| 100 | 5.0 ms | 10 ms | 0.5 | 2.0 MiB | 8.0 MiB | 0.25 |" in made
    assert "| 16,384 | 5.0 ms | – | – | 2.0 MiB | over 4 GB | – |" in made
    with pytest.raises(SystemExit):
        tables.main([str(tmp_path / "nothing")])


def test_commands_name_benchmarks_and_their_options(
    benchmark_script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the pages and of make bench."""
    pages = [ROOT / "Makefile", ROOT / "README.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    wanted: dict[str, set[str]] = {}
    for script, typed in re.findall(r"python benchmarks/(\w+)\.py([^`\n#]*)", text):
        wanted.setdefault(script, set()).update(re.findall(r"--[\w-]+", typed))
    assert {"losses", "pooling", "prompts", "step", "scaling", "tables"} <= set(wanted)
    for script, options in wanted.items():
        monkeypatch.setattr("sys.argv", [script, "--help"])
        with pytest.raises(SystemExit):
            benchmark_script(script).main()
        shown = capsys.readouterr().out
        assert {option for option in options if option not in shown} == set(), script
