"""Features that are written bit by bit: what a killed process has done is not done again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trm_losses._feature_files import RowFile, close_split
from trm_pipeline.files import differences, making_folder, replacing

ABOUT_FILE = "made_with.json"
UNREADABLE_FILE = "unreadable.txt"
_IMAGES, _MARKS = "images.json", "marks"
_LEFT, _DONE, _BROKEN = 0, 1, 2


def _stamp(image: Path) -> list[int] | None:
    """What a file of other content differs in; None: there is none."""
    try:
        found = image.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def done_rows(folder: Path, views: int, count: int) -> Tensor:
    """(views, n) bool: what is encoded in a folder, all of a finished one."""
    if not (folder / _MARKS).is_file():
        return torch.ones(views, count, dtype=torch.bool)
    return torch.from_numpy(np.fromfile(folder / _MARKS, dtype=np.uint8).reshape(views, count) == _DONE)


class Unfinished:
    """Half-precision features of a list of images in ``.NAME.unfinished``, and for each image and view a mark.

    NAME is that of a split of a features folder, or of a cache.

    Several processes may write, each its own images. An image is marked once its rows are on the disk.

    Args:
        folder: that :meth:`start` made.
        new: whether it is to be filled with files first.

    Attributes:
        images: n names, in the order of the rows; fixed at the start.
        about: what the features depend on.
    """

    def __init__(self, folder: Path, *, new: bool = False) -> None:
        self.folder = folder
        self.about: dict[str, Any] = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
        self._stamped: list[Any] = json.loads((folder / _IMAGES).read_text(encoding="utf-8"))
        if any(not isinstance(entry, list) for entry in self._stamped):
            raise ValueError(f"{folder} was begun by another version; delete it, and start again")
        self.images: list[str] = [name for name, _ in self._stamped]
        shapes: dict[str, list[int]] = self.about["shapes"]
        count = len(self.images)
        names = [f"{kind}{view}.npy" for kind in shapes for view in range(self.about["views"])]
        if not new and (lost := [name for name in names if not (folder / name).is_file()]):
            raise FileNotFoundError(f"{folder} must hold {lost[0]}, which is gone; delete the folder, and start again")
        self._files = [
            {kind: RowFile(folder / f"{kind}{view}.npy", torch.float16, (count, *shape)) for kind, shape in shapes.items()}
            for view in range(self.about["views"])
        ]
        self._pending: list[tuple[int, int, int]] = []

    @property
    def finishing(self) -> bool:
        """Whether all is encoded, and a process that put it together was killed: nothing may be written any more."""
        return self.folder.name.endswith(".finishing")

    @staticmethod
    def find(root: Path, name: str) -> Path | None:
        """The folder of what was begun under a name, or None."""
        found = (root / f".{name}.{state}" for state in ("unfinished", "finishing"))
        return next((path for path in found if path.is_dir()), None)

    @classmethod
    def start(cls, root: Path, name: str, images: Sequence[str], about: Mapping[str, Any], *, below: Path) -> Unfinished:
        """Begin, with room for all of it, or go on with what was begun; images that have changed since are left again.

        Args:
            root: where to, made where it is missing.
            name: of the folder that it is to become.
            images: n names; of what was begun they stay what they were.
            about: what the features depend on, as JSON has it; with ``views``, a number, and ``shapes`` of a row by kind.
            below: the folder that the names start from.

        Raises:
            ValueError: what was begun is about something else.
            OSError: there is no room, or a file of what was begun is gone.
        """
        if cls.find(root, name) is None:
            with making_folder(root / f".{name}.unfinished", lambda: cls.find(root, name) is not None) as partial:
                (partial / _IMAGES).write_text(json.dumps([[image, _stamp(below / image)] for image in images]), encoding="utf-8")
                (partial / _MARKS).write_bytes(bytes(len(images) * about["views"]))
                # Last: a folder that says what it is about, and has no marks, is finished.
                (partial / ABOUT_FILE).write_text(json.dumps(about, indent=1), encoding="utf-8")
                cls(partial, new=True).close()
        folder = cls.find(root, name)
        if folder is None:
            raise FileNotFoundError(f"{root / name} was finished by another process")
        made = cls(folder)
        if changed := differences(json.loads(json.dumps(about)), made.about):
            raise ValueError(
                f"{folder} holds unfinished features of something else ({'; '.join(changed)}); go on as it was begun, or "
                "delete it"
            )
        if not made.finishing:
            made._forget_changed(below)
        return made

    def _forget_changed(self, below: Path) -> None:
        """Images with other content than what was encoded are left; those that are gone stay as they are."""
        now = [_stamp(below / image) for image in self.images]
        changed = [row for row, (_, before) in enumerate(self._stamped) if now[row] is not None and now[row] != before]
        if changed:
            self._mark([(view, row, _LEFT) for view in range(self.views) for row in changed])
            for row in changed:
                self._stamped[row][1] = now[row]
            with replacing(self.folder / _IMAGES) as temporary:
                temporary.write_text(json.dumps(self._stamped), encoding="utf-8")

    @property
    def views(self) -> int:
        """How many there are of every image."""
        return len(self._files)

    def marks(self) -> np.ndarray:
        """(views, n) bytes: left, done or broken."""
        return np.fromfile(self.folder / _MARKS, dtype=np.uint8).reshape(len(self._files), -1)

    def left(self, view: int, part: tuple[int, int]) -> Tensor:
        """The images (k,) of the part, one of so many, that have no features yet; broken ones are tried again."""
        place, parts = part
        count = len(self.images)
        own = slice(count * place // parts, count * (place + 1) // parts)
        return torch.from_numpy(np.flatnonzero(self.marks()[view, own] != _DONE)) + own.start

    def write(self, view: int, rows: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Rows (k,) of a view; which of them (k,) are broken, since a value is not finite. :meth:`keep` marks them."""
        half = {kind: value.half() for kind, value in values.items()}
        broken = ~torch.stack([value.flatten(1).isfinite().all(dim=1) for value in half.values()]).all(dim=0).cpu()
        start = 0
        for end in range(1, len(rows) + 1):
            if end == len(rows) or rows[end] != rows[end - 1] + 1:
                for kind, file in self._files[view].items():
                    file.write(int(rows[start]), half[kind][start:end])
                start = end
        self._pending += [(view, row, _BROKEN if bad else _DONE) for row, bad in zip(rows.tolist(), broken.tolist(), strict=True)]
        return broken

    def keep(self) -> None:
        """Mark what was written, once it is on the disk."""
        for view in {view for view, _, _ in self._pending}:
            for file in self._files[view].values():
                file.sync()
        self._mark(self._pending)
        self._pending = []

    def _mark(self, marks: Sequence[tuple[int, int, int]]) -> None:
        """Set marks of views and rows."""
        if marks:
            with (self.folder / _MARKS).open("r+b", buffering=0) as file:
                for view, row, mark in marks:
                    file.seek(view * len(self.images) + row)
                    file.write(bytes([mark]))

    def broken(self) -> list[int]:
        """Images that have no features in one of the views, in their order."""
        return np.flatnonzero((self.marks() == _BROKEN).any(axis=0)).tolist()

    def complete(self) -> bool:
        """Whether nothing is left, in any part."""
        return bool((self.marks() != _LEFT).all())

    def finish(
        self, place: Path, meta: dict[str, Any], text: Tensor, targets: Tensor, ids: Sequence[str], reasons: Mapping[int, str]
    ) -> bool:
        """Make a split of it: leave broken images out, and give it its name; the last images take the places of the broken ones.

        Args:
            place: the folder of the split. meta: for ``meta.json``. text: (C, D).
            targets: (n, C) labels and ids: n names, of all images.
            reasons: of the broken ones, for ``unreadable.txt``.

        Returns:
            Whether this process did it; if not another one has.
        """
        finishing = self.folder.with_name(f".{place.name}.finishing")
        if not self.finishing:
            try:
                self.folder.rename(finishing)
            except FileNotFoundError:
                return False
            self.folder = finishing
        rows = self._kept()
        for files in self._files:
            for file in files.values():
                file.keep(rows)
        self.close()
        if reasons:
            lines = "".join(f"{ids[row]}\t{reason}\n" for row, reason in reasons.items())
            (finishing / UNREADABLE_FILE).write_text(lines, encoding="utf-8", errors="backslashreplace")
        close_split(finishing, place, meta, text, targets[torch.tensor(rows)], [ids[row] for row in rows])
        for name in (_IMAGES, _MARKS):
            (place / name).unlink()
        return True

    def place(self, place: Path) -> None:
        """Give it its name as it is: no image is left or broken."""
        self.close()
        self.folder.rename(place)
        for name in (_IMAGES, _MARKS):
            (place / name).unlink()

    def _kept(self) -> list[int]:
        """The images that have features: those in their places, and the last ones in the places of those that have none."""
        broken = set(self.broken())
        count = len(self.images) - len(broken)
        others = iter([row for row in range(count, len(self.images)) if row not in broken])
        return [next(others) if row in broken else row for row in range(count)]

    def close(self) -> None:
        """No row can be written after this."""
        for files in self._files:
            for file in files.values():
                file.close()
