"""A folder of one's own images and one file of labels, as far as they are known."""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
import re
import sys
import unicodedata
import warnings
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from trm_losses.labels import UNKNOWN
from trm_pipeline.folder.list_cells import combined, split_cells
from trm_pipeline.progress import say

__all__ = ["FolderImages", "Labels", "escaped", "find_images", "hold_out", "read_image", "read_labels"]

_PLUGINS = (".heic", ".heif", ".avif")  # images too, though Pillow may need a plug-in for them
_SYSTEM = ("thumbs.db", "desktop.ini")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation
_OTHER_BYTE = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}  # of Pillow's raw modes
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
_SHOWN = 5  # mistakes of a file that are named; the others are counted


class Labels(NamedTuple):
    """What a label file says: N images relative to their folder, C class names, targets (N, C) of 1, 0 and -1 (unknown).

    ``lists`` is whether images come with a list of what is present, and what is not listed was left unknown; ``separator`` is
    what stands between the names of a list. ``held`` (N,) are the images that a column ``split`` keeps from training, and
    ``groups`` says what each image belongs to; None where nobody said.
    """

    files: list[str]
    class_names: list[str]
    targets: Tensor
    lists: bool
    separator: str | None = None
    held: Tensor | None = None
    groups: list[str] | None = None


class _Row(NamedTuple):
    """An image of the label file: where it stands, and its name there."""

    where: str
    image: str


class _Mistakes:
    """Mistakes of one file, told together: whoever mends one wants to know of the others."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        self.lines.append(line)

    def tell(self) -> None:
        """Raise, where there were any."""
        if self.lines:
            more = len(self.lines) - _SHOWN
            raise ValueError("\n  ".join(self.lines[:_SHOWN]) + (f"\n  and {more} more mistakes" if more > 0 else ""))


# ---------------------------------------------------------------------------------------------------------- images
def find_images(folder: Path) -> list[str]:
    """Image files below a folder, relative to it with ``/``, sorted; hidden files and folders are left out.

    A file is an image by its suffix or, if that says nothing, by its content. Links are followed, but not to a folder that they
    lie in. A file that several paths lead to is an image under each of them. What else is left out is said.

    Raises:
        FileNotFoundError: no such folder. ValueError: no image in it.
    """
    if not folder.is_dir():
        what = "is a file; give the folder that holds the images" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"the image folder {folder} {what}")
    suffixes = _suffixes()
    found: list[str] = []
    left: dict[str, list[str]] = {"no image": [], "a folder that cannot be opened": [], "a link to a folder that it lies in": []}
    # With the real paths of the folders above.
    folders: list[tuple[str, tuple[str, ...]]] = [("", tuple(map(str, Path(os.path.realpath(folder)).parents)))]
    while folders:
        inside, above = folders.pop()
        real = os.path.realpath(folder / inside)
        if real in above:
            left["a link to a folder that it lies in"].append(inside)
            continue
        try:
            entries = list(os.scandir(real))
        except OSError:
            left["a folder that cannot be opened"].append(inside)
            continue
        for entry in entries:
            name = f"{inside}/{entry.name}".removeprefix("/")
            if entry.name.startswith((".", "__MACOSX")) or entry.name.lower() in _SYSTEM:
                continue
            if _is(entry, os.DirEntry.is_dir):
                folders.append((name, (*above, real)))
            elif _is(entry, os.DirEntry.is_file) and (Path(name).suffix.lower() in suffixes or _looks_like_image(entry.path)):
                found.append(name)
            else:
                left["no image"].append(name)
    shown = [f"{len(names)} left out, {what}: {_some(sorted(names))}" for what, names in left.items() if names]
    if not found:
        wanted = f"no image in {folder}: wanted files such as .jpg or .png, in it or in folders below it"
        raise ValueError("; ".join([wanted, *shown]))
    for line in shown:
        say(line)
    return sorted(found)


def _suffixes() -> frozenset[str]:
    """Of images, by Pillow's own list."""
    formats = Image.registered_extensions().items()
    return frozenset((*_PLUGINS, *(suffix for suffix, name in formats if name in Image.OPEN and _is_image(name))))


def _is_image(name: str | None) -> bool:
    """Pillow opens PostScript and some films too, and cannot show them."""
    return Image.MIME.get(name or "", "image/").startswith("image/")


def _looks_like_image(path: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return _is_image(image.format)
    except Exception:  # decoders raise what they like
        return False


def _is(entry: os.DirEntry[str], kind: Callable[[os.DirEntry[str]], bool]) -> bool:
    """Of what a link leads to; a link in a circle leads nowhere."""
    try:
        return kind(entry)
    except OSError:
        return False


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def read_image(path: str | Path, size: tuple[int, int]) -> Image.Image:
    """An image in RGB, upright, and not much larger than ``size`` (height, width) where a JPEG can be decoded at less.

    What is transparent becomes white, and of several frames it is the first. Numbers beyond 8 bits are scaled, see
    :func:`to_bytes`. An orientation that cannot be read is none.

    Raises:
        Exception: whatever the decoder raises at a broken file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            side = 2 * max(size)  # of either orientation
            image.draft(None, (side, side))
            tiles = list(image.tile)  # before they are read
            image.load()
            if image.mode.startswith(("I", "F")):
                shown = Image.fromarray(to_bytes(np.asarray(image)))
            elif (low := _low_bytes(path, image, tiles)) is not None:
                shown = _joined(image, low)
            else:
                shown = image
            upright = _upright(image, shown)
            if upright.mode.endswith(("A", "a")) or "transparency" in upright.info:
                rgba = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            return upright.convert("RGB")


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Numbers of any kind as bytes that can be seen; what is not finite becomes black.

    A camera's 12 bits are often kept in 16, and no file says so. White is therefore :math:`2^k - 1` with the least k such that
    all values are below :math:`2^k`, or :math:`2^k` itself for fractions (k < 1): the highest value is never shown at less than
    half. With negative values the range goes from the lowest to the highest. A lowest (negative) or highest value that lies
    further from all others than these span is no light but a mark, such as -9999 for blank or 65535 for dead pixels: it does not
    count.

    Raises:
        ValueError: no value is finite.
    """
    values = values.astype(np.float32)
    finite = np.abs(values) < np.finfo(np.float32).max  # which is in use for blank pixels, too
    seen = values[finite]
    if not seen.size:
        raise ValueError("no pixel is a finite number")
    others = seen[seen > seen.min()]
    if seen.min() < 0 and others.size and others.min() - seen.min() > np.ptp(others):
        seen = others
    others = seen[seen < seen.max()]
    if others.size and seen.max() - others.max() > np.ptp(others):
        seen = others
    low, high = min(0.0, float(seen.min())), float(seen.max())
    if low == 0:
        power = int(np.frexp(high)[1])
        high = 2.0**power - (power > 0)
    shown = (np.where(finite, values, low).clip(low, high) - low) * (255 / ((high - low) or 1.0))
    return shown.round().astype(np.uint8)


def _low_bytes(path: str | Path, image: Image.Image, tiles: list[Any]) -> np.ndarray | None:
    """Of colors in 16 bits, of which Pillow keeps the high bytes; None if these are enough, or all that there is."""
    modes = [_raw_mode(tile) for tile in tiles]
    high = np.asarray(image)
    if not modes or not all(mode[-4:-3] == ";" and mode[-3:] in _OTHER_BYTE for mode in modes) or high.ndim < 3:
        return None
    if high[..., :3].max() >= 128:
        return None
    if modes[0].startswith("RGBa"):  # Pillow has divided by the transparency already
        return np.zeros_like(high)
    with Image.open(path) as again:
        swapped: list[Any] = []
        tile: Any
        for tile, mode in zip(again.tile, modes, strict=True):
            other = "RGBA" if mode == "LA;16B" else mode[:-3] + _OTHER_BYTE[mode[-3:]]
            args = other if isinstance(tile[3], str) else (other, *tile[3][1:])
            swapped.append(getattr(type(tile), "_make", tuple)((*tile[:3], args)))
        again.tile = swapped
        again.load()
        low = np.asarray(again)
        return low[..., [1, 1, 1, 3]] if modes[0] == "LA;16B" else low  # read as high and low of gray, then of transparency


def _raw_mode(tile: Any) -> str:
    """How a tile of Pillow's lies in its file, where it says so."""
    mode = tile[3][0] if isinstance(tile[3], tuple) and tile[3] else tile[3]
    return mode if isinstance(mode, str) else ""


def _joined(image: Image.Image, low: np.ndarray) -> Image.Image:
    """An image of 16 bits in 8, from its high bytes and its low ones; transparency is scaled by itself."""
    values = 256 * np.asarray(image).astype(np.uint16) + low
    colors = values.shape[2] - (image.mode[-1] in "Aa")
    bands = np.concatenate([to_bytes(part) for part in np.split(values, [colors], axis=2) if part.shape[2]], axis=2)
    return Image.merge(image.mode, [Image.fromarray(band) for band in np.moveaxis(bands, 2, 0)])


def _upright(image: Image.Image, shown: Image.Image) -> Image.Image:
    """``shown`` turned as ``image`` says, if that can be read: ImageOps.exif_transpose fails at other tags that are broken."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken tags raise what they like
        turn = None
    return shown if turn is None else shown.transpose(turn)


class FolderImages(Dataset[tuple[Tensor, Tensor, int]]):
    """Images from files, in their order; one that cannot be read is all NaN, which its features then are too.

    A data set must not end at a broken file among thousands, and what a loading process prints or keeps is lost: NaN passes
    through the model, and into caches, as the mark of the image it belongs to.

    Args:
        paths: the files. size: (height, width) of what ``transform`` gives. transform: from PIL image to tensor.
    """

    def __init__(self, paths: Sequence[Path], size: tuple[int, int], transform: Callable[[Image.Image], Tensor]) -> None:
        self.paths, self.size, self.transform = paths, size, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        """The transformed image, nothing in place of labels, and ``index``."""
        try:
            pixels = self.transform(read_image(self.paths[index], self.size))
        except Exception:  # decoders raise what they like; see why_unreadable
            pixels = torch.full((3, *self.size), float("nan"))
        return pixels, torch.empty(0), index

    def why_unreadable(self, index: int) -> str:
        """What the decoder says of a broken file."""
        path = self.paths[index]
        try:
            if path.stat().st_size == 0:
                return "the file is empty"
            read_image(path, self.size)
        except UnidentifiedImageError:
            heic = path.suffix.lower() in (".heic", ".heif")
            return "convert it to JPEG: Pillow does not read HEIC" if heic else "not an image, or none that Pillow reads"
        except Exception as error:
            return str(error).splitlines()[0] if str(error) else type(error).__name__
        return "its features are not finite"


# ---------------------------------------------------------------------------------------------------------- labels
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
    if not path.is_file():
        raise FileNotFoundError(f"the label file {path} {'is a folder' if path.is_dir() else 'does not exist'}")
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".json"):
        raise ValueError(f"{path.name}: labels must be .csv, .tsv, .txt or .jsonl; save a spreadsheet as 'CSV UTF-8'")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path.name}, line {line}: not UTF-8; save it as 'CSV UTF-8'") from None
    if not text.strip():
        raise ValueError(f"{path.name} is empty; its first line must be a header such as image,cat,dog")
    mistakes = _Mistakes()
    content = _Content(path.name, _Words(minus_one), mistakes, separator, group)
    (_read_json_lines if suffix in (".jsonl", ".ndjson", ".json") else _read_csv)(text, content)
    if not content.rows:
        mistakes.tell()
        raise ValueError(f"{path.name} has no row of labels below its header")
    _check_names(content)
    files = _match(content.rows, images, mistakes)
    mistakes.tell()
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

    def __init__(self, file: str, words: _Words, mistakes: _Mistakes, separator: str | None, group: str | None) -> None:
        self.file, self.words, self.mistakes, self.separator, self.group = file, words, mistakes, separator, group
        self.rows: list[_Row] = []
        self.names: dict[str, int] = {}
        self.lists = False
        self.row, self.column, self.value = array("l"), array("l"), array("f")
        self.held: list[bool] = []
        self.groups: list[str] = []

    def add(self, row: _Row, names: Iterable[str], values: Sequence[float]) -> None:
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
                    fix = "if this column is no class, take it out, or name it with --group if it says what belongs together"
                    if cell.strip() in ("-1", "-1.0"):
                        fix = "-1 is unknown in some files and absent in others: say --minus-one unknown or --minus-one absent"
                    elif what == "column" and len(cells) == 1:
                        fix = "if it lists what is present, call the column labels"
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
        self.groups.append("" if word is None else _clean(str(word)))
        self.groups[-1] = self.groups[-1] or where


@lru_cache(maxsize=1 << 16)
def _clean(name: str) -> str:
    """A name as it is compared: composed characters, no space around."""
    return unicodedata.normalize("NFC", name).strip()


def _read_csv(text: str, content: _Content) -> None:
    """Rows of a table or of lists; the separator of columns is the one that makes most of the header."""
    file = content.file
    first = next(line for line in text.splitlines() if line.strip())
    delimiter = max(",;\t", key=lambda d: len(next(csv.reader([first], delimiter=d))))  # the comma where they are equal
    reader = csv.reader(io.StringIO(text, newline=None), delimiter=delimiter, skipinitialspace=True)
    header: list[str] = []
    classes: list[int] = []
    columns: dict[str, int] = {}
    names: list[str] = []
    listed: list[str] = []
    places: list[str] = []
    try:
        for cells in reader:
            if not any(map(str.strip, cells)):
                continue
            where = f"{file}, line {reader.line_num}"
            if not header:
                header = [_clean(cell) for cell in cells]
                columns = _columns(where, header, content.group)
                classes = [i for i in range(1, len(header)) if i not in columns.values()]
                names = [header[i] for i in classes]
                content.lists = len(names) == 1 and _LISTS.fullmatch(names[0]) is not None
                continue
            if len(cells) != len(header):
                quote = '; put the list in quotes, "cat,dog", or separate it by |' if content.lists else ""
                shown = ", ".join(header[:4])
                content.mistakes.add(f"{where}: {len(cells)} cells, but the header has {len(header)} ({shown} …){quote}")
                continue
            if content.lists:
                listed.append(cells[classes[0]])
                places.append(f"{where}, column {names[0]}")
                content.rows.append(_Row(where, cells[0]))
            else:
                own = [cells[i] for i in classes] if columns else cells[1:]
                content.add(_Row(where, cells[0]), names, content.labels(where, "column", names, own))
            if "split" in columns:
                content.side(where, cells[columns["split"]])
            if "group" in columns:
                content.together(where, cells[columns["group"]])
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: {error}; a quote that is never closed, perhaps") from None
    if content.lists:
        rows, content.rows = content.rows, []
        found, content.separator = split_cells(listed, content.separator, places)
        for row, some in zip(rows, found, strict=True):
            content.add(row, map(_clean, some), [1.0] * len(some))
    elif content.separator is not None and not content.lists:
        raise ValueError(f"{file}: --separator is for a column of lists such as image,labels, and this is a table")


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
    kinds = set()
    wanted = 'wanted one object a line, such as {"image": "a.jpg", "labels": {"cat": 1, "dog": 0}} or "labels": ["cat"]'
    if content.separator is not None:
        raise ValueError(f"{file}: --separator is for lists in a column of a table; JSON has lists of its own")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    parsed = []
    for number, line in lines:
        try:
            parsed.append((f"{file}, line {number}", json.loads(line)))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}, column {error.colno}: not JSON ({error.msg}); {wanted}") from None
    keys = {key for _, item in parsed if isinstance(item, dict) for key in item}
    for where, item in parsed:
        labels = item.get("labels") if isinstance(item, dict) else None
        if not isinstance(labels, dict | list) or not isinstance(item.get("image"), str):
            content.mistakes.add(f"{where}: {wanted}")
            continue
        kinds.add(type(labels))
        row = _Row(where, item["image"])
        if isinstance(labels, dict):
            cells = ["" if value is None else str(value) for value in labels.values()]
            content.add(row, map(_clean, labels), content.labels(where, "class", labels, cells))
        elif all(isinstance(name, str) for name in labels):
            some = [name for part in labels if (name := _clean(part))]
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


def escaped(name: str) -> str:
    """A file's name as it can be printed and written: bytes that are no text are escaped."""
    return name.encode(errors="backslashreplace").decode()


def _match(rows: list[_Row], images: Sequence[str], mistakes: _Mistakes) -> list[str]:
    """The image file of each row."""
    whole = {_clean(file): file for file in images}
    others: dict[str, list[str]] = {}
    for file in images:
        stem = posixpath.splitext(file)[0]
        written = escaped(file).replace("\\", "/")  # as names of rows are compared
        for name in dict.fromkeys(map(_clean, (stem, posixpath.basename(file), posixpath.basename(stem), written))):
            others.setdefault(name, []).append(file)
    found: list[str] = []
    first: dict[str, str] = {}
    for row in rows:
        name = posixpath.normpath(_clean(row.image).replace("\\", "/")) if row.image.strip() else ""
        fits = [whole[name]] if name in whole else others.get(name, [])
        if not name:
            mistakes.add(f"{row.where}: the first column, the image, is blank")
        elif not fits:
            near: list[str] = []
            if len(mistakes.lines) < _SHOWN:  # it takes its time
                stem = posixpath.splitext(name)[0].casefold()  # in other case or of another kind
                near = [f for f in whole if posixpath.splitext(f)[0].casefold() == stem]
                near = near or get_close_matches(name, [*whole, *others], n=1)
            hint = f"; near it: {near[0]}" if near else f"; the folder holds {images[0]} and {len(images) - 1} more"
            mistakes.add(f"{row.where}: there is no image {row.image.strip()!r} in the folder{hint}")
        elif len(fits) > 1:
            mistakes.add(f"{row.where}: {row.image.strip()!r} may be {fits[0]} or {fits[1]}; write its path below the folder")
        elif fits[0] in first:
            mistakes.add(f"{row.where}: a second row for {fits[0]}, which {first[fits[0]]} has; one row an image")
        else:
            first[fits[0]] = row.where
            found.append(fits[0])
    return found


# ------------------------------------------------------------------------------------------------------- hold-out
def hold_out(targets: Tensor, share: float, *, seed: int = 0, groups: Sequence[str] | None = None) -> Tensor:
    """Which images are kept from training, to score on: a share of them, of each class too as far as that can be.

    Of every present and every absent label with n known entries, round(share · n) are wanted, at least one where n ≥ 2; a
    present one always stays for training. The label that is rarest is served first, by an image at random; where images are
    few, by one of some that serves most others with it, and more than the share is taken to have a present label of each class,
    at most half of all. Images of which nothing is known stay for training. With groups all of this is said of whole groups.

    Args:
        targets: (N, C) of 1, 0, -1. share: from 0 to below 1. seed: of the order among equals.
        groups: what each of the N images belongs to; those of one group stay together. Default: each by itself.

    Returns:
        (N,) bool.

    Reference: after the iterative stratification of Sechidis et al. 2011; the rules for rare classes are our choice.
    """
    names = range(len(targets)) if groups is None else groups
    place = {name: i for i, name in enumerate(dict.fromkeys(names))}
    order = torch.randperm(len(place), generator=torch.Generator().manual_seed(seed))
    rank = order.argsort()[torch.tensor([place[name] for name in names], dtype=torch.long)].numpy()
    known = (targets != UNKNOWN).any(dim=1).numpy()
    total = int(known.sum())
    taken = np.zeros(len(place), dtype=bool)
    if share <= 0 or total < 2:
        return torch.from_numpy(taken[rank])
    images = np.bincount(rank, known, len(place)).astype(int)  # with a known label, of each group
    labels = torch.cat([targets == 1, targets == 0], dim=1).int()  # known ones; then counted by group
    has = (
        torch.zeros(len(place), labels.shape[1], dtype=torch.int).index_add_(0, torch.from_numpy(rank), labels).numpy()
    )  # by group
    present = np.arange(has.shape[1]) < targets.shape[1]
    counts = has.sum(axis=0)
    wanted = np.minimum(np.rint(share * counts).clip(min=1), counts - 1)
    size, most = max(1, round(share * total)), max(1, round(share * total), total // 2)
    need, left, count = wanted.copy(), counts.copy(), 0
    rarest = sorted(range(len(counts)), key=counts.tolist().__getitem__)
    free = {label: has[:, label].nonzero()[0] for label in rarest} | {-1: images.nonzero()[0]}  # -1: of any label
    choice = max(1, 256 // len(free[-1]))

    def spare(label: int) -> int | None:
        """The next free group, or of a few the one with most labels that are needed; none with the last present of a class."""
        rows = free[label][:1024]
        rows = rows[~taken[rows]]
        if len(rows) < 256:
            rows = free[label] = free[label][~taken[free[label]]]
        rows = rows[:256]
        rows = rows[(images[rows] <= most - count) & ~(present & (has[rows] > 0) & (left <= has[rows])).any(axis=1)]
        fit = images[rows] <= size - count
        rows = (rows[fit] if fit.any() else rows)[:choice]
        gain = np.minimum(has[rows], need.clip(min=0)).sum(axis=1) / images[rows]
        return int(rows[gain.argmax()]) if len(rows) else None

    while count < most:
        # Beyond the share only for classes that have no present label there yet.
        asking = (need > 0) & (present & (need == wanted) if count >= size else True)
        chosen = None
        for label in rarest if asking.any() else ():
            if asking[label]:
                if (chosen := spare(label)) is not None:
                    break
                need[label] = 0  # what cannot be spared now cannot be later
        if chosen is None and count < size:
            chosen = spare(-1)
        if chosen is None:
            break
        taken[chosen] = True
        count += images[chosen]
        need -= has[chosen]
        left -= has[chosen]
    return torch.from_numpy(taken[rank])
