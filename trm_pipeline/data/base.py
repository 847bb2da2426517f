"""What the pipeline needs of a data set, and what every reader of one shares."""

from __future__ import annotations

import argparse
import copy
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

from trm_pipeline.config.presets import HELD_OUT, Preset
from trm_pipeline.features.frozen import Frozen
from trm_pipeline.files import text_of

if TYPE_CHECKING:
    from typing import Self

Transform = Callable[[Image.Image], Tensor]


class LabelledImages(Dataset[tuple[Tensor, Tensor, int]]):
    """The images of a split and a row of labels for each; floats from 0 to 1 at an image's own size, see :meth:`with_transform`.

    Args:
        name: what stands over tables: the data set, and which split of it where several are in use.
        class_names: one for each column.
        image_paths: the files, in the order of the published list: the label-hiding procedure depends on it.
        targets: (N, C) labels, 1 present, 0 absent, -1 unknown. Assign others to train on those.
        ids: image names; the files' own without folder and suffix where none are given.
        mask_rows: row of each entry of a saved mask of DualCoOp, where these follow another order.
    """

    def __init__(
        self,
        name: str,
        class_names: Sequence[str],
        image_paths: list[str],
        targets: Tensor,
        *,
        ids: list[str] | None = None,
        mask_rows: Tensor | None = None,
    ) -> None:
        self.name, self.class_names = name, tuple(class_names)
        for class_name, times in Counter(class_names).items():
            if times > 1:
                raise ValueError(f"{name}: class_names must be different, got {class_name!r} {times} times; give each its own")
        self.image_paths, self.targets = image_paths, targets
        self.ids = [Path(path).stem for path in image_paths] if ids is None else ids
        self.transform: Transform = to_tensor()
        self.mask_rows = mask_rows

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        """The transformed image, its row of ``targets``, and ``index``."""
        path = self.image_paths[index]
        try:
            with Image.open(path) as image:
                pixels = image.convert("RGB")
        except OSError as error:
            raise ValueError(f"{type(self).__name__}: {path} is not a readable image ({error}); restore the file") from error
        return self.transform(pixels), self.targets[index], index

    def prompt_names(self) -> list[str]:
        """Class names as prompts have them, in column order."""
        return list(self.class_names)

    def with_transform(self, transform: Transform) -> Self:
        """The same images, seen in another way."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def rows(self, rows: Sequence[int]) -> Self:
        """Some of the images."""
        other = copy.copy(self)
        other.ids, other.image_paths = ([values[row] for row in rows] for values in (self.ids, self.image_paths))
        other.targets, other.mask_rows = self.targets[torch.as_tensor(rows)], None
        return other


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    pass


@dataclass(frozen=True)
class Place:
    """Where the images of a run are looked for.

    Args:
        root: ``--data-root``; none: drawn scenes in the cache, of a data set that has such.
        cache: folder for drawn scenes and frozen features.
        own: the arguments that the data set has for itself.
    """

    root: Path | None
    cache: Path
    own: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The root of a data set that has to be there."""
        if self.root is None:
            raise ValueError("--data-root is needed: the folder that holds the data set")
        return self.root


def _no_settings(place: Place) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Source:
    """A data set as its script runs it: ``reproduce_KEY.py`` with results in ``runs/KEY``.

    Args:
        layout: what ``--data-root`` must hold and where it is had, for the one who gives none.
        read: from the place, the preset and a split to its images.
        preset: the one that is taken where none is asked for.
        drawn_preset: the same without ``--data-root``; none: the data set has to be there.
        num_classes: none: what ``read`` finds.
        settings: of the preset, from what the data say themselves.
        given: features of the split trained on and of the one scored, with class texts; none: the preset's model makes them.
    """

    key: str
    title: str
    num_classes: int | None
    layout: str
    read: Callable[[Place, Preset, str], LabelledImages]
    preset: str
    drawn_preset: str | None = None
    add_arguments: Callable[[argparse.ArgumentParser], None] = _no_arguments
    settings: Callable[[Place], dict[str, Any]] = _no_settings
    given: Callable[[Path, Preset, tuple[str, str], torch.device], Frozen] | None = None


def held_out(count: int) -> dict[str, list[int]]:
    """Rows to train on and rows to choose settings with, of ``count`` training images: a fifth is held out.

    Cole's split: the last fifth of numpy's permutation with seed 1200, both parts in ascending order.
    """
    order = np.random.RandomState(1200).permutation(count)
    size = round(0.2 * count)
    return {"fit": sorted(order[: count - size].tolist()), HELD_OUT: sorted(order[count - size :].tolist())}


def eval_transform(size: int | tuple[int, int], *, mean: Sequence[float], std: Sequence[float]) -> v2.Compose:
    """The whole image resized (bicubic) to ``size``, (height, width) or one number for both, stretched to fit."""
    return v2.Compose([v2.Resize(_pair(size), InterpolationMode.BICUBIC), *to_tensor(mean, std).transforms])


def train_transform(size: int | tuple[int, int], *, mean: Sequence[float], std: Sequence[float]) -> v2.Compose:
    """A random part (50 to 100 % of the area) resized to ``size``, flipped every other time, and RandAugment."""
    crop = v2.RandomResizedCrop(_pair(size), scale=(0.5, 1.0), interpolation=InterpolationMode.BICUBIC)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), v2.RandAugment(), *to_tensor(mean, std).transforms])


def to_tensor(mean: Sequence[float] = (0.0, 0.0, 0.0), std: Sequence[float] = (1.0, 1.0, 1.0)) -> v2.Compose:
    """From PIL image to normalised floats."""
    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std), v2.ToPureTensor()])


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def found_in(folder: Path) -> str:
    """What is there instead of what was looked for."""
    return ", ".join(sorted(os.listdir(folder))[:10]) or "nothing" if folder.is_dir() else "no such folder"


def lines_of(path: Path, owner: str, layout: str) -> list[str]:
    """The lines of a list without blank ones, or an error that says where the file comes from."""
    if not path.is_file():
        raise FileNotFoundError(f"{owner}: {path} not found ({path.parent} holds: {found_in(path.parent)}); {layout}")
    return [line.strip() for line in text_of(path, "list").splitlines() if line.strip()]


def need_files(paths: Sequence[str], owner: str, listing: Path, fix: str = "unpack the images again") -> None:
    """Every image a list asks for is there, and asked for once."""
    if len(set(paths)) < len(paths):
        twice = next(path for path, count in Counter(paths).items() if count > 1)
        raise ValueError(f"{owner}: {listing} must list an image once, got {twice} twice; take one of its entries out")
    if missing := [path for path in paths if not os.path.isfile(path)]:
        there = next(folder for folder in Path(missing[0]).parents if folder.is_dir())
        if len(missing) == len(paths) or there != Path(missing[0]).parent:  # their folder is another one
            fix = f"{there} holds: {found_in(there)}; put the images, or a link to their folder, where they are looked for"
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FileNotFoundError(f"{owner}: {missing[0]}{more} is missing, but {listing} asks for it; {fix}")
