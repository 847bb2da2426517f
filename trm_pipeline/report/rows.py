"""Rows of results, and what is asked of them: methods, settings, values by seed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from trm_pipeline.config.presets import VARIANTS, Known
from trm_pipeline.methods.global_head import of_grid

Row = dict[str, Any]
"""One run: method, known (share of labels, or "single"), seed, mAP, mAP_interpolated, OF1, CF1, CF1_per_class, best_epoch_mAP,
expected_positives (a number for "single", else None), and wrong, the share of present labels that were moved, if there is one."""

NINE = tuple(tenth / 10 for tenth in range(1, 10))


def main_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows of the methods themselves, without the variants of an ablation and heads with another method's loss."""
    return [row for row in rows if row["method"] not in VARIANTS and not of_grid(row["method"])]


def ablation_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows of the variants and of what they are compared with; none where either is missing."""
    chosen = [row for row in rows if row["method"] == "trm" or row["method"] in VARIANTS]
    return chosen if len({row["method"] == "trm" for row in chosen}) == 2 else []


def distinct(rows: Sequence[Row], key: str) -> list[Any]:
    """Values in the order in which they are first met."""
    return list(dict.fromkeys(row[key] for row in rows))


def settings(rows: Sequence[Row]) -> list[Known]:
    """Shares ascending, then "single"."""
    known = distinct(rows, "known")
    return [*sorted(share for share in known if share != "single"), *(["single"] if "single" in known else [])]


def heading(rows: Sequence[Row], known: Known) -> str:
    """A setting in words, with what single positives assume."""
    if known != "single":
        return f"{100 * float(known):g}%"
    given = (row.get("expected_positives") for row in rows if row["known"] == "single")
    assumed = sorted({value for value in given if value is not None})
    return f"single (k={', '.join(f'{value:g}' for value in assumed)})" if assumed else "single"


def by_seed(rows: Sequence[Row], method: str, known: Known, key: str = "mAP") -> dict[int, float]:
    """The values of a method in a setting."""
    return {
        row["seed"]: row[key] for row in rows if row["method"] == method and row["known"] == known and row.get(key) is not None
    }


def average(rows: Sequence[Row], method: str, key: str) -> dict[int, float]:
    """The mean over the nine shares for each seed that has them all."""
    shares = [by_seed(rows, method, share, key) for share in NINE]
    return {seed: statistics.fmean(share[seed] for share in shares) for seed in shares[0] if all(seed in s for s in shares)}


def less(rows: Sequence[Row], name: str, other: str, known: Known, key: str = "mAP") -> list[float]:
    """Differences of a method to another on the same seeds."""
    first, second = (by_seed(rows, method, known, key) for method in (name, other))
    return [value - second[seed] for seed, value in first.items() if seed in second]
