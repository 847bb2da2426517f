"""What a short training script needs of a features folder, or of the drawn scenes: features, labels and class texts."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from trm_pipeline.config.presets import EMBEDDED
from trm_pipeline.data.base import eval_transform
from trm_pipeline.data.given import labels_of, open_split, open_text, read_meta, scored_split
from trm_pipeline.data.voc import VOC, class_prompt_names
from trm_pipeline.drawn.devkit import write_drawn_voc
from trm_pipeline.features.cached import CachedFeatures
from trm_pipeline.features.encoding import cache_features, weights_digest
from trm_pipeline.features.towers import open_open_clip
from trm_pipeline.files import CACHE, folder_argument


class Split(NamedTuple):
    """A split in a script: ``for batch in split.features.batches(64, generator)``.

    Batches have tokens (B, N, D), pooled features (B, D) and the rows (B,) of ``targets`` that they belong to, ``index``; with a
    generator they come in a random order, each image in one of its views.
    """

    features: CachedFeatures
    targets: Tensor  # (n, C) in {1, 0, -1}
    text: Tensor  # (C, D), on the device of the features
    class_names: list[str]


def open_splits(folder: Path | None, device: str = "cpu", cache: Path | None = None) -> tuple[Split, Split]:
    """The split ``train`` of a features folder, and the one that is scored: ``test``, or ``val`` if there is none.

    Args:
        folder: what :func:`trm_losses.write_features` wrote. None: the drawn VOC, encoded once by the model that ships with the
            pipeline.
        device: where batches and texts go.
        cache: folder of drawn scenes and their features; default: that of the pipeline.

    Raises:
        ValueError, FileNotFoundError: the folder is none of features; the message says which file, what was wanted and got.
    """
    if folder is None:
        root = folder_argument(CACHE) if cache is None else cache
        return _drawn(root, device)
    train, scored = (_given(folder, split, device) for split in ("train", scored_split(folder)))
    return train, scored


def _given(root: Path, split: str, device: str) -> Split:
    meta, digest = read_meta(root), hashlib.blake2b()
    targets, text = labels_of(root, split, meta), open_text(root, meta, digest)
    features = open_split(root / split, text.shape[1], meta, torch.device(device), digest, first=split != "train")
    return Split(features, targets, text.to(device), meta.class_names)


def _drawn(cache: Path, device: str) -> tuple[Split, Split]:
    backbone = open_open_clip("embedded", None, EMBEDDED.image_size, torch.device(device))
    transform = eval_transform(EMBEDDED.image_size, mean=backbone.image_mean, std=backbone.image_std)
    text = backbone.template_text(class_prompt_names(), EMBEDDED.templates)
    root, weights = write_drawn_voc(cache), weights_digest(backbone)

    def split(name: str) -> Split:
        images = VOC(root, EMBEDDED.year, name).with_transform(transform)
        features = cache_features(
            cache / "features",
            images,
            images.image_paths,
            backbone,
            weights=weights,
            token_pool=EMBEDDED.token_pool,
            mirror=name == "train",
            device=torch.device(device),
        )
        return Split(features, images.targets, text, list(images.class_names))

    return split("train"), split("test")
