"""Inputs of the cases: regions, tokens and logits with their text and labels."""

from __future__ import annotations

import torch

from tests.helpers.values import TOKENS, WIDTH, Inputs, generator, labels, normal


def region_text(batch: int, classes: int) -> Inputs:
    return {
        "regions": 0.4 * normal(batch, classes, WIDTH, seed=1),
        "text": normal(classes, WIDTH, seed=2),
        "targets": labels(batch, classes, seed=3),
    }


def with_weights(batch: int, classes: int) -> Inputs:
    weights = torch.rand(batch, classes, generator=generator(4), dtype=torch.float64)
    weights[-1, 0] = 0.0
    return {**region_text(batch, classes), "weights": weights}


def with_prototypes(batch: int, classes: int) -> Inputs:
    seen = torch.ones(classes, dtype=torch.bool)
    seen[classes // 2] = classes == 1
    return {**with_weights(batch, classes), "prototypes": normal(classes, WIDTH, seed=5), "seen": seen}


def image_labels(batch: int, classes: int) -> Inputs:
    weights = torch.rand(batch, classes, generator=generator(4), dtype=torch.float64)
    return {"features": normal(batch, WIDTH, seed=1), "targets": labels(batch, classes, seed=8), "weights": weights}


def token_text(batch: int, classes: int) -> Inputs:
    return {"tokens": normal(batch, TOKENS, WIDTH, seed=6), "text": normal(classes, WIDTH, seed=7)}


def with_padding(batch: int, classes: int) -> Inputs:
    mask = torch.zeros(batch, TOKENS, dtype=torch.bool)
    mask[0, 4:] = mask[-1, 0] = True
    return {**token_text(batch, classes), "key_padding_mask": mask}


def two_logits(batch: int, classes: int) -> Inputs:
    return {
        "student_logits": 3 * normal(batch, classes, seed=8),
        "teacher_logits": 3 * normal(batch, classes, seed=9),
        "weights": torch.rand(batch, generator=generator(10), dtype=torch.float64),
    }
