"""Contact sheets: images with one class each to look at, and where the model saw it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .data.folder import read_image
from .pictures import _pyplot

__all__ = ["Entry", "draw_entries"]

_SIDE = 320  # pixels of an image on the sheet


class Entry(NamedTuple):
    """A label to look at: image, class, what is said of it, and the trained model's score."""

    file: str
    class_name: str
    said: str
    score: float


def draw_entries(
    path: Path, title: str, folder: Path, entries: Sequence[Entry], maps: Sequence[Tensor], *, columns: int = 6
) -> None:
    """Each entry as its image, with the saliency (N,) of the class over a square grid as light on it."""
    pyplot = _pyplot()
    lines = -(-len(entries) // columns)
    columns = min(columns, len(entries))
    figure, grid = pyplot.subplots(lines, columns, figsize=(2.3 * columns, 2.75 * lines + 0.5), squeeze=False, layout="constrained")
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, entry, saliency in zip(grid.flat, entries, maps, strict=False):
        image = read_image(folder / entry.file, (_SIDE, _SIDE))
        image.thumbnail((_SIDE, _SIDE))
        axes.imshow(np.asarray(image))
        axes.set_title(f"{_short(entry.class_name, 22)}?\n{entry.said}, score {entry.score:.2f}", fontsize=9)
    figure.suptitle(title, fontsize=11)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of names in scripts that the font lacks
        figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
