"""PASCAL VOC as a multi-label data set: images and image-level labels from the original folder layout."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from xml.etree import ElementTree

import torch
from torchvision.datasets import VOCDetection

from trm_pipeline.config.presets import Preset
from trm_pipeline.data.base import LabelledImages, Place, Source, found_in, lines_of, need_files
from trm_pipeline.drawn.captions import CLASS_WORDS
from trm_pipeline.drawn.devkit import write_drawn_voc
from trm_pipeline.drawn.scenes import VOC_CLASSES


def class_prompt_names() -> list[str]:
    """Class names for prompts, in column order: "dining table", since text towers hardly know "diningtable"."""
    return [CLASS_WORDS[name] for name in VOC_CLASSES]


class VOC(LabelledImages):
    """VOC2007 or VOC2012 with one label a class and image.

    Labels are made as the field makes them: a class is present (1) where at least one of its objects is not marked
    *difficult*, else absent (0), so a class seen only as difficult counts as absent. They come from the XML alone; no
    image is decoded for them.

    Args:
        root: the ``VOCdevkit`` folder, under any name once ``VOC2007`` or ``VOC2012`` is in it, or the one that holds it.
        year: 2007 or 2012.
        split: a list in ``ImageSets/Main``: ``train``, ``val``, ``trainval``, and for 2007 ``test``.
        download: fetch the archive with torchvision when the split is not there yet.

    Attributes:
        ids: image names in the order of the list, which is the order the label-hiding procedure needs.
        targets: (N, 20) float32 labels. Assign hidden labels to it to train on those.
        image_paths: the JPEG files, in the same order.

    Raises:
        FileNotFoundError: no VOC below ``root``, or a missing split, image or annotation.
        ValueError: an unknown year, a split that cannot be fetched, an empty split or one with an image twice, an annotation that
            cannot be read or names a class outside :data:`VOC_CLASSES`; an image that cannot be read, when it is asked for.
    """

    def __init__(self, root: str | Path, year: int | str = 2007, split: str = "trainval", *, download: bool = False) -> None:
        if str(year) not in ("2007", "2012"):
            raise ValueError(f"VOC: year must be 2007 or 2012, got {year!r}")
        devkit = Path(os.path.abspath(root))
        if devkit.name != "VOCdevkit" and not any((devkit / name).is_dir() for name in ("VOC2007", "VOC2012")):
            devkit /= "VOCdevkit"
        folder = devkit / f"VOC{year}"
        listing = folder / "ImageSets" / "Main" / f"{split}.txt"
        if download and not listing.is_file():
            if devkit.name != "VOCdevkit":
                raise ValueError(f"VOC: --download unpacks into a folder VOCdevkit, got {devkit}; rename it")
            VOCDetection(devkit.parent, year=str(year), image_set=split, download=True)
        _check_layout(Path(root), folder, listing)
        names = lines_of(listing, "VOC", "")
        if not names:
            raise ValueError(f"VOC: {listing} lists no image; take another split or restore the file")
        images = [str(folder / "JPEGImages" / f"{name}.jpg") for name in names]
        annotations = [str(folder / "Annotations" / f"{name}.xml") for name in names]
        for paths in (images, annotations):
            need_files(paths, "VOC", listing)
        targets = torch.tensor([_image_labels(path) for path in annotations], dtype=torch.float32)
        super().__init__(f"VOC{year}", VOC_CLASSES, images, targets)

    def prompt_names(self) -> list[str]:
        """See :func:`class_prompt_names`."""
        return class_prompt_names()


def _check_layout(root: Path, folder: Path, listing: Path) -> None:
    """Say what was looked for and what is there instead."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"VOC: {folder} not found ({root} holds: {found_in(root)}); pass the VOCdevkit folder or the one that holds it, "
            "or fetch it with --download"
        )
    if not listing.is_file():
        found = ", ".join(sorted(path.name for path in listing.parent.glob("*.txt") if "_" not in path.name)) or "nothing"
        raise FileNotFoundError(f"VOC: {listing} not found (beside it: {found}); take one of these, or fetch it with --download")


def _image_labels(annotation: str) -> list[int]:
    """1 for each class with an object that is not difficult, else 0, in the order of ``VOC_CLASSES``."""
    try:
        root = ElementTree.parse(annotation).getroot()
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the latter from its encoding
        raise ValueError(f"VOC: {annotation} is not readable XML ({error}); restore the file") from error
    if root.tag != "annotation":
        raise ValueError(f"VOC: {annotation} must hold an <annotation>, got <{root.tag}>; restore the file")
    labels = [0] * len(VOC_CLASSES)
    for item in root.findall("object"):
        name = item.findtext("name", "").strip()
        if name not in VOC_CLASSES:
            raise ValueError(
                f"VOC: {annotation} names the class {name!r}, not one of the {len(VOC_CLASSES)} VOC_CLASSES; "
                "correct the name or take the object out"
            )
        if item.findtext("difficult", "0").strip() != "1":
            labels[VOC_CLASSES.index(name)] = 1
    return labels


def _read(place: Place, preset: Preset, split: str) -> LabelledImages:
    root = write_drawn_voc(place.cache) if place.root is None else place.root
    images = VOC(root, preset.year, split, download=place.own["download"])
    if place.root is None:
        images.name = "drawn scenes"
    return images


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--download", action="store_true", help="fetch VOC into --data-root where it is missing")


SOURCE = Source(
    key="voc",
    title="PASCAL VOC",
    num_classes=len(VOC_CLASSES),
    layout="VOCdevkit or the folder that holds it; none: the drawn VOC",
    read=_read,
    add_arguments=_add_arguments,
    preset="voc2007-rn101",
    drawn_preset="embedded",
)
