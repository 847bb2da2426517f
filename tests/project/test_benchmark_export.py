"""The benchmark of exported files, with the small model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_a_file_is_written_run_and_compared(benchmark_script: Callable[[str], Any], tmp_path: Path) -> None:
    row = benchmark_script("export").measured("embedded", tmp_path)
    (file,) = tmp_path.glob("*.onnx")
    assert abs(row.megabytes - file.stat().st_size / 1e6) < 0.1
    assert row.difference < 1e-4 and row.writing > 0 and row.image > 0
