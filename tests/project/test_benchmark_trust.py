"""The table of trust: every cell into the file, the worst of a column into the table."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import trust
from tests.helpers.runs import read_json


def test_table_of_trust(benchmark_script: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All cells into the file; the worst of a column into the table, bold where it does not pass, "-" where there is none."""
    name, script = "distillation", benchmark_script("trust")
    script.main(["--only", name, "--without", "compiled", "ranks", "peers", "--json", str(tmp_path / "trust.json")])
    rows = read_json(tmp_path / "trust.json")["cells"]
    assert [row["precision"] for row in rows] == 2 * ["float32", "bf16", "fp16", "autocast bf16", "autocast fp16"]
    assert all(row["settings"] == 26 and row["gradient at"]["magnitude"] > 0 for row in rows[:5])
    assert [row["value"] for row in rows[5:]] == 5 * [None]  # no state to save
    assert (tmp_path / "trust.md").read_text(encoding="utf-8") in capsys.readouterr().out
    part = trust.named(name)

    def line(**changed: Any) -> str:
        made = script.markdown([{**rows[0], "value": 2e-7, "gradient": 3e-6}, {**rows[1], **changed}], [part])
        return re.sub(" +", " ", made).splitlines()[2]

    assert line(value=1e-5, gradient=4e-3) == f"| {name} | 2e-7 / 3e-6 | 1e-5 / 4e-3 |"
    assert line(value=1e-3, gradient=math.inf) == f"| {name} | 2e-7 / 3e-6 | **1e-3 / inf** |"
    assert line(value=math.inf, failed="no such thing") == f"| {name} | 2e-7 / 3e-6 | **fails** |"
    assert line(value=None) == f"| {name} | 2e-7 / 3e-6 | - |"
