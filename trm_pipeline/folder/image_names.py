"""Names as people write them in files of labels, and the image files they mean."""

from __future__ import annotations

import posixpath
import unicodedata
from collections.abc import Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import NamedTuple

SHOWN = 5  # mistakes of a file that are named; the others are counted


class Row(NamedTuple):
    """An image of a file of labels: where it stands, and its name there."""

    where: str
    image: str


class Mistakes:
    """Mistakes of one file, told together: whoever mends one wants to know of the others."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        """One more."""
        self.lines.append(line)

    def tell(self) -> None:
        """Raise, where there were any."""
        if self.lines:
            more = len(self.lines) - SHOWN
            raise ValueError("\n  ".join(self.lines[:SHOWN]) + (f"\n  and {more} more mistakes" if more > 0 else ""))


@lru_cache(maxsize=1 << 16)
def clean(name: str) -> str:
    """A name as it is compared: composed characters, no space around."""
    return unicodedata.normalize("NFC", name).strip()


def escaped(name: str) -> str:
    """A file's name as it can be printed and written: bytes that are no text are escaped."""
    return name.encode(errors="backslashreplace").decode()


class ImageNames:
    """Image files by what they may be called.

    A name is a path below the folder with or without its suffix, or a file name alone where it is found once.

    Args:
        images: files of the folder, from :func:`.image_files.find_images`.
    """

    def __init__(self, images: Sequence[str]) -> None:
        self.images = images
        self.whole = {clean(file): file for file in images}
        self.others: dict[str, list[str]] = {}
        for file in images:
            stem = posixpath.splitext(file)[0]
            written = escaped(file).replace("\\", "/")  # as names of rows are compared
            for name in dict.fromkeys(map(clean, (stem, posixpath.basename(file), posixpath.basename(stem), written))):
                self.others.setdefault(name, []).append(file)

    @staticmethod
    def _path(name: str) -> str:
        return posixpath.normpath(clean(name).replace("\\", "/")) if name.strip() else ""

    def fits(self, name: str) -> list[str]:
        """The files that a name may mean."""
        path = self._path(name)
        return [self.whole[path]] if path in self.whole else self.others.get(path, [])

    def find(self, row: Row, mistakes: Mistakes) -> str | None:
        """The one file that a row means; None and a mistake where it is none, or may be several."""
        fits = self.fits(row.image)
        if len(fits) == 1:
            return fits[0]
        if not row.image.strip():
            mistakes.add(f"{row.where}: the first column, the image, is blank")
        elif fits:
            mistakes.add(f"{row.where}: {row.image.strip()!r} may be {fits[0]} or {fits[1]}; write its path below the folder")
        else:
            near: list[str] = []
            if len(mistakes.lines) < SHOWN:  # it takes its time
                name = self._path(row.image)
                stem = posixpath.splitext(name)[0].casefold()  # in other case or of another kind
                near = [f for f in self.whole if posixpath.splitext(f)[0].casefold() == stem]
                near = near or get_close_matches(name, [*self.whole, *self.others], n=1)
            hint = f"; near it: {near[0]}" if near else f"; the folder holds {self.images[0]} and {len(self.images) - 1} more"
            mistakes.add(f"{row.where}: there is no image {row.image.strip()!r} in the folder{hint}")
        return None


def match_rows(rows: list[Row], images: Sequence[str], mistakes: Mistakes) -> list[str]:
    """The image file of each row; a second row for one is a mistake."""
    names = ImageNames(images)
    found: list[str] = []
    first: dict[str, str] = {}
    for row in rows:
        file = names.find(row, mistakes)
        if file is None:
            continue
        if file in first:
            mistakes.add(f"{row.where}: a second row for {file}, which {first[file]} has; one row an image")
        else:
            first[file] = row.where
            found.append(file)
    return found
