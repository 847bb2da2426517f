"""Time and peak memory as the problem grows, ours against the form usually written.

    python benchmarks/scaling.py --rounds 5 --only contrast --json runs/bench/scaling.json
    python benchmarks/tables.py runs/bench    # tables and plots of it

Asymmetric loss (128 images) and matching (8 images, width 512) over the number of classes, contrast (width 512, four
images of each class) over the number of anchors; forward and backward. A whole training step with frozen text (8 images of 49
tokens, width 512) over the number of classes, with the pseudo-labels of prototypes and without, beside all classes at once; and
on 512 of the classes, beside all. The usual form is left out where it would take more than 4 GB, told from its peak at the size
before.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from losses import Pair, arguments, asl_pairs, contrast_pairs, matching_pairs, measure, peak_memory, versions
from pooling import sampled_pair, step_pair

from trm_pipeline.files import write_json

LIMIT = 4 * 2**30  # bytes


class Curve(NamedTuple):
    name: str
    axis: str
    sizes: Sequence[int]
    build: Callable[[int], Pair]
    power: int
    """With which power of the size the memory of the usual form grows."""


CLASSES = (20, 80, 312, 1000, 3000, 9605, 20000)
STEPS = (80, 312, 1000, 3000, 10000)
CURVES = [
    Curve("asymmetric loss", "classes", CLASSES, lambda n: asl_pairs(128, n)[0], 1),
    Curve("matching", "classes", CLASSES, lambda n: matching_pairs(8, n, 512)[0], 1),
    Curve("contrast", "anchors", (100, 256, 512, 1024, 2048, 4096, 8192, 16384), lambda n: contrast_pairs(4, n // 4, 512)[0], 2),
    Curve("step", "classes", STEPS, lambda n: step_pair((8, n, 49, 512), labeler=False), 1),
    Curve("step with labeller", "classes", STEPS, lambda n: step_pair((8, n, 49, 512), labeler=True), 1),
    Curve("sampled step", "classes", STEPS, lambda n: sampled_pair((8, n, 49, 512), 512), 1),
]


def once(pair: Pair) -> float:
    """Milliseconds of one call of our side."""
    start = time.perf_counter()
    pair.ours()
    return 1e3 * (time.perf_counter() - start)


def alone(pair: Pair, rounds: int, warmup: int) -> dict[str, object]:
    """Figures of our side by itself."""
    milliseconds = [once(pair) for _ in range(warmup + rounds)][warmup:]
    return {"milliseconds": statistics.median(milliseconds), "peak_mib": peak_memory(pair.ours) / 2**20}


def points(curve: Curve, rounds: int, warmup: int) -> list[dict[str, object]]:
    """A row for each size, without the usual form's figures where it is left out."""
    rows: list[dict[str, object]] = []
    last, peak = 0, 0.0
    for size in curve.sizes:
        pair = curve.build(size)
        left_out = bool(last) and peak * (size / last) ** curve.power > LIMIT
        quick = min(10 * rounds, int(200 / once(pair)))  # small sizes are noisy, and cheap to repeat
        row = (alone if left_out else measure)(pair, max(rounds, quick), warmup)
        if not left_out:
            last, peak = size, 2**20 * float(row["peer_peak_mib"])  # type: ignore[arg-type]
        rows.append({"curve": curve.name, "axis": curve.axis, "size": size, **row})
        ratio = "left out" if left_out else f"{row['time_ratio']:.2f} {row['memory_ratio']:16.3f}"
        ours = f"{row['milliseconds']:9.2f} ms {row['peak_mib']:9.1f} MiB"
        print(f"{curve.name:16} {size:7} {curve.axis:8} {ours}  {ratio}", flush=True)
    return rows


def main(typed: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=3, warmup=1)
    args = parser.parse_args(typed)
    torch.set_num_threads(args.threads)
    setting = {**versions(), "threads": args.threads, "rounds": args.rounds}
    print(", ".join(f"{key} {value}" for key, value in setting.items()))
    wanted = [curve for curve in CURVES if not args.only or curve.name.startswith(tuple(args.only))]
    rows = [row for curve in wanted for row in points(curve, args.rounds, args.warmup)]
    if args.json:
        write_json(args.json, {**setting, "scaling": rows})


if __name__ == "__main__":
    main()
