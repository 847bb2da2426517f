"""Small settings for the losses of others under every head, and features in memory."""

import dataclasses

import torch

from trm_pipeline import methods
from trm_pipeline.config import presets
from trm_pipeline.features import cached as features
from trm_pipeline.training import loop as training

IMAGES, TOKENS, CLASSES, DIM, EPOCHS = 12, 5, 4, 8, 5


class Held:
    """Features in memory."""

    views = 1

    def __init__(self, seed):
        draw = torch.Generator().manual_seed(seed)
        self.tokens = torch.randn(IMAGES, TOKENS, DIM, generator=draw)
        self.pooled = torch.randn(IMAGES, DIM, generator=draw)

    def __len__(self):
        return IMAGES

    def batches(self, batch_size, generator=None, *, view=0):
        order = torch.arange(IMAGES) if generator is None else torch.randperm(IMAGES, generator=generator)
        for index in order.split(batch_size):
            yield features.Batch(self.tokens[index], self.pooled[index], index)


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
    data = Held(1), chosen.targets, Held(2), labels(3).clamp(min=0)
    fixed = {"preset": chosen.preset, "single": chosen.single, "seed": 1, "device": torch.device("cpu"), "label": ""}
    return training.train(method, *data, encode=lambda text: text, **{**fixed, **more})


def setting(*, targets=None, single=False, **changes):
    torch.manual_seed(0)
    text, chosen = torch.randn(CLASSES, DIM), preset(**changes)
    held, targets = Held(1), labels(single=single) if targets is None else targets

    def similarities():
        return training.score(lambda batch: methods.zero_shot_tokens(batch, text), held, 6)

    return methods.Setting(
        chosen, text, None, 10.0, 2 * chosen.epochs, single=single, num_samples=IMAGES, targets=targets, similarities=similarities
    )
