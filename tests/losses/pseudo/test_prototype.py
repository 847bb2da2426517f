"""PrototypeRule over several updates, and its abstentions."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import compare, oracles
from tests.helpers.cases.bank import filled_bank
from tests.helpers.cases.labeler import labeler_by_prototypes
from tests.helpers.values import labels, normal
from trm_losses import PrototypeBank, PseudoLabeler
from trm_losses.labels import UNKNOWN
from trm_losses.pseudo import Evidence, PrototypeRule

close = partial(compare.close, rtol=2e-5, atol=1e-5)  # state is float32


def batch(step: int, bank: PrototypeBank, classes: int, targets: str = "mixed") -> tuple[Tensor, Tensor]:
    """Regions that lie closer to the prototype of their class where it is present."""
    y = labels(12, classes, seed=100 + step)
    if targets == "no absent":
        y = torch.where(y == 0, -1.0, y)
    if targets == "rare":  # the first class has few positives, the second no absent label
        y[:, 0] = torch.where(y[:, 0] == 1, -1.0, y[:, 0])
        y[0, 0] = 1.0 if step == 0 else y[0, 0]
        y[:, 1] = torch.where(y[:, 1] == 0, -1.0, y[:, 1])
    noise = normal(12, classes, 8, seed=200 + step)
    pull = torch.where(y == 1, 2.0, torch.where(y == 0, 0.2, 1.0))[..., None]
    return noise + pull * (bank.visual + 0.5 * bank.text), y


SCENES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "decay": {"momentum": 0.5, "temperature_text": 0.3},
    "soft": {"temperature_visual": 0.5, "temperature_text": 0.5},
    "lenient": {"positive": 0.55, "negative": 0.45, "weight_pos": 0.7, "weight_neg": 0.3, "temperature_text": 0.3},
    "uncapped": {"positive": 0.5, "negative": 0.2, "cap": False, "temperature_text": 0.3},
    "given cap": {"positive": 0.5, "negative": 0.2, "expected_positives": 1.3, "temperature_text": 0.3},
}


@pytest.mark.parametrize("targets, classes", [("mixed", 5), ("no absent", 5), ("rare", 5), ("mixed", 1)])
@pytest.mark.parametrize("scene", SCENES, ids=lambda name: name.replace(" ", "-"))
def test_several_updates_are_the_loops(scene: str, targets: str, classes: int) -> None:
    labeler, slow = labeler_by_prototypes(classes, **SCENES[scene]), oracles.Labeler(classes, **SCENES[scene])
    bank, own = filled_bank(classes), set()
    for step in range(4):
        z, y = batch(step, bank, classes, targets)
        for a, e in zip(labeler(z, y, bank), slow(z, y, bank), strict=True):
            close(a, e)
        labeler.update(z, y, bank)
        slow.update(z, y, bank)
        bank.update(z, y, text=normal(classes, 8, seed=step))
        own |= {n >= 10 for _, n in slow.known}
    assert labeler.known_count.T.tolist() == slow.known and own == {True, False}
    assert int(labeler.step) == 4
    close(labeler.prior.sum() if labeler.expected_positives is None else labeler.expected_positives, slow.expected_positives)
    labeler.reset()
    assert all(torch.count_nonzero(buffer) == 0 for buffer in labeler.buffers())


def test_unseen_classes_take_no_visual_term() -> None:
    labeler, slow, bank = PseudoLabeler(4), oracles.Labeler(4), PrototypeBank(4, 8, init=normal(4, 8))
    for step in range(2):  # before anything was seen, similarities to start values are not taken in
        z, y = batch(step, bank, 4)
        labeler.update(z, y, bank)
        slow.update(z, y, bank)
    mass = labeler.get_buffer("rule.similarity_mass")
    assert torch.count_nonzero(mass[0]) == 0 and mass[1].sum() > 0
    close(labeler(z, y, bank).scores, slow.scores(z, y, bank))
    scores = labeler(z, y, bank).scores
    bank.visual.copy_(normal(4, 8, seed=5))  # of which nothing is read
    close(labeler(z, y, bank).scores, scores)


def test_a_single_seen_class_is_not_compared_with_itself() -> None:
    """A softmax over one class is 1 whatever the picture shows."""
    labeler, slow, bank = PseudoLabeler(4), oracles.Labeler(4), PrototypeBank(4, 8, init=normal(4, 8))
    z, y = batch(0, bank, 4)
    bank.update(z, torch.where(torch.arange(4) == 2, 1.0, 0.0).expand(12, 4))
    assert bank.seen.tolist() == [False, False, True, False]
    for again in (labeler, slow):
        again.update(z, y, bank)
    close(labeler(z, y, bank).scores, slow.scores(z, y, bank))


def test_positives_are_soft_and_negatives_hard() -> None:
    """At a threshold a score is decided, between them it is not."""
    scores, bank = torch.tensor([[0.8, 0.79, 0.11, 0.1, 1.0]]), PrototypeBank(5, 8)
    evidence = Evidence(None, torch.full((1, 5), -1.0), bank, None, None, torch.zeros(2, 5), None)
    with mock.patch.object(PrototypeRule, "scores", return_value=scores):
        default, own = (rule.decide(evidence) for rule in (PrototypeRule(5), PrototypeRule(5, positive=0.79, negative=0.05)))
    close(default.labels, [[0.8, -1, -1, 0, 1]])
    close(own.labels, [[0.8, 0.79, -1, -1, 1]])
    assert default.scores is scores and own.scores is scores


def test_everything_abstains_where_nothing_is_there() -> None:
    """No prototype, no text, no statistics: one half, and nothing is decided or counted."""
    labeler, bank = PseudoLabeler(3), PrototypeBank(3, 8)
    for _ in range(2):
        pseudo = labeler(normal(2, 3, 8), torch.full((2, 3), -1.0), bank)
        close(pseudo.scores, np.full((2, 3), 0.5))
        assert (pseudo.targets == UNKNOWN).all() and torch.count_nonzero(pseudo.weights) == 0
        labeler.update(normal(2, 3, 8), torch.full((2, 3), -1.0), bank)
    assert all(torch.count_nonzero(buffer) == 0 for buffer in labeler.rule.buffers())


def test_a_class_whose_present_entries_are_less_similar_abstains() -> None:
    bank, labeler, slow = filled_bank(2), PseudoLabeler(2), oracles.Labeler(2)
    bank.count.fill_(1)
    toward, away = bank.visual[0], -bank.visual[0]
    z = torch.stack([torch.stack([away, bank.visual[1]]), torch.stack([toward, -bank.visual[1]])]).repeat(10, 1, 1)
    y = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).repeat(10, 1)  # ten known positives each
    for again in (labeler, slow):
        again.update(z, y, bank)
    s_v, unknown = oracles.similarities(z, bank.visual, bank.text, None)[0], np.full((20, 2), True)
    assert slow.calibrated(s_v, unknown, 0, 0, 0) is None and slow.calibrated(s_v, unknown, 0, 0, 1) is not None
    close(labeler(z, y, bank).scores, slow.scores(z, y, bank))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"positive": 0.4}, "positive must be at least 0.5 and at most 1, got 0.4"),
        ({"positive": 0.6, "negative": 0.6}, "negative must be below positive, got 0.6 and 0.6"),
    ],
    ids=str,
)
def test_refuses_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^PrototypeRule: {message}"):
        PrototypeRule(**{"num_classes": 3, **settings})
