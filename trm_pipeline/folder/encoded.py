"""What the frozen model makes of a folder of images and the names of its classes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trm_pipeline.data.base import Transform, eval_transform, lines_of
from trm_pipeline.features.backbone import Backbone, ImageTower, with_texts
from trm_pipeline.features.cached import Batch, CachedFeatures
from trm_pipeline.features.encoding import Check, cache_features, weights_digest
from trm_pipeline.features.towers import folder_of, found_anywhere, open_tower, weights_file
from trm_pipeline.files import check_writable
from trm_pipeline.folder.image_files import FolderImages, why_unreadable
from trm_pipeline.folder.model import DEMONSTRATION, SavedModel, class_texts
from trm_pipeline.folder.options import CacheOptions, EncodeOptions, TowerOptions
from trm_pipeline.progress import say
from trm_pipeline.ranks import check_device, launched


class Encoded(NamedTuple):
    """The frozen model by its name, and the digest of its weights; texts (C, D) and their templates.

    ``features`` are of the images that can be read; their ``places`` are those among all.
    """

    model: str
    pretrained: str | None
    backbone: Backbone
    weights: str
    text: Tensor
    templates: tuple[str, ...]
    token_pool: int
    features: CachedFeatures

    def saved(self, **about: Any) -> SavedModel:
        """What a head on these features is kept with; ``about`` are its classes and scores."""
        size = self.backbone.image_size
        return SavedModel(self.model, self.pretrained, self.weights, size, self.token_pool, self.templates, **about)


class Opening(NamedTuple):
    """The frozen model and where its weights lie; texts (C, D) of the classes and their templates."""

    backbone: Backbone
    pretrained: str | None
    text: Tensor
    templates: tuple[str, ...]


def open_encoder(options: TowerOptions, class_names: Sequence[str], words: Mapping[str, str]) -> Opening:
    """Open the model and encode the words."""
    device = torch.device(options.device)
    file = weights_file(options.model, options.pretrained)
    if options.model == "embedded":
        say(f"\n{DEMONSTRATION}\n")
    else:
        fetched = file is None and folder_of(options.model) is None
        say(f"model {options.model} {options.pretrained or ''}{', fetched where it is not here yet' if fetched else ''}")
    tower = open_tower(options.model, options.pretrained, options.image_size, device)
    backbone = with_texts(tower, options.model, options.class_texts, class_names, device)
    if options.class_texts is not None:
        if options.templates or options.names:
            raise ValueError(
                f"--names and --template are words for a text tower, and --model {options.model} has none; leave them out"
            )
        say(f"class texts of {options.class_texts}, read in the order {', '.join(class_names)}")
    text, templates = class_texts(backbone, words, options.templates)
    return Opening(backbone, file or options.pretrained, text, templates)


def encode(
    options: EncodeOptions, folder: Path, files: Sequence[str], class_names: Sequence[str], words: Mapping[str, str]
) -> Encoded:
    """Open the model, encode the words, and take the features of the images out of the cache or make them."""
    backbone, pretrained, text, templates = open_encoder(options, class_names, words)
    pool = usual_pool(backbone)
    digest = weights_digest(backbone)
    features = features_of(backbone, digest, pool, folder, files, options, mirror=True)
    return Encoded(found_anywhere(options.model), pretrained, backbone, digest, text, templates, pool, features)


def usual_pool(tower: ImageTower) -> int:
    """How many tokens in either direction are averaged: 2 on an even grid of 14 x 14 or more, otherwise 1."""
    height, width = tower.grid(tower.image_size)
    return 2 if height >= 14 and width >= 14 and height % 2 == width % 2 == 0 else 1


def transform_for(tower: ImageTower) -> Transform:
    """From an image of Pillow's to what the frozen model takes."""
    made: Transform = eval_transform(tower.image_size, mean=tower.image_mean, std=tower.image_std)
    return made


def images_for(tower: ImageTower, paths: Sequence[Path]) -> FolderImages:
    """Files as the frozen model takes them."""
    return FolderImages(paths, tower.image_size, transform_for(tower))


def features_of(
    tower: ImageTower, weights: str, token_pool: int, folder: Path, files: Sequence[str], options: CacheOptions, *, mirror: bool
) -> CachedFeatures:
    """Features of the images that can be read, out of the cache or made now; the others are named."""
    paths = [folder / file for file in files]
    data = images_for(tower, paths)
    cached = cache_features(
        options.cache / "folder-features",
        data,
        list(map(str, paths)),
        tower,
        weights=weights,
        token_pool=token_pool,
        mirror=mirror,
        device=torch.device(options.device),
        workers=options.workers,
        check=still_there(folder),
    )
    fine = torch.from_numpy(cached.pooled[0]).isfinite().all(dim=1)
    say_unreadable(folder, (~fine).nonzero().flatten().tolist(), files)
    height, width = tower.grid(tower.image_size)
    cached.grid = height // token_pool, width // token_pool
    return cached.only(fine)


def still_there(folder: Path) -> Check:
    """What refuses a batch with images that cannot be read since the whole folder went away."""

    def check(batch: Batch) -> None:
        if not batch.pooled.isfinite().all() and not folder.is_dir():
            raise OSError(
                f"the image folder {folder} is gone; what was encoded is kept: bring it back, and start the command again"
            )

    return check


def check_encoding(options: TowerOptions, output: Path) -> None:
    """Refuse at the door what would otherwise end late."""
    if launched() > 1:
        raise ValueError(f"a folder of images takes one process, got {launched()} of torchrun; start it without")
    for name, value, least in (("--workers", options.workers, 0), ("--image-size", options.image_size, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    for template in options.templates:
        if "{}" not in template:
            raise ValueError(f"--template must hold {{}} for the class name, got {template!r}")
    check_writable(output, "--output")
    check_device(options.device)


def check_output(output: Path, folder: Path, images: Sequence[str]) -> None:
    """It is no folder of images, nor lies in one, also by way of links."""
    place = Path(os.path.realpath(output))
    for inside in {folder, *((folder / image).parent for image in images)}:
        if place.is_relative_to(os.path.realpath(inside)):
            raise ValueError(f"--output {output} lies in the image folder; its pictures would be images of the next training")


def read_names(path: Path) -> list[str]:
    """Names of classes out of a file, one a line.

    Raises:
        FileNotFoundError: no such file. ValueError: no name in it, or one twice.
    """
    names = lines_of(path, "--classes", "wanted is a file with a name a line")
    if not names or len(set(names)) < len(names):
        got = f"{max(names, key=names.count)!r} twice" if names else "none"
        raise ValueError(f"--classes: {path} must hold different names of classes, one a line, got {got}")
    return names


def words_of(class_names: Sequence[str], given: Sequence[str]) -> dict[str, str]:
    """What each class is called in prompts: its name, with spaces for underscores, or other words."""
    words = {name: name.replace("_", " ") for name in class_names}
    for item in given:
        name, _, word = item.partition("=")
        if name not in words or not word.strip():
            raise ValueError(f"--names: wanted CLASS=WORDS with one of {', '.join(class_names[:10])}; got {item!r}")
        words[name] = word.strip()
    return words


def say_unreadable(folder: Path, broken: Sequence[int], files: Sequence[str]) -> None:
    """Name the images that cannot be read.

    Raises:
        ValueError: none of them can.
    """
    if broken:
        say(f"{len(broken)} of {len(files)} images cannot be read and are left out:")
        for index in broken[:10]:
            say(f"  {files[index]}: {why_unreadable(folder / files[index])}")
        if len(broken) > 10:
            say(f"  and {len(broken) - 10} more")
    if len(broken) == len(files):
        raise ValueError("none of the images can be read")
