"""The page that holds the tables and pictures of a run."""

from __future__ import annotations

import base64
import importlib.metadata
import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trm_losses import __version__
from trm_pipeline.config.presets import VARIANTS
from trm_pipeline.files import read_json, replacing, write_json
from trm_pipeline.methods.global_head import of_grid, parts_of
from trm_pipeline.report.markdown import markdown, rendered
from trm_pipeline.report.pictures import SaliencyMaps, draw_map_against_known, draw_pseudo_quality, draw_saliency
from trm_pipeline.report.rows import Row, ablation_rows, distinct, main_rows
from trm_pipeline.report.tables import Table, ablation_table, closest_table, cost_table, difference_table, grid_tables, mean_table


def _versions() -> str:
    parts = [f"trm_losses {__version__}", f"Python {platform.python_version()}"]
    for name in ("torch", "open_clip_torch", "timm", "numpy"):
        try:
            parts.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(parts)


class _Block(NamedTuple):
    """A table or a picture under a heading, with a caption.

    ``bold`` sets the highest mean of each column in bold; ``folded`` hides a long table on the page.
    """

    caption: str
    table: Table = []
    picture: Path | None = None
    bold: bool = False
    folded: bool = False

    @property
    def best(self) -> list[str | None]:
        """The mean to set in bold in each column after the first."""
        columns = list(zip(*self.table[1:], strict=True))[1:]
        means = [[cell.split(" ±")[0] for cell in column if cell and self.bold] for column in columns]
        return [max(column, key=float, default=None) for column in means]

    @property
    def data(self) -> str:
        """The picture in base64."""
        return base64.b64encode(self.picture.read_bytes()).decode() if self.picture else ""

    def __str__(self) -> str:
        """The same in Markdown."""
        if self.picture:
            return f"![{self.caption}]({self.picture.name})\n\n{self.caption}"
        return f"{self.caption}:\n\n{markdown(self.table)}"


def _sections(
    rows: Sequence[Row], pictures: Sequence[tuple[Path, str]], times: Sequence[Row], measure: str
) -> dict[str, list[_Block]]:
    """What the page shows, by heading; headings without anything to show are left out."""
    seeds = len(distinct(rows, "seed"))
    over = f", mean ± standard deviation of {seeds} seeds" if seeds > 1 else ""
    found: dict[str, list[_Block]] = {"Results": [], "Losses under heads": [], "Ablation": [], "Differences": []}
    if main := main_rows(rows):
        caption = f"{measure} by share of known labels{over}; the highest mean in bold"
        found["Results"].append(_Block(caption, mean_table(main), bold=True))
        if scored := [row for row in main if row.get("OF1") is not None]:
            found["Results"].append(_Block(f"OF1 (%) at probability 0.5{over}", mean_table(scored, "OF1"), bold=True))
    if (grids := grid_tables(rows)) and len(closest := closest_table(rows)) > 1:
        caption = (
            "mAP (%) of the five methods that come closest to trm or before it, and their difference to it on the same seeds "
            "with its 95 % interval; the best of many is better than it will be again"
        )
        found["Losses under heads"].append(_Block(caption, closest))
    for heading, table in grids:
        of = " of the labels known" if heading.endswith("%") else ""
        caption = f"{heading}{of}: mAP (%){over}; the highest mean of each head in bold"
        found["Losses under heads"].append(_Block(caption, table, bold=True))
    if ablation := ablation_rows(rows):
        caption = "mAP (%) of trm and the difference each variant makes to it on the same seeds"
        caption += over and ", mean ± deviation of the differences"
        found["Ablation"].append(_Block(caption, ablation_table(ablation)))
    if len(differences := difference_table(rows)) > 1:
        least = 2 / 2 ** max(int(line[3]) for line in differences[1:])
        caption = (
            "mAP: mean difference over the same seeds, its 95 % interval by Student's t, and two-sided p of t and of all sign "
            f"flips, which cannot go below {least:g} with so few seeds. Read the intervals first; nothing is corrected for the "
            "number of comparisons"
        )
        found["Differences"].append(_Block(caption, differences, folded=len(differences) > 30))
    found["Pictures"] = [_Block(caption, picture=path) for path, caption in pictures]
    caption = (
        "Seconds of training; the highest peak of memory, on cuda what torch allocated, elsewhere the resident peak of the "
        "process, interpreter and cached features included; numbers that are trained. This table alone is measured, and differs "
        "between equal runs"
    )
    found["Cost"] = [_Block(caption, cost_table(times), folded=len(distinct(times, "method")) > 30)] if times else []
    return {heading: blocks for heading, blocks in found.items() if blocks}


def _write(output: Path, sections: Mapping[str, Sequence[_Block]], **texts: Any) -> Path:
    """``report.html``, which needs no other file and no network, and ``report.md``, which names the pictures beside it."""
    plain = [f"# {texts['title']}", *texts["notes"], "## Command", f"```\n{texts['command']}\n```", texts["versions"]]
    for heading, blocks in sections.items():
        plain += [f"## {heading}", *map(str, blocks)]
    page = rendered(Path(__file__).with_name("page.html.j2"), sections=sections, **texts)
    for name, content in (("report.md", "\n\n".join(plain)), ("report.html", page)):
        with replacing(output / name) as temporary:
            temporary.write_text(f"{content}\n", encoding="utf-8", errors="backslashreplace")
    return output / "report.html"


def _trace_groups(folder: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Traces of pseudo-labels that go into one picture: a method in all settings; in one setting trm and its variants."""
    traces = {file.stem: read_json(file) for file in sorted(folder.glob("*.json"))}
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, trace in traces.items():
        method, setting = re.match(r"(.+?)((?:-known[\d.]+|-single)(?:-wrong[\d.]+)?)?(-seed\d+)?$", name).group(1, 2)  # type: ignore[union-attr]
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

    What is given is kept in ``report.json``, and taken from there where it is not given. But for the table of costs the page
    is the same after equal runs.
    """
    results = output / "results.json"
    if not results.is_file():
        raise FileNotFoundError(f"{results} not found: the folder must be the --output of a run")
    rows: list[Row] = [row for row in read_json(results) if not math.isnan(row["mAP"])]  # NaN: no class could be ranked
    kept, settings, times = (
        read_json(file) if (file := output / name).is_file() else {} for name in ("report.json", "run.json", "times.json")
    )
    given = {"command": command, "data": data, "notes": None if notes is None else list(notes)}
    kept |= {key: value for key, value in given.items() if value is not None}
    write_json(output / "report.json", kept)
    title = f"Missing labels: {kept['data']}" if kept.get("data") else "Multi-label recognition with missing labels"

    split = settings.get("preset", {}).get("val_split" if settings.get("tune") else "test_split")
    measure = f"mAP (%) on the {split} images" if split else "mAP (%)"
    pictures: list[tuple[Path, str]] = []
    if main := main_rows(rows):
        draw_map_against_known(output / "map_against_known.png", main, title, measure)
        pictures.append((output / "map_against_known.png", "mAP against the share of known labels; bars: one deviation"))
    for head in dict.fromkeys(parts_of(row["method"])[0] for row in rows if of_grid(row["method"])):
        path = output / f"map_against_known-{head}.png"
        draw_map_against_known(path, [row for row in rows if parts_of(row["method"])[0] == head], title, measure)
        pictures.append((path, f"The same for {head} with its own loss and with those of other methods"))
    for file in sorted(output.glob("saliency*.npz")):
        draw_saliency(file.with_suffix(".png"), SaliencyMaps.load(file))
        pictures.append((file.with_suffix(".png"), f"Region saliency with the score of the class, beside zero-shot: {file.stem}"))
    for name, traces in _trace_groups(output / "pseudo").items():
        draw_pseudo_quality(path := output / f"pseudo_labels-{name}.png", traces)
        pictures.append((path, f"Pseudo-labels of {name} against the hidden truth, which training never sees"))
    return _write(
        output,
        _sections(rows, pictures, list(times), measure),
        title=title,
        notes=kept.get("notes", ()),
        command=kept.get("command", "(not recorded)"),
        versions=_versions(),
        settings=json.dumps(settings, indent=1, default=str) if settings else "",
    )
