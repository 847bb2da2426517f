"""The classifier out of class texts and unlabelled training images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trm_losses import GaussianDiscriminant
from trm_pipeline import ranks
from trm_pipeline.features.cached import Features

TRAINING_FREE = "training-free"


def fit_training_free(features: Features, text: Tensor, batch_size: int, **options: Any) -> GaussianDiscriminant:
    """Fitted on the images in their own order and first view; of several ranks each reads its part of every batch.

    ``options`` are of the constructor.
    """
    classifier = GaussianDiscriminant(*text.shape, **options, distributed=True, device=text.device)
    with torch.random.fork_rng(devices=()):  # a loader draws a seed, and a cell must not tell what came before it
        return classifier.fit((batch.tokens for batch in ranks.batches(features, batch_size)), text)
