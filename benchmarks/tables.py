"""What the benchmarks wrote, as Markdown tables and log-log plots.

    python benchmarks/tables.py runs/bench

Reads every .json file of the folder and writes tables.md and, where scaling.json is there, scaling-*.png beside them.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trm_pipeline.report.markdown import markdown

Row = dict[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown([head, *rows]) + "\n"


def described(row: Row) -> list[str]:
    """Part, size and peer; the first two are told by the first number in the name of a pair."""
    return [*re.split(r" (?=\d)", row["pair"], maxsplit=1), row["peer"]]


def figures(row: Row) -> list[str]:
    low, high = row["time_ratio_quartiles"]
    return [
        f"{significant(row['time_ratio'])} ({significant(low)}–{significant(high)})",
        significant(row["memory_ratio"]),
        f"{significant(row['milliseconds'])} ms",
    ]


def significant(value: float) -> str:
    """Two digits that mean something, and no exponent; a dash where nothing was measured."""
    if math.isnan(value):
        return "–"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1.95 else f"{float(f'{value:.2g}'):g}"


def parts_table(rows: Sequence[Row]) -> str:
    """Where our step goes, beside the other side's."""
    cells = []
    for row in rows:
        mib, peer_mib = row["peak_mib"], row["peer_peak_mib"]
        times = f"{row['peer_seconds']:.3f} s", f"{row['seconds']:.3f} s", f"{100 * row['share']:.0f} %"
        ratio = significant(mib / peer_mib if peer_mib else math.nan)
        memory = f"{significant(peer_mib)} MiB", f"{significant(mib)} MiB", ratio
        cells.append([row["part"], *times, significant(row["time_ratio"]), *memory])
    head = ["part of the step", "time, research code", "ours", "share of ours", "ratio", "held, research code", "ours", "ratio"]
    return table(head, cells)


def scaling_tables(rows: Sequence[Row]) -> str:
    """One table for each curve, ours beside the usual form."""
    made = []
    for curve in dict.fromkeys(row["curve"] for row in rows):
        own = [row for row in rows if row["curve"] == curve]
        cells = []
        for row in own:
            there = "peer_milliseconds" in row
            cells.append(
                [
                    f"{row['size']:,}",
                    f"{significant(row['milliseconds'])} ms",
                    f"{significant(row['peer_milliseconds'])} ms" if there else "–",
                    significant(row["time_ratio"]) if there else "–",
                    f"{significant(row['peak_mib'])} MiB",
                    f"{significant(row['peer_peak_mib'])} MiB" if there else "over 4 GB",
                    significant(row["memory_ratio"]) if there else "–",
                ]
            )
        head = [own[0]["axis"], "ours", "usual", "ratio", "peak, ours", "usual", "ratio"]
        made.append(f"{curve.capitalize()}:\n\n{table(head, cells)}")
    return "\n".join(made)


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """A picture for each curve: time and peak memory over the size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    files = []
    for curve in dict.fromkeys(row["curve"] for row in rows):
        own = [row for row in rows if row["curve"] == curve]
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
        for axis, key, label in zip(axes, ("milliseconds", "peak_mib"), ("ms, forward and backward", "peak MiB"), strict=True):
            for prefix, name in (("", "ours"), ("peer_", "usual form")):
                line = [(row["size"], row[prefix + key]) for row in own if prefix + key in row]
                axis.loglog(*zip(*line, strict=True), marker="o", label=name)
            axis.set(xlabel=own[0]["axis"], ylabel=label)
            axis.grid(alpha=0.3)
        axes[0].legend()
        figure.suptitle(curve)
        files.append(folder / f"scaling-{curve.replace(' ', '-')}.png")
        figure.savefig(files[-1], dpi=90, pil_kwargs={"optimize": True})
        plt.close(figure)
    return files


def main(typed: Sequence[str] | None = None) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # dashes, into any encoding
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(typed).folder
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}
    if not found:
        parser.error(f"{folder} must hold what the benchmarks wrote with --json, got no .json file")
    rows = [row for file in found.values() for row in file.get("pairs", [])]
    head = ["part", "size", "peer", "time / peer (quartiles)", "memory / peer", "ours"]
    written = [table(head, [[*described(row), *figures(row)] for row in rows])] if rows else []
    for file in found.values():
        if parts := file.get("parts"):
            written.append(parts_table(parts))
    if scaling := found.get("scaling", {}).get("scaling"):
        written.append(scaling_tables(scaling))
        for picture in plot(scaling, folder):
            print(f"wrote {picture}")
    (folder / "tables.md").write_text("\n".join(written), encoding="utf-8")
    print("\n".join(written))


if __name__ == "__main__":
    main()
