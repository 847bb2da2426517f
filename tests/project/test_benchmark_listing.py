"""The benchmark of listing, on sizes that take no time."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("torchvision")


@pytest.fixture
def listing(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_script("listing")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted as Linux counts it")
@pytest.mark.parametrize("key", ["coco", "vg200", "nus", "cub"])
def test_a_row_says_what_was_listed(listing: ModuleType, tmp_path: Path, key: str) -> None:
    data = listing.DATA[key]
    labels = {split: np.eye(3 + number, data.classes, dtype=np.int8) for number, split in enumerate(data.splits)}
    data.write(tmp_path / key, labels)
    for split, table in labels.items():
        row = listing.listed(key, tmp_path / key, split)
        assert (row["data"], row["split"], row["images"], row["classes"]) == (key, split, len(table), data.classes)
        assert row["labels"] == 1 and 0 < row["known"] < 0.3 and row["seconds"] > 0 and row["megabytes"] >= 0
        assert f"| {key} | {split} | {len(table)} | {data.classes} | 1.00 |" in re.sub(" +", " ", listing.table([row]))
