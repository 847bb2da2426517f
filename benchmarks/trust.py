"""How far every part is from one process in float64: precisions, compiled code, ranks, saved and loaded; and others' losses.

    python benchmarks/trust.py --json runs/trust/trust.json
    python benchmarks/trust.py --only contrast --without compiled ranks

Every cell is a run: the same rounded inputs and parameters go through the part in the cell's setting and, as they are, through
the part in float64 in one process. A value's error is relative to the larger of 1 and itself, a gradient's to its largest
entry. Ranks are processes joined by gloo, which hold unequal shares of the batch. What a part has no feature for is "-".
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import repository  # noqa: F401
import torch
from losses import versions
from tables import table

from tests.helpers.ranks import Pool
from tests.helpers.trust import (
    ORDINARY,
    PARTS,
    PRECISIONS,
    Part,
    Precision,
    Row,
    compiled,
    failed,
    in_precision,
    over_ranks,
    passed,
    peers,
    saved_and_loaded,
)
from trm_pipeline.files import write_json

# All parts are compiled by aot_eager, which traces and differentiates the graphs and runs them as they are; these by inductor as
# well, which needs a C++ compiler, and under autocast, and over two ranks.
_FURTHER = ("asymmetric loss", "matching", "contrast")


def measured(parts: Sequence[Part], without: Sequence[str], worlds: Sequence[int]) -> Iterator[Row]:
    """All cells, as they come."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for part in parts:
        for device, precision in itertools.product(devices, PRECISIONS if "grid" not in without else ()):
            over_grid = partial(in_precision, settings=list(part.settings()), device=device)
            yield attempt(part, precision, over_grid, device=device)
        for precision in PRECISIONS if "saved" not in without else ():
            yield attempt(part, precision, saved_and_loaded, saved=True)
        if "compiled" not in without:
            for precision in (PRECISIONS[0], *(PRECISIONS[3:4] if part.name in _FURTHER else ())):
                yield attempt(part, precision, partial(compiled, backend="aot_eager"), mode="aot_eager")
            if part.name in _FURTHER:
                yield attempt(part, PRECISIONS[0], partial(compiled, backend="inductor"), mode="inductor")
    for world in worlds if "ranks" not in without else ():
        pool: Pool | None = None
        for part, precision, mode, saved in rank_cells(parts, world):
            pool = pool or Pool(world)
            row = attempt(
                part, precision, partial(over_ranks, pool=pool, mode=mode, saved=saved), ranks=world, mode=mode, saved=saved
            )
            if row["failed"]:  # an error on one rank has ended the pool
                pool = None
            yield row
        if pool is not None:
            pool.close()


def rank_cells(parts: Sequence[Part], world: int) -> Iterator[tuple[Part, Precision, str, bool]]:
    for part in parts:
        for precision in PRECISIONS:
            yield part, precision, "eager", False
        if world == 2:
            yield part, PRECISIONS[0], "eager", True
            if part.name in _FURTHER:
                yield part, PRECISIONS[0], "aot_eager", False


def attempt(part: Part, precision: Precision, measure: Callable[[Part, Precision], Row | None], **where: Any) -> Row:
    """A cell; without figures where the part has no such feature, and with the error where it ended in one."""
    try:
        row = measure(part, precision)
    except Exception as error:  # of any library: the table says so
        return failed(part, precision, error, **where)
    return row or {**failed(part, precision, "", **where), "value": None, "gradient": None}


def column(precisions: Sequence[Precision], **where: Any) -> Callable[[Row], bool]:
    """Whether a cell belongs into a column of the table: of one of these precisions, and ordinary in all but ``where``."""
    names, wanted = {str(p) for p in precisions}, {**ORDINARY, **where}
    return lambda row: row["precision"] in names and all(row[key] == value for key, value in wanted.items())


_COMPILERS = ("aot_eager", "inductor")

COLUMNS: dict[str, list[Callable[[Row], bool]]] = {
    **{str(p): [column([p])] for p in PRECISIONS},
    "compiled": [column(PRECISIONS[:1], mode=mode) for mode in _COMPILERS],
    "compiled, autocast bf16": [column(PRECISIONS[3:4], mode="aot_eager")],
    **{f"{n} ranks": [column(PRECISIONS[:1], ranks=n)] for n in (2, 3, 4)},
    "ranks, half": [column(PRECISIONS[1:], ranks=n) for n in (2, 3, 4)],
    "2 ranks, compiled": [column(PRECISIONS, ranks=2, mode="aot_eager")],
    "saved, loaded": [column(PRECISIONS[:1], saved=True), column(PRECISIONS[:1], ranks=2, saved=True)],
    "cuda": [column(PRECISIONS, device="cuda")],
}


def figure(rows: Sequence[Row], parts: dict[str, Part]) -> str:
    """The worst value and gradient of some cells; bold where one does not pass."""
    rows = [row for row in rows if row["value"] is not None]
    if not rows:
        return "-"
    if any(row["failed"] for row in rows):
        return "**fails**"
    passes = all(passed(row, parts[row["part"]]) for row in rows)
    worst = [max((row[key] for row in rows if row[key] is not None), default=None) for key in ("value", "gradient")]
    text = " / ".join(short(x) for x in worst if x is not None)
    return text if passes else f"**{text}**"


def short(error: float) -> str:
    return "0" if error == 0 else "inf" if math.isinf(error) else f"{error:.0e}".replace("e-0", "e-").replace("e+0", "e")


def markdown(rows: Sequence[Row], parts: Sequence[Part]) -> str:
    found = {part.name: part for part in parts}

    def chosen(name: str, part: str | None = None) -> list[Row]:
        return [row for row in rows if part in (None, row["part"]) and any(belongs(row) for belongs in COLUMNS[name])]

    there = [name for name in COLUMNS if chosen(name)]
    lines = [[part.name, *(figure(chosen(name, part.name), found) for name in there)] for part in parts]
    return table(["part", *there], lines)


def main(typed: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="parts whose name contains one of these")
    parser.add_argument("--without", nargs="*", default=[], choices=["grid", "saved", "compiled", "ranks", "peers"])
    parser.add_argument("--ranks", nargs="*", type=int, default=[2, 3, 4])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all cells here, and the table beside it as .md")
    args = parser.parse_args(typed)
    torch.set_num_threads(args.threads)
    begun = time.perf_counter()
    others = [] if "peers" in args.without else peers()
    ours, others = (
        [part for part in parts if not args.only or any(word in part.name for word in args.only)] for parts in (PARTS, others)
    )
    rows = []
    for row in measured([*ours, *others], args.without, args.ranks):
        rows.append(row)
        if row["value"] is not None:
            where = ", ".join(f"{row[key]}" for key in ("precision", *ORDINARY))
            said = row["failed"][:120] or f"value {row['value']:.1e}, gradient {row['gradient'] or 0:.1e}"
            print(f"{row['part']}, {where}: {said}", flush=True)
    made = "\n".join(markdown(rows, parts) for parts in (ours, others) if parts)
    print(f"\n{made}")
    seconds = time.perf_counter() - begun
    print(f"{len(rows)} cells in {seconds:.0f} s")
    if args.json is not None:
        about: dict[str, Any] = {"seconds": seconds, **versions()}
        write_json(args.json, {"about": about, "cells": rows})
        args.json.with_suffix(".md").write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
