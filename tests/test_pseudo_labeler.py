"""PseudoLabeler over several updates, its rules and its abstentions."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from cases import filled_bank, labels, normal
from torch import Tensor

from trm_losses import PrototypeBank, PseudoLabeler
from trm_losses.labels import UNKNOWN


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(oracles.array(actual), oracles.array(expected), rtol=2e-5, atol=1e-5)


def batch(step: int, bank: PrototypeBank, classes: int, targets: str = "mixed") -> tuple[Tensor, Tensor]:
    """Regions that lie closer to the prototype of their class where it is present."""
    y = labels(8, classes, seed=100 + step)
    if targets == "no absent":
        y = torch.where(y == 0, -1.0, y)
    if targets == "rare":  # the first class has few positives, the second no absent label
        y[:, 0] = torch.where(y[:, 0] == 1, -1.0, y[:, 0])
        y[0, 0] = 1.0 if step == 0 else y[0, 0]
        y[:, 1] = torch.where(y[:, 1] == 0, -1.0, y[:, 1])
    noise = normal(8, classes, 8, seed=200 + step)
    pull = torch.where(y == 1, 2.0, torch.where(y == 0, 0.2, 1.0))[..., None]
    direction = bank.visual + 0.5 * bank.text
    return noise + pull * direction, y


SCENES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "own statistics": {"min_positives": 1, "temperature_text": 0.3},
    "pooled statistics": {"min_positives": 10**6, "temperature_text": 0.3},
    "decay": {"momentum": 0.5, "min_positives": 2, "temperature_text": 0.3},
    "visual only": {"visual_weight": 1.0, "min_positives": 3},
    "text only": {"visual_weight": 0.0, "temperature_text": 0.5},
    "soft": {"steepness": 2.0, "temperature_visual": 0.5, "temperature_text": 0.5, "min_gap": 0.7},
    "lenient": {"threshold_pos": 0.55, "threshold_neg": 0.45, "weight_pos": 0.7, "weight_neg": 0.3, "temperature_text": 0.3},
    "uncapped": {"threshold_pos": 0.4, "threshold_neg": 0.2, "cap": False, "temperature_text": 0.3},
    "given cap": {"threshold_pos": 0.3, "threshold_neg": 0.2, "expected_positives": 1.3, "temperature_text": 0.3},
}


@pytest.mark.parametrize("targets, classes", [("mixed", 5), ("no absent", 5), ("rare", 5), ("mixed", 1)])
@pytest.mark.parametrize("scene", SCENES, ids=lambda name: name.replace(" ", "-"))
def test_several_updates_are_the_loops(scene: str, targets: str, classes: int) -> None:
    settings = SCENES[scene]
    labeler, slow = PseudoLabeler(classes, **settings), oracles.Labeler(classes, **settings)
    bank = filled_bank(classes)
    for step in range(4):
        z, y = batch(step, bank, classes, targets)
        actual, expected = labeler(z, y, bank), slow(z, y, bank)
        for a, e in zip(actual, expected, strict=True):
            close(a, e)
        labeler.update(z, y, bank)
        slow.update(z, y, bank)
        bank.update(z, y, text=normal(classes, 8, seed=step))
    assert labeler.known_count.T.tolist() == slow.known
    assert int(labeler.step) == 4
    close(labeler.prior.sum() if labeler.expected_positives is None else 1.3, slow.expected_positives)


@pytest.mark.parametrize("targets", ["mixed", "no absent"])
def test_with_centres_and_absent_prototypes_it_is_the_loops(targets: str) -> None:
    """Statistics and scores are of one and the same similarity."""
    settings: dict[str, Any] = {"min_positives": 2, "temperature_text": 0.3, "temperature_visual": 0.3}
    labeler, slow = PseudoLabeler(4, **settings), oracles.Labeler(4, **settings)
    bank = PrototypeBank(4, 8, init=normal(4, 8, seed=1), num_prototypes=2, queue_size=3, absent=True, absent_every=2)
    for step in range(5):
        z = normal(8, 4, 8, seed=200 + step) + 0.5 * bank.text
        y = labels(8, 4, seed=100 + step)
        y = torch.where(y == 0, -1.0, y) if targets == "no absent" else y
        for a, e in zip(labeler(z, y, bank), slow(z, y, bank), strict=True):
            close(a, e)
        labeler.update(z, y, bank)
        slow.update(z, y, bank)
        bank.update(z, y, text=normal(4, 8, seed=step), ids=torch.arange(8))
    assert bank.count.min() > 0 and bank.absent is not None and bool(bank.absent.any()) == (targets == "mixed")


def test_unseen_classes_take_no_visual_term() -> None:
    labeler, bank = PseudoLabeler(4, min_positives=0), PrototypeBank(4, 8, init=normal(4, 8))
    slow = oracles.Labeler(4, min_positives=0)
    for step in range(2):  # before anything was seen, similarities to start values are not taken in
        z, y = batch(step, bank, 4)
        labeler.update(z, y, bank)
        slow.update(z, y, bank)
    assert torch.count_nonzero(labeler.similarity_mass[0]) == 0 and labeler.similarity_mass[1].sum() > 0
    close(labeler.scores(z, y, bank), slow.scores(z, y, bank))
    only_text = PseudoLabeler(4, min_positives=0, visual_weight=0.0)
    only_text.load_state_dict(labeler.state_dict())
    close(labeler.scores(z, y, bank), only_text.scores(z, y, bank))


def test_a_single_seen_class_is_not_compared_with_itself() -> None:
    """A softmax over one class is 1 whatever the picture shows."""
    labeler, bank = PseudoLabeler(4, min_positives=0), PrototypeBank(4, 8, init=normal(4, 8))
    z, y = batch(0, bank, 4)
    bank.update(z, torch.where(torch.arange(4) == 2, 1.0, 0.0).expand(8, 4))
    assert bank.seen.tolist() == [False, False, True, False]
    slow = oracles.Labeler(4, min_positives=0)
    for again in (labeler, slow):
        again.update(z, y, bank)
    close(labeler.scores(z, y, bank), slow.scores(z, y, bank))


def test_everything_abstains_where_nothing_is_there() -> None:
    """No prototype, no text, no statistics: one half, and nothing is decided."""
    labeler, bank = PseudoLabeler(3), PrototypeBank(3, 8)
    pseudo = labeler(normal(2, 3, 8), torch.full((2, 3), -1.0), bank)
    close(pseudo.scores, np.full((2, 3), 0.5))
    assert (pseudo.targets == UNKNOWN).all() and torch.count_nonzero(pseudo.weights) == 0


def test_a_class_whose_present_entries_are_less_similar_abstains() -> None:
    bank = filled_bank(2)
    labeler = PseudoLabeler(2, min_positives=1)
    toward, away = bank.visual[0], -bank.visual[0]
    z = torch.stack([torch.stack([away, bank.visual[1]]), torch.stack([toward, -bank.visual[1]])])
    y = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    bank.count.fill_(1)
    labeler.update(z, y, bank)
    similarities = oracles.similarities(z, bank.visual, bank.text, None)
    slow = oracles.Labeler(2, min_positives=1)
    slow.update(z, y, bank)
    unknown = np.full((2, 2), True)
    assert slow.calibrated(similarities[0], unknown, 0, 0, 0) is None
    assert slow.calibrated(similarities[0], unknown, 0, 0, 1) is not None
    close(labeler.scores(z, y, bank), slow.scores(z, y, bank))


def test_known_labels_are_never_changed() -> None:
    labeler, bank = PseudoLabeler(5, threshold_pos=0.5, threshold_neg=0.499), filled_bank()
    z, y = batch(0, bank, 5)
    labeler.update(z, y, bank)
    pseudo = labeler(z, y, bank)
    known = y != UNKNOWN
    assert (pseudo.targets[known] == UNKNOWN).all() and torch.count_nonzero(pseudo.weights[known]) == 0
    assert (pseudo.targets[~known] != UNKNOWN).float().mean() > 0.5
    merged = pseudo.merge(y)
    assert torch.equal(merged[known].double(), y[known]) and torch.equal(merged[~known], pseudo.targets[~known])
    full = torch.where(known, y, 0.0)
    nothing = labeler(z, full, bank)
    assert (nothing.targets == UNKNOWN).all() and torch.count_nonzero(nothing.weights) == 0
    assert torch.equal(nothing.merge(full).double(), full)


def test_positives_are_soft_or_hard_and_negatives_hard() -> None:
    bank = filled_bank()
    soft, hard = (PseudoLabeler(5, threshold_pos=0.5, threshold_neg=0.3, soft_positives=s, cap=False) for s in (True, False))
    z, y = batch(0, bank, 5)
    for labeler in (soft, hard):
        labeler.update(z, y, bank)
    (t_soft, w_soft, q), (t_hard, w_hard, _) = soft(z, y, bank), hard(z, y, bank)
    positive, negative = (y == UNKNOWN) & (q >= 0.5), (y == UNKNOWN) & (q <= 0.3)
    assert positive.any() and negative.any()
    assert torch.equal(t_soft[positive], q[positive]) and (t_hard[positive] == 1).all()
    assert (t_soft[negative] == 0).all() and (t_hard[negative] == 0).all()
    assert (w_soft[positive] == 1.0).all() and (w_soft[negative] == 0.5).all() and torch.equal(w_soft, w_hard)
    assert (q[positive] > 0.5).any() and (q[positive] < 0.999).any()


def test_warm_up_and_ramp_count_updates() -> None:
    bank, y = filled_bank(1), torch.full((1, 1), -1.0)
    labeler = PseudoLabeler(1, rule="logit", warmup_steps=2, ramp_steps=4, weight_neg=0.5)
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
    at_once = PseudoLabeler(1, rule="logit")
    assert float(at_once.ramp) == 1.0
    after = PseudoLabeler(1, warmup_steps=1)
    assert float(after.ramp) == 0.0


def test_logit_rule_has_hard_labels_at_its_thresholds() -> None:
    bank, y = filled_bank(3), torch.tensor([[-1.0, -1.0, -1.0], [1.0, 0.0, 0.5]])
    logits = torch.tensor([[0.9, 0.89, -0.9], [5.0, -5.0, 5.0]])
    labeler = PseudoLabeler(3, rule="logit", weight_pos=0.8, weight_neg=0.2)
    pseudo = labeler(torch.ones(2, 3, 8), y, bank, logits=logits)
    assert pseudo.targets.tolist() == [[1, -1, 0], [-1, -1, -1]]
    close(pseudo.weights, [[0.8, 0, 0.2], [0, 0, 0]])
    close(pseudo.scores, torch.sigmoid(logits))


@pytest.mark.parametrize(
    "expected, known, kept", [(0.5, 0, 1), (1.0, 0, 2), (1.4, 0, 2), (1.5, 0, 3), (1.5, 1, 2), (1.0, 2, 1), (9.0, 0, 5)]
)
def test_cap_keeps_the_surest(expected: float, known: int, kept: int) -> None:
    """At most max(1, 2k - known positives)."""
    labeler = PseudoLabeler(7, rule="logit", expected_positives=expected)
    y = torch.tensor([[1.0] * known + [-1.0] * (7 - known)])
    logits = torch.tensor([[9.0, 8.0, 3.0, 1.0, 5.0, 4.0, 2.0]])
    logits[0, known:2] = -9.0
    pseudo = labeler(torch.ones(1, 7, 8), y, filled_bank(7), logits=logits)
    chosen = (pseudo.targets[0] == 1).nonzero().flatten().tolist()
    assert chosen == sorted([4, 5, 2, 6, 3][:kept])
    assert (pseudo.targets[0, known:2] == 0).all()


def test_cap_from_the_known_labels() -> None:
    """k is the sum over classes of present / known; a class without known labels takes the share of all."""
    labeler, bank = PseudoLabeler(3), filled_bank(3)
    y = torch.tensor([[1.0, 0.0, -1.0], [1.0, 0.0, -1.0], [0.0, 1.0, -1.0], [0.5, -1.0, -1.0]])
    assert labeler.prior.tolist() == [0, 0, 0]
    labeler.update(torch.ones(4, 3, 8), y, bank)
    close(labeler.prior, [2 / 3, 1 / 3, 1 / 2])


def test_text_may_stand_for_the_bank_s() -> None:
    bank, other = filled_bank(), filled_bank()
    text = normal(5, 8, seed=77, dtype=torch.float32)
    other.text.copy_(torch.nn.functional.normalize(text, dim=-1))
    one, two = PseudoLabeler(5), PseudoLabeler(5)
    z, y = batch(0, bank, 5)
    one.update(z, y, bank, text=text)
    two.update(z, y, other)
    close(one.similarity_sum, two.similarity_sum)
    close(one(z, y, bank, text=text).scores, two(z, y, other).scores)
    assert not torch.allclose(one(z, y, bank).scores, two(z, y, other).scores)


def test_no_gradient() -> None:
    labeler, bank = PseudoLabeler(5), filled_bank()
    z, y = batch(0, bank, 5)
    pseudo = labeler(z.requires_grad_(), y, bank)
    labeler.update(z, y, bank)
    assert not any(x.requires_grad for x in (*pseudo, *labeler.buffers()))


def test_resumed_equals_unbroken() -> None:
    bank, unbroken = filled_bank(), PseudoLabeler(5, warmup_steps=1, ramp_steps=3, min_positives=2)
    unbroken.update(*batch(0, bank, 5), bank)
    resumed = PseudoLabeler(5, warmup_steps=1, ramp_steps=3, min_positives=2)
    resumed.load_state_dict(copy.deepcopy(unbroken.state_dict()))
    for labeler in (unbroken, resumed):
        labeler.update(*batch(1, bank, 5), bank)
    for a, b in zip(unbroken(*batch(2, bank, 5), bank), resumed(*batch(2, bank, 5), bank), strict=True):
        assert torch.equal(a, b)
    unbroken.reset()
    assert all(torch.count_nonzero(b) == 0 for b in unbroken.buffers())


def test_bank_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"PseudoLabeler: bank.visual must have shape \(C, D\) = \(5, 6\), got \(5, 8\)"):
        PseudoLabeler(5)(normal(2, 5, 6), labels(2, 5), filled_bank())
    with pytest.raises(ValueError, match=r"PseudoLabeler: text must have shape \(C, D\)"):
        PseudoLabeler(5)(normal(2, 5, 8), labels(2, 5), filled_bank(), text=torch.ones(5, 7))
