"""Small data sets in the layouts of the published ones. Labels are matrices (N, C), a row for each image of a split."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trm_pipeline.data.coco import COCO_CLASSES
from trm_pipeline.data.nus import NUS_CLASSES

Labels = Mapping[str, NDArray[Any]]
Picture = Callable[[Path], None]

# COCO's category ids have gaps; the classes stand in ascending order of these.
COCO_IDS = [number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


def picture(path: Path) -> None:
    """A little JPEG whose colour its name determines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(path.name.encode())
    Image.new("RGB", (24, 20), (seed % 256, 7 * seed % 256, 13 * seed % 256)).save(path)


def draw_labels(rows: int, columns: int, share: float, seed: int = 0) -> NDArray[np.int8]:
    """Random labels, the first row without any."""
    labels = (np.random.default_rng(seed).random((rows, columns)) < share).astype(np.int8)
    labels[0] = 0
    return labels


def coco_names(split: str, count: int, seed: int = 0) -> list[str]:
    """File names in the order of the list of images, which is not that of the ids."""
    ids = np.random.default_rng(seed).permutation(9 * count)[:count] + 1
    return [f"COCO_{split}2014_{number:012d}.jpg" for number in ids]


def write_coco(root: Path, labels: Labels, *, draw: Picture = picture, copies: int = 2, corners: int = 4) -> Path:
    """Annotations and images; 2 in the labels is a class seen only as a crowd.

    Every label has as many objects as there are ``copies``. They are listed from the last image on.
    """
    (root / "annotations").mkdir(parents=True)
    categories: list[dict[str, Any]] = [
        {"supercategory": "thing", "id": number, "name": name} for number, name in zip(COCO_IDS, COCO_CLASSES, strict=True)
    ]
    for split, table in labels.items():
        names = coco_names(split, len(table))
        ids = [int(name[-16:-4]) for name in names]
        images = [
            {
                "license": 1,
                "file_name": name,
                "coco_url": f"http://images.example/{split}2014/{name}",
                "height": 20,
                "width": 24,
                "date_captured": "2013-11-16 17:02:52",
                "flickr_url": "http://farm.example/photo.jpg",
                "id": number,
            }
            for name, number in zip(names, ids, strict=True)
        ]
        outline = [round(101.37 + 0.37 * corner, 2) for corner in range(2 * corners)]
        objects: list[dict[str, Any]] = []
        for row, column in np.repeat(np.argwhere(table > 0)[::-1], copies, axis=0):
            crowd = bool(table[row, column] == 2)
            shape: Any = {"counts": [272, 2, 4, 4], "size": [20, 24]} if crowd else [outline]
            made = {
                "segmentation": shape,
                "area": 12.5,
                "iscrowd": int(crowd),
                "image_id": ids[row],
                "bbox": [1.0, 2.5, 5.0, 2],
                "category_id": COCO_IDS[column],
                "id": len(objects) + 1,
            }
            objects.append(made)
        whole = {"info": {"year": 2014}, "images": images, "licenses": [], "annotations": objects, "categories": categories[::-1]}
        (root / "annotations" / f"instances_{split}2014.json").write_text(json.dumps(whole), encoding="utf-8")
        (root / f"{split}2014").mkdir()
        for name in names:
            draw(root / f"{split}2014" / name)
    return root


def write_vg(root: Path, labels: Labels, *, draw: Picture = picture, names: Sequence[str] | None = None) -> Path:
    """Lists, label index and images, every other image in the second folder; the last line has no end."""
    index = {}
    for folder in ("VG_100K", "VG_100K_2"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number, (split, table) in enumerate(labels.items()):
        images = [f"{2300000 - 7 * row - number}.jpg" for row in range(len(table))]
        (root / f"{split}_list_500.txt").write_text("\n".join(images), encoding="utf-8")
        for row, image in enumerate(images):
            index[image] = np.flatnonzero(table[row]).tolist()
            draw(root / ("VG_100K", "VG_100K_2")[row % 2] / image)
    (root / "vg_category_200_labels_index.json").write_text(json.dumps(index), encoding="utf-8")
    if names is not None:
        (root / "vg_category_200.txt").write_text("\n".join(names), encoding="utf-8")
    return root


def nus_names(split: str, count: int) -> list[str]:
    """Paths as the official lists have them."""
    return [f"{'actor' if row % 2 else 'zoo'}\\{row:04d}_{2124494179 + 3 * row + (split == 'test')}.jpg" for row in range(count)]


def write_nus(root: Path, labels: Labels, *, draw: Picture = picture) -> Path:
    """The official layout: lists, a label file for each concept and part, images in folders."""
    (root / "ImageList").mkdir(parents=True)
    folder = root / "Groundtruth" / "TrainTestLabels"
    folder.mkdir(parents=True)
    for split, table in labels.items():
        part, images = split.capitalize(), nus_names(split, len(table))
        (root / "ImageList" / f"{part}Imagelist.txt").write_text("\r\n".join([*images, ""]), encoding="utf-8")
        for column, name in enumerate(NUS_CLASSES):
            lines = "".join(f"{label}\n" for label in table[:, column])
            (folder / f"Labels_{name}_{part}.txt").write_text(lines, encoding="utf-8")
        for image in images:
            path = root / "Flickr" / image.replace("\\", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(path)
    return root


def write_nus_cole(root: Path, labels: Labels, *, draw: Picture = picture) -> Path:
    """Cole's layout: two arrays for each phase."""
    for split, table in labels.items():
        phase = {"train": "train", "test": "val"}[split]
        images = [f"{split}{row}_4f3e.jpg" for row in range(len(table))]
        for image in images:
            (root / "Flickr").mkdir(parents=True, exist_ok=True)
            draw(root / "Flickr" / image)
        np.save(root / f"formatted_{phase}_images.npy", np.array(images))
        np.save(root / f"formatted_{phase}_labels.npy", table.astype(np.int64))
    return root


def write_nus_scpnet(root: Path, labels: Labels, *, draw: Picture = picture) -> Path:
    """The layout of SPLC and SCPNet: text lists, some with a blank after the comma, without a last newline."""
    for split, table in labels.items():
        lines = []
        for row, present in enumerate(table):
            image = f"{9 * row}_{split}_m.jpg"
            draw(root / "images" / image)
            lines.append(f"{image},{' ' * (row % 2)}{' '.join(map(str, np.flatnonzero(present)))}")
        (root / {"train": "nus_train_full.txt", "test": "nus_val.txt"}[split]).write_text("\n".join(lines), encoding="utf-8")
    return root


def cub_attribute(column: int) -> str:
    """A name as ``attributes.txt`` has it."""
    return f"has_part_{column // 8}_color::shade_{column % 8}_(light)"


def write_cub(
    root: Path, labels: NDArray[Any], train: Sequence[bool], certainty: NDArray[Any], *, draw: Picture = picture
) -> Path:
    """``CUB_200_2011`` and, beside it as in the archive, ``attributes.txt``; some lines have more fields than five."""
    folder = root / "CUB_200_2011"
    (folder / "attributes").mkdir(parents=True)
    images = [f"{1 + row % 3:03d}.Bird_{row % 3}/Bird_{row}.jpg" for row in range(len(labels))]
    (folder / "images.txt").write_text("".join(f"{row + 1} {image}\n" for row, image in enumerate(images)), encoding="utf-8")
    lines = "".join(f"{row + 1} {int(flag)}\n" for row, flag in enumerate(train))
    (folder / "train_test_split.txt").write_text(lines, encoding="utf-8")
    lines = "".join(f"{column + 1} {cub_attribute(column)}\n" for column in range(labels.shape[1]))
    (root / "attributes.txt").write_text(lines, encoding="utf-8")
    with (folder / "attributes" / "image_attribute_labels.txt").open("w", encoding="utf-8") as file:
        for row in range(len(labels)):
            for column in range(labels.shape[1]):
                more = " 0 1.509" if (row, column) in ((1, 9), (2, 0)) else ""
                file.write(f"{row + 1} {column + 1} {labels[row, column]} {certainty[row, column]} 1.509{more}\n")
    for image in images:
        path = folder / "images" / image
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(path)
    return root


def write_tiny(key: str, root: Path) -> Path:
    """A dozen images for each of two splits, in the layout of a data set of ``trm-losses reproduce``."""
    if key == "coco":
        return write_coco(root, {split: draw_labels(12, 80, 0.3, seed) for seed, split in enumerate(("train", "val"))})
    if key == "cub":
        return write_cub(root, draw_labels(24, 312, 0.3), [row < 12 for row in range(24)], np.full((24, 312), 3))
    write, classes = {"vg200": (write_vg, 200), "nus": (write_nus, 81)}[key]
    return write(root, {split: draw_labels(12, classes, 0.3, seed) for seed, split in enumerate(("train", "test"))})
