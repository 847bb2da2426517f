"""Small runs of the pipeline: sizes of the drawn scenes, what is typed, and what is read of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES = {"train": 40, "val": 30, "test": 30}
FIGURES = ("mAP", "mAP_interpolated", "OF1", "CF1", "CF1_per_class", "best_epoch_mAP")
COLUMNS = {"method", "known", "seed", *FIGURES, "expected_positives"}
Run = Callable[..., list[dict[str, Any]]]
"""A command that gives its rows."""


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def typed(**options: Any) -> list[str]:
    """A command's options: ``typed(data_root=devkit, seeds=(1, 2))`` for ``--data-root ... --seeds 1 2``."""
    words: list[str] = []
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return words
