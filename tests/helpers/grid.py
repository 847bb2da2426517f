"""Small settings for the losses of others under every head, features in memory and in files, and a tower."""

import dataclasses

import numpy as np
import torch

from trm_losses.backbones import ImageFeatures
from trm_pipeline import methods
from trm_pipeline.config import presets
from trm_pipeline.features import cached as features
from trm_pipeline.training import loop as training

IMAGES, TOKENS, CLASSES, DIM, EPOCHS = 12, 5, 4, 8, 5


def in_memory(tokens, pooled, penultimate=None):
    """Features (V, n, ...) in memory, in so many views."""
    parts = ([] if part is None else [*part.numpy()] for part in (tokens, pooled, penultimate))
    return features.CachedFeatures(*parts, torch.device("cpu"))


def save_arrays(folder, **kinds):
    """Arrays (V, n, ...) of each kind as a cache has them, a file for each view."""
    for name, views in kinds.items():
        for view, array in enumerate(views):
            np.save(folder / f"{name}{view}.npy", np.asarray(array, np.float16))


class Means:
    """A tower of one token, the mean of the pixels of each channel."""

    name, dim, image_size, image_mean, image_std = "means", 3, (8, 16), (0.0,) * 3, (1.0,) * 3

    def grid(self, size):
        return 1, 1

    def __call__(self, pixels):
        pooled = pixels.mean(dim=(2, 3))
        return ImageFeatures(pooled[:, None], pooled, (1, 1), torch.cat([pooled, pooled], dim=1))


def batch(images, tokens, dim, seed=1):
    """Features of a few images that nothing is known of."""
    draw = torch.Generator().manual_seed(seed)
    return features.Batch(
        torch.randn(images, tokens, dim, generator=draw), torch.randn(images, dim, generator=draw), torch.arange(images)
    )


def held(seed):
    """Features of a few images."""
    draw = torch.Generator().manual_seed(seed)
    return in_memory(torch.randn(1, IMAGES, TOKENS, DIM, generator=draw), torch.randn(1, IMAGES, DIM, generator=draw))


def labels(seed=0, single=False):
    draw = torch.Generator().manual_seed(seed)
    if single:
        return torch.full((IMAGES, CLASSES), -1.0).scatter(1, torch.randint(CLASSES, (IMAGES, 1), generator=draw), 1.0)
    return torch.randint(-1, 2, (IMAGES, CLASSES), generator=draw).float()


def preset(**changes):
    small = {"epochs": EPOCHS, "batch_size": 6, "pooler": {"dropout": 0.0, "num_heads": 2}}
    return dataclasses.replace(presets.EMBEDDED, **{**small, **changes})


def train(method, chosen, **more):
    """The loop on features in memory."""
    data = held(1), chosen.targets, held(2), labels(3).clamp(min=0)
    fixed = {"preset": chosen.preset, "single": chosen.single, "seed": 1, "device": torch.device("cpu"), "label": ""}
    return training.train(method, *data, encode=lambda text: text, **{**fixed, **more})


def setting(*, targets=None, single=False, **changes):
    torch.manual_seed(0)
    text, chosen = torch.randn(CLASSES, DIM), preset(**changes)
    own, targets = held(1), labels(single=single) if targets is None else targets

    def similarities():
        return training.score(lambda batch: methods.zero_shot_tokens(batch, text), own, 6)

    return methods.Setting(
        chosen, text, None, 10.0, 2 * chosen.epochs, single=single, num_samples=IMAGES, targets=targets, similarities=similarities
    )
