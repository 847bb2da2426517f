"""Calibration on known labels that are held out: calibration error and OF1 at 0.5 on other images, before and after.

    python benchmarks/calibration.py                                     # drawn VOC, test images
    python benchmarks/calibration.py --features FEATURES                 # given features: their split test, or val

A method learns from four fifths of what is known; the rest calibrates it. With single positives that is a fifth of the images,
and the mean number of present classes is assumed, as in training. Few images leave an error even if scores are the very chances
of labels: the last column is that of labels drawn from the calibrated scores.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from trm_losses import Calibration
from trm_losses.metrics import calibration_error, evaluate
from trm_pipeline.config.presets import Known
from trm_pipeline.data import given, voc
from trm_pipeline.files import write_json
from trm_pipeline.methods import LABEL_FREE
from trm_pipeline.methods.global_head import FITTED
from trm_pipeline.report.markdown import markdown
from trm_pipeline.run.arguments import parse
from trm_pipeline.run.choose import hold_out, logits_of
from trm_pipeline.run.options import known_argument
from trm_pipeline.run.prepare import prepare
from trm_pipeline.run.prepared import Cell, Prepared, known_labels, train_cell

METHODS = ("linear", "dual-coop", "trm")


def measure(data: Prepared, cell: Cell) -> dict[str, float]:
    """Mean calibration error of the classes (%), OF1 at 0.5 and mAP on the scored images, before and after."""
    single = cell.known == "single"
    held = hold_out(known_labels(data, cell), single=single, seed=cell.seed)
    part = data.with_labels(held.kept)
    method = train_cell(part, cell, data.preset, method=cell.method, scored=False).method
    own, other = (logits_of(data, method, features) for features in (data.features, data.test_features))
    if single:  # what is not known of an image that was held out stays unknown here
        rows = (held.asked >= 0).any(dim=1)
        listed = torch.where(held.asked[rows] == 1, 1.0, -1.0)
        fitted = Calibration(len(data.text)).fit(own[rows], listed, expected_positives=data.preset.expected_positives)
    else:
        fitted = Calibration(len(data.text)).fit(own, held.asked)
    probabilities = fitted(other).sigmoid()
    draw = torch.Generator().manual_seed(cell.seed)
    drawn = [torch.bernoulli(probabilities, generator=draw) for _ in range(5)]  # labels of which they are the chances
    floor = statistics.mean(float(calibration_error(probabilities, labels).nanmean()) for labels in drawn)
    found: dict[str, float] = {"floor": 100 * floor}
    for word, logits in (("before", other), ("after", fitted(other))):
        metrics = evaluate(logits, data.test_targets, threshold=0.0)
        found[f"error {word}"] = 100 * float(calibration_error(logits.sigmoid(), data.test_targets).nanmean())
        found |= {f"{name} {word}": metrics[name] for name in ("OF1", "mAP")}
    return found


def main(argv: list[str] | None = None) -> None:
    """Train, calibrate, and print the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--features", type=Path, help="a folder of given features; default: the drawn VOC")
    p.add_argument("--known", type=known_argument, nargs="+", default=[0.1, 0.5, "single"])
    p.add_argument("--methods", nargs="+", default=METHODS)
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    p.add_argument("--set", nargs="+", default=[], help="settings of the preset, such as epochs=2")
    p.add_argument("--json", type=Path, help="file for the figures")
    args = p.parse_args(argv)
    typed = [str(args.features)] if args.features else []
    typed += ["--methods", *args.methods, *(["--set", *args.set] if args.set else [])]
    options = parse(typed, given.SOURCE if args.features else voc.SOURCE)
    if untrained := {*options.methods} & {*LABEL_FREE, *FITTED}:
        p.error(f"--methods {min(untrained)} is not trained")
    data = prepare(options)
    rows: list[tuple[str, ...]] = []
    figures = []
    for known in args.known:
        for method in options.methods:
            cells = [Cell(method, known, seed) for seed in args.seeds]
            found = [measure(data, cell) for cell in cells]
            figures += [{**cell._asdict(), **row} for cell, row in zip(cells, found, strict=True)]
            floor = statistics.mean(row["floor"] for row in found)
            rows.append((method, _word(known), *(_pair(found, name) for name in ("error", "OF1", "mAP")), f"{floor:.1f}"))
            print(*rows[-1], flush=True)
    print(f"\n{data.name}, before → after calibration, mean of {len(args.seeds)} seeds")
    print(markdown([("method", "known", "calibration error", "OF1 at 0.5", "mAP", "error of perfect scores"), *rows]))
    if args.json:
        write_json(args.json, figures)


def _word(known: Known) -> str:
    return known if isinstance(known, str) else f"{100 * known:g} %"


def _pair(found: list[dict[str, float]], name: str) -> str:
    means = [statistics.mean(row[f"{name} {word}"] for row in found) for word in ("before", "after")]
    return " → ".join(f"{value:.1f}" for value in means)


if __name__ == "__main__":
    main()
