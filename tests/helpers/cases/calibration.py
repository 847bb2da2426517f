"""Cases of Calibration, and the logits that it is fitted to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import trm_losses as tl
from tests.helpers import oracles
from tests.helpers.cases.case import Case, integers, refused
from tests.helpers.values import CLASSES, Inputs, generator, normal

IMAGES = 60


def held_out(classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Logits (60, C) and known labels of some entries; of the last of several classes too few for numbers of its own."""
    logits = 2 * normal(IMAGES, classes, seed=40) + normal(classes, seed=41)
    truth = 1.7 * logits - 0.8 + normal(classes, seed=42) > torch.logit(random_numbers(IMAGES, classes, seed=43))
    targets = torch.where(random_numbers(IMAGES, classes, seed=44) < 0.7, truth.double(), -1.0)
    if classes > 1:
        targets[4:, -1] = -1
    return logits, targets


def random_numbers(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=generator(seed), dtype=torch.float64)


def calibration(classes: int = CLASSES) -> tl.Calibration:
    return tl.Calibration(classes).fit(*held_out(classes))


def with_single_positives(classes: int = CLASSES) -> tl.Calibration:
    logits, targets = held_out(classes)
    return tl.Calibration(classes).fit(logits, torch.where(targets == 1, 1.0, -1.0), expected_positives=0.4 * classes)


def several(batch: int, classes: int) -> Inputs:
    return {"logits": 3 * normal(batch, classes, seed=45)}


def calibrated(module: tl.Calibration, x: Inputs) -> Any:
    scale, shift, _ = oracles.platt(*held_out(module.num_classes))
    return oracles.array(x["logits"]) * scale + shift


def with_one_scale(module: tl.Calibration, x: Inputs) -> Any:
    logits, targets = held_out(module.num_classes)
    scale, shift = oracles.single_positives(logits, torch.where(targets == 1, 1.0, -1.0), 0.4 * module.num_classes)
    return oracles.array(x["logits"]) * scale + shift


WRONG = {key: how for key, how in refused(logits="B C").items() if not key.endswith("device")}

CASES = [
    Case(
        name=name,
        owner="Calibration",
        build=build,
        inputs=several,
        call=lambda m, x: m(x["logits"]),
        oracle=oracle,
        learns=("logits",),
        wrong={**WRONG, **integers("logits")},
        state=("scale", "shift", "pooled"),
        finite=("logits",),
        shows=("num_classes=5",),
    )
    for name, build, oracle in (
        ("calibration", calibration, calibrated),
        ("calibration, single positives", with_single_positives, with_one_scale),
    )
]
