"""TextRegionMatchingLoss beyond the table: its scale, its bias, and what it shares with the functions."""

from __future__ import annotations

import math
from typing import Any

import oracles
import pytest
import torch
from cases import labels, normal

from trm_losses import TextRegionMatchingLoss


def test_scale_and_bias_start_where_told() -> None:
    loss = TextRegionMatchingLoss(3, scale=5.0, bias=-2.0)
    assert math.isclose(loss.scale.item(), 5.0, rel_tol=1e-6)
    assert loss.bias.tolist() == [-2.0] * 3
    assert math.isclose(TextRegionMatchingLoss(3).scale.item(), 20.0, rel_tol=1e-6)


def test_scale_stops_at_a_hundred() -> None:
    loss = TextRegionMatchingLoss(3)
    with torch.no_grad():
        loss.log_scale.fill_(9.0)
    assert math.isclose(loss.scale.item(), 100.0, rel_tol=1e-5)


def test_a_scale_that_starts_at_the_limit_still_learns() -> None:
    """log(100) rounds up in float32: a clamp after exp() would cut its gradient for good."""
    loss = TextRegionMatchingLoss(3, scale=100.0)
    loss.scale.backward()
    assert loss.log_scale.grad is not None and loss.log_scale.grad > 0


def test_logits_without_bias() -> None:
    loss = TextRegionMatchingLoss(4, scale=3.0, bias=1.5).double()
    r, t = normal(2, 4, 8), normal(4, 8, seed=1)
    torch.testing.assert_close(loss.logits(r, t, bias=False), loss.logits(r, t) + 1.5)


def test_loss_of_logits_at_hand() -> None:
    loss = TextRegionMatchingLoss(4).double()
    r, t, y = normal(3, 4, 8), normal(4, 8, seed=1), labels(3, 4)
    w = torch.rand(3, 4, dtype=torch.float64)
    torch.testing.assert_close(loss.loss(loss.logits(r, t), y, w), loss(r, t, y, w))
    entries = loss.loss(loss.logits(r, t), y, w, reduction="none")
    assert entries.shape == (3, 4) and torch.count_nonzero(entries[y == -1]) == 0
    torch.testing.assert_close(entries.sum(), loss.loss(loss.logits(r, t), y, w, reduction="sum"))


def test_frozen_text_stays_as_it_is_and_the_rest_learns() -> None:
    loss = TextRegionMatchingLoss(4)
    r, t = normal(3, 4, 8, dtype=torch.float32).requires_grad_(), normal(4, 8, seed=1, dtype=torch.float32)
    before = t.clone()
    optimizer = torch.optim.SGD([r, *loss.parameters()], lr=0.1)
    start = [p.detach().clone() for p in loss.parameters()]
    loss(r, t, labels(3, 4)).backward()
    optimizer.step()
    assert torch.equal(t, before)
    assert all(not torch.equal(p, q) for p, q in zip(loss.parameters(), start, strict=True))


@pytest.mark.parametrize("prior", [0.07, 0.5, 0.9])
@pytest.mark.parametrize("size", [0.1, 5.0])
@pytest.mark.parametrize("form", ["single", "pair", "pair_free"])
def test_calibrated_bias_gives_the_prior(prior: float, size: float, form: Any) -> None:
    r, t, n = (normal(rows, 4, 8, seed=seed, dtype=torch.float32).squeeze(0) for rows, seed in ((30, 0), (1, 1), (1, 2)))
    r = size * r
    loss = TextRegionMatchingLoss(4, form=form, negative_init=n if form == "pair_free" else None)
    given: dict[str, Any] = {"negative_text": t + 0.1 * n} if form == "pair" else {}
    loss.calibrate_bias(r, t, prior, **given)
    assert len(set(loss.bias.tolist())) == 1
    assert abs(torch.sigmoid(loss.logits(r, t, **given)).mean().item() - prior) < 1e-4
    with pytest.raises(ValueError, match="prior must be above 0"):
        loss.calibrate_bias(r, t, 0.0)


def test_device_and_dtype_of_the_parameters() -> None:
    assert {p.dtype for p in TextRegionMatchingLoss(2, dtype=torch.float64).parameters()} == {torch.float64}
    assert {p.device.type for p in TextRegionMatchingLoss(2, device="meta").parameters()} == {"meta"}
    free = TextRegionMatchingLoss(2, form="pair_free", dim=4, device="meta", dtype=torch.float64).negative
    assert free is not None and free.device.type == "meta" and free.dtype == torch.float64


def test_a_pair_without_bias_is_the_softmax_over_its_two_texts() -> None:
    """DualCoOp's form: presence against absence."""
    loss = TextRegionMatchingLoss(4, form="pair", scale=7.0).double()
    r, present, absent = normal(3, 4, 8), normal(4, 8, seed=1), normal(4, 8, seed=2)
    both = torch.stack([oracle_similarity(r, t, 7.0) for t in (present, absent)], dim=-1)
    probability = torch.sigmoid(loss.logits(r, present, negative_text=absent))
    torch.testing.assert_close(probability, both.softmax(dim=-1)[..., 0])
    torch.testing.assert_close(loss.logits(r, absent, negative_text=present), -loss.logits(r, present, negative_text=absent))
    assert loss.logits(r, present, negative_text=3 * present).abs().max() < 1e-12  # the length of a text never counts


def oracle_similarity(regions: torch.Tensor, text: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.tensor(oracles.matching_logits(regions, text, scale))


def test_a_free_vector_starts_as_the_single_form_and_learns() -> None:
    single, free = TextRegionMatchingLoss(4, bias=0.3), TextRegionMatchingLoss(4, bias=0.3, form="pair_free", dim=8)
    r, t, y = normal(3, 4, 8, dtype=torch.float32), normal(4, 8, seed=1, dtype=torch.float32), labels(3, 4)
    torch.testing.assert_close(free.logits(r, t), single.logits(r, t))
    free(r, t, y).backward()
    assert free.negative is not None and free.negative.grad is not None and free.negative.grad.abs().sum() > 0
    start = normal(4, 8, seed=2, dtype=torch.float32)
    told = TextRegionMatchingLoss(4, form="pair_free", negative_init=start)
    assert torch.equal(told.negative, start) and told.negative.data_ptr() != start.data_ptr()
    longer = TextRegionMatchingLoss(4, form="pair_free", negative_init=2 * start)
    move = [m.logits(r, t) - single.logits(r, t) for m in (told, longer)]
    torch.testing.assert_close(move[1] - move[0], move[0] - 0.3, rtol=1e-4, atol=1e-4)  # its length does count
