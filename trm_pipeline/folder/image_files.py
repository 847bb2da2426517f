"""Image files of all kinds, found and read upright as 8-bit RGB."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from trm_pipeline.folder.image_names import SHOWN
from trm_pipeline.progress import say

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
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def read_image(path: str | Path, size: tuple[int, int]) -> Image.Image:
    """An image in RGB, upright, and not much larger than ``size`` (height, width) where a JPEG can be decoded at less.

    What is transparent becomes white, and of several frames it is the first. Gray beyond 8 bits is scaled, see :func:`to_bytes`;
    of colors in 16 bits Pillow keeps the high bytes. An orientation that cannot be read is none.

    Raises:
        Exception: whatever the decoder raises at a broken file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            side = 2 * max(size)  # of either orientation
            image.draft(None, (side, side))
            return shown_upright(image)


def shown_upright(image: Image.Image) -> Image.Image:
    """An image of Pillow's in RGB, as :func:`read_image` shows it: upright, on white, and gray beyond 8 bits scaled."""
    image.load()  # a broken file fails here, and not as tags that are broken
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken tags raise what they like, and ImageOps.exif_transpose fails at others than this one, too
        turn = None
    shown = Image.fromarray(to_bytes(np.asarray(image))) if image.mode.startswith(("I", "F")) else image
    shown = shown if turn is None else shown.transpose(turn)
    if shown.mode.endswith(("A", "a")) or "transparency" in shown.info:
        rgba = shown.convert("RGBA")
        shown = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return shown.convert("RGB")


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


def why_unreadable(path: Path) -> str:
    """What the decoder says of a broken file."""
    try:
        if path.stat().st_size == 0:
            return "the file is empty"
        read_image(path, (1, 1))
    except UnidentifiedImageError:
        heic = path.suffix.lower() in (".heic", ".heif")
        return "convert it to JPEG: Pillow does not read HEIC" if heic else "not an image, or none that Pillow reads"
    except Exception as error:  # decoders raise what they like
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return "its features are not finite"
