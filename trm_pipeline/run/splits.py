"""What a short training script needs of a features folder, or of the drawn scenes: features, labels and class texts."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from trm_pipeline.data import given, voc
from trm_pipeline.features.cached import Features
from trm_pipeline.run.arguments import parse
from trm_pipeline.run.prepare import prepare


class Split(NamedTuple):
    """A split in a script: ``for batch in split.features.batches(64, generator)``.

    Batches have tokens (B, N, D), pooled features (B, D) and the rows (B,) of ``targets`` that they belong to, ``index``; with a
    generator they come in a random order, each image in one of its views.
    """

    features: Features
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
    where = [str(folder)] if folder is not None else ["--cache", str(cache)] if cache is not None else []
    with torch.random.fork_rng(devices=()):  # a script's own draws do not depend on what was made here
        data = prepare(parse([*where, "--device", device], voc.SOURCE if folder is None else given.SOURCE))
    train = Split(data.features, data.targets, data.text, data.class_names)
    return train, train._replace(features=data.test_features, targets=data.test_targets)
