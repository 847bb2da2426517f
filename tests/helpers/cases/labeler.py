"""Cases of PseudoLabeler under each of its rules, and labelers that have seen something."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import trm_losses as tl
from tests.helpers import oracles
from tests.helpers.cases.bank import filled_bank
from tests.helpers.cases.case import Case, change, encodings, integers, refused
from tests.helpers.values import CLASSES, SAMPLES, WIDTH, Inputs, Result, labels, normal
from trm_losses import pseudo


def labeler_by_prototypes(classes: int = CLASSES, **settings: Any) -> tl.PseudoLabeler:
    """Settings of labeler, prototype rule and what decides, by quantiles if ``share`` is given: those of oracles.Labeler."""
    own = {key: settings.pop(key) for key in ("temperature_visual", "temperature_text", "momentum") if key in settings}
    decider: pseudo.Quantiles | pseudo.Thresholds
    if "share" in settings:
        decider = pseudo.Quantiles(classes, share=settings.pop("share"), momentum=own.get("momentum", 0.99))
    else:
        decider = pseudo.Thresholds(settings.pop("positive", 0.8), settings.pop("negative", 0.1))
    return tl.PseudoLabeler(classes, pseudo.PrototypeRule(classes, decider, **own), **settings)


def evidence(known: list[list[int]], targets: Tensor | None = None, expected: float | None = None) -> pseudo.Evidence:
    """Of known labels (absent, present) of each class, and nothing else."""
    y, bank = torch.full((1, len(known)), -1.0) if targets is None else targets, tl.PrototypeBank(len(known), WIDTH)
    return pseudo.Evidence(None, y, bank, bank.text, None, None, torch.tensor(known).T, expected, None)


def fillings(classes: int) -> Iterator[tuple[Tensor, Tensor, tl.PrototypeBank]]:
    """Batches after which some classes, and not all, have the ten known positives that their own statistics need."""
    bank = filled_bank(classes)
    for seed in (31, 32):
        yield normal(14, classes, WIDTH, seed=seed) + bank.visual, labels(14, classes, seed), bank


def filled_labeler(classes: int = CLASSES, **settings: Any) -> tl.PseudoLabeler:
    labeler = labeler_by_prototypes(classes, **settings)
    for batch in fillings(classes):
        labeler.update(*batch)
    return labeler


def filled_oracle(classes: int = CLASSES, **settings: Any) -> oracles.Labeler:
    slow = oracles.Labeler(classes, **settings)
    for batch in fillings(classes):
        slow.update(*batch)
    return slow


LABELER_BANKS = {classes: filled_bank(classes) for classes in (1, 2, 3, CLASSES)}  # made outside of what is compiled


def call_labeler(module: tl.PseudoLabeler, x: Inputs) -> Result:
    bank = LABELER_BANKS[module.num_classes]
    return tuple(module(x["regions"], x["targets"], bank, **{key: x.get(key) for key in ("text", "logits", "ids")}))


def labeler_inputs(batch: int, classes: int) -> Inputs:
    return {
        "regions": normal(batch, classes, WIDTH, seed=11) + filled_bank(classes).visual.double(),
        "targets": labels(batch, classes, seed=12),
    }


def labeler_ids(batch: int, classes: int) -> Inputs:
    return {**labeler_inputs(batch, classes), "ids": torch.arange(batch).flip(0)}


def refreshed_labeler(classes: int) -> tl.PseudoLabeler:
    rule = pseudo.NeighbourRule(classes, SAMPLES, neighbours=3, temperature=0.3, steps=2)
    labeler = tl.PseudoLabeler(classes, rule, weight_pos=0.8, weight_neg=0.6)
    labeler.refresh(*training_set(classes))
    return labeler


def training_set(classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Regions, logits and labels of all samples."""
    return normal(SAMPLES, classes, WIDTH, seed=51), 2 * normal(SAMPLES, classes, seed=52), labels(SAMPLES, classes, seed=53)


def neighbour_rule_oracle(module: tl.PseudoLabeler, x: Inputs) -> Any:
    z, logits, known = (oracles.array(part) for part in training_set(module.num_classes))
    said = known.copy()
    for i in zip(*np.where(known == -1), strict=True):
        said[i] = oracles.sigmoid(logits[i])
    scores = oracles.neighbour_scores(z, said, 3, 0.3, known=known != -1, steps=2)[oracles.array(x["ids"]).astype(int)]
    unknown = oracles.array(x["targets"]) == -1
    return np.where(unknown, scores, -1.0), np.where(unknown, np.where(scores >= 0.5, 0.8, 0.6), 0.0), scores


def labeler_oracle(module: tl.PseudoLabeler, x: Inputs, **settings: Any) -> Any:
    return filled_oracle(module.num_classes, **settings)(x["regions"], x["targets"], filled_bank(module.num_classes))


COUNTS = ("step", "known_count")  # of a labeler, whatever its rule
LABELER_STATE = (*COUNTS, "rule.similarity_sum", "rule.similarity_mass")


CASES = [
    Case(
        name="labeler",
        owner="PseudoLabeler",
        build=lambda c: filled_labeler(c),
        inputs=labeler_inputs,
        call=call_labeler,
        oracle=labeler_oracle,
        wrong={**refused(regions="B C D", targets="B C"), **integers("regions"), **encodings()},
        state=LABELER_STATE,
        finite=("regions",),
        shows=("num_classes=5", "PrototypeRule", "positive=0.8, negative=0.1", "warmup_steps=0"),
    ),
    *(
        Case(
            name=f"labeler, quantiles{name}",
            owner="PseudoLabeler",
            build=lambda c, settings=settings: filled_labeler(c, **settings),
            inputs=labeler_inputs,
            call=call_labeler,
            oracle=lambda m, x, settings=settings: labeler_oracle(m, x, **settings),
            state=(*LABELER_STATE, "rule.decider.histogram"),
            shows=("Quantiles", "share=0.6"),
        )
        for name, settings in (("", {"share": 0.6}), (", given positives", {"share": 0.6, "expected_positives": 1.5}))
    ),
    Case(
        name="labeler, neighbour rule",
        owner="PseudoLabeler",
        build=refreshed_labeler,
        inputs=labeler_ids,
        call=call_labeler,
        oracle=neighbour_rule_oracle,
        wrong={
            **refused(regions="B C D", targets="B C", ids="B"),
            "ids: missing": (
                lambda x: {k: v for k, v in x.items() if k != "ids"},
                ValueError,
                "ids must be given, NeighbourRule needs them",
            ),
            "ids: outside": (change("ids", lambda i: i + 5), ValueError, "ids must be from 0 to num_samples - 1 = 5, got 5 to 8"),
        },
        state=(*COUNTS, "rule.estimates"),
        shows=("NeighbourRule", "num_samples=6"),
    ),
]
