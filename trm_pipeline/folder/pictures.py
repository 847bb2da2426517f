"""Contact sheets: images with one class each to look at, and where the model saw it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from trm_pipeline.folder.image_files import read_image
from trm_pipeline.folder.labels import escaped
from trm_pipeline.report.pictures import import_pyplot

__all__ = ["Entry", "draw_entries"]

_SIDE = 320  # pixels of an image on the sheet


class Entry(NamedTuple):
    """A label to look at: image, class, what is said of it, the trained model's score, and where it looked, (h, w)."""

    file: str
    class_name: str
    said: str
    score: float
    saliency: np.ndarray


def draw_entries(path: Path, title: str, folder: Path, entries: Sequence[Entry], *, columns: int = 6) -> None:
    """Each entry as its image, with a line around the least part of it that holds half of the class's saliency."""
    pyplot = import_pyplot()
    columns = max(3, min(columns, len(entries)))  # room for the title
    lines = -(-len(entries) // columns)
    figsize = (2.3 * columns, 2.85 * lines + 0.6)
    figure, grid = pyplot.subplots(lines, columns, figsize=figsize, squeeze=False, layout="constrained")
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, entry in zip(grid.flat, entries, strict=False):
        image = read_image(folder / entry.file, (_SIDE, _SIDE))
        image.thumbnail((_SIDE, _SIDE))
        axes.set_anchor("N")
        axes.imshow(np.asarray(image))
        _outline(axes, entry.saliency, image.size)
        axes.set_title(f"{_short(entry.class_name, 24)}?\n{entry.said}, score {entry.score:.2f}", fontsize=9, parse_math=False)
        name = _short(escaped(entry.file), 36)
        axes.text(0.5, -0.02, name, transform=axes.transAxes, ha="center", va="top", fontsize=6.5, color="0.35", parse_math=False)
    figure.suptitle(f"{title}\nin the outline: half of what the model looked at for this class", fontsize=10.5)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of names in scripts that the font lacks
        figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _outline(axes: Any, saliency: np.ndarray, size: tuple[int, int]) -> None:
    """A line over an image of ``size`` (width, height), white on dark, so that it can be seen on anything."""
    smooth = Image.fromarray(saliency.astype(np.float32)).resize((96, 96), Image.Resampling.BICUBIC)
    values = np.pad(np.asarray(smooth).clip(0), 1)  # closed at the borders
    falling = np.sort(values, axis=None)[::-1]
    level = falling[np.searchsorted(falling.cumsum(), 0.5 * falling.sum())]
    if not 0 < level < falling[0]:
        return
    xs, ys = (np.linspace(-0.5 - side / 192, side - 0.5 + side / 192, 98).clip(0, side - 1) for side in size)
    for color, width in (("black", 2.6), ("white", 1.2)):
        axes.contour(xs, ys, values, levels=[level], colors=color, linewidths=width)


def _short(text: str, length: int) -> str:
    """The end of a long text says more than its middle, which is left out; bytes that are no UTF-8 are escaped."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= length else f"{text[: length // 2]}…{text[len(text) + 1 - (length - length // 2) :]}"
