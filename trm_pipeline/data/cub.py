"""CUB-200-2011 as a multi-label data set: the 312 attributes of its birds."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from trm_pipeline.config.presets import Preset
from trm_pipeline.data.base import LabelledImages, Place, Source, found_in, lines_of, need_files
from trm_pipeline.drawn.phrases import write_drawn_phrases

_COUNT = 312
LAYOUT = (
    "CUB_200_2011 or the folder that holds it, as CUB_200_2011.tgz of https://data.caltech.edu/records/65de6-vp158 unpacks: "
    "images/, images.txt, train_test_split.txt, attributes/image_attribute_labels.txt, and attributes.txt in one of these "
    "folders or beside CUB_200_2011"
)


class CUB(LabelledImages):
    """CUB-200-2011 with a label for each of 312 attributes, as Cole's.

    An attribute is present where the flag of the file says so, whatever its annotator thought of the certainty. Some
    lines of the file have more than its five fields; the first four are right on all of them and nothing else is read.

    Args:
        root: the folder ``CUB_200_2011`` or the one that holds it.
        split: ``train`` or ``test`` of ``train_test_split.txt``, in the order of ``images.txt``.
        min_certainty: labels less certain than that are unknown, in both splits: 1 not visible, 2 guessing,
            3 probably, 4 definitely. Scores then leave them out, and are not comparable with published ones.

    Raises:
        FileNotFoundError: a list, the attributes or an image is missing.
        ValueError: an unknown split or certainty, an empty split, a line of less than four numbers or with one that
            cannot be, an image without one line for each attribute, an image twice.
    """

    def __init__(self, root: str | Path, split: str = "train", *, min_certainty: int = 1) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"CUB: split must be 'train' or 'test', got {split!r}")
        if min_certainty not in (1, 2, 3, 4):
            raise ValueError(f"CUB: min_certainty must be from 1 (not visible) to 4 (definitely), got {min_certainty}")
        folder = Path(root) / "CUB_200_2011" if (Path(root) / "CUB_200_2011").is_dir() else Path(root)
        wanted = f"wanted is {LAYOUT}"
        listing = folder / "images.txt"
        images, flags = (_by_number(path, wanted) for path in (listing, folder / "train_test_split.txt"))
        if missing := images.keys() - flags.keys():
            raise ValueError(f"CUB: train_test_split.txt says nothing about image {min(missing)} of images.txt; restore the file")
        ids = [image for image in images if (flags[image] == "1") == (split == "train")]
        if not ids:
            raise ValueError(f"CUB: train_test_split.txt puts no image into {split}; restore the file")
        targets = _read_labels(folder / "attributes" / "image_attribute_labels.txt", len(images), min_certainty)
        paths = [str(folder / "images" / images[image]) for image in ids]
        need_files(paths, "CUB", listing)
        places = (folder / "attributes" / "attributes.txt", folder / "attributes.txt", folder.parent / "attributes.txt")
        names = _by_number(next(filter(Path.is_file, places), places[0]), wanted)
        if len(names) != _COUNT:
            raise ValueError(f"CUB: attributes.txt must name {_COUNT} attributes, got {len(names)}; restore the file")
        certain = f", labels of certainty {min_certainty} and more" if min_certainty > 1 else ""
        rows = targets[[int(image) - 1 for image in ids]].float()
        ordered = [names[str(number)] for number in range(1, _COUNT + 1)]
        super().__init__(f"CUB-200-2011 attributes{certain}", ordered, paths, rows)

    def prompt_names(self) -> list[str]:
        """The attributes as phrases, see :func:`attribute_phrase`."""
        return [attribute_phrase(name) for name in self.class_names]


def attribute_phrase(name: str) -> str:
    """``has_bill_shape::curved_(up_or_down)`` as "bird whose bill shape is curved (up or down)", ``red_car`` as "red car"."""
    what, parted, value = name.removeprefix("has_").partition("::")
    return (f"bird whose {what} is {value}" if parted else name).replace("_", " ")


def _by_number(path: Path, wanted: str) -> dict[str, str]:
    """What a list says of each image or attribute, by its number."""
    said: dict[str, str] = {}
    for line in lines_of(path, "CUB", wanted):
        number, *rest = line.split(maxsplit=1)
        if not rest:
            raise ValueError(
                f"CUB: {path} must have a number and what it stands for in each line, got {line!r}; restore the file"
            )
        value = rest[0]
        if said.setdefault(number, value) != value:
            lines = f"{said[number]!r} and {value!r}"
            raise ValueError(f"CUB: {path} must have one line for number {number}, got {lines}; restore the file")
    if odd := {str(number) for number in range(1, len(said) + 1)} - said.keys():
        raise ValueError(
            f"CUB: {path} must number its lines from 1 to {len(said)}, and has no {min(odd, key=int)}; restore the file"
        )
    return said


def _read_labels(path: Path, count: int, min_certainty: int) -> torch.Tensor:
    """(count, 312) in int8, of images 1 to ``count``."""
    if not path.is_file():
        raise FileNotFoundError(f"CUB: {path} not found ({path.parent} holds: {found_in(path.parent)}); wanted is {LAYOUT}")
    try:
        table = np.loadtxt(path, dtype=np.int32, usecols=range(4), comments=None, ndmin=2, encoding="utf-8-sig")
    except ValueError as error:
        raise ValueError(f"CUB: {path} must have image, attribute, presence and certainty in each line ({error})") from error
    image, attribute, present, certainty = table.T
    for what, values, least, most in (
        ("image", image, 1, count),
        ("attribute", attribute, 1, _COUNT),
        ("presence", present, 0, 1),
    ):
        if (bad := (values < least) | (values > most)).any():
            line = int(bad.argmax())
            raise ValueError(f"CUB: line {line + 1} of {path}: {what} must be from {least} to {most}, got {values[line]}")
    labels = np.full((count, _COUNT), 2, dtype=np.int8)
    labels[image - 1, attribute - 1] = np.where(certainty >= min_certainty, present, -1)
    if (gaps := labels == 2).any():
        row, column = np.argwhere(gaps)[0]
        raise ValueError(
            f"CUB: {path} has no line for {int(gaps.sum())} labels, the first attribute {column + 1} of image {row + 1}; "
            "unpack the archive again"
        )
    if len(table) > labels.size:
        lines, counts = np.unique(table[:, :2], axis=0, return_counts=True)
        row, column = lines[counts > 1][0]
        raise ValueError(
            f"CUB: {path} must have one line for a label, got several for attribute {column} of image {row}; restore the file"
        )
    return torch.from_numpy(labels)


def _read(place: Place, preset: Preset, split: str) -> LabelledImages:
    root = write_drawn_phrases("cub", place.cache) if place.root is None else place.root
    images = CUB(root, split, min_certainty=place.own["min_certainty"])
    if place.root is None:
        images.name = images.name.replace("CUB-200-2011", "drawn")
    return images


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--min-certainty",
        type=int,
        choices=(1, 2, 3, 4),
        default=1,
        help="labels less certain are unknown, in training and test: 1 not visible, 2 guessing, 3 probably, 4 definitely",
    )


SOURCE = Source(
    key="cub",
    title="CUB-200-2011 attributes",
    num_classes=_COUNT,
    layout=f"{LAYOUT}; none: drawn attributes",
    read=_read,
    add_arguments=_add_arguments,
    preset="cub200-rn101",
    drawn_preset="embedded-cub",
)
