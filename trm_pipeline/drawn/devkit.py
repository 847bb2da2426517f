"""Drawn scenes in the layout of VOC2007."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from xml.sax.saxutils import escape

from PIL import Image

from trm_pipeline.drawn.scenes import (
    DEFAULT_SIZES,
    RECIPE_VERSION,
    TARGET,
    TARGET_COUNTS,
    TARGET_DISTRACTORS,
    TARGET_POWER,
    VOC_CLASSES,
    Scene,
    target_scene,
)
from trm_pipeline.drawn.writing import in_parallel, write_once


def _annotation(image_id: str, scene: Scene) -> str:
    height, width = scene.image.shape[:2]
    objects = "".join(
        f"\t<object>\n\t\t<name>{escape(item.name)}</name>\n\t\t<pose>Unspecified</pose>\n"
        f"\t\t<truncated>{int(item.truncated)}</truncated>\n\t\t<difficult>{int(item.difficult)}</difficult>\n"
        f"\t\t<bndbox>\n\t\t\t<xmin>{item.box[0] + 1}</xmin>\n\t\t\t<ymin>{item.box[1] + 1}</ymin>\n"
        f"\t\t\t<xmax>{item.box[2]}</xmax>\n\t\t\t<ymax>{item.box[3]}</ymax>\n\t\t</bndbox>\n\t</object>\n"
        for item in scene.objects
    )
    return (
        f"<annotation>\n\t<folder>VOC2007</folder>\n\t<filename>{image_id}.jpg</filename>\n"
        "\t<source>\n\t\t<database>Drawn scenes in the layout of VOC2007</database>\n\t</source>\n"
        f"\t<size>\n\t\t<width>{width}</width>\n\t\t<height>{height}</height>\n\t\t<depth>3</depth>\n\t</size>\n"
        f"\t<segmented>0</segmented>\n{objects}</annotation>\n"
    )


def _write_chunk(indices: range, *, folder: Path, seed: int, split: str, first_id: int) -> list[list[int]]:
    """Write the scenes of one range; returns per image the VOC label of each class: 1, -1, or 0 if only *difficult*."""
    rows = []
    for index in indices:
        scene = target_scene(seed, split, index)
        image_id = f"{first_id + index:06d}"
        Image.fromarray(scene.image).save(folder / "JPEGImages" / f"{image_id}.jpg", quality=92)
        (folder / "Annotations" / f"{image_id}.xml").write_text(_annotation(image_id, scene), encoding="utf-8")
        row = [-1] * len(VOC_CLASSES)
        for item in scene.objects:
            at = VOC_CLASSES.index(item.name)
            row[at] = max(row[at], 0 if item.difficult else 1)
        rows.append(row)
    return rows


def _write_split(folder: Path, split: str, ids: Sequence[str], labels: Sequence[Sequence[int]]) -> None:
    main = folder / "ImageSets" / "Main"
    (main / f"{split}.txt").write_text("".join(f"{image_id}\n" for image_id in ids), encoding="utf-8")
    for at, name in enumerate(VOC_CLASSES):
        lines = (f"{image_id} {row[at]:2d}\n" for image_id, row in zip(ids, labels, strict=True))
        (main / f"{name}_{split}.txt").write_text("".join(lines), encoding="utf-8")


def _write_devkit(folder: Path, seed: int, sizes: Mapping[str, int], workers: int | None) -> None:
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    first_id = 1
    for split in ("train", "val", "test"):
        work = partial(_write_chunk, folder=folder, seed=seed, split=split, first_id=first_id)
        labels = [row for rows in in_parallel(work, sizes[split], workers, chunk=25) for row in rows]
        ids = [f"{first_id + index:06d}" for index in range(sizes[split])]
        _write_split(folder, split, ids, labels)
        if split == "train":
            train_ids, train_labels = ids, labels
        elif split == "val":
            _write_split(folder, "trainval", train_ids + ids, train_labels + labels)
        first_id += sizes[split]


def write_drawn_voc(
    root: str | os.PathLike[str], *, seed: int = 0, sizes: Mapping[str, int] | None = None, workers: int | None = None
) -> Path:
    """Write the drawn VOC below ``root`` unless it is there already, and return its ``VOCdevkit`` folder.

    The data set lies in a folder named after all that determines it (recipe and its version, seed, sizes). It is drawn
    in a temporary folder and renamed as a whole when it is complete, so a half-written or outdated one is never read.

    Args:
        root: A folder for caches; made if missing.
        seed: Seed of all scenes.
        sizes: Images in ``train``, ``val`` and ``test``; missing ones keep their default (2,000, 500 and 1,000).
        workers: Processes that draw; all cores by default. The result does not depend on it.

    Returns:
        The path of the ``VOCdevkit`` folder, with ``VOC2007`` inside.

    Raises:
        ValueError: If a size is not positive or names no split.
    """
    wanted = {**DEFAULT_SIZES, **(sizes or {})}
    if set(wanted) != set(DEFAULT_SIZES) or min(wanted.values()) < 1:
        raise ValueError(f"write_drawn_voc: sizes must be positive for train, val and test, got {dict(sizes or {})}")
    recipe = {**asdict(TARGET), "counts": TARGET_COUNTS, "distractors": TARGET_DISTRACTORS, "power": TARGET_POWER}
    stamp = {"version": RECIPE_VERSION, "recipe": recipe, "seed": seed, "sizes": {name: wanted[name] for name in DEFAULT_SIZES}}
    write = partial(_write_devkit, seed=seed, sizes=wanted, workers=workers)
    return write_once(root, "drawn-voc", stamp, lambda folder: write(folder / "VOCdevkit" / "VOC2007")) / "VOCdevkit"
