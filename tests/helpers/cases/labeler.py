"""Cases of PseudoLabeler under each of its rules, and labelers that have seen something."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import trm_losses as tl
from tests.helpers import oracles
from tests.helpers.cases.bank import filled_bank
from tests.helpers.cases.case import Case, change, encodings, integers, refused
from tests.helpers.values import CLASSES, SAMPLES, WIDTH, Inputs, Result, generator, labels, normal
from trm_losses import pseudo


def labeler_by_prototypes(classes: int = CLASSES, **settings: Any) -> tl.PseudoLabeler:
    """Settings of labeler and prototype rule: those of oracles.Labeler."""
    names = ("positive", "negative", "temperature_visual", "temperature_text", "momentum")
    own = {key: settings.pop(key) for key in names if key in settings}
    return tl.PseudoLabeler(classes, pseudo.PrototypeRule(classes, **own), **settings)


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
    return tuple(module(x["regions"], x["targets"], bank, **{key: x.get(key) for key in ("logits", "ids")}))


def labeler_inputs(batch: int, classes: int) -> Inputs:
    return {
        "regions": normal(batch, classes, WIDTH, seed=11) + filled_bank(classes).visual.double(),
        "targets": labels(batch, classes, seed=12),
    }


def labeler_oracle(module: tl.PseudoLabeler, x: Inputs, **settings: Any) -> Any:
    return filled_oracle(module.num_classes, **settings)(x["regions"], x["targets"], filled_bank(module.num_classes))


ESTIMATES = torch.rand(SAMPLES, CLASSES, generator=generator(54))
ESTIMATES[1, 0], ESTIMATES[3, 2] = torch.nan, -1.0


def taught_labeler(classes: int) -> tl.PseudoLabeler:
    return tl.PseudoLabeler(classes, pseudo.TeacherRule(ESTIMATES[:, :classes]), weight_pos=0.8, weight_neg=0.6)


def teacher_oracle(module: tl.PseudoLabeler, x: Inputs) -> Any:
    """Labels, weights and scores: what is unknown and estimated has its estimate."""
    y = oracles.array(x["targets"])
    found, weights, scores = np.full(y.shape, -1.0), np.zeros(y.shape), np.full(y.shape, 0.5)
    for b, c in np.ndindex(*y.shape):
        said = float(ESTIMATES[int(x["ids"][b]), c])
        if 0 <= said <= 1:
            scores[b, c] = said
            if y[b, c] == -1:
                found[b, c], weights[b, c] = said, 0.8 if said >= 0.5 else 0.6
    return found, weights, scores


class LogitRule(pseudo.Rule):
    """A rule of a user's own."""

    needs = ("logits",)

    def decide(self, evidence: pseudo.Evidence) -> pseudo.Decision:
        assert evidence.logits is not None
        found = torch.where(evidence.logits >= 0.9, 1.0, torch.where(evidence.logits <= -0.9, 0.0, -1.0))
        return pseudo.Decision(found, torch.sigmoid(evidence.logits))


COUNTS = ("step", "known_count")  # of a labeler, whatever its rule
LABELER_STATE = (*COUNTS, "rule.similarity_sum", "rule.similarity_mass")
GIVEN_POSITIVES = {"positive": 0.6, "negative": 0.4, "expected_positives": 1.5}


labeler = partial(Case, owner="PseudoLabeler", decides=True)

CASES = [
    labeler(
        name="labeler",
        build=lambda c: filled_labeler(c),
        inputs=labeler_inputs,
        call=call_labeler,
        oracle=labeler_oracle,
        wrong={**refused(regions="B C D", targets="B C"), **integers("regions"), **encodings()},
        state=LABELER_STATE,
        finite=("regions",),
        shows=("num_classes=5", "PrototypeRule", "positive=0.8, negative=0.1", "warmup_steps=0"),
    ),
    labeler(
        name="labeler, given positives",
        build=lambda c: filled_labeler(c, **GIVEN_POSITIVES),
        inputs=labeler_inputs,
        call=call_labeler,
        oracle=lambda m, x: labeler_oracle(m, x, **GIVEN_POSITIVES),
        state=LABELER_STATE,
        shows=("positive=0.6, negative=0.4",),
    ),
    labeler(
        name="labeler, teacher rule",
        build=taught_labeler,
        inputs=lambda b, c: {"targets": labels(b, c, seed=12), "ids": torch.arange(b).flip(0)},
        call=lambda m, x: tuple(m(None, x["targets"], LABELER_BANKS[m.num_classes], ids=x.get("ids"))),
        oracle=teacher_oracle,
        wrong={
            **refused(targets="B C", ids="B"),
            "ids: missing": (
                lambda x: {k: v for k, v in x.items() if k != "ids"},
                ValueError,
                "ids must be given for TeacherRule",
            ),
            "ids: outside": (change("ids", lambda i: i + 5), ValueError, "ids must be from 0 to num_samples - 1 = 5, got 5 to 8"),
        },
        state=(*COUNTS, "rule.estimates"),
        shows=("TeacherRule", "num_samples=6"),
    ),
]
