"""The benchmarks run at their smallest, and what they compare agrees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers import ROOT
from tests.helpers.runs import read_json


def test_pooling(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/pooling.py", "--sizes", "tiny", "--rounds", "2", "--warmup", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [*command, "--json", str(tmp_path / "figures.json")], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert run.returncode == 0, run.stderr
    figures = read_json(tmp_path / "figures.json")
    assert [row["pair"].partition(" 2x")[0] for row in figures["pairs"]] == [
        *["regions"] * 6,
        *["pool and match"] * 2,
        "score",
        *["step"] * 2,
    ]
    for row in figures["pairs"]:
        assert row["milliseconds"] > 0 and row["time_ratio"] > 0 and row["peak_mib"] > 0 and row["memory_ratio"] > 0
