"""A folder of one's own images and one file of labels, as far as they are known."""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
import sys
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from trm_losses.labels import UNKNOWN

from ..progress import say

__all__ = ["FolderImages", "Labels", "find_images", "hold_out", "read_image", "read_labels"]

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
_LISTS = ("labels", "label", "classes", "tags")  # header of a column that lists what is present
_SHOWN = 5  # mistakes of a file that are named; the others are counted


class Labels(NamedTuple):
    """What a label file says: N images relative to their folder, C class names, targets (N, C) of 1, 0 and -1 (unknown).

    ``lists`` is whether images come with a list of what is present, and what is not listed was left unknown.
    """

    files: list[str]
    class_names: list[str]
    targets: Tensor
    lists: bool


class _Row(NamedTuple):
    """An image of the label file: where it stands, its name there, and its labels by class."""

    where: str
    image: str
    labels: dict[str, float]


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
        swapped = []
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
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
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
    path: Path, images: Sequence[str], *, minus_one: str | None = None, unlisted_absent: bool = False
) -> Labels:
    """Labels of images out of a CSV or JSON-lines file.

    A table has one column of images, which comes first, and one for each class; a list has the columns ``image,labels``, with
    names separated by ``;`` ``|`` or ``,``. A line of JSON is ``{"image": ..., "labels": ...}`` with an object of labels, or a
    list of what is present. Classes are in the order of the columns, or of the objects' keys; of lists alphabetical.

    Args:
        images: files of the folder, from :func:`find_images`. An image may be named by its path below the folder, with or
            without the suffix, or by its file name where that is found once.
        minus_one: what -1 means, "unknown" or "absent" (0 is unknown then); by default it is refused, since both are in use.
        unlisted_absent: what a list does not name is absent, not unknown.

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
    words = dict(_WORDS)
    if minus_one is not None:
        words |= dict.fromkeys(("-1", "-1.0"), 0.0 if minus_one == "absent" else float(UNKNOWN))
    if minus_one == "absent":
        words |= dict.fromkeys(("0", "0.0"), float(UNKNOWN))

    def label(value: object, where: str) -> float:
        word = "" if value is None else str(value).strip().lower()
        if word in words:
            return words[word]
        fix = "if this column is no class, take it out"
        if word in ("-1", "-1.0"):
            fix = "-1 is unknown in some files and absent in others: say --minus-one unknown or --minus-one absent"
        mistakes.add(f"{where}: {str(value).strip()!r} is no label ({_ACCEPTED}); {fix}")
        return float(UNKNOWN)

    read = _read_json_lines if suffix in (".jsonl", ".ndjson", ".json") else _read_csv
    rows, class_names, lists = read(path.name, text, label, mistakes)
    if not rows:
        mistakes.tell()
        raise ValueError(f"{path.name} has no row of labels below its header")
    _check_names(path.name, class_names, rows, lists)
    files = _match(rows, images, mistakes)
    mistakes.tell()
    column = {name: c for c, name in enumerate(class_names)}
    targets = torch.full((len(rows), len(class_names)), 0.0 if lists and unlisted_absent else float(UNKNOWN))
    for i, row in enumerate(rows):
        for name, value in row.labels.items():
            targets[i, column[name]] = value
    return Labels(files, class_names, targets, lists and not unlisted_absent)


_Label = Callable[[object, str], float]
_Read = tuple[list[_Row], list[str], bool]


def _clean(name: str) -> str:
    """A name as it is compared: composed characters, no space around."""
    return unicodedata.normalize("NFC", name).strip()


def _split_list(cell: str) -> list[str]:
    separator = next((s for s in ";|," if s in cell), ";")
    return [name for part in cell.split(separator) if (name := _clean(part))]


def _read_csv(file: str, text: str, label: _Label, mistakes: _Mistakes) -> _Read:
    """Rows of a table or of lists; the separator is the one that makes most of the header."""
    first = next(line for line in text.splitlines() if line.strip())
    delimiter = max(",;\t", key=lambda d: len(next(csv.reader([first], delimiter=d))))  # the comma where they are equal
    reader = csv.reader(io.StringIO(text, newline=None), delimiter=delimiter, skipinitialspace=True)
    header: list[str] = []
    rows: list[_Row] = []
    lists = False
    try:
        lines = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: {error}; a quote that is never closed, perhaps") from None
    for number, cells in lines:
        where = f"{file}, line {number}"
        if not header:
            header = [_clean(cell) for cell in cells]
            _check_header(where, header)
            lists = len(header) == 2 and header[1].lower() in _LISTS
            continue
        if len(cells) != len(header):
            quote = '; put the list in quotes, "cat,dog", or separate it by |' if lists else ""
            mistakes.add(f"{where}: {len(cells)} cells, but the header has {len(header)} ({', '.join(header[:4])} …){quote}")
            continue
        if lists:
            labels = dict.fromkeys(_split_list(cells[1]), 1.0)
        else:
            named = zip(header[1:], cells[1:], strict=True)
            labels = {name: label(cell, f"{where}, column {name}") for name, cell in named}
        rows.append(_Row(where, cells[0], labels))
    names = sorted({name for row in rows for name in row.labels}) if lists else header[1:]
    return rows, names, lists


def _says(cell: str) -> bool:
    """It is a label, not the name of a class."""
    return cell.lower() in _WORDS or cell in ("-1", "-1.0")


def _check_header(where: str, header: list[str]) -> None:
    if len(header) < 2:
        raise ValueError(f"{where}: the header must name a column of images and one for each class, got {header[0]!r} alone")
    if all(_says(cell) for cell in header[1:]):
        raise ValueError(f"{where}: the first line must be a header with the names of the classes, got {', '.join(header[:4])}")
    for number, name in enumerate(header, start=1):
        if not name and number > 1:
            raise ValueError(f"{where}: column {number} has no name; name its class or take it out")
        if header.index(name) < number - 1:
            raise ValueError(f"{where}: columns {header.index(name) + 1} and {number} are both named {name!r}")


def _read_json_lines(file: str, text: str, label: _Label, mistakes: _Mistakes) -> _Read:
    """Rows of one JSON object a line."""
    rows: list[_Row] = []
    names: dict[str, None] = {}
    kinds = set()
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        wanted = 'wanted one object a line, such as {"image": "a.jpg", "labels": {"cat": 1, "dog": 0}} or "labels": ["cat"]'
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}, column {error.colno}: not JSON ({error.msg}); {wanted}") from None
        labels = content.get("labels") if isinstance(content, dict) else None
        if not isinstance(labels, dict | list) or not isinstance(content.get("image"), str):
            mistakes.add(f"{where}: {wanted}")
            continue
        kinds.add(type(labels))
        if isinstance(labels, dict):
            found = {_clean(name): label(value, f"{where}, class {name}") for name, value in labels.items()}
        elif all(isinstance(name, str) for name in labels):
            found = {name: 1.0 for item in labels if (name := _clean(item))}
        else:
            mistakes.add(f"{where}: a list of labels must hold names; {wanted}")
            continue
        names |= dict.fromkeys(found)
        rows.append(_Row(where, content["image"], found))
    if len(kinds) > 1:
        raise ValueError(f"{file}: labels are lists in some lines and objects in others; take one form, objects can say all")
    lists = kinds == {list}
    return rows, sorted(names) if lists else list(names), lists


def _check_names(file: str, names: list[str], rows: list[_Row], lists: bool) -> None:
    """No class at all, labels where a list must hold names, or two names that differ in their spelling alone."""
    if not names:
        raise ValueError(f"{file} names no class in its {len(rows)} rows")
    labels = [name for name in names if _WORDS.get(name.lower()) == UNKNOWN] or names * all(map(_says, names))
    if lists and labels:
        raise ValueError(
            f"{file}: a list must hold names of classes, got {', '.join(labels)}; leave it blank where nothing is known, and "
            "call a column of one class by its name"
        )
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault("".join(name.casefold().split()), name)
        if other != name:
            where = next((f"{row.where}: " for row in rows if name in row.labels), f"{file}: ")
            raise ValueError(f"{where}the classes {other!r} and {name!r} differ in case or spaces alone; write them alike")


def _match(rows: list[_Row], images: Sequence[str], mistakes: _Mistakes) -> list[str]:
    """The image file of each row."""
    whole = {_clean(file): file for file in images}
    others: dict[str, list[str]] = {}
    for file in images:
        stem = posixpath.splitext(file)[0]
        for name in dict.fromkeys(map(_clean, (stem, posixpath.basename(file), posixpath.basename(stem)))):
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
def hold_out(targets: Tensor, share: float, *, seed: int = 0) -> Tensor:
    """Which images are kept from training, to score on: a share of them, of each class too as far as that can be.

    Of every present and every absent label with n known entries, round(share · n) are wanted, at least one where n ≥ 2; a
    present one always stays for training. The label that is rarest is served first, by an image at random; where images are
    few, by one of some that serves most others with it, and more than the share is taken to have a present label of each class,
    at most half of all. Images of which nothing is known stay for training.

    Args:
        targets: (N, C) of 1, 0, -1. share: from 0 to below 1. seed: of the order among equals.

    Returns:
        (N,) bool.

    Reference: after the iterative stratification of Sechidis et al. 2011; the rules for rare classes are our choice.
    """
    held = torch.zeros(len(targets), dtype=torch.bool)
    total = int((targets != UNKNOWN).any(dim=1).sum())
    if share <= 0 or total < 2:
        return held
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    has = torch.cat([targets == 1, targets == 0], dim=1)[order]  # (N, 2C): the known labels of each image
    present = torch.arange(has.shape[1]) < targets.shape[1]
    counts = has.sum(dim=0)
    wanted = (share * counts).round().clamp(min=1).minimum(counts - 1)
    size, most = max(1, round(share * total)), max(1, round(share * total), total // 2)
    taken, need, left = held.clone(), wanted.clone(), counts.clone()

    def spare(free: Tensor) -> int | None:
        """The next free image, or of a few the one with most labels that are needed; none with the last present of a class."""
        rows = free.nonzero().flatten()[:256]
        rows = rows[~(has[rows] & present & (left < 2)).any(dim=1)][: max(1, 256 // total)]
        return int(rows[(has[rows].float() @ need.sign().clamp(min=0)).argmax()]) if len(rows) else None

    while (count := int(taken.sum())) < most:
        # Beyond the share only for classes that have no present label there yet.
        asking = (need > 0) & (present & (need == wanted) if count >= size else torch.ones_like(present))
        chosen = None
        for label in sorted(asking.nonzero().flatten().tolist(), key=lambda label: int(counts[label])):
            if (chosen := spare(has[:, label] & ~taken)) is not None:
                break
            need[label] = 0  # what cannot be spared now cannot be later
        if chosen is None and count < size:
            chosen = spare(has.any(dim=1) & ~taken)
        if chosen is None:
            break
        taken[chosen] = True
        need -= has[chosen].to(need.dtype)
        left -= has[chosen].to(left.dtype)
    held[order] = taken
    return held
