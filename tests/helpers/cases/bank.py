"""Cases of PrototypeBank, and a bank that has seen something."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import trm_losses as tl
from tests.helpers import oracles
from tests.helpers.cases.case import Case, integers, refused
from tests.helpers.values import CLASSES, WIDTH, Inputs, Result, normal, with_weights
from trm_losses import functional as TF
from trm_losses._precision import unit


def filled_bank(classes: int = CLASSES, width: int = WIDTH) -> tl.PrototypeBank:
    """Two updates old; the last of several classes has never been seen."""
    bank = tl.PrototypeBank(classes, width, init=normal(classes, width, seed=20))
    for seed in (21, 22):
        y = torch.ones(3, classes)
        if classes > 1:
            y[:, -1] = 0
        bank.update(normal(3, classes, width, seed=seed), y, text=normal(classes, width, seed=seed + 2))
    return bank


def call_bank(module: tl.PrototypeBank, x: Inputs) -> Result:
    module.reset()
    module.update(x["regions"], x["targets"], weights=x.get("weights"), text=x["text"])
    module.update(x["regions"].roll(1, 0), x["targets"], weights=x.get("weights"), text=x["text"].roll(1, 0))
    return module.visual.clone(), module.text.clone(), module.count.clone()


def bank_oracle(module: tl.PrototypeBank, x: Inputs) -> Any:
    bank = oracles.Bank(module.init)
    bank.update(x["regions"], x["targets"], x.get("weights"), x["text"])
    bank.update(x["regions"].roll(1, 0), x["targets"], x.get("weights"), x["text"].roll(1, 0))
    return bank.visual, bank.text, np.array(bank.count)


def bank_twin(module: tl.PrototypeBank, x: Inputs) -> Result:
    visual, count = module.init, torch.zeros(len(module.init), dtype=torch.int64)
    mass = torch.where(x["targets"] == 1, x["weights"].float(), 0.0)
    for z in (x["regions"], x["regions"].roll(1, 0)):
        visual, count = TF.update_prototypes(visual, count, *TF.class_sums(z, mass), momentum=module.momentum)
    first, second = unit(x["text"]).float(), unit(x["text"].roll(1, 0)).float()
    return visual, unit(0.5 * first + 0.5 * second), count


BANK_STATE = ("init", "visual", "text", "count", "text_count")


CASES = [
    Case(
        name="bank",
        owner="PrototypeBank",
        build=lambda c: tl.PrototypeBank(c, WIDTH, init=normal(c, WIDTH, seed=17)),
        inputs=with_weights,
        call=call_bank,
        oracle=bank_oracle,
        twin=bank_twin,
        wrong={**refused(regions="B C D", text="C D", targets="B C", weights="B C"), **integers("regions", "text", "weights")},
        state=BANK_STATE,
        compiles=False,
        finite=("text",),
        shows=("num_classes=5", "dim=8", "momentum=0.99"),
    )
]
