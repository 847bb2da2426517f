"""One command's work: data, features, every method in every setting and with every seed, results, table and picture."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from PIL import Image

from trm_losses import TRMHead
from trm_losses.labels import known_fraction
from trm_pipeline import ranks
from trm_pipeline.config.presets import Known
from trm_pipeline.data import voc
from trm_pipeline.data.base import Source
from trm_pipeline.files import check_writable, hold, tensor_digest
from trm_pipeline.progress import Sweep, escape_output, say
from trm_pipeline.report.markdown import markdown
from trm_pipeline.report.page import make_report
from trm_pipeline.report.pictures import choose_images, collect_saliency
from trm_pipeline.report.rows import Row, ablation_rows, main_rows
from trm_pipeline.report.tables import ablation_table, grid_tables, mean_table
from trm_pipeline.run.arguments import check_single, parse
from trm_pipeline.run.cells import run_cells, use_deterministic_algorithms
from trm_pipeline.run.options import RunOptions
from trm_pipeline.run.prepare import prepare
from trm_pipeline.run.prepared import Cell, Prepared
from trm_pipeline.run.results import Results, plan
from trm_pipeline.run.unseen import unseen_row, unseen_table

_COMPARED = ("known", "methods", "seeds", "ablation", "ablation_known", "unseen", "tune", "choose", "amp", "deterministic")
"""Options that a run which is resumed must have had."""


def run(options: RunOptions) -> list[Row]:
    """Everything the command does; returns the rows it wrote."""
    started = time.perf_counter()
    if options.deterministic:
        use_deterministic_algorithms()
    options = dataclasses.replace(options, device=ranks.start(options.device))
    check_writable(options.output, "--output")
    options.output.mkdir(parents=True, exist_ok=True)
    with closing(hold(options.output, "--output")) if ranks.first() else nullcontext():
        return _run(options, started)


def _run(options: RunOptions, started: float) -> list[Row]:
    """Everything, in a folder that no other run writes into."""
    with ranks.first_before_others():
        data = prepare(options)
    say(data.description)
    if data.labels is not None:
        # Without a known absence a file of labels is one of single positives, or of several.
        known: Known = round(known_fraction(data.labels), 4) if bool((data.labels == 0).any()) else "single"
        options = dataclasses.replace(options, known=(known,))
        check_single(options.known, options.preset)

    if next(iter(data.features.batches(1))).penultimate is None and "linear-penultimate" in options.methods:
        say("no penultimate features are here: linear-penultimate is left out")
        kept = tuple(name for name in options.methods if name != "linear-penultimate")
        options = dataclasses.replace(options, methods=kept)
    cells = plan(options)
    results = Results(options.output, cells)
    results.start(
        {
            **{name: getattr(options, name) for name in _COMPARED},
            "device": data.device.type,
            "preset": dataclasses.asdict(options.preset),
            "weights": data.weights,
            "class_names": None if options.class_names is None else data.class_names,  # otherwise those of the data
            "labels": [tensor_digest(data.targets), tensor_digest(data.test_targets)],
            "known_labels": None if data.labels is None else tensor_digest(data.labels),
            **({"wrong": options.wrong} if options.wrong else {}),
        },
        resume=options.resume,
    )
    todo = ranks.from_first([cell for cell in cells if cell not in results.rows])
    if len(todo) < len(cells):
        say(f"{len(cells) - len(todo)} of {len(cells)} rows are there already")
    sweep = Sweep(len(cells), len(cells) - len(todo))
    with closing(run_cells(data, todo, options, prepare)) as finished:
        for cell in finished:
            results.add(cell)
            sweep.add(cell.cell.label, cell.row["mAP"], cell.seconds)

    rows = results.ordered()
    apart = dict.fromkeys(cell._replace(method="trm") for cell in cells if options.unseen)
    unseen = [unseen_row(data, cell, options) for cell in apart]
    if not ranks.first():
        return rows
    where = f"{data.name}, {data.model}"
    scored, classes = int((data.test_targets == 1).any(dim=0).sum()), len(data.class_names)
    over = f" over {scored} of {classes} classes, those with present and absent labels there" if scored < classes else ""
    notes = [f"mAP (%) on the {options.splits[1]} images{over}, last epoch of the averaged weights; {where}."]
    if options.wrong:
        notes.append(
            f"{100 * options.wrong:g}% of the known present labels are wrong: each was moved to a class that its image lacks."
        )
    say("\n" + "\n".join(notes))
    if main := main_rows(rows):
        say(markdown(mean_table(main)))
    for heading, table in grid_tables(rows):
        say(f"\n{heading}:\n{markdown(table)}")
    if variants := ablation_rows(rows):
        say(f"\nDifference to trm on the same seeds:\n{markdown(ablation_table(variants))}")
    if unseen:
        say(f"\nmAP (%) with {', '.join(unseen[0]['unseen'])} never labelled in training:\n{unseen_table(unseen)}")
    look_at_images(data, cells, options.output)
    command = shlex.join(["trm-losses", "reproduce", options.source.key, *options.typed])
    page = make_report(options.output, command=command, data=where, notes=notes)
    say(f"\n{options.output / 'results.json'}, {page}; {time.perf_counter() - started:.0f} s")
    return rows


def look_at_images(data: Prepared, cells: Sequence[Cell], output: Path) -> None:
    """Saliency maps of the first trained trm head over some test images, for the page."""
    heads = [path for cell in cells if cell.method == "trm" and (path := output / f"{cell.name}.pt").is_file()]
    chosen = choose_images(data.test_targets)
    if not heads or not chosen or data.grid is None or not all(Path(data.test_paths[i]).is_file() for i in chosen):
        return
    maps = collect_saliency(
        TRMHead.load(heads[0]),
        next(data.test_features.only(torch.tensor(chosen)).batches(len(chosen))),
        data.grid,
        [Image.open(data.test_paths[i]) for i in chosen],
        data.test_targets[chosen],
        data.text,
        size=data.image_size,
    )
    maps.save(output / f"saliency-{heads[0].stem}.npz")


def main(argv: Sequence[str] | None = None, source: Source = voc.SOURCE, prog: str | None = None) -> None:
    """Entry point; errors of data, names and settings are one line without a traceback."""
    escape_output()
    try:
        run(parse(sys.argv[1:] if argv is None else argv, source, prog))
        ranks.stop()
    except (ValueError, OSError, ImportError) as error:
        # One that comes from a process that reads images brings its traceback along; the error itself is the last line.
        line = str(error).strip().splitlines()[-1:] if str(error).startswith("Caught ") else [str(error)]
        raise SystemExit(f"error: {''.join(line).removeprefix(f'{type(error).__name__}: ')}") from error
    except BrokenExecutor as error:
        raise SystemExit(
            "error: a process of --jobs was ended from outside, perhaps for want of memory; the same command with --resume "
            "and fewer jobs goes on from here"
        ) from error
    except RuntimeError as error:
        if not ranks.lost(error):
            raise
        raise SystemExit(
            f"error: another process than {ranks.rank()} of {ranks.world()} has ended or does not answer; the same command with "
            "--resume goes on from here"
        ) from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command with --resume goes on from here, up to the page") from None
