"""What the benchmarks wrote, as Markdown tables and log-log plots; and beside what was aimed at.

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
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from trm_pipeline.report.markdown import markdown

Row = dict[str, Any]
Rates = dict[str, float]
Limit = Callable[[Sequence[int], Rates], float]
"""Seconds that a machine of some rates needs at the least, from the numbers in a pair's name."""


class Target(NamedTuple):
    """At most this share of a peer's time and memory; or, in place of the latter, so many floats."""

    pair: str
    peer: str
    time: float
    memory: float | None = None
    floats: int | None = None
    limit: Limit | None = None


def elementwise(size: Sequence[int], rates: Rates) -> float:
    """The asymmetric loss: logits, targets and gradient read and written, one sigmoid and one logarithm."""
    return size[0] * size[1] * 1e-9 * (20 / rates["stream_gbs"] + rates["sigmoid_ns"] + rates["log_ns"])


def two_products(size: Sequence[int], rates: Rates) -> float:
    """Contrast: half of the pairs twice, and the gradient; every exponential once."""
    dim, anchors = size[2:4]
    return 1e-9 * anchors**2 * (4 * dim / rates["gemm_gflops"] + rates["exp_ns"])


def touched_rows(size: Sequence[int], rates: Rates) -> float:
    """Prototypes: the entries read, the prototypes of as many classes read and written."""
    return 12e-9 * size[3] * size[2] / rates["stream_gbs"]


def regions_once(size: Sequence[int], rates: Rates) -> float:
    """Pseudo-labels: regions, prototypes and texts read once."""
    batch, classes, dim = size
    return 4e-9 * classes * dim * (batch + 2) / rates["stream_gbs"]


PUBLISHED = "published formula"
CLASSES, SAMPLES, MHA = "loop over classes", "loop over samples", "nn.MultiheadAttention"
MHA_LOGITS = "nn.MultiheadAttention, multiply, sum"
TOKENS = "all 77 tokens of every class"
TARGETS = [
    Target("step 32x80x196, shared contexts, all terms", "research code", 0.15, 0.3),
    Target("asymmetric loss 64x20", PUBLISHED, 1.1, 0.34, limit=elementwise),
    Target("asymmetric loss 128x80", PUBLISHED, 0.75, 0.34, limit=elementwise),
    Target("asymmetric loss 128x312", PUBLISHED, 0.6, 0.34, limit=elementwise),
    Target("asymmetric loss 128x9605", PUBLISHED, 0.25, 0.12, limit=elementwise),
    *(
        Target(f"contrast *x512 ({anchors} anchors)", "published N x N formula", *share, limit=two_products)
        for anchors, share in {531: (0.85, 0.65), 1680: (0.65, 0.15), 2624: (0.55, 0.08), 4096: (0.4, 0.05)}.items()
    ),
    *(
        Target(f"contrast *x512 ({anchors} anchors)", "pytorch-metric-learning SupConLoss", *share, limit=two_products)
        for anchors, share in {1680: (0.36, 0.09), 4096: (0.27, 0.03)}.items()
    ),
    Target("contrast 64x9605x512 (1024 anchors, * keys)", "each against all, as matrices", 0.55, 0.25),
    *(
        Target(f"regions {size}, 1 head(s)", MHA, *share)
        for size, share in {
            "16x20x196x512": (0.3, 0.22),
            "16x80x196x512": (0.38, 0.26),
            "32x80x49x1024": (0.35, 0.48),
            "8x312x196x512": (0.5, 0.4),
            "8x80x784x512": (0.25, 0.14),
        }.items()
    ),
    Target("regions 16x80x196x512, 8 head(s)", MHA, 0.75, 0.75),
    Target("regions 16x20x196x512, 8 head(s)", MHA, 0.65, 0.55),
    *(
        Target(f"pool and match {size}, 1 head(s), *", MHA_LOGITS, *share)
        for size, share in {"16x80x196x512": (0.42, 0.36), "8x312x196x512": (0.48, 0.45), "4x2000x196x512": (0.55, 0.24)}.items()
    ),
    Target("text tower, shared contexts 20 classes", TOKENS, 0.11, 0.16),
    Target("text tower, shared contexts 80 classes", TOKENS, 0.08, 0.15),
    Target("text tower, shared contexts 80 classes, chunks of 16", TOKENS, 0.18, 0.035),
    Target("text tower, a context for each class 20 classes", TOKENS, 0.25, 0.3),
    *(
        Target(f"prototypes *x{classes}x512 ({n} entries)", CLASSES, time, None, (n + classes) * 512, touched_rows)
        for n, classes, time in ((371, 80, 0.1), (1280, 200, 0.1), (1024, 9605, 0.02))
    ),
    *(
        Target(f"prototypes *x{classes}x512 ({n} entries)", SAMPLES, time, None, 3 * n * 512, touched_rows)
        for n, classes, time in ((371, 80, 0.2), (3968, 312, 0.08), (1024, 9605, 0.18))
    ),
    Target("pseudo-labels 64x80x512", CLASSES, 0.3, None, 2 * 80 * 512 + 3 * 64 * 80, regions_once),
    Target("pseudo-labels 8x9605x512", CLASSES, 0.04, None, 2 * 9605 * 512 + 3 * 8 * 9605, regions_once),
    Target("pseudo-labels 64x80x512", "nn.CosineSimilarity", 0.15, 0.01, limit=regions_once),
    Target("pseudo-labels 8x9605x512", "nn.CosineSimilarity", 0.1, 0.03, limit=regions_once),
    *(Target(f"average precision {size}", "torchmetrics", 0.15, 1.4) for size in ("4952x20", "5000x80", "10000x200")),
    Target("average precision 5000x80", "scikit-learn, a loop", 0.07),
]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown([head, *rows]) + "\n"


def described(row: Row) -> list[str]:
    """Part, size and peer; the first two of a pair are told by the first size in its name."""
    if "pair" in row:
        return [*re.split(r" (?=\d+x)", row["pair"], maxsplit=1), row["peer"]]
    chunk = "" if row["chunk_size"] is None else f", chunks of {row['chunk_size']}"
    kind = {"shared": "shared contexts", "csc": "a context for each class"}[row["mode"]]
    return [f"text tower, {kind}", f"{row['classes']} classes{chunk}", TOKENS]


def figures(row: Row) -> list[str]:
    low, high = row.get("time_ratio_quartiles") or row["time_ratio_range"]
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


def targets_table(rows: Iterable[Row], rates: Rates) -> str:
    """Each target that was measured, whether it is met, and how fast the machine could be at the best."""
    cells = []
    for row in rows:
        part, size, peer = described(row)
        for target in TARGETS:
            if peer != target.peer or not fnmatchcase(f"{part} {size}", target.pair):
                continue
            held, shown = row["memory_ratio"], significant
            wanted = target.memory
            if target.floats is not None:
                held, wanted, shown = row["peak_mib"], target.floats / 2**18, lambda value: f"{significant(value)} MiB"
            met = row["time_ratio"] <= target.time, wanted is None or held <= wanted
            time, _, ours = figures(row)
            limit = "–"
            if target.limit is not None and rates:
                numbers = [int(number) for number in re.findall(r"\d+", size)]
                limit = f"{significant(1e3 * target.limit(numbers, rates))} ms"
            cells.append(
                [
                    *(part, size, peer, significant(target.time), time),
                    *(("–", "–") if wanted is None else (shown(wanted), shown(held))),
                    {(True, True): "yes", (True, False): "time only", (False, True): "memory only", (False, False): "no"}[met],
                    *(ours, limit),
                ]
            )
    head = ["part", "size", "peer", "time, at most", "measured (quartiles)", "memory, at most", "measured", "met", "ours"]
    return table([*head, "the machine's limit"], cells) if cells else ""


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
    rows = [row for kind in ("pairs", "prompts") for file in found.values() for row in file.get(kind, [])]
    head = ["part", "size", "peer", "time / peer (quartiles)", "memory / peer", "ours"]
    written = [table(head, [[*described(row), *figures(row)] for row in rows])] if rows else []
    rates: dict[str, float] = next((file["rates"] for file in found.values() if "rates" in file), {})
    if targets := targets_table(rows, rates):
        written.append(targets)
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
