"""A small folder of drawn scenes with a label file that has gaps, to try everything on."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from trm_pipeline.drawn.scenes import TARGET, draw_scene
from trm_pipeline.files import check_writable, scratch_in
from trm_pipeline.progress import progress, say

CLASSES = ("person", "car", "bus", "dog", "cow", "horse", "chair", "sofa")
KNOWN = 0.5  # share of the labels that the file holds
NEW = 12  # further images, of which it says nothing


def run_demo(folder: Path, count: int) -> None:
    """Draw ``count`` images with labels into ``folder``/photos, a few more into ``folder``/new, and write the tables.

    Raises:
        ValueError: the folder cannot be written into, or holds something already; fewer than two images.
    """
    if count < 2:
        raise ValueError(f"--images must be at least 2, got {count}")
    check_writable(folder, "FOLDER")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} must be empty or not there, so that nothing is lost; give another folder")
    with scratch_in(folder) as made:
        _draw(made, count)
        for path in [*made.iterdir()]:
            path.rename(folder / path.name)
    say(
        f"{folder}:\n  photos      {count} drawn scenes\n  labels.csv  half of their labels\n  truth.csv   all of them\n"
        f"  new         {NEW} more scenes"
    )
    say(f"train on them: trm-losses train {folder / 'photos'} {folder / 'labels.csv'}")


def _draw(folder: Path, count: int) -> None:
    for name in ("photos", "new"):
        (folder / name).mkdir()
    with (
        (folder / "labels.csv").open("w", encoding="utf-8", newline="") as labels_file,
        (folder / "truth.csv").open("w", encoding="utf-8", newline="") as truth_file,
    ):
        labels, truth = csv.writer(labels_file), csv.writer(truth_file)
        for table in (labels, truth):
            table.writerow(["image", *CLASSES])
        for i in progress(range(count + NEW), f"drawing {count + NEW} scenes"):
            rng = np.random.default_rng(i)
            scene = draw_scene(rng, TARGET, [name for name in CLASSES if rng.random() < 0.25] or ["cat"])
            name = f"{i:04}.jpg"
            Image.fromarray(scene.image).save(folder / ("photos" if i < count else "new") / name, quality=90)
            if i < count:
                present = {item.name for item in scene.objects}
                row = [int(own in present) for own in CLASSES]
                truth.writerow([name, *row])
                labels.writerow([name, *(value if rng.random() < KNOWN else "" for value in row)])
