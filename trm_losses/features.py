"""Features of an encoder of your own, written for ``examples/reproduce_features.py``."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._checks import Dims, check_finite, check_targets
from ._feature_files import RowFile, check_about, close_split, grid_of_others, meta_of

_OWNER = "write_features"
_SHAPES = {"tokens": "B N D", "pooled": "B D", "penultimate": "B W"}


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
    root = Path(folder)
    if not split or split.startswith(".") or Path(split).name != split:
        raise ValueError(f"{_OWNER}: split must be a name such as 'train', got {split!r}")
    if (root / split).exists():
        raise FileExistsError(f"{_OWNER}: split {split!r} must be new, and {root / split} is there; delete it to write it again")
    if not views:
        raise ValueError(f"{_OWNER}: views must be at least one iterable of batches, got none")
    if dtype not in (torch.float16, torch.float32):
        raise ValueError(f"{_OWNER}: dtype must be torch.float16 or torch.float32, got {dtype}")
    names = check_about(_OWNER, class_names, text, logit_scale)
    targets = Dims(_OWNER, C=len(names)).targets(targets, "n C", validate=False)
    count = len(targets)
    if not count:
        raise ValueError(f"{_OWNER}: targets must have a row for each image, got no image")
    targets = check_targets(_OWNER, targets, soft=False)
    if ids is not None and (len(ids) != count or not all(name.strip() and len(name.splitlines()) == 1 for name in ids)):
        raise ValueError(f"{_OWNER}: ids must be {count} names of one line each, got {len(ids)}")

    meta = meta_of(names, logit_scale, expected_positives=expected_positives, description=description)
    grid = grid or grid_of_others(_OWNER, root, meta, text)  # before anything is encoded
    root.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{split}.", dir=root))
    try:
        sizes = {"D": text.shape[1]}  # N and W join with the first batch: later ones, and other views, are of the same
        for view, batches in enumerate(views):
            grid = _write_view(partial, view, batches, count, sizes, dtype) or grid
        if grid is not None:
            meta["grid"] = list(grid)
            if math.prod(grid) != sizes["N"]:
                raise ValueError(f"{_OWNER}: grid must be (h, w) with h * w = {sizes['N']} tokens, got {tuple(grid)}")
        close_split(partial, root / split, meta, text, targets, ids)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_view(
    folder: Path, view: int, batches: Iterable[Sequence[Any]], count: int, sizes: dict[str, int], dtype: torch.dtype
) -> tuple[int, int] | None:
    """All batches of a view into a file a kind; the grid, where the batches have one."""
    grid, written = None, 0
    files: dict[str, RowFile] = {}
    with ExitStack() as stack:
        for batch in batches:
            parts = list(batch)
            if len(parts) > 2 and not isinstance(parts[2], Tensor):  # an ImageFeatures
                grid = (int(parts[2][0]), int(parts[2][1]))
                parts = [part for part in (*parts[:2], *parts[3:]) if part is not None]
            if len(parts) not in (2, 3) or len(parts) != len(files or parts):
                raise ValueError(f"{_OWNER}: a batch must be (tokens, pooled) or (tokens, pooled, penultimate), got {len(parts)}")
            given, dims = dict(zip(_SHAPES, parts, strict=False)), Dims(_OWNER, **sizes)
            for name, part in given.items():
                dims.check(name, part, _SHAPES[name])
            sizes |= {key: size for key, size in dims.sizes.items() if key != "B"}
            if not files:
                for name, part in given.items():
                    files[name] = RowFile(folder / f"{name}{view}.npy", dtype, (count, *part.shape[1:]))
                    stack.callback(files[name].close)
            if written + len(parts[0]) <= count:  # what is too much is counted, for the message below
                for name, part in given.items():
                    values = part.detach().to(dtype)
                    check_finite(_OWNER, name, values, f" from image {written} on in {str(dtype).removeprefix('torch.')}")
                    files[name].write(written, values)
            written += len(parts[0])
    if written != count:
        raise ValueError(f"{_OWNER}: view {view} must have the {count} images of the targets, got {written}")
    return grid
