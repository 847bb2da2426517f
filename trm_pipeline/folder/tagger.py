"""A trained model as one object: an image in; names, probabilities and where each was seen out."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from trm_losses import TRMHead
from trm_pipeline.features.backbone import ImageTower, has_texts
from trm_pipeline.features.cached import Batch, LiveFeatures
from trm_pipeline.folder.encoded import images_for, transform_for
from trm_pipeline.folder.image_files import read_image, shown_upright
from trm_pipeline.folder.model import SavedModel, class_texts
from trm_pipeline.folder.onnx_file import Exported, export_onnx
from trm_pipeline.ranks import check_device


class Tag(NamedTuple):
    """A class of an image: its probability, whether that is above the threshold, and where it was looked for, (h, w)."""

    name: str
    probability: float
    present: bool
    where: Tensor


class Tagger:
    """A model that ``train`` or ``tag`` wrote, with its frozen model, for other images.

    Example:
        >>> tagger = Tagger.load("runs/folder")  # doctest: +SKIP
        >>> [tag.name for tag in tagger("photo.jpg") if tag.present]  # doctest: +SKIP
        ['dog', 'garden chair']
    """

    def __init__(self, saved: SavedModel, head: TRMHead, tower: ImageTower, device: torch.device) -> None:
        self.saved, self.head, self.tower, self.device = saved, head.to(device), tower, device

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, device: torch.device | str = "cpu", pretrained: str | None = None) -> Tagger:
        """Open the folder of a model.

        Args:
            folder: what ``train`` or ``tag`` wrote, or the ``model.json`` in it.
            device: where it runs.
            pretrained: where the weights of the frozen model lie now, if not where they were in training.

        Raises:
            FileNotFoundError: no finished model. ValueError: files of other trainings, or other weights of the frozen model.
        """
        saved, head = SavedModel.load(Path(folder))
        check_device(str(device))
        return cls(saved, head, saved.open(torch.device(device), pretrained), torch.device(device))

    @property
    def class_names(self) -> list[str]:
        """C names, in the order of columns."""
        return self.head.class_names

    def with_classes(self, names: Sequence[str]) -> Tagger:
        """The same with further classes, known by their names alone; their threshold is 0.5.

        Raises:
            ValueError: no list of names, names that are there already, or the model has no text tower to read them.
        """
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name.strip() for name in names):
            raise ValueError(f"new classes must be a list of names, none of them blank, got {names!r}")
        if twice := [name for i, name in enumerate(names) if name in self.class_names or name in names[:i]]:
            raise ValueError(f"new classes must have names of their own, got {twice[0]!r} twice")
        if not has_texts(self.tower):
            raise ValueError(f"new classes are known by their names, and {self.saved.model} has no text tower to read them")
        text, _ = class_texts(self.tower, {name: name.replace("_", " ") for name in names}, self.saved.templates)
        head = self.head.with_classes(torch.cat([self.head.text, text.to(self.head.text)]), [*self.class_names, *names])
        other = copy.copy(self)
        other.head, other.saved = head.eval(), self.saved.with_classes(names)
        return other

    def __call__(self, image: str | os.PathLike[str] | Image.Image) -> list[Tag]:
        """All classes of an image, a path or an image of Pillow's, the most probable first."""
        if not isinstance(image, (str, os.PathLike, Image.Image)):
            got = f"got {type(image).__name__}; Image.fromarray makes one of an array"
            raise TypeError(f"Tagger: image must be a path or an image of Pillow's, {got}")
        size = self.tower.image_size
        shown = shown_upright(image) if isinstance(image, Image.Image) else read_image(Path(image), size)
        data = [(transform_for(self.tower)(shown), torch.empty(0), 0)]
        batch = _rounded(next(iter(self._live(data, 0).batches(1))))
        with torch.no_grad():
            probability = self.head.predict(batch.tokens, batch.penultimate)[0].cpu()
            where = self.head.pooler(batch.tokens, self.head.text).saliency[0]
        height, width = self.tower.grid(size)
        grid = height // self.saved.token_pool, width // self.saved.token_pool
        present = (probability > self.saved.thresholds).tolist()
        maps = where.unflatten(1, grid).float().cpu()
        tags = [Tag(*row) for row in zip(self.class_names, probability.tolist(), present, maps, strict=True)]
        return sorted(tags, key=lambda tag: -tag.probability)

    def stream(
        self, paths: Iterable[str | os.PathLike[str]], *, workers: int = 0, batch_size: int = 50
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Places (b,) among the paths, and probabilities (b, C) of the images there; NaN of an image that cannot be read."""
        one = isinstance(paths, (str, os.PathLike))
        files = [] if one else list(paths)
        if wrong := [paths] if one else [file for file in files if not isinstance(file, (str, os.PathLike))]:
            raise TypeError(f"Tagger: paths must be a list of paths, got {type(wrong[0]).__name__}; tagger(image) takes one")
        live = self._live(images_for(self.tower, [Path(file) for file in files]), workers)
        for batch in live.batches(batch_size):
            fine = batch.pooled.isfinite().all(dim=1)
            rounded = _rounded(batch)
            with torch.no_grad():
                found = self.head.predict(rounded.tokens, rounded.penultimate)
            yield batch.index, torch.where(fine[:, None], found, torch.nan).cpu()

    def export(self, path: str | os.PathLike[str]) -> Exported:
        """Write an ONNX file that takes an image in bytes (H, W, 3) and gives the probabilities (C,) of this object.

        Args:
            path: a file that ends in ``.onnx``; one that is there is replaced.

        Raises:
            ImportError: onnx or onnxscript is missing.
            ValueError: another suffix, an operation that ONNX does not have, or more than 2 GiB.
        """
        return export_onnx(self.saved, self.head, self.tower, Path(path))

    def _live(self, data: Any, workers: int) -> LiveFeatures:
        return LiveFeatures(data, self.tower, token_pool=self.saved.token_pool, device=self.device, workers=workers)


def _rounded(batch: Batch) -> Batch:
    """Features rounded as they are cached in training; zeros of an image that cannot be read."""

    def rounded(x: Tensor) -> Tensor:
        return torch.nan_to_num(x.half().float(), 0.0, 0.0, 0.0)

    return batch._replace(
        tokens=rounded(batch.tokens), penultimate=None if batch.penultimate is None else rounded(batch.penultimate)
    )
