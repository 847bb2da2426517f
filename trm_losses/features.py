"""Features of an encoder of your own, written for ``examples/reproduce_features.py``."""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ._checks import Dims, check_targets

__all__ = ["write_features"]

_OWNER = "write_features"
_NAMES = ("tokens", "pooled", "penultimate")
_SHAPES = ("B N D", "B D", "B W")
_TYPES = {torch.float16: "<f2", torch.float32: "<f4", torch.int8: "|i1"}


def write_features(
    folder: str | os.PathLike[str],
    split: str,
    *views: Iterable[Sequence[Any]],
    targets: Tensor,
    class_names: Sequence[str],
    text: Tensor,
    logit_scale: float,
    ids: Sequence[str] | None = None,
    grid: tuple[int, int] | None = None,
    expected_positives: float | None = None,
    description: str | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a split of a features folder, batch by batch: what is held in memory is one batch.

    A batch is (tokens (B, N, D), pooled (B, D)), with the penultimate features (B, W) of the encoder as a third where it has
    them. What a backbone of :mod:`trm_losses.backbones` gives is one too, and its grid is kept. A split is there as a whole or
    not at all: it has its name once every image is written. The first split also writes class names, texts and scale; the
    others must be given the same.

    Args:
        folder: made where it is missing.
        split: ``"train"``, ``"val"`` or ``"test"``; it must not be there yet.
        views: batches of the same images in the same order, seen in one way or in several, such as mirrored.
        targets: (n, C) labels of the images: 1 present, 0 absent, -1 unknown.
        class_names: C different names.
        text: (C, D) class texts in the space of the tokens.
        logit_scale: the factor that the encoder's own cosines go into its softmax with, 100 for CLIP.
        ids: n names of the images; where they are paths of image files, absolute or seen from ``folder``, reports show them.
        grid: (h, w) of the tokens with h * w = N, for pictures.
        expected_positives: the mean number of present labels of an image that runs with single positives assume.
        description: a sentence about data and encoder.
        dtype: of what is written, ``torch.float16`` or ``torch.float32``.

    Raises:
        FileExistsError: the split is there already.
        ValueError: shapes that do not fit, NaN or infinity, other labels, more or fewer images than targets.

    Example:
        >>> import tempfile, torch
        >>> batches = ((torch.randn(4, 9, 8), torch.randn(4, 8)) for _ in range(3))
        >>> names, text, targets = ["cat", "dog"], torch.randn(2, 8), torch.randint(-1, 2, (12, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_features(folder, "train", batches, targets=targets, class_names=names, text=text, logit_scale=100.0)
        ...     sorted(os.listdir(folder))
        ['meta.json', 'text.npy', 'train']
    """
    root, names = Path(folder), list(class_names)
    if not split or split.startswith(".") or Path(split).name != split:
        raise ValueError(f"{_OWNER}: split must be a name such as 'train', got {split!r}")
    if (root / split).exists():
        raise FileExistsError(f"{_OWNER}: split {split!r} must be new, and {root / split} is there; delete it to write it again")
    if not views:
        raise ValueError(f"{_OWNER}: views must be at least one iterable of batches, got none")
    if dtype not in (torch.float16, torch.float32):
        raise ValueError(f"{_OWNER}: dtype must be torch.float16 or torch.float32, got {dtype}")
    if not all(isinstance(name, str) and name.strip() for name in names) or len(set(names)) < len(names):
        raise ValueError(f"{_OWNER}: class_names must be different names, got {names}")
    if not 0 < logit_scale < math.inf:
        raise ValueError(f"{_OWNER}: logit_scale must be above 0, got {logit_scale!r}; take its exp where it is a logarithm")
    dims = Dims(_OWNER, C=len(names))
    dims.check("text", text, "C D")
    _check_finite("text", text)
    dims = Dims(_OWNER, C=len(names))
    targets = dims.targets(targets, "n C", validate=False)
    count = len(targets)
    if not count:
        raise ValueError(f"{_OWNER}: targets must have a row for each image, got no image")
    targets = check_targets(_OWNER, targets, soft=False)
    if ids is not None and (len(ids) != count or not all(name.strip() and len(name.splitlines()) == 1 for name in ids)):
        raise ValueError(f"{_OWNER}: ids must be {count} names of one line each, got {len(ids)}")

    told = {"logit_scale": float(logit_scale), "expected_positives": expected_positives, "description": description}
    meta: dict[str, Any] = {"class_names": names, **{key: value for key, value in told.items() if value is not None}}
    root.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{split}.", dir=root))
    try:
        _save(partial / "text.npy", text.float())
        grid = grid or _grid_of_others(root, meta, (partial / "text.npy").read_bytes())  # before anything is encoded
        sizes = {"D": text.shape[1]}  # N and W join with the first batch: later ones, and other views, are of the same
        for view, batches in enumerate(views):
            grid = _write_view(partial, view, batches, count, sizes, dtype) or grid
        if grid is not None:
            meta["grid"] = list(grid)
            if math.prod(grid) != sizes["N"]:
                raise ValueError(f"{_OWNER}: grid must be (h, w) with h * w = {sizes['N']} tokens, got {tuple(grid)}")
        _save(partial / "targets.npy", targets.to(torch.int8))
        if ids is not None:
            (partial / "ids.txt").write_text("".join(f"{name}\n" for name in ids), encoding="utf-8")
        (partial / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        for name in ("text.npy", "meta.json"):
            os.replace(partial / name, root / name)
        partial.chmod(0o755)
        partial.rename(root / split)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _grid_of_others(root: Path, meta: dict[str, Any], text: bytes) -> tuple[int, int] | None:
    """That of the splits that are there already, which must be of the same classes and encoder."""
    if all(path.name.startswith(".") or not path.is_dir() for path in root.iterdir()):
        return None
    found = json.loads((root / "meta.json").read_text(encoding="utf-8"))
    grid = found.pop("grid", None)
    different = [key for key in dict.fromkeys([*found, *meta]) if found.get(key) != meta.get(key)]
    if different := different or ["text"] * ((root / "text.npy").read_bytes() != text):
        raise ValueError(f"{_OWNER}: {different[0]} must be what the other splits in {root} have; write into another folder")
    return None if grid is None else (grid[0], grid[1])


def _write_view(
    folder: Path, view: int, batches: Iterable[Sequence[Any]], count: int, sizes: dict[str, int], dtype: torch.dtype
) -> tuple[int, int] | None:
    """All batches of a view into a file a kind; the grid, where the batches have one."""
    grid, kinds, written = None, 0, 0
    with ExitStack() as stack:
        files: list[BinaryIO] = []
        for batch in batches:
            parts = list(batch)
            if len(parts) > 2 and not isinstance(parts[2], Tensor):  # an ImageFeatures
                grid = (int(parts[2][0]), int(parts[2][1]))
                parts = [part for part in (*parts[:2], *parts[3:]) if part is not None]
            kinds = kinds or len(parts)
            if len(parts) not in (2, 3) or len(parts) != kinds:
                raise ValueError(f"{_OWNER}: a batch must be (tokens, pooled) or (tokens, pooled, penultimate), got {len(parts)}")
            dims = Dims(_OWNER, **sizes)
            for name, part, shape in zip(_NAMES, parts, _SHAPES, strict=False):
                dims.check(name, part, shape)
            sizes |= {key: size for key, size in dims.sizes.items() if key != "B"}
            files = files or [stack.enter_context((folder / f"{name}{view}.npy").open("wb")) for name in _NAMES[:kinds]]
            for name, part, file in zip(_NAMES, parts, files, strict=False):
                values = part.detach().to(dtype)
                _check_finite(name, values, f" from image {written} on in {str(dtype).removeprefix('torch.')}")
                _write(file, values, None if written else (count, *part.shape[1:]))
            written += len(parts[0])
    if written != count:
        raise ValueError(f"{_OWNER}: view {view} must have the {count} images of the targets, got {written}")
    return grid


def _check_finite(name: str, values: Tensor, where: str = "") -> None:
    if not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).sum())
        raise ValueError(f"{_OWNER}: {name} must be finite, got {bad} NaN or infinite of {values.numel()} values{where}")


def _save(path: Path, values: Tensor) -> None:
    with path.open("wb") as file:
        _write(file, values, values.shape)


def _write(file: BinaryIO, values: Tensor, shape: Sequence[int] | None) -> None:
    """Append rows to an array in numpy's format, after its head where the shape of the whole is given. Without numpy."""
    values = values.detach().cpu().contiguous()
    if shape is not None:
        head = f"{{'descr': {_TYPES[values.dtype]!r}, 'fortran_order': False, 'shape': {tuple(shape)}, }}"
        head += " " * (-(len(head) + 11) % 64) + "\n"  # magic, version and length are 10 bytes; data begin at a multiple of 64
        file.write(b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode())
    if values.numel():
        file.write((ctypes.c_char * (values.numel() * values.element_size())).from_address(values.data_ptr()))
