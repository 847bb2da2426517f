"""VG-200: Visual Genome with its 200 most frequent classes, as HCP-MLR-PL (SST, SARB, HST) splits and labels it."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import torch

from trm_pipeline.config.presets import Preset
from trm_pipeline.data.base import LabelledImages, Place, Source, found_in, lines_of, need_files
from trm_pipeline.drawn.phrases import write_drawn_phrases
from trm_pipeline.files import read_json

_INDEX, _NAMES, _COUNT = "vg_category_200_labels_index.json", "vg_category_200.txt", 200
LAYOUT = (
    f"a folder with VG_100K/ and VG_100K_2/ (images of Visual Genome 1.2, https://homes.cs.washington.edu/~ranjay/visualgenome, "
    f"in both folders or merged into the first) and, there or in vg/, train_list_500.txt, test_list_500.txt and {_INDEX} out of "
    "data.zip of https://github.com/HCPLab-SYSU/HCP-MLR-PL, without which the split cannot be made again"
)


class VG200(LabelledImages):
    """VG-200 with one label a class and image.

    The label index holds numbers alone. Class names are read from ``vg_category_200.txt`` beside it, one a line in
    the order of the numbers; without that file they are ``class 0`` and so on, which are no prompts.

    Args:
        root: the folder with the images, and with the lists there or in ``vg``.
        split: ``train`` or ``test``: the images of ``train_list_500.txt`` or ``test_list_500.txt``, in that order.

    Raises:
        FileNotFoundError: a list, the label index or an image is missing.
        ValueError: an unknown split, an empty list, an image twice or one that the index does not know, a class outside 0 to 199.
    """

    def __init__(self, root: str | Path, split: str = "train") -> None:
        if split not in ("train", "test"):
            raise ValueError(f"VG200: split must be 'train' or 'test', got {split!r}")
        root = Path(root)
        lists = root / "vg" if (root / "vg" / _INDEX).is_file() else root
        listing, index = lists / f"{split}_list_500.txt", lists / _INDEX
        images = lines_of(listing, "VG200", f"wanted is {LAYOUT}")
        if not images:
            raise ValueError(f"VG200: {listing} lists no image; restore the file")
        if not index.is_file():
            raise FileNotFoundError(f"VG200: {index} not found ({lists} holds: {found_in(lists)}); wanted is {LAYOUT}")
        present = read_json(index, "JSON", "restore the file", object_pairs_hook=partial(_once, index))
        if not isinstance(present, dict):
            raise ValueError(
                f"VG200: {index} must be an object of lists by image, got {type(present).__name__}; restore the file"
            )
        targets = torch.zeros(len(images), _COUNT)
        for row, image in enumerate(images):
            if image not in present:
                raise ValueError(f"VG200: {index} has no labels of {image}, which {listing} names; take both from one archive")
            if not isinstance(present[image], list) or not all(column in range(_COUNT) for column in present[image]):
                raise ValueError(
                    f"VG200: {index} gives {image} the classes {present[image]}, wanted are numbers from 0 to {_COUNT - 1}; "
                    "take the index of 200 classes, not that of 500"
                )
            targets[row, present[image]] = 1.0
        second = root / "VG_100K_2"
        also = {path.name for path in second.iterdir()} if second.is_dir() else set()
        paths = [str((second if image in also else root / "VG_100K") / image) for image in images]
        need_files(paths, "VG200", listing)
        names = [f"class {column}" for column in range(_COUNT)]
        if (lists / _NAMES).is_file():
            names = lines_of(lists / _NAMES, "VG200", LAYOUT)
            if len(names) != _COUNT:
                raise ValueError(f"VG200: {lists / _NAMES} must name {_COUNT} classes, one a line, got {len(names)}")
        super().__init__("VG-200 (list_500)", names, paths, targets)

    def prompt_names(self) -> list[str]:
        """The names of the list; numbers are refused."""
        if self.class_names[0] == "class 0":
            raise ValueError(
                f"VG200: the label index holds numbers alone; put the {_COUNT} names, one a line in their order, into {_NAMES} "
                "beside it or give them with --class-names"
            )
        return super().prompt_names()


def _once(index: Path, pairs: list[tuple[str, list[int]]]) -> dict[str, list[int]]:
    """The label index, which may name an image once."""
    present = dict(pairs)
    if len(present) < len(pairs):
        twice = next(image for image, count in Counter(image for image, _ in pairs).items() if count > 1)
        raise ValueError(f"VG200: {index} must have the labels of {twice} once, got them twice; take one of its entries out")
    return present


def _read(place: Place, preset: Preset, split: str) -> LabelledImages:
    images = VG200(write_drawn_phrases("vg200", place.cache) if place.root is None else place.root, split)
    if place.root is None:
        images.name = "drawn scenes of 200 classes"
    return images


SOURCE = Source(
    key="vg200",
    title="VG-200",
    num_classes=_COUNT,
    layout=f"{LAYOUT}; none: drawn scenes of 200 classes",
    read=_read,
    preset="vg200-rn101",
    drawn_preset="embedded-vg200",
)
