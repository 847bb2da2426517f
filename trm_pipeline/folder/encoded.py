"""What the frozen model makes of a folder of images and the names of its classes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from trm_pipeline.data.voc import eval_transform
from trm_pipeline.features.backbone import Backbone, with_texts
from trm_pipeline.features.cached import cache_features, weights_digest
from trm_pipeline.features.towers import folder_of
from trm_pipeline.files import check_writable
from trm_pipeline.folder.image_files import FolderImages
from trm_pipeline.folder.model import DEMONSTRATION, class_texts, open_backbone, weights_file
from trm_pipeline.folder.part import Part
from trm_pipeline.progress import say

__all__ = ["Encoded", "check_device", "check_encoding", "check_output", "encode", "readable", "words_of"]


class Encoded(NamedTuple):
    """The frozen model with the digest and the file of its weights; texts (C, D) and their templates; readable images.

    ``features`` are of the images that can be read, ``readable`` their places among all.
    """

    backbone: Backbone
    weights: str
    file: str | None
    text: Tensor
    templates: tuple[str, ...]
    token_pool: int
    features: Part
    readable: Tensor


def encode(args: argparse.Namespace, files: Sequence[str], class_names: Sequence[str], words: Mapping[str, str]) -> Encoded:
    """Open the model, encode the words, and take the features of the images out of the cache or make them."""
    device = torch.device(args.device)
    file = weights_file(args.model, args.pretrained)
    if args.model == "embedded":
        say(f"\n{DEMONSTRATION}\n")
    else:
        fetched = file is None and folder_of(args.model) is None
        say(f"model {args.model} {args.pretrained or ''}{', fetched where it is not here yet' if fetched else ''}")
    tower = open_backbone(args.model, args.pretrained, args.image_size, device)
    backbone = with_texts(tower, args.model, args.class_texts, class_names, device)
    if args.class_texts is not None:
        if args.templates or args.names:
            raise ValueError(
                f"--names and --template are words for a text tower, and --model {args.model} has none; leave them out"
            )
        say(f"class texts of {args.class_texts}, read in the order {', '.join(class_names)}")
    text, templates = class_texts(backbone, words, args.templates)
    height, width = backbone.grid(backbone.image_size)
    pool = 2 if height >= 14 and width >= 14 and height % 2 == width % 2 == 0 else 1
    digest = weights_digest(backbone)

    transform = eval_transform(backbone.image_size, mean=backbone.image_mean, std=backbone.image_std)
    paths = [args.images / file for file in files]
    data = FolderImages(paths, backbone.image_size, transform)
    cached = cache_features(
        args.cache / "folder-features",
        data,
        list(map(str, paths)),
        backbone,
        weights=digest,
        token_pool=pool,
        mirror=True,
        device=device,
        workers=args.workers if len(paths) > 64 else 0,
    )
    whole = readable(data, torch.from_numpy(cached.pooled[0]), files)
    features = Part(cached, whole, (height // pool, width // pool))
    return Encoded(backbone, digest, file, text, templates, pool, features, whole)


def check_encoding(args: argparse.Namespace) -> None:
    """Refuse at the door what would otherwise end late."""
    for name, value, least in (("--workers", args.workers, 0), ("--image-size", args.image_size, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    for template in args.templates or ():
        if "{}" not in template:
            raise ValueError(f"--template must hold {{}} for the class name, got {template!r}")
    check_writable(args.output, "--output")
    check_device(args.device)


def check_output(output: Path, folder: Path, images: Sequence[str]) -> None:
    """It is no folder of images, nor lies in one, also by way of links."""
    place = Path(os.path.realpath(output))
    for inside in {folder, *((folder / image).parent for image in images)}:
        if place.is_relative_to(os.path.realpath(inside)):
            raise ValueError(f"--output {output} lies in the image folder; its pictures would be images of the next training")


def check_device(device: str) -> None:
    """It can be used here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error


def words_of(class_names: Sequence[str], given: Sequence[str]) -> dict[str, str]:
    """What each class is called in prompts: its name, with spaces for underscores, or other words."""
    words = {name: name.replace("_", " ") for name in class_names}
    for item in given:
        name, _, word = item.partition("=")
        if name not in words or not word.strip():
            raise ValueError(f"--names: wanted CLASS=WORDS with one of {', '.join(class_names[:10])}; got {item!r}")
        words[name] = word.strip()
    return words


def readable(data: FolderImages, pooled: Tensor, files: Sequence[str]) -> Tensor:
    """The images whose features are finite; the others are named."""
    broken = (~pooled.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if broken:
        say(f"{len(broken)} of {len(files)} images cannot be read and are left out:")
        for index in broken[:10]:
            say(f"  {files[index]}: {data.why_unreadable(index)}")
        if len(broken) > 10:
            say(f"  and {len(broken) - 10} more")
    if len(broken) == len(files):
        raise ValueError("none of the images can be read")
    return pooled.isfinite().all(dim=1).nonzero().flatten()
