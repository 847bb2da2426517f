"""The rows of a run on disk, and the cells that they come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from trm_pipeline import ranks
from trm_pipeline.config.presets import VARIANTS
from trm_pipeline.config.settings import override
from trm_pipeline.files import differences, read_json, write_json
from trm_pipeline.methods import LABEL_FREE
from trm_pipeline.report.rows import Row
from trm_pipeline.run.cells import Finished, checkpoint_path
from trm_pipeline.run.options import RunOptions
from trm_pipeline.run.prepared import Cell


def plan(options: RunOptions) -> list[Cell]:
    """All cells of the run, in the order of their rows."""
    settings, seeds = dict.fromkeys(options.known), dict.fromkeys(options.seeds)
    chosen = dict.fromkeys(options.methods)
    cells = [Cell(m, known, seed, options.wrong) for m in chosen if m in LABEL_FREE for known in settings for seed in seeds]
    # A variant that changes nothing, such as the rule that trm has anyway, is trm itself.
    ablation = [name for name, change in VARIANTS.items() if override(options.preset, [change]) != options.preset]
    for seed in seeds:
        for known in settings:
            trained = [m for m in chosen if m not in LABEL_FREE]
            if options.ablation and known in (options.ablation_known or settings):
                trained += ["trm", *ablation]  # trm is what they are set against
            cells += [Cell(method, known, seed, options.wrong) for method in dict.fromkeys(trained)]
    return cells


class Results:
    """``results.json``, which equal runs write byte by byte alike, and ``times.json``, in the order of the cells.

    A cell counts as finished when its row is in ``results.json``; that is written last, and its checkpoint removed after.
    """

    def __init__(self, output: Path, cells: Sequence[Cell]) -> None:
        self.output, self.cells = output, cells
        self.rows: dict[Cell, Row] = {}
        self.costs: dict[Cell, dict[str, float | None]] = {}

    def start(self, settings: dict[str, object], *, resume: bool) -> None:
        """Go on with what an interrupted run of the same settings left, or begin afresh."""
        if not ranks.first():
            return
        record = self.output / "run.json"
        if resume and record.exists():
            found = read_json(record)
            if changed := differences(json.loads(json.dumps(settings)), found):
                raise ValueError(
                    f"--resume: {self.output} holds a run with other settings: {'; '.join(changed)}. Give those, or another "
                    "--output, or start afresh without --resume"
                )
            for name, into in (("times.json", self.costs), ("results.json", self.rows)):
                path = self.output / name
                for row in read_json(path) if path.exists() else []:
                    cell = Cell(row["method"], row["known"], row["seed"], row.get("wrong", 0.0))
                    into[cell] = row
            for cell in self.rows:
                checkpoint_path(self.output, cell).unlink(missing_ok=True)
            return
        # Without the record nothing that is still there can be taken for a part of another run.
        made = ("checkpoints/*.pt*", "chosen/*.json", "pseudo/*.json", "unseen/*.json", "saliency*.npz", "trm*-seed*.pt")
        page = ("report.html", "report.json", "report.md", "map_against_known*.png", "saliency*.png", "pseudo_labels-*.png")
        for pattern in ("run.json", "results.json", "times.json", *made, *page):
            for path in self.output.glob(pattern):
                path.unlink(missing_ok=True)
        write_json(record, settings)

    def add(self, finished: Finished) -> None:
        """Write the row of a cell."""
        self.rows[finished.cell], self.costs[finished.cell] = finished.row, finished.cost
        if not ranks.first():
            return
        times = [{**cell.record, **self.costs[cell]} for cell in self.cells if cell in self.costs]
        write_json(self.output / "times.json", times)
        write_json(self.output / "results.json", self.ordered())
        checkpoint_path(self.output, finished.cell).unlink(missing_ok=True)

    def ordered(self) -> list[Row]:
        """The rows so far."""
        return [self.rows[cell] for cell in self.cells if cell in self.rows]
