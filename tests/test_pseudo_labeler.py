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
    "quantile": {"rule": "quantile", "quantile_pos": 0.83, "temperature_text": 0.3, "momentum": 0.9},
    "quantile given": {"rule": "quantile", "expected_positives": 1.3, "temperature_text": 0.3, "cap": False},
    "single positive": {"single_positive": True, "expected_positives": 0.9, "threshold_neg": 0.01},
    "related labels": {"relation": 0.2, "min_positives": 2, "temperature_text": 0.3},
    "related prototypes": {"relation": 0.15, "relation_from": "prototypes", "rule": "quantile"},
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
    close(labeler.prior.sum() if labeler.expected_positives is None else labeler.expected_positives, slow.expected_positives)


@pytest.mark.parametrize("rule", ["prototype", "quantile"])
def test_an_averaged_model_votes_in_scores_and_histograms(rule: str) -> None:
    settings: dict[str, Any] = {"rule": rule, "ema_weight": 0.6, "relation": 0.1, "temperature_text": 0.3, "min_positives": 2}
    settings |= {"threshold_pos": 0.6, "threshold_neg": 0.3} if rule == "prototype" else {"quantile_pos": 0.9, "momentum": 0.5}
    labeler, slow, bank = PseudoLabeler(5, **settings), oracles.Labeler(5, **settings), filled_bank()
    for step in range(4):
        (z, y), vote = batch(step, bank, 5), 3 * normal(8, 5, seed=300 + step)
        pseudo = labeler(z, y, bank, ema_logits=vote)
        for a, e in zip(pseudo, slow(z, y, bank, vote), strict=True):
            close(a, e)
        labeler.update(z, y, bank, scores=pseudo.scores)
        slow.update(z, y, bank, vote)
    assert (pseudo.targets > 0).any() and (pseudo.targets == 0).any()
    plain = PseudoLabeler(5, ema_weight=0.25)
    pseudo = plain(torch.zeros(1, 5, 8), torch.full((1, 5), -1.0), PrototypeBank(5, 8), ema_logits=torch.zeros(1, 5) + 2)
    close(pseudo.scores, 0.75 * 0.5 + 0.25 * torch.sigmoid(torch.full((1, 5), 2.0)))


def test_the_logit_rule_takes_no_vote() -> None:
    labeler, z = PseudoLabeler(5, rule="logit"), normal(1, 5)
    with pytest.raises(ValueError, match="ema_logits must be None with rule='logit'"):
        labeler(normal(1, 5, 8), torch.full((1, 5), -1.0), filled_bank(), logits=z, ema_logits=z)


def evenly(labeler: PseudoLabeler, known: list[list[int]]) -> Tensor:
    """Histograms of scores spread evenly over [0, 1], and known labels (absent, present) of each class; the scores (100, C)."""
    labeler.histogram.fill_(1.0)
    labeler.known_count.copy_(torch.tensor(known).T)
    return ((torch.arange(100) + 0.5) / 100)[:, None].expand(-1, len(known))


def test_quantile_shares_follow_the_prior_of_each_class() -> None:
    """The top 0.6 r and the bottom 1 - 2 r; a class without known labels or scores abstains."""
    labeler = PseudoLabeler(5, rule="quantile")
    scores = evenly(labeler, [[9, 1], [7, 3], [4, 6], [0, 0], [9, 1]])
    labeler.histogram[4] = 0
    positive, negative = labeler._within_shares(scores, torch.ones(100, 5, dtype=torch.bool))
    assert positive.sum(dim=0).tolist() == [6, 18, 36, 0, 0] and negative.sum(dim=0).tolist() == [80, 40, 0, 0, 0]
    assert positive[-6:, 0].all() and negative[:80, 0].all()
    none_present = PseudoLabeler(1, rule="quantile")
    positive, negative = none_present._within_shares(evenly(none_present, [[9, 0]]), torch.ones(100, 1, dtype=torch.bool))
    assert not positive.any() and negative.all()


@pytest.mark.parametrize(
    "known, score, low", [([9, 0], 1.0, 0.0), ([5, 5], 0.0, 0.2), ([9, 1], 0.5, 0.6)], ids=["top", "bottom", "no score"]
)
def test_an_empty_share_takes_no_score_whatever(known: list[int], score: float, low: float) -> None:
    """Nor is one half decided, though it lies below everything met."""
    labeler, free = PseudoLabeler(1, rule="quantile"), torch.ones(1, 1, dtype=torch.bool)
    evenly(labeler, [known])
    labeler.histogram[:, : int(256 * low)] = 0
    labeler.histogram[:, 128:] *= low > 0  # for the first: all below one half
    positive, negative = labeler._within_shares(torch.full((1, 1), score), free)
    assert not positive.any() and not negative.any()
    positive, negative = labeler._within_shares(torch.full((1, 1), 0.3 if low == 0 else 0.51), free)
    assert negative.any() == (known != [5, 5])


def test_quantile_is_free_of_scale() -> None:
    """Scores pressed together in a few bins give up nearly the same shares."""
    labeler = PseudoLabeler(1, rule="quantile", momentum=1.0)
    labeler.known_count.copy_(torch.tensor([[7], [3]]))
    bank, y = filled_bank(1), torch.full((1000, 1), -1.0)
    for low, width in ((0.0, 1.0), (0.4, 0.01), (0.99, 0.01)):
        labeler.histogram.zero_()
        q = low + width * torch.rand(1000, 1, generator=torch.Generator().manual_seed(1))
        labeler.update(torch.zeros(1000, 1, 8), y, bank, scores=q)
        assert labeler.histogram.sum() == 1000
        positive, negative = labeler._within_shares(q, y == UNKNOWN)
        assert abs(int(positive.sum()) - 180) < 30 and abs(int(negative.sum()) - 400) < 30


def test_where_positives_are_given_the_prior_is_the_model_s() -> None:
    """k / C times the class's mean score relative to the mean over classes; no known absent label is asked for."""
    labeler = PseudoLabeler(2, rule="quantile", expected_positives=0.4)
    scores = evenly(labeler, [[0, 5], [0, 0]])
    labeler.histogram[1, 128:] = 0  # mean scores 1/2 and 1/4: priors 0.2 * 4/3 and 0.2 * 2/3
    positive, negative = labeler._within_shares(scores, torch.ones(100, 2, dtype=torch.bool))
    assert positive.sum(dim=0).tolist() == [16, 54] and negative.sum(dim=0).tolist() == [47, 37]
    certain = PseudoLabeler(1, rule="quantile", expected_positives=9.0)  # a prior is at most one
    positive, negative = certain._within_shares(evenly(certain, [[0, 5]]), torch.ones(100, 1, dtype=torch.bool))
    assert positive.sum() == 60 and not negative.any()


def test_quantile_counts_unknown_entries_that_have_a_score() -> None:
    """Decayed; neither known labels nor scores of one half, which are no score, come in; nor are the latter decided."""
    labeler, bank = PseudoLabeler(1, rule="quantile", momentum=0.5), filled_bank(1)
    y = torch.tensor([[-1.0], [1.0], [-1.0], [-1.0], [0.0]])
    q = torch.tensor([[0.5], [0.9], [0.2], [1.0], [0.1]])
    for _ in range(2):
        labeler.update(torch.zeros(5, 1, 8), y, bank, scores=q)
    assert labeler.histogram.nonzero().tolist() == [[0, 51], [0, 255]] and labeler.histogram.sum() == 3
    nothing = PseudoLabeler(3, rule="quantile")
    for _ in range(2):
        nothing.update(normal(4, 3, 8), torch.full((4, 3), -1.0), PrototypeBank(3, 8))
    pseudo = nothing(normal(4, 3, 8), torch.full((4, 3), -1.0), PrototypeBank(3, 8))
    assert (pseudo.targets == UNKNOWN).all() and torch.count_nonzero(nothing.histogram) == 0


def test_present_classes_speak_for_those_that_come_with_them() -> None:
    """Three times with the second class and once with the third; the fourth was never met, and has no say."""
    labeler, bank = PseudoLabeler(4, relation=0.2), PrototypeBank(4, 8)
    y = torch.tensor([[1.0, 1, 0, -1], [1, 1, -1, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]])
    labeler.update(torch.zeros(5, 4, 8), y, bank)
    assert labeler.cooccurrence.tolist() == [[4, 3, 1, 0], [3, 3, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    asked = torch.tensor([[1.0, -1, -1, -1], [-1, 1, 1, -1], [-1, -1, -1, 1], [-1, -1, -1, -1], [1, -1, -1, 1]])
    q = labeler(torch.zeros(5, 4, 8), asked, bank).scores
    close(q[0, 1:], [0.4 + 0.2 * 0.75, 0.4 + 0.2 * 0.25, 0.4])
    close(q[1, [0, 3]], [0.4 + 0.2 * 1.0, 0.4])
    close(q[2:4], np.full((2, 4), 0.5))  # without a word of anyone, as it was
    close(q[4], q[0])
    alone = PseudoLabeler(1, relation=0.2, relation_from="prototypes")
    close(alone(torch.zeros(1, 1, 8), torch.ones(1, 1), PrototypeBank(1, 8)).scores, [[0.5]])


def test_related_prototypes_are_visual_where_seen() -> None:
    """Of several centres their mean; else the text given."""
    bank = PrototypeBank(3, 8, init=normal(3, 8, seed=1), num_prototypes=2, queue_size=4)
    for step in range(3):
        y = torch.tensor([1.0, 1.0, -1.0]).expand(4, 3)
        bank.update(normal(4, 3, 8, seed=step), y, ids=torch.arange(4), text=normal(3, 8, seed=9))
    settings: dict[str, Any] = {"relation": 0.5, "relation_from": "prototypes"}
    z, y = normal(3, 3, 8, seed=4), torch.tensor([[1.0, -1, -1], [1, 1, -1], [-1, -1, 1]])
    labeler, slow = PseudoLabeler(3, **settings), oracles.Labeler(3, **settings)
    close(labeler(z, y, bank).scores, slow(z, y, bank)[2])
    assert not hasattr(labeler, "cooccurrence") and bank.seen.tolist() == [True, True, False]


def test_single_positive_takes_the_lowest_of_each_image_until_an_absent_label_is_met() -> None:
    bank = filled_bank(5)
    labeler, plain = (PseudoLabeler(5, expected_positives=1.0, threshold_neg=0.0, single_positive=s) for s in (True, False))
    z, y = batch(0, bank, 5)
    y = torch.where(y == 1, 1.0, -1.0)
    for one in (labeler, plain):
        one.update(z, y, bank)
    pseudo, before = labeler(z, y, bank), plain(z, y, bank)
    for row, q, known in zip(pseudo.targets, pseudo.scores, y, strict=True):
        free = [c for c in range(5) if known[c] == UNKNOWN]
        lowest = sorted(free, key=lambda c: float(q[c]))[: int(0.6 * len(free) + 1e-6)]
        assert [c for c in range(5) if row[c] == 0] == sorted(lowest)
    assert not (before.targets == 0).any() and torch.equal(pseudo.targets > 0, before.targets > 0)
    assert (pseudo.weights[pseudo.targets == 0] == 0.5).all()
    y[0, 1] = 0.0
    labeler.update(z, y, bank)
    assert not (labeler(z, y, bank).targets == 0).any()
    fresh = PseudoLabeler(3, expected_positives=0.5, single_positive=True)
    empty = fresh(z[:, :3], torch.full((8, 3), -1.0), PrototypeBank(3, 8))
    assert (empty.targets == UNKNOWN).all()  # where every term abstains there is no order
    fresh, scores = PseudoLabeler(5, expected_positives=1.0, single_positive=True), torch.tensor([[0.4, 0.5, 0.1, 0.5, 0.6]])
    chosen = fresh._lowest(scores, torch.ones(1, 5, dtype=torch.bool))
    assert chosen.tolist() == [[True, False, True, False, True]]  # the share is of all unknown entries


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


@pytest.mark.parametrize("options", [{}, {"rule": "quantile", "relation": 0.1}], ids=["defaults", "options"])
def test_resumed_equals_unbroken(options: dict[str, Any]) -> None:
    bank, unbroken = filled_bank(), PseudoLabeler(5, warmup_steps=1, ramp_steps=3, min_positives=2, **options)
    unbroken.update(*batch(0, bank, 5), bank)
    assert all(torch.count_nonzero(b) for b in unbroken.buffers())
    resumed = PseudoLabeler(5, warmup_steps=1, ramp_steps=3, min_positives=2, **options)
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
