"""NUS-WIDE with 81 concepts, in three of its splits, which are not comparable."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trm_pipeline.config.presets import Preset
from trm_pipeline.data.base import LabelledImages, Place, Source, lines_of, need_files
from trm_pipeline.data.label_files import read_list, read_names
from trm_pipeline.features.cached import mapped
from trm_pipeline.files import text_of

NUS_CLASSES: tuple[str, ...] = tuple(
    (
        "airport, animal, beach, bear, birds, boats, book, bridge, buildings, cars, castle, cat, cityscape, clouds, "
        "computer, coral, cow, dancing, dog, earthquake, elk, fire, fish, flags, flowers, food, fox, frost, garden, "
        "glacier, grass, harbor, horses, house, lake, leaf, map, military, moon, mountain, nighttime, ocean, person, "
        "plane, plants, police, protest, railroad, rainbow, reflection, road, rocks, running, sand, sign, sky, snow, "
        "soccer, sports, statue, street, sun, sunset, surf, swimmers, tattoo, temple, tiger, tower, town, toy, train, "
        "tree, valley, vehicle, water, waterfall, wedding, whales, window, zebra"
    ).split(", ")
)
"""The concepts in the order of ``Concepts81.txt``."""

VARIANTS = ("official", "cole", "scpnet")

_OFFICIAL = "https://lms.comp.nus.edu.sg/wp-content/uploads/2019/research/nuswide/NUS-WIDE.html"
_GONE = "images whose links are dead have to be had from someone who has them"
_WANTED = {
    "official": "Flickr/ with the images, ImageList/TrainImagelist.txt and TestImagelist.txt, "
    "Groundtruth/TrainTestLabels/Labels_airport_Train.txt and so on for 81 concepts and two parts, all from "
    f"{_OFFICIAL}; {_GONE}",
    "cole": "Flickr/ with the images, formatted_train_images.npy, formatted_train_labels.npy and the same of val, as "
    "https://github.com/elijahcole/single-positive-multi-label tells to get and format them",
    "scpnet": "images/ with the images, nus_train_full.txt (every label of each training image) and nus_val.txt of "
    "https://github.com/xinyu1205/robust-loss-mlml; the 81 names in their order are those of Concepts81.txt, or of "
    "nuswide_labels.txt where it is there",
}
LAYOUT = f"a folder with {_WANTED['official']}; with --split cole: {_WANTED['cole']}; with --split scpnet: {_WANTED['scpnet']}"


class NUS(LabelledImages):
    """NUS-WIDE with one label a concept and image.

    Args:
        root: the folder of the data set.
        split: ``train`` or ``test``.
        variant: whose images and split: ``official`` (161,789 and 107,859 images), ``cole`` (150,000 and 60,260, crawled
            anew), or ``scpnet`` (about 119,000 and 50,720, none without labels; also SPLC's and ASL's).
        drop_empty: leave out images without any label; about a fifth of the official and of Cole's images have none.

    Raises:
        FileNotFoundError: a list, a label file or an image is missing.
        ValueError: an unknown split or variant, an empty list or one with an image twice, files of different lengths, a label
            other than 0 or 1.
    """

    def __init__(self, root: str | Path, split: str = "train", *, variant: str = "official", drop_empty: bool = False) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"NUS: split must be 'train' or 'test', got {split!r}")
        if variant not in VARIANTS:
            raise ValueError(f"NUS: variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        root, names = Path(root), NUS_CLASSES
        if variant == "official":
            listing, images, targets = _read_official(root, split)
        elif variant == "cole":
            listing, images, targets = _read_cole(root, split)
        else:
            listing, images, targets, names = _read_scpnet(root, split)
        folder = root / ("images" if variant == "scpnet" else "Flickr")
        paths = [str(folder / image.replace("\\", "/")) for image in images]
        if drop_empty:
            kept = (targets > 0).any(dim=1)
            paths, targets = [path for path, keep in zip(paths, kept.tolist(), strict=True) if keep], targets[kept]
        if not paths:
            raise ValueError(f"NUS: {listing} lists no image{' with a label' * drop_empty}; restore the file")
        need_files(paths, "NUS", listing, _GONE)
        name = f"NUS-WIDE, {variant} split" + " without empty images" * drop_empty
        super().__init__(name, names, paths, targets)


def _read_official(root: Path, split: str) -> tuple[Path, list[str], Tensor]:
    part, wanted = split.capitalize(), f"wanted is {_WANTED['official']}"
    listing = root / "ImageList" / f"{part}Imagelist.txt"
    images = lines_of(listing, "NUS", wanted)
    targets = torch.empty(len(images), len(NUS_CLASSES))
    for column, name in enumerate(NUS_CLASSES):
        path = root / "Groundtruth" / "TrainTestLabels" / f"Labels_{name}_{part}.txt"
        if not path.is_file():
            raise FileNotFoundError(f"NUS: {path} not found; {wanted}")
        text = np.frombuffer(text_of(path, "label file").encode(), dtype=np.uint8)
        labels = text[text > ord(" ")] - ord("0")  # one digit a line
        if len(labels) != len(images) or (labels > 1).any():
            said = f"{len(labels)} labels" if len(labels) != len(images) else "another character"
            raise ValueError(f"NUS: {path} must have 0 or 1 for each of {len(images)} images of {listing.name}, got {said}")
        targets[:, column] = torch.from_numpy(labels)
    return listing, images, targets


def _read_cole(root: Path, split: str) -> tuple[Path, list[str], Tensor]:
    phase = {"train": "train", "test": "val"}[split]
    listing, path = (root / f"formatted_{phase}_{what}.npy" for what in ("images", "labels"))
    for file in (listing, path):
        if not file.is_file():
            raise FileNotFoundError(f"NUS: {file} not found; wanted is {_WANTED['cole']}")
    images = read_names(listing)
    labels = mapped(path, len(images), len(NUS_CLASSES))
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"NUS: {path} must hold 0 and 1, got values from {labels.min()} to {labels.max()}")
    return listing, images, torch.from_numpy(labels.astype(np.float32))


def _read_scpnet(root: Path, split: str) -> tuple[Path, list[str], Tensor, tuple[str, ...]]:
    wanted = f"wanted is {_WANTED['scpnet']}"
    listing = root / {"train": "nus_train_full.txt", "test": "nus_val.txt"}[split]
    own = root / "nuswide_labels.txt"
    names = tuple(lines_of(own, "NUS", wanted)) if own.is_file() else NUS_CLASSES
    if sorted(names) != sorted(NUS_CLASSES):
        odd = sorted(set(names) ^ set(NUS_CLASSES))[:3]
        raise ValueError(f"NUS: nuswide_labels.txt must name the 81 concepts, got {len(names)} names, not the same: {odd}")
    images, targets = read_list(listing, lines_of(listing, "NUS", wanted), len(names))
    return listing, images, targets.float(), names


def _read(place: Place, preset: Preset, split: str) -> LabelledImages:
    return NUS(place.folder, split, variant=place.own["split"], drop_empty=place.own["drop_empty"])


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--split",
        choices=VARIANTS,
        default="official",
        help="whose images and split; figures of different ones are not comparable",
    )
    parser.add_argument("--drop-empty", action="store_true", help="leave out images without any label, in both parts")


def _settings(place: Place) -> dict[str, Any]:
    """The mean number of labels where images without any are left out: of SCPNet's split it is published."""
    return {"expected_positives": 2.4} if place.own["split"] == "scpnet" or place.own["drop_empty"] else {}


SOURCE = Source(
    key="nus",
    title="NUS-WIDE",
    num_classes=len(NUS_CLASSES),
    layout=LAYOUT,
    read=_read,
    add_arguments=_add_arguments,
    preset="nus-rn101",
    settings=_settings,
)
