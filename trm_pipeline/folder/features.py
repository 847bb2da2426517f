"""Write what a frozen model makes of a folder of images, as a features folder that ``reproduce features`` reads."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trm_losses._feature_files import grid_of_others, meta_of
from trm_losses.labels import UNKNOWN, known_fraction
from trm_pipeline import ranks
from trm_pipeline.features.cached import LiveFeatures
from trm_pipeline.features.encoding import encode, weights_digest
from trm_pipeline.features.towers import found_anywhere
from trm_pipeline.features.unfinished import ABOUT_FILE, UNREADABLE_FILE, Unfinished
from trm_pipeline.files import differences
from trm_pipeline.folder.encoded import (
    Opening,
    check_encoding,
    check_output,
    images_for,
    open_encoder,
    read_names,
    say_unreadable,
    still_there,
    usual_pool,
    words_of,
)
from trm_pipeline.folder.image_files import find_images, why_unreadable
from trm_pipeline.folder.image_names import escaped
from trm_pipeline.folder.known import read_known
from trm_pipeline.folder.options import FeaturesOptions
from trm_pipeline.progress import say

_OWNER = "features"
_SPLITS = ("train", "val", "test")


class _Split(NamedTuple):
    """A split to write: its name, its files below the image folder, and labels (n, C) of them."""

    name: str
    files: list[str]
    targets: Tensor


def run_features(options: FeaturesOptions) -> None:
    """Everything ``features`` does; a second call goes on where the first one stopped."""
    started = time.perf_counter()
    part = _check(options)
    class_names, splits = _splits(options, find_images(options.images))
    left = [split for split in splits if not (options.output / split.name).is_dir()]
    for split in splits:
        if split not in left:
            say(f"{options.output / split.name} is there already and stays as it is; delete it to write it again")
    if not left:
        return
    _check_apart(options, left)
    opened = open_encoder(options, class_names, words_of(class_names, options.names))
    pool = usual_pool(opened.backbone) if options.token_pool is None else options.token_pool
    about, live = _about(options, opened, pool)
    height, width = opened.backbone.grid(opened.backbone.image_size)
    meta = meta_of(
        class_names,
        opened.backbone.logit_scale,
        expected_positives=options.expected_positives,
        description=f"tokens of {opened.backbone.name} at {' x '.join(map(str, opened.backbone.image_size))} pixels",
        grid=[height // pool, width // pool],
    )
    grid_of_others(_OWNER, options.output, meta, opened.text)
    for split in left:
        work = Unfinished.start(options.output, split.name, split.files, about, below=options.images)
        try:
            _encode(work, split.name, options, live, part)
            if not work.complete():
                say(f"part {options.part} of {split.name} is done; {_count(work)}; the last part to end puts them together")
                continue
            _finish(work, split, options, meta, opened.text)
        except KeyboardInterrupt:
            print(f"\ninterrupted; {_count(work)}, and the same command goes on from there", file=sys.stderr)
            raise SystemExit(130) from None
        finally:
            work.close()
    if all((options.output / split.name).is_dir() for split in splits):
        say(f"{options.output} ({time.perf_counter() - started:.0f} s): trm-losses reproduce features {options.output}")


def _check(options: FeaturesOptions) -> tuple[int, int]:
    """Refuse at the door what would otherwise end late; the part, counted from 0, and how many there are."""
    if ranks.launched() > 1:
        raise ValueError(
            f"features takes one process, got {ranks.launched()} of torchrun; start several with --part 1/2 and so on"
        )
    if options.split is not None and options.split not in _SPLITS:
        raise ValueError(f"--split must be one of {', '.join(_SPLITS)}, got {options.split!r}")
    if options.token_pool is not None and options.token_pool < 1:
        raise ValueError(f"--token-pool must be at least 1, got {options.token_pool}")
    if options.expected_positives is not None and options.expected_positives <= 0:
        raise ValueError(f"--expected-positives must be above 0, got {options.expected_positives:g}")
    if not options.labels and options.classes is None:
        raise ValueError("features needs the names of the classes: give a file of labels, or --classes FILE with a name a line")
    check_encoding(options, options.output)
    if options.part is None:
        return 0, 1
    found = re.fullmatch(r"(\d+)/(\d+)", options.part)
    place, parts = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= place <= parts:
        raise ValueError(f"--part must be K/N with K from 1 to N, such as 1/4, got {options.part!r}")
    return place - 1, parts


def _splits(options: FeaturesOptions, found: list[str]) -> tuple[list[str], list[_Split]]:
    """Names of the classes, and the splits with what is known of their images.

    An image of a split that was begun stays in it, though its file may be gone.
    """
    check_output(options.output, options.images, found)
    begun = {name: Unfinished.find(options.output, name) for name in _SPLITS}
    before = [file for folder in begun.values() if folder for file in Unfinished(folder).images]
    images = sorted({*found, *before})
    names = None if options.classes is None else read_names(options.classes)
    if not options.labels:
        assert names is not None
        targets = torch.full((len(images), len(names)), float(UNKNOWN))
        return names, [_resumed(options.split or "train", images, targets, begun)]
    labels = read_known(options, images)
    names = names or labels.class_names
    if unnamed := [name for name in labels.class_names if name not in names]:
        raise ValueError(f"--classes: {options.classes} must name all classes of {options.labels[0]}, got none of {unnamed[0]!r}")
    targets = torch.full((len(labels.files), len(names)), float(UNKNOWN))
    targets[:, [names.index(name) for name in labels.class_names]] = labels.targets
    if others := len(images) - len(labels.files):
        say(f"{others} images without a row are left out")
    say(f"{len(labels.files)} images, {len(names)} classes; {known_fraction(targets):.0%} of the labels are known")
    sides = {options.split or "train": torch.ones(len(labels.files), dtype=torch.bool)}
    if labels.held is not None and options.split is None:
        sides = {"train": ~labels.held, "val": labels.held}
    elif labels.held is not None:
        say(f"the column split is not heeded: all images are {options.split} (--split)")
    chosen = [(name, side.nonzero().flatten()) for name, side in sides.items() if side.any()]
    return names, [_resumed(name, [labels.files[i] for i in rows.tolist()], targets[rows], begun) for name, rows in chosen]


def _resumed(name: str, files: Sequence[str], targets: Tensor, begun: dict[str, Path | None]) -> _Split:
    """A split with the images that it was begun with, in their order."""
    folder = begun[name]
    if folder is None:
        return _Split(name, list(files), targets)
    before = Unfinished(folder).images
    places = {file: row for row, file in enumerate(files)}
    if new := len(places.keys() - set(before)):
        say(f"{new} images are not in {name}, which was begun without them")
    rows = torch.tensor([places.get(file, -1) for file in before])
    return _Split(name, before, torch.where((rows >= 0)[:, None], targets[rows], float(UNKNOWN)))


def _check_apart(options: FeaturesOptions, left: Sequence[_Split]) -> None:
    """Refuse to write an image into a second split."""
    there: dict[str, Path] = {}
    for name in set(_SPLITS) - {split.name for split in left}:
        if (path := options.output / name / "ids.txt").is_file():
            there |= dict.fromkeys(path.read_text(encoding="utf-8").split("\n")[:-1], path.parent)
    for split in left:
        ids = [escaped(os.path.abspath(options.images / file)) for file in split.files]
        if twice := [own for own in ids if own in there]:
            other = there[twice[0]]
            raise ValueError(
                f"{len(twice)} of {len(ids)} images of {split.name} are in {other} already, such as {twice[0]}; "
                f"take them out of {split.name}, or delete {other} to write it again"
            )
        there |= dict.fromkeys(ids, Unfinished.find(options.output, split.name) or options.output / split.name)


def _about(options: FeaturesOptions, opened: Opening, pool: int) -> tuple[dict[str, Any], LiveFeatures]:
    """What features depend on; and the encoder, which is given its images later.

    Raises:
        ValueError: tokens that cannot be pooled, or the splits that are there are of something else.
    """
    backbone, device = opened.backbone, torch.device(options.device)
    height, width = backbone.grid(backbone.image_size)
    if height % pool or width % pool:
        raise ValueError(f"--token-pool must divide the grid of tokens {height} x {width}, got {pool}")
    live = LiveFeatures(images_for(backbone, []), backbone, token_pool=pool, device=device, workers=options.workers)
    about = {
        "model": found_anywhere(options.model),
        "weights": weights_digest(backbone),
        "image_size": backbone.image_size,
        "channels": (backbone.image_mean, backbone.image_std),
        "token_pool": pool,
        "device": device.type,  # encoded under autocast on an accelerator, in full precision elsewhere
        "views": 1 + options.mirror,
        "shapes": live.shapes,
    }
    own: dict[str, Any] = json.loads(json.dumps(about))
    for path in (options.output / name / ABOUT_FILE for name in _SPLITS):
        if path.is_file():
            there = json.loads(path.read_text(encoding="utf-8"))
            if changed := differences({**own, "views": 0}, {**there, "views": 0}):
                raise ValueError(f"{path.parent} was made with something else ({'; '.join(changed)}); write into another folder")
    return about, live


def _encode(work: Unfinished, name: str, options: FeaturesOptions, live: LiveFeatures, part: tuple[int, int]) -> None:
    if work.finishing:
        return
    live.images = images_for(live.backbone, [options.images / file for file in work.images])
    encode(work, live, part=part, label=f"{name}: ", check=still_there(options.images))


def _finish(work: Unfinished, split: _Split, options: FeaturesOptions, meta: dict[str, Any], text: Tensor) -> None:
    """Name what cannot be read, and give the split its name."""
    paths = [options.images / file for file in work.images]
    broken = work.broken()
    say_unreadable(options.images, broken, work.images)
    reasons = {row: why_unreadable(paths[row]) for row in broken}
    ids = [os.path.abspath(path) for path in paths]
    if work.finish(options.output / split.name, meta, text, split.targets, ids, reasons):
        listed = f"; {len(broken)} left out, see {UNREADABLE_FILE}" if broken else ""
        say(f"{options.output / split.name}: {len(paths) - len(broken)} images{listed}")


def _count(work: Unfinished) -> str:
    left = int((work.marks() == 0).any(axis=0).sum())
    return f"{len(work.images) - left} of {len(work.images)} images are encoded"
