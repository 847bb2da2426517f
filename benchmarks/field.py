"""The field beside TRM-ML: every head, every loss under three heads, four data sets, six settings of known labels, three seeds.

    python benchmarks/field.py FEATURES --jobs 2      # train what is not in field.csv yet; interrupted, it goes on from there
    python benchmarks/field.py                        # the same without the photographs
    python benchmarks/field.py --tables               # field.csv -> the tables of docs/field.md and README.md

FEATURES are given features of the photographs (tools/make_photograph_features.py), scored on their val images; the drawn sets are
scored on their test images, last epoch of the averaged weights. Settings of every method are chosen for each cell by known labels
that are held out, with the same lists. One training gives two rows: the method, and the same merged with the image as a whole.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import multiprocessing
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trm_losses.metrics import evaluate
from trm_pipeline.config.losses import LOSSES
from trm_pipeline.config.presets import Known, Preset
from trm_pipeline.config.settings import override
from trm_pipeline.data import cub, given, vg200, voc
from trm_pipeline.data.base import Source
from trm_pipeline.methods import LABEL_FREE, Method
from trm_pipeline.methods.global_head import FITTED, GLOBAL, Merged, merged_name
from trm_pipeline.methods.grid import GRID
from trm_pipeline.progress import Sweep, say
from trm_pipeline.report.markdown import markdown
from trm_pipeline.report.rows import Row, by_seed, less
from trm_pipeline.report.statistics import paired
from trm_pipeline.report.tables import Table, closest_table, interval, mean_sd, signed
from trm_pipeline.run.arguments import parse
from trm_pipeline.run.cells import end_with_parent, run_cell
from trm_pipeline.run.choose import logits_of, search
from trm_pipeline.run.options import RunOptions
from trm_pipeline.run.prepare import prepare
from trm_pipeline.run.prepared import Cell, Prepared, known_labels, train_cell

ROOT = Path(__file__).resolve().parents[1]
STORE = Path(__file__).with_suffix(".csv")
PAGE, README = ROOT / "docs" / "field.md", ROOT / "README.md"
SEEDS = (11, 12, 13)
PSEUDO_SEEDS = (11, 12, 13, 14, 15)
"""Of the method whose pseudo-labels are asked for their worth."""

WRONG = 0.1

ALONE = (*LABEL_FREE, *FITTED)
LOCAL = ("linear", "text-image", "text-pixel", "dual-coop", "dual-coop++", "positive-coop", "trm-region")
QUERY = "trm-query"
UNDER = ("linear", "text-pixel", "trm-region")
"""Heads that every loss is tried under."""

SHOWN = ("linear", "text-pixel", "dual-coop", "trm-region")
"""Heads in the table of README."""

FEW = ("an", "role", "em", "ll-r", "hill", "partial-bce", "vlpl", "gr", "gpr", "gce")
"""Losses that differ in their idea: first in the order of work."""


class Setting(NamedTuple):
    """A column of the tables."""

    known: Known
    wrong: float = 0.0
    losses: bool = True

    @property
    def words(self) -> str:
        share = "single" if self.known == "single" else f"{100 * float(self.known):g} %"
        return f"{share}, {100 * self.wrong:g} % wrong" if self.wrong else share


SETTINGS = (Setting(0.1), Setting(0.5), Setting(0.9, losses=False), Setting("single"), Setting(0.1, WRONG))
"""With 90 % of the labels losses hardly differ, so only heads are trained there."""


class Data(NamedTuple):
    """A data set: its source and its title."""

    source: Source
    title: str


DATA = {
    "photographs": Data(given.SOURCE, "Photographs"),
    "voc": Data(voc.SOURCE, "The drawn VOC"),
    "vg200": Data(vg200.SOURCE, "200 classes with a long tail"),
    "cub": Data(cub.SOURCE, "312 attributes"),
}

STAGES = ("heads", "pseudo", "few", "query", "many")
"""In the order of work, each over all data sets, so that a study in progress has its main tables early."""


def cells(stage: str) -> Iterator[Cell]:
    """What a stage trains on each data set; losses with 50 % known, where they differ little, are left to the last one."""
    methods = {
        "heads": (*FITTED, *LOCAL),
        "pseudo": ("trm-region",),
        "few": tuple(f"{head}+{loss}" for loss in FEW for head in UNDER),
        "query": (QUERY,),
        "many": tuple(f"{head}+{loss}" for loss in LOSSES for head in UNDER if f"{head}+{loss}" in GRID),
    }[stage]
    for setting in SETTINGS:
        if stage != "heads" and not setting.losses or stage == "few" and setting.known == 0.5:
            continue
        for seed in PSEUDO_SEEDS if stage == "pseudo" else SEEDS:
            yield from (Cell(method, setting.known, seed, setting.wrong) for method in methods)


def measure(data: Prepared, options: RunOptions, cell: Cell) -> list[Row]:
    """The rows of a cell: of the method, and of the method merged with the whole image; of ``trm`` without pseudo-labels too."""
    started = time.process_time()
    if cell.method in ALONE:
        rows = [run_cell(data, cell, dataclasses.replace(options, choose=cell.method not in LABEL_FREE)).row]
        chosen = ""
    else:
        whole = cell._replace(method=merged_name(cell.method))
        found = search(data, whole, options.preset)
        chosen = " ".join(found.changes)
        rows = rows_of_training(data, cell, whole, override(options.preset, found.changes))
    seconds = time.process_time() - started  # in one row: there is one training
    return [{**row, "wrong": cell.wrong, "seconds": seconds * (row is rows[0]), "chosen": chosen} for row in rows]


def rows_of_training(data: Prepared, cell: Cell, whole: Cell, preset: Preset) -> list[Row]:
    """The rows of one training."""

    def row(name: str, method: Method) -> Row:
        logits = logits_of(data, method, data.test_features)
        return {**cell._asdict(), "method": name, **evaluate(logits, data.test_targets, threshold=0.0)}

    method = train_cell(data, whole, preset, method=whole.method, scored=False, finish=False).method
    assert isinstance(method, Merged)
    rows = [row(cell.method, method.inner)]
    with torch.no_grad():
        text = data.encode(method.prompts())
    for name in ("trm-no-pseudo", "trm") if whole.method == "trm" else (whole.method,):
        method.teaches = name == whole.method
        method.finish(data.features, known_labels(data, cell), text, preset.batch_size)
        rows.append(row(name, method))
    return rows


FIELDS = ("data", "method", "known", "wrong", "seed", "mAP", "OF1", "seconds", "chosen")


def read(path: Path) -> list[Row]:
    """The rows of the study so far."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [_typed(row) for row in csv.DictReader(file)]


def _typed(row: dict[str, str]) -> Row:
    known = row["known"] if row["known"] == "single" else float(row["known"])
    numbers = {name: float(row[name]) if row[name] else None for name in ("wrong", "mAP", "OF1", "seconds")}
    return {**row, **numbers, "known": known, "seed": int(row["seed"])}


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add lines, below a header."""
    new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})


_worker: tuple[Prepared, RunOptions] | None = None


def _start(options: RunOptions) -> None:
    global _worker
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _worker = prepare(options), options


def _work(cell: Cell) -> tuple[Cell, list[Row]]:
    assert _worker is not None
    return cell, measure(*_worker, cell)


def study(key: str, stage: str, features: Path | None, store: Path, jobs: int, changes: Sequence[str], limit: float) -> None:
    """Train the cells of a stage that the store lacks."""
    data = DATA[key]
    typed = [*([str(features)] if data.source.given else []), "--choose", "--output", str(ROOT / "runs" / "field" / key)]
    options = parse([*typed, *(["--set", *changes] if changes else [])], data.source)
    options.output.mkdir(parents=True, exist_ok=True)
    done = {(row["method"], row["known"], row["wrong"], row["seed"]) for row in read(store) if row["data"] == key}
    wanted = [Cell(method, 0.0, SEEDS[0]) for method in LABEL_FREE] if stage == STAGES[0] else []
    wanted += cells(stage)
    todo = [cell for cell in wanted if tuple(cell._asdict()[name] for name in ("method", "known", "wrong", "seed")) not in done]
    sweep = Sweep(len(wanted), len(wanted) - len(todo))
    made = prepare(options)  # features are cached once
    if next(iter(made.features.batches(1))).penultimate is None:
        todo = [cell for cell in todo if cell.method != "linear-penultimate"]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start, (options,)) as pool:
        futures = [pool.submit(_work, cell) for cell in todo]
        for future in as_completed(futures):
            cell, rows = future.result()
            append(store, ({"data": key, **row} for row in rows))
            sweep.add(f"{key} {cell.label}", rows[-1]["mAP"], rows[0]["seconds"])
            if time.monotonic() > limit:
                pool.shutdown(wait=False, cancel_futures=True)
                raise SystemExit("the time is over; the same command goes on from here")


def head_table(rows: Sequence[Row], key: str = "mAP") -> Table:
    """Methods down, settings across; what needs no label has a value in the first column alone."""
    columns = [Setting(0.0), *SETTINGS]
    lines = [["method", "no label", *(setting.words for setting in SETTINGS)]]
    names = (*LABEL_FREE, *FITTED, *(name for local in (*LOCAL, QUERY) for name in (local, merged_name(local))))
    for name in names:
        line = [_value(rows, name, setting, key) for setting in columns]
        if any(line):
            lines.append([name, *line])
    return lines


def loss_table(rows: Sequence[Row], setting: Setting) -> Table:
    """Losses down, heads across, each alone and merged with the whole image; "its own" is what the head's name alone means."""
    heads = [(head, end) for end in ("", GLOBAL) for head in UNDER]
    names = [merged_name(head) if end else head for head, end in heads]
    lines = [["loss", *names], ["its own", *(_value(rows, name, setting) for name in names)]]
    for loss in LOSSES:
        line = [_value(rows, f"{head}+{loss}{end}", setting) for head, end in heads]
        if any(line):
            lines.append([loss, *line])
    return lines


def pseudo_table(rows: Sequence[Row]) -> Table:
    """What pseudo-labels change: trm less the same without them, on the same seeds."""
    lines = [["known", "seeds", "mAP", "95% interval", "OF1 at 0.5", "95% interval"]]
    for setting in SETTINGS:
        differences = [less(_of(rows, setting), "trm", "trm-no-pseudo", setting.known, key) for key in ("mAP", "OF1")]
        if len(differences[0]) == len(PSEUDO_SEEDS):
            both = [cell for values in map(paired, differences) for cell in (signed(values.mean), interval(values))]
            lines.append([setting.words, str(len(PSEUDO_SEEDS)), *both])
    return lines


def _of(rows: Sequence[Row], setting: Setting) -> list[Row]:
    return [row for row in rows if row["known"] == setting.known and row["wrong"] == setting.wrong]


def _value(rows: Sequence[Row], method: str, setting: Setting, key: str = "mAP") -> str:
    found = by_seed(_of(rows, setting), method, setting.known, key)
    return mean_sd([value for seed, value in found.items() if seed in SEEDS])


def page(rows: Sequence[Row]) -> str:
    """All tables, as they stand in docs/field.md."""
    parts = []
    for key, data in DATA.items():
        own = whole(row for row in rows if row["data"] == key)
        if not own:
            continue
        parts += [f"## {data.title}", markdown(head_table(own))]
        closest: Table = []
        for setting in SETTINGS:
            found = closest_table(_of(own, setting), count=10)
            closest += [found[0]] * (not closest) + [[setting.words, *line[1:]] for line in found[1:]]
        parts += ["The ten that come closest to `trm`, or before it, on the same seeds:", markdown(closest)]
        parts += ["OF1 (%) at probability 0.5:", markdown(head_table(own, "OF1"))]
        if len(table := pseudo_table(own)) > 1:
            parts += ["What pseudo-labels change, `trm` less `trm-no-pseudo`:", markdown(table)]
        for setting in SETTINGS:
            if len(table := loss_table(own, setting)) > 2:
                parts += [f"### {data.title}: losses, {setting.words}", markdown(table)]
    return "\n\n".join(parts)


def whole(rows: Iterable[Row]) -> list[Row]:
    """Rows of methods in settings where every seed is there."""
    rows = list(rows)
    counts: dict[tuple[Any, ...], int] = {}
    for row in rows:
        key = row["method"], row["known"], row["wrong"]
        counts[key] = counts.get(key, 0) + 1
    return [row for row in rows if counts[row["method"], row["known"], row["wrong"]] >= len(SEEDS) or row["method"] in LABEL_FREE]


def summary(rows: Sequence[Row]) -> str:
    """The table of README: heads alone and merged, on the drawn VOC and on photographs."""
    sets = {"drawn": "voc", "photographs": "photographs"}
    columns = (Setting(0.0), *(setting for setting in SETTINGS if setting.losses and not setting.wrong))
    own = {name: whole(row for row in rows if row["data"] == key) for name, key in sets.items()}
    words = ["no label", *(setting.words for setting in columns[1:])]
    lines = [["method", *(f"{name}, {word}" for name in sets for word in words)]]
    for method in (*LABEL_FREE, *FITTED, *(name for local in SHOWN for name in (local, merged_name(local)))):
        lines.append([method, *(_value(own[name], method, setting) for name in sets for setting in columns)])
    return markdown(lines)


BEGIN, END = "<!-- tables: python benchmarks/field.py --tables -->", "<!-- end of tables -->"


def with_tables(text: str, tables: str) -> str:
    """A page with what stands between its marks in place of the old."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> None:
    """The study, or its tables."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("features", type=Path, nargs="?", metavar="FEATURES", help="given features of the photographs")
    p.add_argument("--data", nargs="+", choices=tuple(DATA), help="default: all, the photographs if FEATURES are given")
    p.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="in the order of work")
    p.add_argument("--jobs", type=int, default=1, help="cells at a time, each in a process with one thread")
    p.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so many")
    p.add_argument("--store", type=Path, default=STORE)
    p.add_argument("--set", nargs="+", default=[], help="settings of the preset, such as epochs=1, for a trial")
    p.add_argument("--tables", action="store_true", help="train nothing: write the tables into docs/field.md and README.md")
    args = p.parse_args(argv)
    if args.set and args.store == STORE:
        p.error("--set is for trials, and field.csv is not: give --store another file")
    if args.tables:
        rows = read(args.store)
        for path, tables in ((PAGE, page(rows)), (README, summary(rows))):
            path.write_text(with_tables(path.read_text(encoding="utf-8"), tables), encoding="utf-8")
        return
    limit = time.monotonic() + 60 * args.minutes
    keys = args.data or [key for key, data in DATA.items() if args.features or not data.source.given]
    if args.features is None and any(DATA[key].source.given for key in keys):
        p.error("--data photographs needs FEATURES, a folder of given features")
    for stage in args.stages:
        for key in keys:
            study(key, stage, args.features, args.store, args.jobs, args.set, limit)
    hours = sum(row["seconds"] for row in read(args.store)) / 3600
    say(f"{args.store}: {hours:.1f} hours of processor in all")


if __name__ == "__main__":
    main()
