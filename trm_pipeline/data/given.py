"""Features that any encoder made, in the layout that :func:`trm_losses.write_features` writes."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trm_pipeline.config.presets import Preset
from trm_pipeline.data.base import LabelledImages, Place, Source, found_in, lines_of
from trm_pipeline.features.backbone import finished_texts, needs_text_tower
from trm_pipeline.features.cached import CachedFeatures, mapped
from trm_pipeline.features.frozen import Frozen
from trm_pipeline.files import read_json

_FLOATS = (np.dtype(np.float16), np.dtype(np.float32))
_AT_A_TIME = 1 << 24  # values that are read together


class Meta(NamedTuple):
    """What ``meta.json`` says; texts and tokens of the classes are in ``text.npy`` and the splits."""

    class_names: list[str]
    logit_scale: float
    grid: tuple[int, int] | None
    expected_positives: float | None


def read_meta(folder: Path) -> Meta:
    """``meta.json``, checked."""
    path = folder / "meta.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found ({folder} holds: {found_in(folder)}); {_LAYOUT}")
    found = read_json(path, "JSON", _LAYOUT)
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(found).__name__}; {_LAYOUT}")
    names, scale, grid, expected = (found.get(key) for key in ("class_names", "logit_scale", "grid", "expected_positives"))
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"{path}: class_names must be a list of names, got {names!r}")
    if scale is None or not _positive(scale):
        raise ValueError(f"{path}: logit_scale must be above 0, 100 for CLIP, got {scale!r}")
    if grid is not None and not (isinstance(grid, list) and len(grid) == 2 and all(isinstance(n, int) and n > 0 for n in grid)):
        raise ValueError(f"{path}: grid must be [height, width] of the tokens, got {grid!r}; leave it out where there is none")
    if expected is not None and not _positive(expected):
        raise ValueError(f"{path}: expected_positives must be above 0, the present labels of an image, got {expected!r}")
    return Meta(names, float(scale), None if grid is None else (grid[0], grid[1]), expected)


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def opened(path: Path, *shape: int | str) -> np.ndarray:
    """See :func:`.mapped`; a file that is not there is another error."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found ({path.parent} holds: {found_in(path.parent)}); {_LAYOUT}")
    return mapped(path, *shape)


def finite(path: Path, array: np.ndarray, digest: Any) -> np.ndarray:
    """The array, if it is of finite floats; its values join the digest."""
    if array.dtype not in _FLOATS:
        raise ValueError(f"{path} must be of float16 or float32, got {array.dtype}; write it again")
    digest.update(f"{array.dtype} {array.shape}".encode())
    step = max(1, _AT_A_TIME // math.prod(array.shape[1:]))
    for start in range(0, len(array), step):
        rows = np.ascontiguousarray(array[start : start + step])
        if not np.isfinite(rows).all():
            row = start + int(np.argwhere(~np.isfinite(rows))[0, 0])
            raise ValueError(f"{path} must be finite, got NaN or infinity in row {row}; look for overflow in the encoder")
        digest.update(rows.data)
    return array


def labels_of(root: Path, split: str, meta: Meta) -> Tensor:
    """Labels (n, C) of a split."""
    folder = root / split
    if not folder.is_dir():
        splits = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        wanted = "wanted are train, and test or val"
        raise FileNotFoundError(f"{root} has no split {split!r} (it has: {', '.join(splits) or 'none'}); {wanted}")
    table = opened(path := folder / "targets.npy", "n", len(meta.class_names))
    if bad := [value for value in np.unique(table).tolist() if value not in (0, 1, -1)]:
        raise ValueError(f"{path} must hold 1 (present), 0 (absent) or -1 (unknown), got {bad[0]}; see trm_losses.labels")
    return torch.from_numpy(table.astype(np.float32))


def read(place: Place, preset: Preset, split: str) -> LabelledImages:
    """Labels and names of the images of a split; the images themselves may be anywhere or gone."""
    root = place.folder
    meta = read_meta(root)
    targets = labels_of(root, split, meta)
    names = [str(row) for row in range(len(targets))]
    if (path := root / split / "ids.txt").is_file():
        names = lines_of(path, "FEATURES", _LAYOUT)
        if len(names) != len(targets):
            raise ValueError(f"{path} must name {len(targets)} images, one a line, got {len(names)}")
    return LabelledImages(root.resolve().name, meta.class_names, [str(root / name) for name in names], targets, ids=names)


def scored_split(root: Path) -> str:
    """The split whose images are scored."""
    return "test" if (root / "test").is_dir() else "val"


def settings(place: Place) -> dict[str, Any]:
    """What the folder says of the preset."""
    told = {} if (expected := read_meta(place.folder).expected_positives) is None else {"expected_positives": expected}
    return {
        "model": "given",
        "pretrained": None,
        "train_split": "train",
        "val_split": "val",
        "test_split": scored_split(place.folder),
        "global_head": {},
        **told,
    }


def given(root: Path, preset: Preset, splits: tuple[str, str], device: torch.device) -> Frozen:
    """Features of both splits and the class texts."""
    needs_text_tower(preset.prompts, "given features")
    meta, digest = read_meta(root), hashlib.blake2b(digest_size=16)
    digest.update(repr(meta.logit_scale).encode())
    text = open_text(root, meta, digest).to(device)
    width = text.shape[1]
    features = [open_split(root / split, width, meta, device, digest, first=split == splits[1]) for split in splits]
    widths = [f.penultimate[0].shape[1] if f.penultimate else None for f in features]
    if widths[0] != widths[1]:
        both = " and ".join(
            f"{'none' if width is None else width} in {split}" for split, width in zip(splits, widths, strict=True)
        )
        raise ValueError(f"{root}: penultimate features must be of one width in both splits, got {both}; write the splits again")
    height, across = meta.grid or (1, 1)
    count, views = features[0].tokens[0].shape[1], features[0].views
    return Frozen(
        model="given features",
        detail=f"given features, {count} tokens of width {width}, {views} view{'s' * (views > 1)} of the training images",
        weights=digest.hexdigest(),
        features=features[0],
        test_features=features[1],
        text=text,
        logit_scale=meta.logit_scale,
        encode=finished_texts,
        image_size=(224, max(1, round(224 * across / height))),
        grid=meta.grid,
    )


def open_text(root: Path, meta: Meta, digest: Any) -> Tensor:
    """The class texts (C, D) in single precision; their values join the digest."""
    text = finite(path := root / "text.npy", opened(path, len(meta.class_names), "D"), digest)
    return torch.from_numpy(text.astype(np.float32))


def open_split(folder: Path, width: int, meta: Meta, device: torch.device, digest: Any, *, first: bool) -> CachedFeatures:
    """A split's features, whose values join the digest; ``first``: of the first view alone."""
    images, views = len(opened(folder / "targets.npy", "n", len(meta.class_names))), 1
    tokens: list[np.ndarray] = []
    pooled: list[np.ndarray] = []
    penultimate: list[np.ndarray] = []
    number: int | str = "N" if meta.grid is None else math.prod(meta.grid)
    while not first and any((folder / f"{kind}{views}.npy").exists() for kind in ("tokens", "pooled")):
        views += 1
    for view in range(views):
        tokens.append(finite(path := folder / f"tokens{view}.npy", opened(path, images, number, width), digest))
        pooled.append(finite(path := folder / f"pooled{view}.npy", opened(path, images, width), digest))
        path = folder / f"penultimate{view}.npy"
        if len(penultimate) < view and path.exists():
            raise ValueError(f"{path} must stand beside those of earlier views, and these are missing; write the split again")
        if path.exists() or penultimate:
            further = penultimate[0].shape[1] if penultimate else "W"
            penultimate.append(finite(path, opened(path, images, further), digest))
        number = tokens[0].shape[1]
    return CachedFeatures(tokens, pooled, penultimate, device)


_LAYOUT = "FEATURES is a folder that trm_losses.write_features wrote"

SOURCE = Source(
    key="features",
    title="features that an encoder of your own made",
    num_classes=None,
    layout="folder that trm_losses.write_features wrote: meta.json, text.npy and the splits train, and val or test",
    read=read,
    preset="embedded",
    settings=settings,
    given=given,
)
