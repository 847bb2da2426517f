"""NeighbourRule, and the label propagation over regions that it stands on."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import trm_losses as tl
from tests.helpers import oracles
from tests.helpers.cases.bank import filled_bank
from tests.helpers.values import WIDTH, labels, normal
from trm_losses import functional as TF
from trm_losses.pseudo import NeighbourRule


@pytest.mark.parametrize("images, neighbours", [(9, 3), (9, 8), (4, 20), (2, 1), (1, 5)])
@pytest.mark.parametrize("block", [1 << 24, 20, 1])
def test_scores_are_the_loops(images: int, neighbours: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trm_losses.functional.neighbours.BLOCK", block)
    f, s = normal(images, 3, 5), torch.sigmoid(normal(images, 3, seed=1))
    before = s.clone()
    actual = TF.neighbour_scores(3 * f, s, neighbours=neighbours, temperature=0.2)
    np.testing.assert_allclose(actual, oracles.neighbour_scores(f, s, neighbours, 0.2), rtol=1e-9)
    assert torch.equal(s, before) and actual.dtype == torch.float64


@pytest.mark.parametrize("known", [None, labels(9, 3) != -1], ids=["none", "some"])
def test_scores_are_passed_on_from_known_labels(known: torch.Tensor | None) -> None:
    f, s = normal(9, 3, 5), torch.sigmoid(normal(9, 3, seed=1))
    actual = TF.neighbour_scores(f, s, known=known, neighbours=3, temperature=0.2, steps=4)
    np.testing.assert_allclose(actual, oracles.neighbour_scores(f, s, 3, 0.2, known=known, steps=4), rtol=1e-9)
    assert not torch.allclose(actual, TF.neighbour_scores(f, s, neighbours=3, temperature=0.2), atol=1e-2)


def test_a_prior_is_matched_by_one_shift_a_class() -> None:
    q, y = torch.sigmoid(3 * normal(40, 4)), labels(40, 4)
    q = torch.where(y == -1, q, y.double())
    free = y == -1
    least, room = (q * ~free).mean(dim=0), free.double().mean(dim=0)
    prior = least + room * torch.tensor([0.1, 0.3, 0.6, 0.95])
    matched = TF.match_prior(q, prior, free)
    for c in range(4):
        assert matched[:, c].mean().item() == pytest.approx(float(prior[c]), abs=1e-9)
        shifts = (torch.logit(matched[:, c]) - torch.logit(q[:, c]))[free[:, c]]
        np.testing.assert_allclose(shifts, shifts[0].expand_as(shifts), atol=1e-6)
    assert torch.equal(matched[~free], q[~free])


def test_a_prior_keeps_the_order_of_probabilities_of_any_size() -> None:
    q = torch.tensor([[1e-30], [1e-9], [1e-7], [0.3], [1 - 1e-6], [0.9]])
    moved = TF.match_prior(q, torch.tensor([0.6]), torch.ones_like(q, dtype=torch.bool))[:, 0]
    assert moved.mean().item() == pytest.approx(0.6, abs=1e-5)
    assert (moved.double()[[0, 1, 2, 3, 5, 4]].diff() >= 0).all() and moved[2] > moved[1] > moved[0]


@pytest.mark.parametrize("case", ["certain", "out of reach", "nothing free", "half"])
def test_priors_at_the_edge(case: str) -> None:
    q, free = torch.tensor([[0.0], [1.0], [0.5], [1.0]]), torch.tensor([[True], [True], [True], [False]])
    if case == "certain":  # even labels of which the model is certain have a place on the scale
        assert TF.match_prior(q, torch.tensor([0.6]), free).mean().item() == pytest.approx(0.6, abs=1e-5)
    if case == "out of reach":  # the known one alone is more than the prior
        np.testing.assert_allclose(TF.match_prior(q, torch.tensor([0.1]), free)[:, 0], [0, 0, 0, 1], atol=1e-6)
        np.testing.assert_allclose(TF.match_prior(q, torch.tensor([1.0]), free)[:, 0], [1, 1, 1, 1], atol=1e-6)
    if case == "nothing free":
        assert torch.equal(TF.match_prior(q, torch.tensor([0.5]), torch.zeros_like(free)), q)
    if case == "half":
        assert TF.match_prior(q.half(), torch.tensor([0.6]), free).mean().item() == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("shown", [[0, 1, 2, 0, 0, 1], [0, 0, 0, 0, 0, 1]], ids=["spread", "known oftener than assumed"])
def test_estimates_of_single_positives_have_the_assumed_number_of_positives(shown: list[int]) -> None:
    z, logits = normal(6, 3, WIDTH), normal(6, 3, seed=1) - 3
    y = torch.full((6, 3), -1.0)
    y[torch.arange(6), torch.tensor(shown)] = 1.0
    labeler = labeler_with(expected_positives=1.5, neighbours=3, temperature=0.3, steps=2)
    labeler.refresh(z, logits, y)
    p = np.vectorize(oracles.sigmoid)(oracles.array(logits))
    unknown = oracles.array(y) == -1
    said = np.where(unknown, p, 1.0)
    heard = oracles.neighbour_scores(z, said, 3, 0.3, known=~unknown, steps=2)
    merged = np.where(unknown, oracles.array(labeler.get_buffer("rule.estimates")), 1.0)
    told, assumed = np.where(unknown, 0.0, 1.0).mean(axis=0), 0.5 * p.mean(axis=0) / p.mean()
    np.testing.assert_allclose(merged.mean(axis=0), np.maximum(told, assumed), atol=1e-5)
    assert (told > assumed).any() == (shown.count(0) > 3)  # then nothing is left for its unknown entries
    np.testing.assert_allclose(oracles.array(labeler.get_buffer("rule.estimates"))[~unknown], heard[~unknown], atol=1e-6)
    for c in range(3):
        order = np.argsort(heard[unknown[:, c], c])
        assert (np.diff(oracles.array(labeler.get_buffer("rule.estimates"))[unknown[:, c], c][order]) >= -1e-6).all()


def test_half_precision_regions() -> None:
    f, s = normal(12, 2, 16, dtype=torch.float32), torch.rand(12, 2, generator=torch.Generator().manual_seed(0))
    exact = TF.neighbour_scores(f, s, neighbours=11)
    for dtype in (torch.float16, torch.bfloat16):
        near = TF.neighbour_scores(f.to(dtype), s, neighbours=11)
        assert near.dtype == torch.float32
        np.testing.assert_allclose(near, exact, atol=0.03)


def test_two_clusters_take_over_the_label_of_their_one_known_image() -> None:
    """What no threshold on the model's own probability could do: the model is undecided about all of them."""
    direction = torch.eye(2).repeat_interleave(5, dim=0)[:, None]  # five images of one look, five of another
    regions = direction + 0.05 * normal(10, 1, 2, dtype=torch.float32)
    targets = torch.full((10, 1), -1.0)
    targets[0], targets[5] = 1.0, 0.0
    labeler = tl.PseudoLabeler(1, NeighbourRule(1, 10, neighbours=4, steps=1))
    labeler.refresh(regions, torch.zeros(10, 1), targets)
    pseudo = labeler(regions, targets, tl.PrototypeBank(1, 2), ids=torch.arange(10))
    assert (pseudo.targets[1:5] > 0.55).all() and ((pseudo.targets[6:] >= 0) & (pseudo.targets[6:] < 0.45)).all()
    assert pseudo.targets[0] == pseudo.targets[5] == -1 and pseudo.weights[[0, 5]].eq(0).all()
    assert pseudo.weights[1:5].eq(1).all() and pseudo.weights[6:].eq(1).all()


def labeler_with(expected_positives: float | None = None, warmup: int = 0, ramp: int = 0, **settings: Any) -> tl.PseudoLabeler:
    rule = NeighbourRule(3, **{"num_samples": 6, "steps": 1, **settings})
    return tl.PseudoLabeler(3, rule, expected_positives=expected_positives, warmup_steps=warmup, ramp_steps=ramp)


def test_nothing_is_decided_before_a_refresh_and_in_the_warm_up() -> None:
    labeler, bank = labeler_with(warmup=2, ramp=2), filled_bank(3)
    z, y, ids = normal(6, 3, WIDTH, dtype=torch.float32), torch.full((6, 3), -1.0), torch.arange(6)
    weights = []
    for step in range(5):
        if step == 1:
            labeler.refresh(z, torch.zeros(6, 3), y)
        pseudo = labeler(z, y, bank, ids=ids)
        weights.append(float(pseudo.weights.mean()))
        assert bool((pseudo.targets == -1).all()) == (step < 2)
        assert torch.allclose(pseudo.scores, torch.tensor(0.5))
        labeler.update(z, y, bank)
    assert weights == [0, 0, 0, 0.5, 1]
    labeler.reset()
    assert (labeler.get_buffer("rule.estimates") == -1).all() and labeler.step == 0


def test_estimates_are_saved_and_restored() -> None:
    labeler, fresh = labeler_with(), labeler_with()
    z, y = normal(6, 3, WIDTH, dtype=torch.float32), labels(6, 3).float()
    labeler.refresh(z, normal(6, 3, dtype=torch.float32), y)
    fresh.load_state_dict(copy.deepcopy(labeler.state_dict()))
    args = (z[:2], torch.full((2, 3), -1.0), filled_bank(3))
    for a, b in zip(labeler(*args, ids=torch.tensor([4, 1])), fresh(*args, ids=torch.tensor([4, 1])), strict=True):
        assert torch.equal(a, b)
    assert labeler.half().get_buffer("rule.estimates").dtype == torch.float32


@pytest.mark.parametrize("settings", [{"num_samples": 0}, {"neighbours": 0}, {"temperature": 0.0}, {"steps": 0}], ids=str)
def test_refuses_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"NeighbourRule: {next(iter(settings))} must be (at least 1|above 0), got"):
        labeler_with(**settings)


def test_ids_are_places() -> None:
    labeler, z, y = labeler_with(), normal(2, 3, WIDTH, dtype=torch.float32), torch.full((2, 3), -1.0)
    for ids in (torch.tensor([0.0, 1.0]), torch.tensor([True, False]), torch.tensor([0, 1], dtype=torch.uint8)):
        with pytest.raises(TypeError, match="PseudoLabeler: ids must be int64, got"):
            labeler(z, y, filled_bank(3), ids=ids)
    whole = torch.compile(labeler, fullgraph=True, backend="eager")
    assert (whole(z, y, filled_bank(3), ids=torch.tensor([5, 0])).targets == -1).all()


def test_refuses_a_refresh_that_does_not_fit() -> None:
    z, logits, y = normal(6, 3, WIDTH), normal(6, 3), labels(6, 3)
    labeler = labeler_with()
    with pytest.raises(ValueError, match=r"regions must have shape \(N, C, D\) = \(6, 3, D\), got \(5, 3, 8\); one for each of"):
        labeler.refresh(z[:5], logits, y)
    with pytest.raises(ValueError, match="logits must be finite"):
        labeler.refresh(z, logits.log(), y)
    with pytest.raises(ValueError, match="targets must be 1"):
        labeler.refresh(z, logits, y - 2)


def test_estimates_stay_probabilities() -> None:
    """A mean of ones, in float32, is not always one."""
    rule = NeighbourRule(40, 30)
    rule.refresh(normal(30, 40, WIDTH, dtype=torch.float32), torch.zeros(30, 40), torch.ones(30, 40), None)
    assert rule.estimates.max() <= 1 and rule.estimates.min() > 0.999


def test_classes_that_are_new_have_no_estimate() -> None:
    labeler = labeler_with()
    labeler.refresh(normal(6, 3, WIDTH), normal(6, 3), labels(6, 3))
    old, new = labeler.get_buffer("rule.estimates"), labeler.with_classes([2, None]).get_buffer("rule.estimates")
    assert torch.equal(new[:, 0], old[:, 2]) and (new[:, 1] == -1).all() and (old >= 0).all()
