"""The files of a features folder: arrays in numpy's format, written row by row, and what is said beside them. Without numpy."""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._checks import Dims, check_finite

_TYPES = {torch.float16: "<f2", torch.float32: "<f4", torch.int8: "|i1"}
_HEAD = 128  # bytes, whatever the shape is, so that it can be written again for fewer rows
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RowFile:
    """An array (n, ...) on disk whose rows are written in any order; several processes may write different rows.

    Args:
        path: the file. One that is not there is made, with room for all rows: a full disk is an error now and not later.
        dtype: of what is written.
        shape: of the whole array.

    Raises:
        OSError: there is no room, or the file is of another type or shape.
    """

    def __init__(self, path: Path, dtype: torch.dtype, shape: Sequence[int]) -> None:
        self.path, self.dtype, self.shape = path, dtype, tuple(shape)
        self.row_bytes = math.prod(shape[1:]) * dtype.itemsize
        if not path.exists():
            with path.open("wb") as file:
                file.write(_head(dtype, shape))
                file.flush()
                _take_room(file.fileno(), _HEAD + shape[0] * self.row_bytes, path)
        self._file = path.open("r+b")

    def write(self, row: int, values: Tensor) -> None:
        """Rows (k, ...) from ``row`` on."""
        values = values.detach().to(self.dtype).cpu().contiguous()
        self._file.seek(_HEAD + row * self.row_bytes)
        if values.numel():
            size = values.numel() * values.element_size()
            self._file.write((ctypes.c_char * size).from_address(values.data_ptr()))
        self._file.flush()

    def sync(self) -> None:
        """What was written is on the disk after this."""
        os.fsync(self._file.fileno())

    def keep(self, rows: Sequence[int]) -> None:
        """Leave these rows, in this order: a place below ``len(rows)`` keeps its row or takes one from above.

        A call that was cut short can be made again.
        """
        count = len(rows)
        self._file.seek(0)
        wanted = _head(self.dtype, (count, *self.shape[1:]))
        if self._file.read(_HEAD) != wanted:
            for place, row in enumerate(rows):
                if row != place:
                    self._file.seek(_HEAD + row * self.row_bytes)
                    content = self._file.read(self.row_bytes)
                    self._file.seek(_HEAD + place * self.row_bytes)
                    self._file.write(content)
            self._file.flush()
            self.sync()
            self._file.seek(0)
            self._file.write(wanted)
            self._file.flush()
        self._file.truncate(_HEAD + count * self.row_bytes)
        self.sync()

    def close(self) -> None:
        """Nothing can be written after this."""
        self._file.close()


def _head(dtype: torch.dtype, shape: Sequence[int]) -> bytes:
    head = f"{{'descr': {_TYPES[dtype]!r}, 'fortran_order': False, 'shape': {tuple(shape)}, }}"
    head = f"{head:<{_HEAD - 11}}\n"  # magic, version and length are 10 bytes; data begin at a multiple of 64
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode()


def _take_room(file: int, size: int, path: Path) -> None:
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
        else:
            os.ftruncate(file, size)
    except OSError as error:
        if error.errno in _FULL:
            error.filename = str(path)
            raise
        os.ftruncate(file, size)  # a file system that cannot take room beforehand


def save_array(path: Path, values: Tensor) -> None:
    """A whole array, in place of what was there."""
    path.unlink(missing_ok=True)
    file = RowFile(path, values.dtype, values.shape)
    file.write(0, values)
    file.close()


def check_about(owner: str, class_names: Sequence[str], text: Tensor, logit_scale: float) -> list[str]:
    """The names of the classes as a list.

    Raises:
        ValueError: names that are none or not different, texts (C, D) that are not finite or of other classes, a scale that is
            not above 0.
    """
    names = list(class_names)
    if not all(isinstance(name, str) and name.strip() for name in names) or len(set(names)) < len(names):
        raise ValueError(f"{owner}: class_names must be different names, got {names}")
    if not 0 < logit_scale < math.inf:
        raise ValueError(f"{owner}: logit_scale must be above 0, got {logit_scale!r}; take its exp where it is a logarithm")
    Dims(owner, C=len(names)).check("text", text, "C D")
    check_finite(owner, "text", text, "")
    return names


def meta_of(class_names: Sequence[str], logit_scale: float, **further: object) -> dict[str, Any]:
    """What ``meta.json`` says, without what is None."""
    told = {"logit_scale": float(logit_scale), **further}
    return {"class_names": list(class_names), **{key: value for key, value in told.items() if value is not None}}


def grid_of_others(owner: str, root: Path, meta: dict[str, Any], text: Tensor) -> tuple[int, int] | None:
    """That of the splits that are there already.

    Raises:
        ValueError: they are of other classes or of another encoder.
    """
    if not root.is_dir() or all(path.name.startswith(".") or not path.is_dir() for path in root.iterdir()):
        return None
    if not (root / "meta.json").is_file():
        raise ValueError(f"{owner}: {root} holds folders and no meta.json, so it is no features folder; write into another one")
    found = json.loads((root / "meta.json").read_text(encoding="utf-8"))
    grid = found.pop("grid", None)
    different = [key for key in dict.fromkeys([*found, *meta]) if key != "grid" and found.get(key) != meta.get(key)]
    values = text.detach().float().cpu().contiguous()
    own = ctypes.string_at(values.data_ptr(), values.nbytes)
    if different := different or ["text"] * ((root / "text.npy").read_bytes()[-len(own) :] != own):
        raise ValueError(f"{owner}: {different[0]} must be what the other splits in {root} have; write into another folder")
    return None if grid is None else (grid[0], grid[1])


def close_split(made: Path, place: Path, meta: dict[str, Any], text: Tensor, targets: Tensor, ids: Sequence[str] | None) -> None:
    """Write what stands beside the features in the folder ``made``, and give it its name; the features folder is above."""
    root = place.parent
    save_array(made / "text.npy", text.float())
    save_array(made / "targets.npy", targets.to(torch.int8))
    if ids is not None:
        lines = "".join(f"{name}\n" for name in ids)
        (made / "ids.txt").write_text(lines, encoding="utf-8", errors="backslashreplace")
    (made / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    for name in ("text.npy", "meta.json"):
        os.replace(made / name, root / name)
    made.chmod(0o755)
    made.rename(place)
