"""One file of labels, of the kinds that people have."""

from __future__ import annotations

import json
import posixpath
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from math import nan
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trm_losses.labels import UNKNOWN
from trm_pipeline.files import text_of
from trm_pipeline.folder.image_names import Mistakes, Row, clean, match_rows
from trm_pipeline.folder.list_cells import combined, split_cells
from trm_pipeline.folder.tables import csv_rows

_WORDS: Mapping[str, float] = {
    **dict.fromkeys(("1", "1.0", "yes", "y", "true", "present"), 1.0),
    **dict.fromkeys(("0", "0.0", "no", "n", "false", "absent"), 0.0),
    **dict.fromkeys(("", "?", "nan", "na", "n/a", "none", "null", "unknown"), float(UNKNOWN)),
}
_ACCEPTED = "present: 1 yes true present; absent: 0 no false absent; unknown: blank ? nan unknown"
# Headers of a column that lists what is present, and words for the sides of a split: whether images are kept from training.
_LISTS = re.compile(
    r"((label|class|tag|attribute|keyword|object|target|annotation|choice)(e?s)?|categor(y|ies))([ _-]?(id|name)s?)?",
    re.IGNORECASE,
)
_SIDES = {
    **dict.fromkeys(("train", "training"), False),
    **dict.fromkeys(("val", "valid", "validation", "dev", "test", "testing", "eval", "holdout", "hold-out", "held-out"), True),
}


class Labels(NamedTuple):
    """What a label file says: N images relative to their folder, C class names, targets (N, C) of 1, 0 and -1 (unknown).

    ``lists`` is whether images come with a list of what is present, and what is not listed was left unknown; ``separator`` is
    what stands between the names of a list. ``held`` (N,) are the images that a column ``split`` keeps from training, and
    ``groups`` says what each image belongs to; None where nobody said. ``replaced`` (N, C) are the labels that answers took the
    place of, NaN where nobody answered.
    """

    files: list[str]
    class_names: list[str]
    targets: Tensor
    lists: bool
    separator: str | None = None
    held: Tensor | None = None
    groups: list[str] | None = None
    replaced: Tensor | None = None

    @property
    def answered(self) -> Tensor:
        """Pairs (N, C) that somebody answered, be it unsure or what the label says."""
        return torch.zeros_like(self.targets, dtype=torch.bool) if self.replaced is None else ~self.replaced.isnan()

    @property
    def noted(self) -> Tensor:
        """Targets (N, C) before answers."""
        return self.targets if self.replaced is None else self.targets.where(~self.answered, self.replaced)

    def with_unknown(self, files: list[str], *, by_folder: bool) -> Labels:
        """With further images, of which nothing is known; each is a group by itself, if not those of one folder are."""
        unknown = self.targets.new_full((len(files), len(self.class_names)), UNKNOWN)
        held = None if self.held is None else torch.cat([self.held, self.held.new_zeros(len(files))])
        own = [posixpath.dirname(file) if by_folder else file for file in files]
        groups = None if self.groups is None else self.groups + own
        replaced = None if self.replaced is None else torch.cat([self.replaced, torch.full_like(unknown, torch.nan)])
        targets = torch.cat([self.targets, unknown])
        return self._replace(files=self.files + files, targets=targets, held=held, groups=groups, replaced=replaced)

    def only(self, rows: Tensor) -> Labels:
        """Of some of the images."""
        return self._replace(
            files=[self.files[i] for i in rows.tolist()],
            targets=self.targets[rows],
            held=None if self.held is None else self.held[rows],
            groups=None if self.groups is None else [self.groups[i] for i in rows.tolist()],
            replaced=None if self.replaced is None else self.replaced[rows],
        )


def read_labels(
    path: Path,
    images: Sequence[str],
    *,
    minus_one: str | None = None,
    unlisted_absent: bool = False,
    separator: str | None = None,
    group: str | None = None,
) -> Labels:
    """Labels of images out of a CSV or JSON-lines file.

    A table has one column of images, which comes first, and one for each class; a list has the columns ``image,labels``, with
    names separated by what :func:`.list_cells.split_cells` finds. A line of JSON is ``{"image": ..., "labels": ...}`` with an
    object of labels, or a list of what is present. Classes are in the order of the columns, or of the objects' keys; of lists
    alphabetical. A column (or key) ``split`` says which images are kept from training.

    Args:
        images: files of the folder, from :func:`find_images`. An image may be named by its path below the folder, with or
            without the suffix, or by its file name where that is found once.
        minus_one: what -1 means, "unknown" or "absent" (0 is unknown then); by default it is refused, since both are in use.
        unlisted_absent: what a list does not name is absent, not unknown.
        separator: between the names of a list; by default it is found.
        group: the column (or key) of what images belong together, or "folder": those of one folder do.

    Raises:
        FileNotFoundError: no such file.
        ValueError: with file, line and column: words that are no label, images that are not there, two rows for an image, a
            missing or doubtful header, another encoding than UTF-8, and so on; the first few of them together.
    """
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".json") and not path.is_dir():
        raise ValueError(f"{path.name}: labels must be .csv, .tsv, .txt or .jsonl; save a spreadsheet as 'CSV UTF-8'")
    text = text_of(path, "label file")
    if not text.strip():
        raise ValueError(f"{path.name} is empty; its first line must be a header such as image,cat,dog")
    mistakes = Mistakes()
    content = _Content(path.name, _Words(minus_one), mistakes, separator, group)
    (_read_json_lines if suffix in (".jsonl", ".ndjson", ".json") else _read_csv)(text, content)
    if not content.rows:
        mistakes.tell()
        raise ValueError(f"{path.name} has no row of labels below its header")
    _check_names(content)
    files = match_rows(content.rows, images, mistakes)
    mistakes.tell()
    if unlisted_absent and not content.lists:
        raise ValueError(f"{path.name}: --unlisted absent is for lists of what is present, and here each class has its own label")
    if group is not None and not content.groups:
        if group != "folder":
            raise ValueError(f"--group must be folder or a column (in JSON a key) of {path.name}, got {group!r}")
        content.groups = [posixpath.dirname(file) for file in files]
    class_names = sorted(content.names) if content.lists else list(content.names)
    place = np.empty(len(class_names), dtype=np.int64)
    place[[content.names[name] for name in class_names]] = np.arange(len(class_names))
    targets = np.full((len(files), len(class_names)), 0 if content.lists and unlisted_absent else UNKNOWN, dtype=np.float32)
    targets[np.asarray(content.row), place[np.asarray(content.column)]] = np.asarray(content.value)
    return Labels(
        files,
        class_names,
        torch.from_numpy(targets),
        content.lists and not unlisted_absent,
        content.separator,
        torch.tensor(content.held) if content.held else None,
        content.groups or None,
    )


class _Words(dict[str, float]):
    """Labels by the words for them, which are learned as they are met: tables have millions; ``nan`` for what is none."""

    def __init__(self, minus_one: str | None) -> None:
        super().__init__(_WORDS)
        if minus_one is not None:
            self |= dict.fromkeys(("-1", "-1.0"), 0.0 if minus_one == "absent" else float(UNKNOWN))
        if minus_one == "absent":
            self |= dict.fromkeys(("0", "0.0"), float(UNKNOWN))

    def __missing__(self, word: str) -> float:
        self[word] = value = self.get(word.strip().lower(), nan)
        return value


class _Content:
    """What a label file says, row by row: a class is kept by its column, and the labels as three long arrays."""

    def __init__(self, file: str, words: _Words, mistakes: Mistakes, separator: str | None, group: str | None) -> None:
        self.file, self.words, self.mistakes, self.separator, self.group = file, words, mistakes, separator, group
        self.rows: list[Row] = []
        self.names: dict[str, int] = {}
        self.lists = False
        self.row, self.column, self.value = array("l"), array("l"), array("f")
        self.held: list[bool] = []
        self.groups: list[str] = []

    def add(self, row: Row, names: Iterable[str], values: Sequence[float]) -> None:
        """Labels of an image by class."""
        self.row.extend([len(self.rows)] * len(values))
        self.column.extend([self.names.setdefault(name, len(self.names)) for name in names])
        self.value.extend(values)
        self.rows.append(row)

    def labels(self, where: str, what: str, names: Iterable[str], cells: Sequence[str]) -> list[float]:
        """What the words in cells mean; others are mistakes."""
        values = list(map(self.words.__getitem__, cells))
        if nan in values:
            for name, cell, value in zip(names, cells, values, strict=True):
                if value is nan:
                    fix = "if this column is no class, take it out; if it says what belongs together, train takes it as --group"
                    if cell.strip() in ("-1", "-1.0"):
                        fix = "-1 is unknown in some files and absent in others: say --minus-one unknown or --minus-one absent"
                    elif what == "column" and len(cells) == 1:
                        fix = "if it lists what is present, call the column labels"
                    elif what == "column" and _LISTS.fullmatch(name):
                        others = ", ".join([other for other in names if other != name][:5])
                        fix = f"if it lists what is present, take out the other columns: {others}"
                    self.mistakes.add(f"{where}, {what} {name}: {cell.strip()!r} is no label ({_ACCEPTED}); {fix}")
        return values

    def side(self, where: str, word: object) -> None:
        """Which side of the split an image is on."""
        held = _SIDES.get("-".join(str(word).lower().replace("_", " ").replace("-", " ").split()))
        if held is None:
            self.mistakes.add(
                f"{where}, split: {word!r} is no side; wanted train, or one of val, test and hold-out (kept from training)"
            )
        self.held.append(bool(held))

    def together(self, where: str, word: object) -> None:
        """What an image belongs to; blank: to nothing but itself."""
        self.groups.append("" if word is None else clean(str(word)))
        self.groups[-1] = self.groups[-1] or where


def _read_csv(text: str, content: _Content) -> None:
    """Rows of a table or of lists."""
    table = csv_rows(text, content.file)
    first = next(table, None)
    if first is None:  # nothing but separators
        return
    header = list(map(clean, first[1]))
    special = _columns(first[0], header, content.group)
    classes = [i for i in range(1, len(header)) if i not in special.values()]
    names = [header[i] for i in classes]
    content.lists = len(names) == 1 and _LISTS.fullmatch(names[0]) is not None
    listed: list[str] = []  # cells that are split once all of them are known
    for where, cells in table:
        if len(cells) != len(header):
            quote = '; put the list in quotes, "cat,dog", or separate it by |' if content.lists else ""
            shown = ", ".join(header[:4])
            content.mistakes.add(f"{where}: {len(cells)} cells, but the header has {len(header)} ({shown} …){quote}")
            continue
        if content.lists:
            listed.append(cells[classes[0]])
            content.rows.append(Row(where, cells[0]))
        else:
            own = [cells[i] for i in classes] if special else cells[1:]
            content.add(Row(where, cells[0]), names, content.labels(where, "column", names, own))
        if "split" in special:
            content.side(where, cells[special["split"]])
        if "group" in special:
            content.together(where, cells[special["group"]])
    if content.lists:
        rows, content.rows = content.rows, []
        places = [f"{row.where}, column {names[0]}" for row in rows]
        found, content.separator = split_cells(listed, content.separator, places)
        for row, some in zip(rows, found, strict=True):
            content.add(row, map(clean, some), [1.0] * len(some))
    elif content.separator is not None:
        raise ValueError(f"{content.file}: --separator is for a column of lists such as image,labels, and this is a table")


def _says(cell: str) -> bool:
    """It is a label, not the name of a class."""
    return cell.lower() in _WORDS or cell in ("-1", "-1.0")


def _columns(where: str, header: list[str], group: str | None) -> dict[str, int]:
    """Columns that are no classes: ``split``, and the one named by ``group``."""
    if len(header) < 2:
        raise ValueError(f"{where}: the header must name a column of images and one for each class, got {header[0]!r} alone")
    if all(_says(cell) for cell in header[1:]):
        raise ValueError(f"{where}: the first line must be a header with the names of the classes, got {', '.join(header[:4])}")
    for number, name in enumerate(header, start=1):
        if not name and number > 1:
            raise ValueError(f"{where}: column {number} has no name; name its class or take it out")
        if header.index(name) < number - 1:
            raise ValueError(f"{where}: columns {header.index(name) + 1} and {number} are both named {name!r}")
    special = {"split": "split"} | ({group.lower(): "group"} if group is not None else {})
    found = {special[name.lower()]: i for i, name in enumerate(header) if i and name.lower() in special}
    if group is not None and "group" not in found and group != "folder":
        raise ValueError(f"{where}: --group must be folder or a column, {', '.join(header[1:6])} …; got {group!r}")
    if len(header) == 1 + len(found):
        raise ValueError(f"{where}: the header must name a column for each class, got {', '.join(header)} alone")
    return found


def _read_json_lines(text: str, content: _Content) -> None:
    """Rows of one JSON object a line."""
    file = content.file
    keys: set[str] = set()
    kinds = set()
    wanted = 'wanted one object a line, such as {"image": "a.jpg", "labels": {"cat": 1, "dog": 0}} or "labels": ["cat"]'
    if content.separator is not None:
        raise ValueError(f"{file}: --separator is for lists in a column of a table; JSON has lists of its own")
    if file.lower().endswith(".json") and _is_one_document(text):
        raise ValueError(f"{file} is one JSON document: of Label Studio, COCO or FiftyOne? Say --form; otherwise {wanted}")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    for number, line in lines:
        try:
            item = json.loads(line, object_pairs_hook=_once)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}, column {error.colno}: not JSON ({error.msg}); {wanted}") from None
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from None
        keys.update(item if isinstance(item, dict) else ())
    for number, line in lines:  # read twice: all objects together would take several times the memory of the text
        where, item = f"{file}, line {number}", json.loads(line)
        labels = item.get("labels") if isinstance(item, dict) else None
        if not isinstance(labels, dict | list) or not isinstance(item.get("image"), str):
            content.mistakes.add(f"{where}: {wanted}")
            continue
        kinds.add(type(labels))
        row = Row(where, item["image"])
        if isinstance(labels, dict):
            cells = ["" if value is None else str(value) for value in labels.values()]
            content.add(row, map(clean, labels), content.labels(where, "class", labels, cells))
        elif all(isinstance(name, str) for name in labels):
            some = [name for part in labels if (name := clean(part))]
            content.add(row, some, [1.0] * len(some))
        else:
            content.mistakes.add(f"{where}: a list of labels must hold names; {wanted}")
            continue
        if "split" in keys:
            content.side(where, item.get("split"))
        if content.group is not None and content.group in keys:
            content.together(where, item.get(content.group))
    if len(kinds) > 1:
        raise ValueError(f"{file}: labels are lists in some lines and objects in others; take one form, objects can say all")
    content.lists = kinds == {list}


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of JSON, whose names differ in more than spaces; of equal ones the last would win without a word."""
    names = [clean(name) for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{max(names, key=names.count)!r} stands in one object twice, spaces aside; take one out")
    return dict(pairs)


def _is_one_document(text: str) -> bool:
    """It is JSON as a whole, and no line about one image."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return False
    return not (isinstance(value, dict) and "image" in value)


def _check_names(content: _Content) -> None:
    """No class at all, labels or lists where a list must hold names, or two names that differ in their spelling alone."""
    file, names, lists = content.file, sorted(content.names) if content.lists else list(content.names), content.lists

    def where(name: str) -> str:
        place = np.flatnonzero(np.asarray(content.column) == content.names[name])
        return content.rows[content.row[place[0]]].where if len(place) else file

    if not names:
        raise ValueError(f"{file} names no class in its {len(content.rows)} rows")
    labels = [name for name in names if _WORDS.get(name.lower()) == UNKNOWN] or names * all(map(_says, names))
    if lists and labels:
        raise ValueError(
            f"{file}: a list must hold names of classes, got {', '.join(labels)}; leave it blank where nothing is known, and "
            "call a column of one class by its name"
        )
    if lists and content.separator is None and (name := combined(names)) is not None:
        raise ValueError(f"{where(name)}: {name!r} consists of other classes; write each name of a list by itself")
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault("".join(name.casefold().split()), name)
        if other != name:
            spelling = "differ in case or spaces alone; write them alike"
            raise ValueError(f"{where(name)}: the classes {other!r} and {name!r} {spelling}")
