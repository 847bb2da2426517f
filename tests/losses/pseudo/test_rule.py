"""A user's own rule: saved, moved, kept in float32, compiled, taken to other classes, and part of an objective."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import trm_losses as tl
from tests.helpers.cases.bank import filled_bank
from tests.helpers.cases.labeler import LogitRule
from tests.helpers.cases.objective import objective
from tests.helpers.values import CLASSES, TOKENS, WIDTH, labels, normal
from trm_losses.pseudo import Decision, Evidence, Rule


class MeanRule(Rule):
    """Present above the mean logit of the class so far."""

    needs = ("logits",)
    _class_axes = {"mean": (0,)}
    mean: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_classes))

    def decide(self, evidence: Evidence) -> Decision:
        assert evidence.logits is not None
        return Decision((evidence.logits > self.mean).float(), torch.sigmoid(evidence.logits))

    def update(self, evidence: Evidence) -> None:
        assert evidence.logits is not None
        self.mean.lerp_(evidence.logits.float().mean(dim=0), 0.5)


RULES: dict[str, Any] = {"logits": LogitRule, "means": lambda: MeanRule(CLASSES)}
GIVEN = {"logits": 2 * normal(12, CLASSES, seed=3, dtype=torch.float32)}


def made(name: str) -> tl.PseudoLabeler:
    labeler = tl.PseudoLabeler(CLASSES, RULES[name]())
    labeler.update(None, labels(12, CLASSES), filled_bank(), **GIVEN)
    return labeler


@pytest.mark.parametrize("name", RULES)
def test_it_is_saved_moved_halved_compiled_and_taken_to_other_classes(name: str) -> None:
    labeler, y, bank = made(name), labels(12, CLASSES).float(), filled_bank()
    expected = labeler(None, y, bank, **GIVEN)
    assert (expected.targets == 1).any() and (expected.targets == 0).any() and (expected.targets[y != -1] == -1).all()
    fresh = tl.PseudoLabeler(CLASSES, RULES[name]())
    fresh.load_state_dict(copy.deepcopy(labeler.state_dict()))
    for other in (fresh, copy.deepcopy(labeler).half(), torch.compile(labeler, fullgraph=True, backend="eager")):
        for a, e in zip(other(None, y, bank, **GIVEN), expected, strict=True):
            torch.testing.assert_close(a, e)
    assert {buffer.device.type for buffer in copy.deepcopy(labeler).to("meta").buffers()} == {"meta"}
    keep = [3, None, 0]
    other, some = labeler.with_classes(keep), [3, 0]
    logits = torch.stack([GIVEN["logits"][:, 3], torch.zeros(12), GIVEN["logits"][:, 0]], dim=1)
    y = torch.stack([y[:, 3], -torch.ones(12), y[:, 0]], dim=1)
    found = other(None, y, bank.with_classes(keep), logits=logits)
    torch.testing.assert_close(found.scores[:, [0, 2]], expected.scores[:, some])
    assert torch.equal(other.known_count[:, [0, 2]], labeler.known_count[:, some])
    if name == "means":
        assert isinstance(other.rule, MeanRule) and isinstance(labeler.rule, MeanRule)
        torch.testing.assert_close(other.rule.mean, torch.stack([labeler.rule.mean[3], torch.tensor(0.0), labeler.rule.mean[0]]))
        other.reset()
        assert torch.count_nonzero(other.rule.mean) == 0


@pytest.mark.parametrize("name", RULES)
def test_an_objective_takes_it_whole_and_in_chunks_of_classes(name: str) -> None:
    outputs = []
    for settings in ({}, {"class_chunk": 2}):
        module = objective(**settings).double()
        module.labeler = made(name)
        for seed in (1, 2):
            output = module(normal(6, TOKENS, WIDTH, seed=seed), normal(CLASSES, WIDTH, seed=7), labels(6, CLASSES))
            output.loss.backward()
            module.update(output)
        assert output.pseudo is not None and output.terms["pseudo_query"] > 0
        outputs.append([*output.terms.values(), *output.pseudo, *module.labeler.buffers()])
    for a, e in zip(*outputs, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)
