"""Tables of results, and the page that holds tables and pictures."""

from __future__ import annotations

import base64
import html
import importlib.metadata
import json
import os
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trm_pipeline.config.presets import VARIANTS, Known
from trm_pipeline.report.pictures import SaliencyMaps, draw_map_against_known, draw_pseudo_quality, draw_saliency
from trm_pipeline.report.statistics import Paired, paired

__all__ = [
    "Row",
    "ablation_rows",
    "ablation_table",
    "closest_table",
    "cost_table",
    "difference_table",
    "draw_map_against_known",
    "grid_tables",
    "main_rows",
    "make_report",
    "markdown_table",
    "write_report",
]

Row = dict[str, Any]
"""One run: method, known (share of labels, or "single"), seed, mAP, mAP_interpolated, OF1, CF1, CF1_per_class, best_epoch_mAP,
expected_positives (a number for "single", else None)."""

Table = list[list[str]]
"""The header, then a line for each method."""

NINE = tuple(tenth / 10 for tenth in range(1, 10))


def _replace(path: Path, content: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(content, encoding="utf-8", errors="backslashreplace")
    os.replace(temporary, path)


def main_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows of the methods themselves, without the variants of an ablation and heads with another method's loss."""
    return [row for row in rows if row["method"] not in VARIANTS and "+" not in row["method"]]


def ablation_rows(rows: Sequence[Row], reference: str = "trm") -> list[Row]:
    """Rows of the variants and of what they are compared with; none where either is missing."""
    chosen = [row for row in rows if row["method"] == reference or row["method"] in VARIANTS]
    return chosen if len({row["method"] == reference for row in chosen}) == 2 else []


def _ordered(rows: Sequence[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _settings(rows: Sequence[Row]) -> list[Known]:
    """Shares ascending, then "single"."""
    known = _ordered(rows, "known")
    return [*sorted(share for share in known if share != "single"), *(["single"] if "single" in known else [])]


def _heading(rows: Sequence[Row], known: Known) -> str:
    if known != "single":
        return f"{100 * float(known):g}%"
    given = (row.get("expected_positives") for row in rows if row["known"] == "single")
    assumed = sorted({value for value in given if value is not None})
    return f"single (k={', '.join(f'{value:g}' for value in assumed)})" if assumed else "single"


def _by_seed(rows: Sequence[Row], method: str, known: Known, key: str) -> dict[int, float]:
    return {
        row["seed"]: row[key] for row in rows if row["method"] == method and row["known"] == known and row.get(key) is not None
    }


def _average(rows: Sequence[Row], method: str, key: str) -> dict[int, float]:
    """The mean over the nine shares for each seed that has them all."""
    shares = [_by_seed(rows, method, share, key) for share in NINE]
    return {seed: statistics.fmean(share[seed] for share in shares) for seed in shares[0] if all(seed in s for s in shares)}


def _mean_sd(values: Sequence[float], form: str = ".1f") -> str:
    if not values:
        return ""
    mean = f"{round(statistics.fmean(values), 1) + 0.0:{form}}".replace("-", "−")  # + 0.0: no minus before a zero
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _table(rows: Sequence[Row], key: str) -> Table:
    methods, settings = _ordered(rows, "method"), _settings(rows)
    columns = [(_heading(rows, known), [_by_seed(rows, method, known, key) for method in methods]) for known in settings]
    if set(NINE) <= set(settings):
        place = len(settings) - ("single" in settings)
        columns.insert(place, ("mean 10–90%", [_average(rows, method, key) for method in methods]))
    header = ["method", *(heading for heading, _ in columns)]
    body = [[method, *(_mean_sd(list(cells[i].values())) for _, cells in columns)] for i, method in enumerate(methods)]
    return [header, *body]


def _ablation(rows: Sequence[Row], reference: str, key: str) -> Table:
    rows = ablation_rows(rows, reference)
    variants = [method for method in _ordered(rows, "method") if method != reference]
    settings = [known for known in _settings(rows) if any(_by_seed(rows, variant, known, key) for variant in variants)]
    table = [["variant", *(_heading(rows, known) for known in settings)]]
    base = {known: _by_seed(rows, reference, known, key) for known in settings}
    table.append([reference, *(_mean_sd(list(base[known].values())) for known in settings)])
    for variant in variants:
        cells = [_by_seed(rows, variant, known, key) for known in settings]
        pairs = [
            [value - base[known][seed] for seed, value in cell.items() if seed in base[known]]
            for known, cell in zip(settings, cells, strict=True)
        ]
        table.append([variant, *(_mean_sd(differences, "+.1f") for differences in pairs)])
    return table


def _grids(rows: Sequence[Row], key: str) -> list[tuple[str, Table]]:
    """A heading and a table for each setting with a grid: losses down, heads across."""
    pairs = [row for row in rows if "+" in row["method"]]
    heads = list(dict.fromkeys(row["method"].partition("+")[0] for row in pairs))
    losses = list(dict.fromkeys(row["method"].partition("+")[2] for row in pairs))
    tables = []
    for known in _settings(pairs):
        body = [
            [
                loss or "its own",
                *(_mean_sd(list(_by_seed(rows, f"{head}+{loss}" if loss else head, known, key).values())) for head in heads),
            ]
            for loss in ("", *losses)
        ]
        tables.append((_heading(pairs, known), [["loss", *heads], *(line for line in body if any(line[1:]))]))
    return tables


def _compared(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What is set against what: a head with another loss against the head, every other trained method against trm."""
    names = _ordered(rows, "method")
    pairs = [(name, name.partition("+")[0] if "+" in name else "trm") for name in names]
    return [(name, other) for name, other in pairs if other in names and name != other and not name.startswith("zero-shot")]


def _differences(rows: Sequence[Row], key: str) -> Table:
    table = [["method", "against", "known", "seeds", "difference", "95% interval", "p (t)", "p (sign flips)"]]
    for name, other in _compared(rows):
        for known in _settings(rows):
            if len(both := _less(rows, name, other, known, key)) < 2:
                continue
            found = paired(both)
            table.append(
                [
                    name,
                    other,
                    _heading(rows, known),
                    str(found.n),
                    _signed(found.mean),
                    _interval(found),
                    f"{found.t_p:.3f}",
                    f"{found.flip_p:.3f}",
                ]
            )
    return table


def _less(rows: Sequence[Row], name: str, other: str, known: Known, key: str) -> list[float]:
    """Differences of a method to another on the same seeds."""
    first, second = (_by_seed(rows, method, known, key) for method in (name, other))
    return [value - second[seed] for seed, value in first.items() if seed in second]


def _interval(found: Paired) -> str:
    return f"[{_signed(found.low)}, {_signed(found.high)}]"


def _closest(rows: Sequence[Row], key: str, reference: str = "trm", count: int = 5) -> Table:
    """What comes closest to ``reference``, or before it, in each setting, of all that is not a part of it."""
    peers = [name for name in _ordered(rows, "method") if "+" in name or not name.startswith((reference, "zero-shot"))]
    table = [["known", "method", key, f"less {reference}", "95% interval"]]
    for known in _settings(rows):
        found = {name: both for name in peers if (both := _less(rows, name, reference, known, key))}
        for name in sorted(found, key=lambda name: statistics.fmean(found[name]), reverse=True)[:count]:
            mean, both = _mean_sd(list(_by_seed(rows, name, known, key).values())), found[name]
            interval = _interval(paired(both)) if len(both) > 1 else ""
            table.append([_heading(rows, known), name, mean, _signed(statistics.fmean(both)), interval])
    return table


def _costs(times: Sequence[Row]) -> Table:
    table = [["method", "cells", "seconds a cell", "peak MiB", "trained parameters"]]
    for method in _ordered(times, "method"):
        own = [row for row in times if row["method"] == method]
        peaks = [row["peak_mib"] for row in own if row.get("peak_mib") is not None]
        parameters = {row["parameters"] for row in own if row.get("parameters") is not None}
        table.append(
            [
                method,
                str(len(own)),
                _mean_sd([row["seconds"] for row in own]),
                f"{max(peaks):.0f}" if peaks else "",
                ", ".join(f"{count:,}" for count in sorted(parameters)),
            ]
        )
    return table


def _signed(value: float) -> str:
    return _mean_sd([value], "+.1f")


def _markdown(table: Table) -> str:
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in [table[0], ["-" * width for width in widths], *table[1:]]
    ]
    return "\n".join(lines)


def markdown_table(rows: Sequence[Row], key: str = "mAP") -> str:
    """Methods down, shares of known labels across; mean ± standard deviation over seeds.

    With all nine shares from 10 to 90 % a column averages them; single-positive runs come last.
    """
    return _markdown(_table(rows, key))


def ablation_table(rows: Sequence[Row], reference: str = "trm", key: str = "mAP") -> str:
    """Variants down: their difference to ``reference`` on the same seeds, mean ± standard deviation of the differences."""
    return _markdown(_ablation(rows, reference, key))


def grid_tables(rows: Sequence[Row], key: str = "mAP") -> list[tuple[str, str]]:
    """A setting and its table of heads and losses, for each that has cells of the grid."""
    return [(heading, _markdown(table)) for heading, table in _grids(rows, key)]


def difference_table(rows: Sequence[Row], key: str = "mAP") -> str:
    """Mean difference of paired seeds, its 95 % interval by t, and two-sided p of t and of all sign flips.

    A head with another loss is set against the head, any other method against trm. Nothing is corrected for how many
    comparisons there are.
    """
    return _markdown(_differences(rows, key))


def closest_table(rows: Sequence[Row], key: str = "mAP", reference: str = "trm", count: int = 5) -> str:
    """The ``count`` methods of each setting that come closest to ``reference`` or before it, with their paired differences.

    Heads with any loss are among them; methods whose names begin as the reference's, and variants of it, are parts of it.
    """
    return _markdown(_closest(rows, key, reference, count))


def cost_table(times: Sequence[Row]) -> str:
    """Mean seconds of training, highest peak of memory and trained parameters of each method, out of ``times.json``."""
    return _markdown(_costs(times))


def _html_table(table: Table, caption: str, *, best: bool = False) -> str:
    """A table; ``best`` sets the highest mean of each column in bold."""
    columns = range(1, len(table[0]))
    means = [[float(line[c].split(" ±")[0]) if best and line[c] else float("nan") for c in columns] for line in table[1:]]
    top = [max((line[c - 1] for line in means if line[c - 1] == line[c - 1]), default=None) for c in columns]

    def row(line: Sequence[str], tag: str, values: Sequence[float] = ()) -> str:
        first, *rest = (html.escape(cell) for cell in line)
        bold = [bool(values) and values[i] == top[i] for i in range(len(rest))]
        cells = (f"<{tag}><b>{cell}</b></{tag}>" if b else f"<{tag}>{cell}</{tag}>" for cell, b in zip(rest, bold, strict=True))
        return f"<tr><th>{first}</th>{''.join(cells)}</tr>"

    body = "\n".join(row(line, "td", values) for line, values in zip(table[1:], means, strict=True))
    return (
        f"<figure><figcaption>{html.escape(caption)}</figcaption><div class=wide><table>\n"
        f"<thead>{row(table[0], 'th')}</thead>\n<tbody>\n{body}\n</tbody></table></div></figure>"
    )


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
pre, code { font: 14px/1.45 ui-monospace, monospace; background: #f4f4f4; }
pre { padding: .7rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: 1.2rem 0; } figcaption { color: #555; margin-bottom: .4rem; } img { max-width: 100%; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child { text-align: left; } thead th { border-bottom: 2px solid #888; }
"""


def _versions() -> str:
    parts = [f"Python {platform.python_version()}"]
    for name in ("torch", "open_clip_torch", "timm", "numpy"):
        try:
            parts.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    from trm_losses import __version__

    return ", ".join([f"trm_losses {__version__}", *parts])


class _Block(NamedTuple):
    """Something under a heading: a table or a picture, with a caption; ``folded`` hides a long one on the page."""

    caption: str
    content: Table | Path
    best: bool = False
    folded: bool = False


def _sections(rows: Sequence[Row], pictures: Sequence[tuple[Path, str]], times: Sequence[Row]) -> dict[str, list[_Block]]:
    """What the page shows, by heading; headings without anything to show are left out."""
    seeds = len(_ordered(rows, "seed"))
    over = f", mean ± standard deviation of {seeds} seeds" if seeds > 1 else ""
    found: dict[str, list[_Block]] = {"Results": [], "Losses under heads": [], "Ablation": [], "Differences": []}
    if main := main_rows(rows):
        caption = f"mAP (%) on the test images by share of known labels{over}; the highest mean in bold"
        found["Results"].append(_Block(caption, _table(main, "mAP"), best=True))
        if scored := [row for row in main if row.get("OF1") is not None]:
            found["Results"].append(_Block(f"OF1 (%) at probability 0.5{over}", _table(scored, "OF1"), best=True))
    if _grids(rows, "mAP") and len(closest := _closest(rows, "mAP")) > 1:
        caption = (
            "mAP (%) of the five methods that come closest to trm or before it, and their difference to it on the same seeds "
            "with its 95 % interval; the best of many is better than it will be again"
        )
        found["Losses under heads"].append(_Block(caption, closest))
    for heading, table in _grids(rows, "mAP"):
        of = " of the labels known" if heading.endswith("%") else ""
        caption = f"{heading}{of}: mAP (%){over}; the highest mean of each head in bold"
        found["Losses under heads"].append(_Block(caption, table, best=True))
    if ablation := ablation_rows(rows):
        caption = "mAP (%) of trm and the difference each variant makes to it on the same seeds"
        caption += over and ", mean ± deviation of the differences"
        found["Ablation"].append(_Block(caption, _ablation(ablation, "trm", "mAP")))
    if len(differences := _differences(rows, "mAP")) > 1:
        least = 2 / 2 ** max(int(line[3]) for line in differences[1:])
        caption = (
            "mAP: mean difference over the same seeds, its 95 % interval by Student's t, and two-sided p of t and of all sign "
            f"flips, which cannot go below {least:g} with so few seeds. Read the intervals first; nothing is corrected for the "
            "number of comparisons"
        )
        found["Differences"].append(_Block(caption, differences, folded=len(differences) > 30))
    found["Pictures"] = [_Block(caption, path) for path, caption in pictures]
    caption = (
        "Seconds of training; the highest peak of memory, on cuda what torch allocated, elsewhere the resident peak of the "
        "process, interpreter and cached features included; numbers that are trained. This table alone is measured, and differs "
        "between equal runs"
    )
    found["Cost"] = [_Block(caption, _costs(times), folded=len(_ordered(times, "method")) > 30)] if times else []
    return {heading: blocks for heading, blocks in found.items() if blocks}


def _html_block(block: _Block) -> str:
    if isinstance(block.content, Path):
        data, text = base64.b64encode(block.content.read_bytes()).decode(), html.escape(block.caption)
        return f'<figure><figcaption>{text}</figcaption><img alt="{text}" src="data:image/png;base64,{data}"></figure>'
    table = _html_table(block.content, block.caption, best=block.best)
    return f"<details><summary>{len(block.content) - 1} lines</summary>{table}</details>" if block.folded else table


def _markdown_block(block: _Block) -> str:
    if isinstance(block.content, Path):
        return f"![{block.caption}]({block.content.name})\n\n{block.caption}"
    return f"{block.caption}:\n\n{_markdown(block.content)}"


def write_report(
    output: Path,
    rows: Sequence[Row],
    command: str,
    pictures: Sequence[tuple[Path, str]] = (),
    notes: Sequence[str] = (),
    *,
    title: str = "Multi-label recognition with missing labels",
    settings: Mapping[str, Any] | None = None,
    times: Sequence[Row] = (),
) -> Path:
    """One page, ``report.html`` in the folder ``output``, that needs no other file and no network, and ``report.md`` beside it.

    Args:
        rows: see :data:`Row`.
        command: what made them, as typed.
        pictures: PNG files with a caption each, put into the page itself; ``report.md`` names them.
        notes: sentences under the title.
        settings: shown folded at the end of the page.
        times: what ``times.json`` holds.

    But for the table of costs nothing here changes between equal runs.
    """
    sections = _sections(rows, pictures, times)
    parts = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{html.escape(note)}</p>" for note in notes)]
    parts.append("<h2>Command</h2>")
    parts.append(f"<pre>{html.escape(command)}</pre>\n<p>{html.escape(_versions())}</p>")
    plain = [f"# {title}", *notes, "## Command", f"```\n{command}\n```", _versions()]
    for heading, blocks in sections.items():
        parts += [f"<h2>{heading}</h2>", *map(_html_block, blocks)]
        plain += [f"## {heading}", *map(_markdown_block, blocks)]
    if settings:
        content = html.escape(json.dumps(settings, indent=1, default=str))
        parts.append(f"<details><summary>Settings</summary><pre>{content}</pre></details>")
    page = "\n".join(parts)
    head = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    _replace(output / "report.md", "\n\n".join(plain) + "\n")
    _replace(output / "report.html", f"{head}\n<style>{_STYLE}</style></head>\n<body>\n{page}\n</body></html>\n")
    return output / "report.html"


def _trace_groups(folder: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Traces of pseudo-labels that go into one picture: a method in all settings; in one setting trm and its variants."""
    traces = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, trace in traces.items():
        method, setting = re.match(r"(.+?)(-known[\d.]+|-single)?(-seed\d+)?$", name).group(1, 2)  # type: ignore[union-attr]
        if trace and method in VARIANTS:
            whole = {key: value for key, value in traces.items() if value and re.match(rf"trm{setting}-seed\d+$", key)}
            groups.setdefault(f"variants{setting}", whole)[name] = trace
        elif trace:
            groups.setdefault(method, {})[name] = trace
    return groups


def make_report(output: Path, *, command: str | None = None, data: str | None = None, notes: Sequence[str] | None = None) -> Path:
    """Draw every picture an output folder has the results for, and write its page; returns the page.

    Read are ``results.json``, and where they are there ``run.json`` (settings), ``times.json`` (costs), ``pseudo/*.json``
    (traces of pseudo-labels) and ``saliency*.npz`` (see :class:`~trm_pipeline.report.pictures.SaliencyMaps`).

    Args:
        command: what made the results, as typed.
        data: names the data and the model in titles.
        notes: sentences under the title.

    What is given is kept in ``report.json``, and taken from there where it is not given.
    """
    results = output / "results.json"
    if not results.is_file():
        raise FileNotFoundError(f"{results} not found: the folder must be the --output of reproduce_voc.py")
    rows: list[Row] = json.loads(results.read_text(encoding="utf-8"))
    kept, settings, times = (
        json.loads(file.read_text(encoding="utf-8")) if (file := output / name).is_file() else {}
        for name in ("report.json", "run.json", "times.json")
    )
    given = {"command": command, "data": data, "notes": None if notes is None else list(notes)}
    kept |= {key: value for key, value in given.items() if value is not None}
    _replace(output / "report.json", json.dumps(kept, indent=1) + "\n")
    title = f"Missing labels: {kept['data']}" if kept.get("data") else "Multi-label recognition with missing labels"

    pictures: list[tuple[Path, str]] = []
    if main := main_rows(rows):
        draw_map_against_known(output / "map_against_known.png", main, title)
        pictures.append((output / "map_against_known.png", "mAP against the share of known labels; bars: one deviation"))
    for head in dict.fromkeys(row["method"].partition("+")[0] for row in rows if "+" in row["method"]):
        path = output / f"map_against_known-{head}.png"
        draw_map_against_known(path, [row for row in rows if row["method"].partition("+")[0] == head], title)
        pictures.append((path, f"The same for {head} with its own loss and with those of other methods"))
    for file in sorted(output.glob("saliency*.npz")):
        draw_saliency(file.with_suffix(".png"), SaliencyMaps.load(file))
        pictures.append((file.with_suffix(".png"), f"Region saliency with the score of the class, beside zero-shot: {file.stem}"))
    for name, traces in _trace_groups(output / "pseudo").items():
        draw_pseudo_quality(path := output / f"pseudo_labels-{name}.png", traces)
        pictures.append((path, f"Pseudo-labels of {name} against the hidden truth, which training never sees"))
    command = kept.get("command", "(not recorded)")
    return write_report(output, rows, command, pictures, kept.get("notes", ()), title=title, settings=settings, times=list(times))
