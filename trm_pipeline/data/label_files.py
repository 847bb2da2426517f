"""Published files of partial labels: what they hold, which rows are which images, and whether they fit.

========================  ==================================================================================
``ternary``               1 present, -1 absent, 0 unknown: Cole's ``formatted_*_labels_obs.npy``, TaI-DPT's text
``positive-only``         1 present, 0 unknown
``direct``                1 present, 0 absent, -1 unknown, as this package has it
``mask``                  1 known, 0 hidden, of labels that are the data set's own: DualCoOp's saved tensors
``list``                  lines ``image,3 17`` with the numbers of present classes: SPLC's and SCPNet's text
========================  ==================================================================================
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trm_losses.labels import UNKNOWN, from_positive_only, from_ternary, known_fraction
from trm_pipeline.data.base import LabelledImages, lines_of
from trm_pipeline.features.cached import mapped

_VALUES: dict[str, tuple[int, ...]] = {"ternary": (1, -1, 0), "positive-only": (1, 0), "direct": (1, 0, -1), "mask": (1, 0)}
ENCODINGS = (*_VALUES, "list")
_TOLERATED = 0.1  # share of known labels that may differ from the data set's own: another order of rows differs in most


class PublishedLabels(NamedTuple):
    """Labels (N, C) in the order of the images, 1 present, 0 absent, -1 unknown, and lines that say what they are."""

    labels: Tensor
    lines: list[str]


class _File(NamedTuple):
    """What a file holds: a table (N, C), the names of its rows where it has them, and its encoding where that can be told."""

    table: Tensor
    names: list[str] | None
    encoding: str | None


def read_labels(path: Path, images: LabelledImages, encoding: str | None = None) -> PublishedLabels:
    """The labels of a file for the images of a split.

    The encoding is told by the kind of the file where that is certain, see the table above; a plain matrix could be
    several of them, and then it has to be said. Rows are matched by image name where the file has names (Cole's in
    ``formatted_*_images.npy`` beside it), else they are those of the split in its order. What the file says is compared
    with the data set's own labels: rows in another order, columns in another order or a wrong encoding contradict them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind, an encoding that cannot be told or does not fit, other images than those of
            the split, labels that contradict the data set's own.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--labels: {path} not found")
    readers: dict[str, Callable[[Path, LabelledImages], _File]] = {".npy": _read_npy, ".txt": _read_text, ".pt": _read_tensor}
    if path.suffix not in readers:
        raise ValueError(f"--labels: {path} must be a .npy, .txt or .pt file, got {path.suffix or 'no suffix'!r}")
    table, names, told = readers[path.suffix](path, images)
    encoding = encoding or told
    found = sorted(table.unique().tolist())
    if encoding is None:
        fits = [name for name, values in _VALUES.items() if set(found) <= set(values)]
        raise ValueError(
            f"--labels: {path} holds {found}, which can be several encodings; give --labels-encoding "
            f"{' or '.join(fits) or '(none fits)'}"
        )
    if (encoding == "list") != (told == "list"):
        raise ValueError(f"--labels-encoding {encoding} does not fit {path}: {'it is' if told == 'list' else 'it is not'} a list")
    wanted = (1, UNKNOWN) if encoding == "list" else _VALUES[encoding]
    if not set(found) <= set(wanted):
        raise ValueError(f"--labels: {path} holds {found}, and {encoding} is made of {sorted(wanted)}")
    count, table = len(table), _in_order(path, table, names, images, mask=encoding == "mask")
    if encoding == "ternary":
        table = from_ternary(table)
    elif encoding == "positive-only":
        table = from_positive_only(table)
    elif encoding == "mask":
        table = torch.where(table == 1, images.targets, UNKNOWN)
    labels = table.to(images.targets.dtype)
    share, agreement = known_fraction(labels), _agreement(path, labels, images.targets, encoding)
    head = f"{path.name}: {encoding}, {share:.2%} of the labels known, {int((labels == 1).sum())} present{agreement}"
    head += f"; {more} rows of other images left out" if (more := count - len(labels)) else ""
    return PublishedLabels(labels, [head, *_first_rows(labels, images)])


def read_list(path: Path, lines: Sequence[str], num_classes: int) -> tuple[list[str], Tensor]:
    """Image names and labels (N, C), 1 where a class is listed and else 0, of lines ``image,3 17``."""
    names: list[str] = []
    cells: tuple[list[int], list[int]] = [], []
    for row, line in enumerate(lines):
        name, comma, listed = line.partition(",")
        columns = listed.split()
        if not comma or not all(column.isdecimal() and int(column) < num_classes for column in columns):
            raise ValueError(
                f"{path}: line {row + 1} must be an image name, a comma and numbers from 0 to {num_classes - 1}, got {line!r}; "
                "take the list of this data set"
            )
        names.append(name.strip())
        cells[0].extend([row] * len(columns))
        cells[1].extend(map(int, columns))
    table = torch.zeros(len(lines), num_classes, dtype=torch.int8)
    table[cells] = 1
    return names, table


def read_names(path: Path) -> list[str]:
    """The names of images that Cole keeps in an array, as text or as bytes."""
    names: list[str] = mapped(path, "images").astype(str).tolist()
    return names


def _read_npy(path: Path, images: LabelledImages) -> _File:
    table = _whole_numbers(path, torch.from_numpy(mapped(path, "images", "classes")))
    formatted = path.name.startswith("formatted_") and path.name.endswith("_labels_obs.npy")
    beside = path.with_name(path.name.replace("_labels_obs.npy", "_images.npy"))
    names = read_names(beside) if formatted and beside.is_file() else None
    if names is not None and len(names) != len(table):
        raise ValueError(f"--labels: {beside} must name the {len(table)} rows of {path.name}, got {len(names)} names")
    return _File(table, names, "ternary" if formatted else None)


def _read_text(path: Path, images: LabelledImages) -> _File:
    lines = lines_of(path, "--labels", "")
    if lines and all(field.strip() in ("1", "0", "-1") for field in lines[0].split(",")):
        table = _whole_numbers(path, torch.from_numpy(np.loadtxt(lines, delimiter=",", dtype=np.int8, ndmin=2)))
        return _File(table, None, "ternary" if (table == -1).any() else None)
    names, table = read_list(path, lines, len(images.class_names))
    return _File(torch.where(table == 1, 1, UNKNOWN), names, "list")


def _read_tensor(path: Path, images: LabelledImages) -> _File:
    try:
        table = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever bytes may lead to
        said = f"must be a tensor that loads without running code, and cannot be read ({type(error).__name__})"
        raise ValueError(f"--labels: {path} {said}; save it again with torch.save") from error
    if not isinstance(table, Tensor):
        raise ValueError(f"--labels: {path} must hold one tensor, got {type(table).__name__}; class splits are no labels")
    if table.dim() == 3:  # a row for each size of object, all alike
        if not bool((table == table[:, :1]).all()):
            raise ValueError(f"--labels: {path} hides other labels for each size of object, which one label a class cannot tell")
        return _File(_whole_numbers(path, table[:, 0]), None, "mask")
    return _File(_whole_numbers(path, table), None, None)


def _whole_numbers(path: Path, table: Tensor) -> Tensor:
    if table.dim() != 2:
        raise ValueError(f"--labels: {path} must be a matrix of 1, 0 and -1, got shape {tuple(table.shape)}")
    wrong = (table != 1) & (table != 0) & (table != -1)
    if len(found := wrong.nonzero()):
        row, column = found[0].tolist()
        raise ValueError(
            f"--labels: {path} must be a matrix of 1, 0 and -1, got {table[row, column].item()} in row {row}, column {column}"
        )
    return table.to(torch.int8)


def _in_order(path: Path, table: Tensor, names: list[str] | None, images: LabelledImages, *, mask: bool) -> Tensor:
    """The rows of a table in the order of the images; those of other images are left out where the rows have names."""
    wanted = (len(images) if names is None else len(table), len(images.class_names))
    if tuple(table.shape) != wanted:
        raise ValueError(
            f"--labels: {path} has {table.shape[0]} images and {table.shape[1]} classes, {images.name} has {len(images)} and "
            f"{wanted[1]}; likely it is of another split, year or data set, or of annotated images alone (coco --annotated-only)"
        )
    if names is not None:
        listed = [Path(name.replace("\\", "/")).name for name in names]
        row_of = {name: row for row, name in enumerate(listed)}
        own = [Path(image).name for image in images.image_paths]
        if len(row_of) < len(names):
            twice = next(name for name, count in Counter(listed).items() if count > 1)
            raise ValueError(f"--labels: {path} must have one row for an image, got {twice} twice; take one of them out")
        if missing := [name for name in own if name not in row_of]:
            raise ValueError(
                f"--labels: {path} has no row for {len(missing)} of {len(own)} images, the first {missing[0]} (it has "
                f"{next(iter(row_of), 'none')}); likely it is of another split"
            )
        return table[[row_of[name] for name in own]]
    if mask and images.mask_rows is not None:
        ordered = torch.empty_like(table)
        ordered[images.mask_rows] = table
        return ordered
    return table


def _agreement(path: Path, labels: Tensor, own: Tensor, encoding: str) -> str:
    """How known labels compare with those of the data set, of what it knows itself; an error where most differ."""
    if encoding == "mask":
        return ""
    said = []
    for word, among, wrong in (
        ("present", (labels == 1) & (own >= 0), own == 0),
        ("absent", (own == 1) & (labels >= 0), labels == 0),
    ):
        count, differ = int(among.sum()), int((among & wrong).sum())
        if differ > _TOLERATED * count:
            raise ValueError(
                f"--labels: {path}, read as {encoding}, contradicts the data set: {differ} of {count} labels "
                f"{'that it calls present are absent' if word == 'present' else 'that are present it calls absent'}; likely its "
                "rows or columns are in another order (keep formatted_*_images.npy beside Cole's files), or --labels-encoding is "
                "another one"
            )
        if differ:
            said.append(f"{differ} wrongly {word}")
    return f"; against the data set's own labels: {' and '.join(said) or 'none wrong'}"


def _first_rows(labels: Tensor, images: LabelledImages) -> list[str]:
    """What is known of the first three images, by name."""
    lines, most = [], 6
    for name, row in zip(images.ids[:3], labels, strict=False):
        parts = []
        for word, value in (("present", 1), ("absent", 0)):
            columns = (row == value).nonzero().flatten().tolist()
            shown = ", ".join(images.class_names[column] for column in columns[:most]) or "–"
            parts.append(f"{word} {shown}" + (f" and {len(columns) - most} more" if len(columns) > most else ""))
        lines.append(f"  {name}: {'; '.join(parts)}")
    return lines
