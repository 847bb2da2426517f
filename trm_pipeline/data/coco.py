"""MS-COCO 2014 as a multi-label data set: image-level labels from the instance annotations."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from trm_pipeline.config.presets import Preset
from trm_pipeline.data.base import LabelledImages, Place, Source, found_in, need_files
from trm_pipeline.files import read_json

COCO_CLASSES: tuple[str, ...] = tuple(
    (
        "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
        "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
        "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
        "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
        "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, "
        "laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, "
        "scissors, teddy bear, hair drier, toothbrush"
    ).split(", ")
)
"""The classes by ascending category id (1 to 90 with gaps): column c of every label matrix is ``COCO_CLASSES[c]``."""

LAYOUT = (
    "a folder with annotations/instances_train2014.json and instances_val2014.json, train2014/ and val2014/, all from "
    "https://cocodataset.org/#download (2014 Train images, 2014 Val images, 2014 Train/Val annotations)"
)
_KEPT = ("id", "image_id", "category_id", "iscrowd", "file_name", "name")
_NEEDED = {"images": {"id", "file_name"}, "annotations": {"image_id", "category_id"}, "categories": {"id", "name"}}


class COCO(LabelledImages):
    """COCO 2014 with one label a class and image.

    A class is present if the image has an object of it, a crowd or not, as in the code of HCP-MLR-PL, DualCoOp and
    Cole. Rows are in the order of the file's list of images. Ids of annotations may repeat.

    Args:
        root: the folder with ``annotations``, ``train2014`` and ``val2014``.
        split: ``train`` or ``val``.
        annotated_only: leave out the images without any object: 82,081 and 40,137 images in place of 82,783 and
            40,504. The same seed hides other labels then.
        crowd: whether an object marked as a crowd makes its class present, as one that is not does.

    Raises:
        FileNotFoundError: the annotations or an image is missing.
        ValueError: an unknown split, a file that cannot be read, other categories than the 80 of COCO, one id for two
            images, an image listed twice, or an object of an image or category that is not listed.
    """

    def __init__(self, root: str | Path, split: str = "train", *, annotated_only: bool = False, crowd: bool = True) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"COCO: split must be 'train' or 'val', got {split!r}")
        path = Path(root) / "annotations" / f"instances_{split}2014.json"
        if not path.is_file():
            raise FileNotFoundError(f"COCO: {path} not found ({root} holds: {found_in(Path(root))}); wanted is {LAYOUT}")
        dataset = _read_annotations(path)
        categories, listed = (_by_id(path, dataset, *what) for what in (("categories", "name"), ("images", "file_name")))
        columns = {category: column for column, category in enumerate(sorted(categories))}
        names = tuple(categories[category] for category in columns)
        if names != COCO_CLASSES:
            odd = next((pair for pair in zip(names, COCO_CLASSES, strict=False) if pair[0] != pair[1]), None)
            said = f"{len(names)} categories" if odd is None else f"{odd[0]!r} where {odd[1]!r} belongs"
            raise ValueError(f"COCO: {path} must have the 80 categories of COCO, got {said}; take the instances file")
        objects = dataset["annotations"]  # by place, not by id: two files put together have ids twice
        for field, known in (("image_id", listed), ("category_id", categories)):
            if strange := {item[field] for item in objects} - known.keys():
                what, first = field.removesuffix("_id"), next(iter(strange))
                raise ValueError(f"COCO: {path} has an object of {what} {first!r}, which it does not list; restore the file")
        annotated = dict.fromkeys(item["image_id"] for item in objects)  # in the order in which annotations first name them
        images = [image for image in listed if not annotated_only or image in annotated]
        if not images:
            raise ValueError(f"COCO: {path} lists no image; restore the file")
        row_of = {image: row for row, image in enumerate(images)}
        counted = [item for item in objects if crowd or not item.get("iscrowd")]
        targets = torch.zeros(len(images), len(columns))
        targets[[row_of[item["image_id"]] for item in counted], [columns[item["category_id"]] for item in counted]] = 1.0
        folder = Path(root) / f"{split}2014"
        paths = [str(folder / listed[image]) for image in images]
        need_files(paths, "COCO", path)
        name = "MS-COCO 2014" + " annotated images" * annotated_only + " without crowds" * (not crowd)
        rows = torch.tensor([row_of[image] for image in annotated]) if annotated_only else None
        super().__init__(name, COCO_CLASSES, paths, targets, mask_rows=rows)


def _read_annotations(path: Path) -> dict[str, list[dict[str, Any]]]:
    """What labels need of the file.

    Outlines make up nearly all of it: an object loses them as soon as it is read, so that they are never in memory together.
    """
    dataset: dict[str, list[dict[str, Any]]] = read_json(path, "JSON", "restore the file", object_hook=_without_outlines)
    for what, fields in _NEEDED.items():
        if not isinstance(dataset, dict) or not isinstance(dataset.get(what), list):
            raise ValueError(f"COCO: {path} has no {what}; take the instances file, not captions or test images")
        for item in dataset[what]:
            if not isinstance(item, dict) or not item.keys() >= fields:
                wanted = " and ".join(sorted(fields))
                raise ValueError(f"COCO: {path} must have {wanted} for each of its {what}, got {item!r:.200}; restore the file")
    return dataset


def _by_id(path: Path, dataset: dict[str, list[dict[str, Any]]], what: str, field: str) -> dict[Any, str]:
    """The name of each category or image by its id; the same entry twice is one."""
    names: dict[Any, str] = {}
    for item in dataset[what]:
        if (name := names.setdefault(item["id"], item[field])) != item[field]:
            raise ValueError(
                f"COCO: {path} must have one of its {what} for each id, got {name!r} and {item[field]!r} for {item['id']!r}; "
                "give those of the second file other ids, also in their annotations"
            )
    return names


def _without_outlines(item: dict[str, Any]) -> dict[str, Any]:
    return item if "images" in item else {key: item[key] for key in _KEPT if key in item}


def _read(place: Place, preset: Preset, split: str) -> LabelledImages:
    return COCO(place.folder, split, annotated_only=place.own["annotated_only"], crowd=not place.own["no_crowd"])


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--annotated-only",
        action="store_true",
        help="leave out images without any object, as DualCoOp, SCPNet and Cole: 82,081 and 40,137 in place "
        "of 82,783 and 40,504; the same seed then hides other labels",
    )
    parser.add_argument("--no-crowd", action="store_true", help="objects marked as crowds do not make their class present")


SOURCE = Source(
    key="coco",
    title="MS-COCO 2014",
    num_classes=len(COCO_CLASSES),
    layout=LAYOUT,
    read=_read,
    add_arguments=_add_arguments,
    preset="coco2014-rn101",
)
