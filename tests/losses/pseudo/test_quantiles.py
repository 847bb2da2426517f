"""Quantiles: shares of the unknown entries of a class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.cases.labeler import evidence
from trm_losses.pseudo import Quantiles


def evenly(quantiles: Quantiles) -> Tensor:
    """Histograms of scores spread evenly over [0, 1], and such scores (100, C)."""
    quantiles.histogram.fill_(1.0)
    return ((torch.arange(100) + 0.5) / 100)[:, None].expand(-1, quantiles.num_classes)


def test_shares_follow_the_prior_of_each_class() -> None:
    """The top 0.6 r and the bottom 1 - 2 r; a class without known labels or scores abstains."""
    quantiles = Quantiles(5)
    scores = evenly(quantiles)
    quantiles.histogram[4] = 0
    found = quantiles(scores, evidence([[9, 1], [7, 3], [4, 6], [0, 0], [9, 1]]))
    assert (found == 1).sum(dim=0).tolist() == [6, 18, 36, 0, 0] and (found == 0).sum(dim=0).tolist() == [80, 40, 0, 0, 0]
    assert (found[-6:, 0] == 1).all() and (found[:80, 0] == 0).all()
    none_present = Quantiles(1)
    assert (none_present(evenly(none_present), evidence([[9, 0]])) == 0).all()


@pytest.mark.parametrize(
    "known, score, low", [([9, 0], 1.0, 0.0), ([5, 5], 0.0, 0.2), ([9, 1], 0.5, 0.6)], ids=["top", "bottom", "no score"]
)
def test_an_empty_share_takes_no_score_whatever(known: list[int], score: float, low: float) -> None:
    """Nor is one half decided, though it lies below everything met."""
    quantiles = Quantiles(1)
    evenly(quantiles)
    quantiles.histogram[:, : int(256 * low)] = 0
    quantiles.histogram[:, 128:] *= low > 0  # for the first: all below one half
    assert quantiles(torch.full((1, 1), score), evidence([known])) == -1
    near = quantiles(torch.full((1, 1), 0.3 if low == 0 else 0.51), evidence([known]))
    assert (near == 0).any() == (known != [5, 5])


def test_quantiles_are_free_of_scale() -> None:
    """Scores pressed together in a few bins give up nearly the same shares."""
    quantiles, given = Quantiles(1, momentum=1.0), evidence([[7, 3]], torch.full((1000, 1), -1.0))
    for low, width in ((0.0, 1.0), (0.4, 0.01), (0.99, 0.01)):
        quantiles.histogram.zero_()
        q = low + width * torch.rand(1000, 1, generator=torch.Generator().manual_seed(1))
        quantiles.update(q, given)
        assert quantiles.histogram.sum() == 1000
        found = quantiles(q, given)
        assert abs(int((found == 1).sum()) - 180) < 30 and abs(int((found == 0).sum()) - 400) < 30


def test_where_positives_are_given_the_prior_is_the_model_s() -> None:
    """k / C times the class's mean score relative to the mean over classes; no known absent label is asked for."""
    quantiles = Quantiles(2)
    scores = evenly(quantiles)
    quantiles.histogram[1, 128:] = 0  # mean scores 1/2 and 1/4: priors 0.2 * 4/3 and 0.2 * 2/3
    found = quantiles(scores, evidence([[0, 5], [0, 0]], expected=0.4))
    assert (found == 1).sum(dim=0).tolist() == [16, 54] and (found == 0).sum(dim=0).tolist() == [47, 37]
    certain = Quantiles(1)  # a prior is at most one
    found = certain(evenly(certain), evidence([[0, 5]], expected=9.0))
    assert (found == 1).sum() == 60 and not (found == 0).any()


def test_unknown_entries_that_have_a_score_are_counted() -> None:
    """Decayed; neither known labels nor scores of one half, which are no score, come in."""
    quantiles = Quantiles(1, momentum=0.5)
    y = torch.tensor([[-1.0], [1.0], [-1.0], [-1.0], [0.0]])
    for _ in range(2):
        quantiles.update(torch.tensor([[0.5], [0.9], [0.2], [1.0], [0.1]]), evidence([[1, 1]], y))
    assert quantiles.histogram.nonzero().tolist() == [[0, 51], [0, 255]] and quantiles.histogram.sum() == 3


@pytest.mark.parametrize("settings", [{"share": 1.1}, {"momentum": -0.1}, {"num_classes": 0}], ids=str)
def test_refuses_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Quantiles: {next(iter(settings))} must be at least"):
        Quantiles(**{"num_classes": 3, **settings})
