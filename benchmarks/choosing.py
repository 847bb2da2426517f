"""What a choice by held-out known labels costs against the best of the list, which only the scored images can tell.

    python benchmarks/choosing.py --features FEATURES      # given features: their split val
    python benchmarks/choosing.py --data voc vg200 cub     # drawn sets: their val split, or a part of the training images

The choice is that of --choose: each rate is trained on four fifths of the known labels, and the rest are asked. Then each is
trained on all of them and scored. Differences are in points of mAP. The correlation is Spearman's, of the score on
held-out labels and mAP.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scipy.stats import spearmanr

from trm_losses.metrics import mean_average_precision
from trm_pipeline.config.settings import override
from trm_pipeline.data import cub, given, vg200, voc
from trm_pipeline.methods import LABEL_FREE
from trm_pipeline.methods.global_head import FITTED
from trm_pipeline.progress import say
from trm_pipeline.report.markdown import markdown
from trm_pipeline.run.arguments import parse
from trm_pipeline.run.choose import FACTORS, logits_of, search
from trm_pipeline.run.options import known_argument
from trm_pipeline.run.prepare import prepare
from trm_pipeline.run.prepared import Cell, Prepared, train_cell

METHODS = ("linear", "text-pixel", "dual-coop", "trm-region")
SOURCES = {"photographs": given.SOURCE, "voc": voc.SOURCE, "vg200": vg200.SOURCE, "cub": cub.SOURCE}


class Candidates(NamedTuple):
    """The rates of a cell, first that of the preset: what held-out labels score (%), and mAP (%) of the scored images."""

    held_out: list[float]
    scored: list[float]
    chosen: float

    @property
    def correlation(self) -> float:
        return float(spearmanr(self.held_out, self.scored).statistic)


def measure(data: Prepared, cell: Cell) -> Candidates:
    """Every rate, both ways."""
    names = [f"lr_factor={factor:g}" for factor in dict.fromkeys((data.preset.lr_factor, *FACTORS))]
    changes, found = search(data, cell, data.preset)
    scored = []
    for name in names:
        preset, label = override(data.preset, [name]), f"{cell.label}, {name}"
        method = train_cell(data, cell, preset, method=cell.method, label=label, scored=False).method
        logits = logits_of(data, method, data.test_features)
        scored.append(100 * float(mean_average_precision(logits, data.test_targets)))
    (chosen,) = (names.index(change) for change in changes if change in names)
    return Candidates([found[name] for name in names], scored, scored[chosen])


def main(argv: Sequence[str] | None = None) -> None:
    """A line for each data set, setting and method."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--features", type=Path, help="given features of the photographs")
    p.add_argument("--data", nargs="+", choices=tuple(SOURCES), default=[], help="default: the photographs")
    p.add_argument("--known", type=known_argument, nargs="+", default=[0.1, 0.5, "single"])
    p.add_argument("--methods", nargs="+", default=METHODS)
    p.add_argument("--seeds", type=int, nargs="+", default=[4])
    p.add_argument("--set", nargs="+", default=[], help="settings of the preset, such as epochs=2")
    args = p.parse_args(argv)
    rows = [("data", "known", "method", "as it is", "chosen", "best of the list", "chosen less best", "correlation")]
    for key in args.data or ["photographs"]:
        source = SOURCES[key]
        if source.given and args.features is None:
            p.error("--features is needed for the photographs")
        typed = [str(args.features)] if source.given else ["--tune"]
        options = parse([*typed, "--methods", *args.methods, *(["--set", *args.set] if args.set else [])], source)
        if untrained := {*options.methods} & {*LABEL_FREE, *FITTED}:
            p.error(f"--methods {min(untrained)} has no rate to choose")
        data = prepare(options)
        for known in args.known:
            for method in options.methods:
                found = [measure(data, Cell(method, known, seed)) for seed in args.seeds]
                columns = [
                    [cell.scored[0] for cell in found],
                    [cell.chosen for cell in found],
                    [max(cell.scored) for cell in found],
                    [cell.chosen - max(cell.scored) for cell in found],
                ]
                correlation = statistics.fmean(cell.correlation for cell in found)
                words = known if isinstance(known, str) else f"{100 * known:g} %"
                said = [f"{statistics.fmean(column):.1f}" for column in columns]
                rows.append((key, words, method, *said, f"{correlation:.2f}"))
                say(" ".join(rows[-1]))
    print(markdown(rows))


if __name__ == "__main__":
    main()
