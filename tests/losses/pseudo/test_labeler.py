"""PseudoLabeler: when decisions count, and how much; whatever rule makes them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from tests.helpers import compare
from tests.helpers.cases.bank import filled_bank
from tests.helpers.cases.labeler import LogitRule
from tests.helpers.values import labels, normal
from trm_losses import PrototypeBank, PseudoLabeler
from trm_losses.pseudo import Decision, Evidence, PrototypeRule, Rule, TeacherRule

close = partial(compare.close, rtol=2e-5, atol=1e-5)  # state is float32


def by_logits(classes: int, **settings: Any) -> PseudoLabeler:
    return PseudoLabeler(classes, LogitRule(), **settings)


def test_labels_of_one_half_are_positive_and_each_kind_has_its_weight() -> None:
    class Given(Rule):
        def decide(self, evidence: Evidence) -> Decision:
            return Decision(torch.tensor([[0.5, 0.49, 0.0, 1.0, -1.0]]), torch.full((1, 5), 0.3))

    pseudo = PseudoLabeler(5, Given(), weight_pos=0.8, weight_neg=0.2, cap=False)(
        None, torch.full((1, 5), -1.0), PrototypeBank(5, 8)
    )
    close(pseudo.targets, [[0.5, 0.49, 0, 1, -1]])
    close(pseudo.weights, [[0.8, 0.2, 0.2, 0.8, 0]])


def test_warm_up_and_ramp_count_updates() -> None:
    bank, y = filled_bank(1), torch.full((1, 1), -1.0)
    labeler = by_logits(1, warmup_steps=2, ramp_steps=4, weight_neg=0.5)
    z, logits = torch.ones(1, 1, 8), torch.tensor([[5.0]])
    seen = []
    for _ in range(8):
        up, down = (labeler(z, y, bank, logits=sign * logits) for sign in (1, -1))
        assert float(up.weights) == 2 * float(down.weights) == float(labeler.ramp)
        seen.append((float(up.targets), float(up.weights)))
        labeler.update(z, y, bank)
    assert seen == [(-1, 0), (-1, 0), (1, 0), (1, 0.25), (1, 0.5), (1, 0.75), (1, 1), (1, 1)]
    labeler.reset()
    assert float(labeler.ramp) == 0 and int(labeler.step) == 0
    assert float(by_logits(1).ramp) == 1.0 and float(by_logits(1, warmup_steps=1).ramp) == 0.0


@pytest.mark.parametrize(
    "expected, known, kept", [(0.5, 0, 1), (1.0, 0, 2), (1.4, 0, 2), (1.5, 0, 3), (1.5, 1, 2), (1.0, 2, 1), (9.0, 0, 5)]
)
def test_cap_keeps_the_surest(expected: float, known: int, kept: int) -> None:
    """At most max(1, 2k - known positives)."""
    labeler = by_logits(7, expected_positives=expected)
    y = torch.tensor([[1.0] * known + [-1.0] * (7 - known)])
    logits = torch.tensor([[9.0, 8.0, 3.0, 1.0, 5.0, 4.0, 2.0]])
    logits[0, known:2] = -9.0
    pseudo = labeler(torch.ones(1, 7, 8), y, filled_bank(7), logits=logits)
    chosen = (pseudo.targets[0] == 1).nonzero().flatten().tolist()
    assert chosen == sorted([4, 5, 2, 6, 3][:kept])
    assert (pseudo.targets[0, known:2] == 0).all()


def test_cap_from_the_known_labels() -> None:
    """k is the sum over classes of present / known; a class without known labels takes the share of all."""
    labeler, bank = by_logits(3), filled_bank(3)
    y = torch.tensor([[1.0, 0.0, -1.0], [1.0, 0.0, -1.0], [0.0, 1.0, -1.0], [0.5, -1.0, -1.0]])
    assert labeler.prior.tolist() == [0, 0, 0]
    labeler.update(None, y, bank)
    close(labeler.prior, [2 / 3, 1 / 3, 1 / 2])


def test_a_soft_rule_is_not_capped_and_weighs_both_kinds_alike() -> None:
    estimates = torch.tensor([[0.9, 0.8, 0.1], [0.7, 0.6, 0.6]])
    soft, hard = PseudoLabeler(3, TeacherRule(estimates), expected_positives=0.5), PseudoLabeler(3)
    assert (soft.cap, soft.weight_neg, hard.cap, hard.weight_neg) == (False, 1.0, True, 0.5)
    y, bank = torch.full((2, 3), -1.0), PrototypeBank(3, 8)
    pseudo = soft(None, y, bank, ids=torch.tensor([1, 0]))
    assert torch.equal(pseudo.targets, estimates.flip(0)) and (pseudo.weights == 1).all()
    own = PseudoLabeler(3, TeacherRule(estimates), expected_positives=0.5, cap=True, weight_neg=0.2)
    assert (own.cap, own.weight_neg) == (True, 0.2)
    close(own(None, y, bank, ids=torch.arange(2)).weights, [[1, 0, 0.2], [1, 0, 0]])


def test_a_rule_learns_from_all_that_was_given_and_no_gradient_passes() -> None:
    class Remembers(Rule):
        last: Evidence

        def decide(self, evidence: Evidence) -> Decision:
            self.last = evidence
            return Decision(torch.ones_like(evidence.targets), torch.ones_like(evidence.targets))

        def update(self, evidence: Evidence) -> None:
            self.last = evidence

    rule = Remembers()
    labeler, bank, y, ids = PseudoLabeler(2, rule, expected_positives=1.5), filled_bank(2), labels(3, 2), torch.arange(3)
    z, logits = normal(3, 2, 8).requires_grad_(), normal(3, 2).half().requires_grad_()
    for call in (labeler, labeler.update):
        given = call(z, y, bank, logits=logits, ids=ids)  # type: ignore[operator]
        assert rule.last.logits is not None and rule.last.logits.dtype == torch.float32
        close(rule.last.logits.detach(), logits.detach())
        assert rule.last.ids is ids
        assert given is None or not any(x.requires_grad for x in given)
    assert labeler.known_count.sum() == ((y == 0) | (y == 1)).sum()


class Wrong(Rule):
    def __init__(self, labels: Any, scores: Any) -> None:
        super().__init__()
        self.answer = Decision(labels, scores)

    def decide(self, evidence: Evidence) -> Decision:
        return self.answer


@pytest.mark.parametrize(
    "rule, message",
    [
        ("quantile", r"PseudoLabeler: rule must be a trm_losses.pseudo.Rule, got str; try PrototypeRule\(C\)"),
        (PrototypeRule(3), "PseudoLabeler: rule must have num_classes = 2, got 3"),
        (type("Text", (LogitRule,), {"needs": "logits"})(), "needs of a rule must be a tuple of .*, got 'logits'"),
        (type("Other", (LogitRule,), {"needs": ("tokens",)})(), r"needs of a rule must be a tuple of .*, got \('tokens',\)"),
        (LogitRule(), "PseudoLabeler: logits must be given for LogitRule, got None$"),
        (PrototypeRule(2), "regions must be given for PrototypeRule, got None; take all classes at once, or define"),
        (type("Bank", (LogitRule,), {"needs": ("bank",)})(), "PseudoLabeler: bank must be given for Bank, got None$"),
        (Rule(), r"Rule must define decide\(evidence\) -> Decision"),
        (Wrong(torch.ones(3), torch.ones(1, 2)), r"Wrong: labels must have shape \(B, C\) = \(1, 2\), got \(3,\); decide"),
        (Wrong(torch.ones(1, 2), torch.ones(1, 1)), r"Wrong: scores must have shape \(B, C\) = \(1, 2\), got \(1, 1\)"),
        (Wrong(torch.ones(1, 2).bool(), torch.ones(1, 2)), "Wrong: labels must be a floating-point tensor, got torch.bool"),
    ],
    ids=lambda value: "",
)
def test_refuses_rules_by_name(rule: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        PseudoLabeler(2, rule)(None, torch.full((1, 2), -1.0))


def test_a_bank_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"PseudoLabeler: bank.visual must have shape \(C, D\) = \(5, 6\), got \(5, 8\)"):
        PseudoLabeler(5)(normal(2, 5, 6), labels(2, 5), filled_bank())
    with pytest.raises(ValueError, match="PseudoLabeler: logits must be finite"):
        by_logits(2)(None, torch.full((1, 2), -1.0), PrototypeBank(2, 8), logits=torch.tensor([[1.0, float("nan")]]))
