"""Tables of results."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence

from trm_pipeline.methods import LABEL_FREE
from trm_pipeline.methods.global_head import GLOBAL, merged_name, of_grid, parts_of
from trm_pipeline.report.rows import NINE, Row, ablation_rows, average, by_seed, distinct, heading, less, settings
from trm_pipeline.report.statistics import Paired, paired

Table = list[list[str]]
"""The header, then the other lines."""


def mean_table(rows: Sequence[Row], key: str = "mAP") -> Table:
    """Methods down, shares of known labels across; mean ± standard deviation over seeds.

    With all nine shares from 10 to 90 % a column averages them; single-positive runs come last.
    """
    methods, across = distinct(rows, "method"), settings(rows)
    columns = [[heading(rows, known), *(mean_sd(by_seed(rows, m, known, key).values()) for m in methods)] for known in across]
    if set(NINE) <= set(across):
        mean = ["mean 10–90%", *(mean_sd(average(rows, method, key).values()) for method in methods)]
        columns.insert(len(across) - ("single" in across), mean)
    return [list(line) for line in zip(["method", *methods], *columns, strict=True)]


def ablation_table(rows: Sequence[Row]) -> Table:
    """Variants down: their difference to trm on the same seeds, mean ± standard deviation of the differences."""
    rows = ablation_rows(rows)
    variants = [method for method in distinct(rows, "method") if method != "trm"]
    across = [known for known in settings(rows) if any(by_seed(rows, variant, known) for variant in variants)]
    return [
        ["variant", *(heading(rows, known) for known in across)],
        ["trm", *(mean_sd(by_seed(rows, "trm", known).values()) for known in across)],
        *([name, *(mean_sd(less(rows, name, "trm", known), "+.1f") for known in across)] for name in variants),
    ]


def grid_tables(rows: Sequence[Row]) -> list[tuple[str, Table]]:
    """A heading and a table for each setting with a grid: losses down, heads across."""
    pairs = [row for row in rows if of_grid(row["method"])]
    heads, losses = (list(dict.fromkeys(parts_of(row["method"])[side] for row in pairs)) for side in (0, 1))
    tables = []
    for known in settings(pairs):
        body = [["its own", *(mean_sd(by_seed(rows, head, known).values()) for head in heads)]]
        body += [[loss, *(mean_sd(by_seed(rows, f"{head}+{loss}", known).values()) for head in heads)] for loss in losses]
        tables.append((heading(pairs, known), [["loss", *heads], *(line for line in body if any(line[1:]))]))
    return tables


def difference_table(rows: Sequence[Row]) -> Table:
    """Mean difference of paired seeds, its 95 % interval by t, and two-sided p of t and of all sign flips.

    A head with another loss is set against the head, both merged or not, any other method against trm. Nothing is corrected for
    how many comparisons there are.
    """
    names = distinct(rows, "method")
    table = [["method", "against", "known", "seeds", "difference", "95% interval", "p (t)", "p (sign flips)"]]
    for name in names:
        other = "trm"
        if of_grid(name):
            head = parts_of(name)[0]
            other = merged_name(head) if name.endswith(GLOBAL) else head
        if other not in names or name == other or name in LABEL_FREE:
            continue
        for known in settings(rows):
            if len(both := less(rows, name, other, known)) > 1:
                found = paired(both)
                said = [str(found.n), signed(found.mean), interval(found), f"{found.t_p:.3f}", f"{found.flip_p:.3f}"]
                table.append([name, other, heading(rows, known), *said])
    return table


def closest_table(rows: Sequence[Row], count: int = 5) -> Table:
    """The ``count`` methods of each setting that come closest to trm or before it, with their paired differences.

    Heads with another's loss are among them; others whose names begin with trm are parts of it.
    """
    names = distinct(rows, "method")
    peers = [name for name in names if of_grid(name) or not (name.startswith("trm") or name in LABEL_FREE)]
    table = [["known", "method", "mAP", "less trm", "95% interval"]]
    for known in settings(rows):
        found = {name: both for name in peers if (both := less(rows, name, "trm", known))}
        for name in sorted(found, key=lambda name: statistics.fmean(found[name]), reverse=True)[:count]:
            mean, both = mean_sd(by_seed(rows, name, known).values()), found[name]
            spread = interval(paired(both)) if len(both) > 1 else ""
            table.append([heading(rows, known), name, mean, signed(statistics.fmean(both)), spread])
    return table


def cost_table(times: Sequence[Row]) -> Table:
    """Mean seconds of training, highest peak of memory and trained parameters of each method, out of ``times.json``."""
    table = [["method", "cells", "seconds a cell", "peak MiB", "trained parameters"]]
    for method in distinct(times, "method"):
        own = [row for row in times if row["method"] == method]
        peaks = [row["peak_mib"] for row in own if row.get("peak_mib") is not None]
        counts = sorted({row["parameters"] for row in own if row.get("parameters") is not None})
        seconds, peak = mean_sd([row["seconds"] for row in own]), f"{max(peaks):.0f}" if peaks else ""
        table.append([method, str(len(own)), seconds, peak, ", ".join(f"{count:,}" for count in counts)])
    return table


def mean_sd(values: Collection[float], form: str = ".1f") -> str:
    """Mean ± standard deviation; nothing of no value, and no spread of one."""
    if not values:
        return ""
    mean = f"{round(statistics.fmean(values), 1) + 0.0:{form}}".replace("-", "−")  # + 0.0: no minus before a zero
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def signed(value: float) -> str:
    """A difference."""
    return mean_sd([value], "+.1f")


def interval(found: Paired) -> str:
    """Its interval."""
    return f"[{signed(found.low)}, {signed(found.high)}]"
