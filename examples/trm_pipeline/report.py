"""Tables and pictures of results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["Row", "draw_map_against_known", "markdown_table"]

Row = dict[str, Any]
"""One run: method, known (share of labels or "single"), seed, mAP, mAP_interpolated, OF1, CF1, CF1_per_class, best_epoch_mAP,
expected_positives (None unless single)."""


def _cells(rows: Sequence[Row], method: str, known: float, key: str) -> list[float]:
    return [row[key] for row in rows if row["method"] == method and row["known"] == known]


def _ordered(rows: Sequence[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _mean_sd(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def markdown_table(rows: Sequence[Row], key: str = "mAP") -> str:
    """Methods down, shares of known labels across; mean ± standard deviation over seeds."""
    shares = sorted(_ordered(rows, "known"), key=lambda known: 2 if known == "single" else known)
    methods = _ordered(rows, "method")
    assumed = next((row["expected_positives"] for row in rows if row["known"] == "single"), None)
    header = ["method", *(f"single (k={assumed:g})" if share == "single" else f"{100 * share:g}%" for share in shares)]
    body = [[method, *(_mean_sd(_cells(rows, method, share, key)) for share in shares)] for method in methods]
    widths = [max(len(line[column]) for line in [header, *body]) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in [header, ["-" * width for width in widths], *body]
    ]
    return "\n".join(lines)


def draw_map_against_known(path: Path, rows: Sequence[Row], title: str) -> None:
    """mAP on the test images against the share of known labels, a line for each method, bars of one deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.8), layout="constrained")
    ends: list[tuple[float, str, Any]] = []
    for method in _ordered(rows, "method"):
        shares = sorted({row["known"] for row in rows if row["method"] == method})
        values = [_cells(rows, method, share, "mAP") for share in shares]
        means = [statistics.fmean(cell) for cell in values]
        spread = [statistics.stdev(cell) if len(cell) > 1 else 0.0 for cell in values]
        style = ":" if method.startswith("zero-shot") else "-"
        line = axes.errorbar([100 * s for s in shares], means, spread, marker="o", ms=4, capsize=3, ls=style, lw=1.6)
        ends.append((means[-1], method, line.lines[0].get_color()))
    axes.set(xlabel="known labels (%)", ylabel="mAP on the test images (%)", title=title)
    # Names stand at the ends of their lines, pushed apart where lines end close together.
    low, high = axes.get_ylim()
    place, right = -float("inf"), max(100 * row["known"] for row in rows)
    for value, method, color in sorted(ends):
        place = max(value, place + 0.042 * (high - low))
        axes.annotate(f" {method}", (right, value), (right + 2, place), color=color, fontsize=9, va="center")
    axes.set_ylim(low, max(high, place))
    axes.margins(x=0.03)
    axes.set_xlim(right=right * 1.32)
    axes.set_xticks(sorted({100 * row["known"] for row in rows}))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
