"""Features that are encoded once and kept; a command that was stopped goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from trm_pipeline.features.backbone import ImageTower
from trm_pipeline.features.cached import Batch, CachedFeatures, LiveFeatures
from trm_pipeline.features.unfinished import ABOUT_FILE, Unfinished, done_rows
from trm_pipeline.files import check_writable
from trm_pipeline.progress import Pace, progress

BATCH = 50
KEPT = 5.0
"""Seconds after which what was encoded is kept, at the end of a batch."""

Check = Callable[[Batch], None]
"""Is shown each batch before it is kept, and may refuse it by an error."""


def encode(
    work: Unfinished, live: LiveFeatures, *, part: tuple[int, int] = (0, 1), label: str = "", check: Check | None = None
) -> None:
    """Everything that a part still lacks; what is done when it ends, however it ends, is kept.

    Args:
        work: where to. live: the images of ``work``, in its order, and what encodes them.
        part: which one, counted from 0, and how many there are.
        label: of the bar.
        check: of every batch.
    """
    count = len(live)
    for view in range(work.views):
        rows = work.left(view, part)
        if not len(rows):
            continue
        left = LiveFeatures(
            Subset(live.images, rows.tolist()),
            live.backbone,
            token_pool=live.token_pool,
            device=live.device,
            mirror=bool(view),
            workers=live.workers if len(rows) > 64 else 0,
        )
        told = f"{label}encoding {len(rows)} of {count} images{', mirrored' if view else ''}"
        pace, kept = Pace(len(rows)), time.monotonic()
        try:
            for batch in progress(left.batches(BATCH), told, total=-(-len(rows) // BATCH)):
                if check is not None:
                    check(batch)
                values = {"tokens": batch.tokens, "pooled": batch.pooled, "penultimate": batch.penultimate}
                work.write(view, batch.index, {kind: value for kind, value in values.items() if value is not None})
                pace.add(len(batch.index))
                if time.monotonic() - kept > KEPT:
                    work.keep()
                    kept = time.monotonic()
        finally:
            work.keep()


def weights_digest(backbone: ImageTower) -> str:
    """A fingerprint of the weights themselves, whatever name or file they came from."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cache_features(
    root: Path,
    images: Dataset[tuple[Tensor, Tensor, int]],
    files: list[str],
    backbone: ImageTower,
    *,
    weights: str,
    token_pool: int,
    mirror: bool,
    device: torch.device,
    workers: int = 2,
    check: Check | None = None,
) -> CachedFeatures:
    """Features of a data set out of the cache below ``root``, computed where they are not there yet.

    ``images`` are resized to the backbone's size and normalised with its channel statistics, nothing else. The key holds
    everything the features depend on: model, weights, size, statistics, pooling, value path, views, kind of device and the image
    files (name, length, time of change). A cache of anything else has another name. What another one holds of the same files is
    copied, and one that was not finished is gone on with.
    """
    paths = [os.path.abspath(path) for path in files]
    stats = [(path, os.stat(path)) for path in paths]
    views = 1 + int(mirror)
    key = {
        "version": 2,
        "model": backbone.name,
        "weights": weights,
        "image_size": backbone.image_size,
        "channels": (backbone.image_mean, backbone.image_std),
        "device": device.type,  # encoded under autocast on an accelerator, in full precision elsewhere
        "token_pool": token_pool,
        "value_path": getattr(backbone, "value_path", False),  # of open_clip's ViTs alone
        "views": views,
        "files": [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats],
    }
    name = hashlib.blake2b(json.dumps(key).encode(), digest_size=12).hexdigest()
    shown = re.sub(r"[^\w.-]+", "-", backbone.name)[-80:]  # of a local model this is a path
    folder = root / f"{shown}-{backbone.image_size[0]}-{name}"
    if not folder.is_dir():
        check_writable(root, "--cache")
        live = LiveFeatures(images, backbone, token_pool=token_pool, device=device, workers=workers)
        work = None
        try:
            work = Unfinished.start(root, folder.name, paths, {**key, "shapes": live.shapes}, below=Path())
            _take_over(work, root)
            encode(work, live, check=check)
            if work.broken():
                folder = work.folder  # so that they are tried again at the next start
            else:
                work.place(folder)
        except OSError:
            if not folder.is_dir():
                raise
            if work is not None:  # another process was quicker
                shutil.rmtree(work.folder, ignore_errors=True)
        finally:
            if work is not None:
                work.close()
    cached = CachedFeatures.from_folder(folder, views, device)
    if len(cached) != len(files):
        raise ValueError(f"{folder} must hold the features of {len(files)} images, got {len(cached)}; delete it")
    return cached


def _take_over(work: Unfinished, root: Path) -> None:
    """What other caches hold of the same files, made in the same way."""
    places = {tuple(file): row for row, file in enumerate(work.about["files"])}
    for path in root.glob(f"*/{ABOUT_FILE}"):  # of unfinished ones too
        try:
            other = json.loads(path.read_text(encoding="utf-8"))
            wanted, found = ({**about, "files": [], "views": 0} for about in (work.about, other))
            if path.parent != work.folder and wanted == found:
                _copy(work, path.parent, torch.tensor([places.get(tuple(file), -1) for file in other["files"]]), other["views"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError):  # gone or damaged: then it is encoded anew
            continue


def _copy(work: Unfinished, folder: Path, places: Tensor, views: int) -> None:
    """The rows of a cache in so many views, whose places (n,) in ``work`` are not -1 and lack features."""
    done, held = done_rows(folder, views, len(places)), CachedFeatures.from_folder(folder, views, torch.device("cpu"))
    shapes = work.about["shapes"]
    for view in range(min(work.views, views)):
        left = torch.zeros(len(work.images) + 1, dtype=torch.bool)  # the last is that of -1
        left[work.left(view, (0, 1))] = True
        arrays = {kind: getattr(held, kind)[view] for kind in shapes}
        if wrong := [kind for kind, array in arrays.items() if array.shape != (len(places), *shapes[kind])]:
            raise ValueError(f"{folder} holds {wrong[0]} of another shape")
        for rows in (left[places] & done[view]).nonzero().flatten().split(BATCH):
            work.write(view, places[rows], {kind: torch.from_numpy(array[rows.numpy()]) for kind, array in arrays.items()})
    work.keep()
