"""PrototypeBank over several updates."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import compare, oracles
from tests.helpers.values import labels, normal
from trm_losses import PrototypeBank
from trm_losses import functional as TF

close = partial(compare.close, rtol=1e-5, atol=1e-6)  # state is float32


@pytest.mark.parametrize("momentum, text_momentum", [(0.99, 0.99), (0.5, 0.0), (0.0, 0.6), (1.0, 1.0)])
@pytest.mark.parametrize("weighted", [False, True])
def test_several_updates_are_the_loops(momentum: float, text_momentum: float, weighted: bool) -> None:
    init = normal(4, 6, seed=1)
    bank = PrototypeBank(4, 6, init=init, momentum=momentum, text_momentum=text_momentum)
    slow = oracles.Bank(init, momentum, text_momentum)
    close(bank.visual, slow.visual)
    for step in range(5):
        z, y, t = normal(5, 4, 6, seed=step), labels(5, 4, seed=step), normal(4, 6, seed=50 + step)
        y[:, 3] = torch.where(y[:, 3] == 1, 0, y[:, 3])  # the last class never has a positive
        w = torch.rand(5, 4, generator=torch.Generator().manual_seed(step)).double() if weighted else None
        bank.update(z, y, weights=w, text=t if step != 2 else None)
        slow.update(z, y, w, t if step != 2 else None)
        close(bank.visual, slow.visual)
        close(bank.text, slow.text)
        assert bank.count.tolist() == slow.count and bank.seen.tolist() == slow.seen
        assert int(bank.text_count) == slow.text_count
    assert bank.seen.tolist() == [True, True, True, False]


def test_first_update_is_the_normalised_mean_and_others_stay() -> None:
    init = normal(3, 6, seed=1, dtype=torch.float32)
    bank = PrototypeBank(3, 6, init=init)
    z = normal(4, 3, 6, dtype=torch.float32)
    y = torch.tensor([[1.0, 0, -1], [1, 0.9, -1], [0, 0, -1], [-1, -1, -1]])
    bank.update(z, y)
    units = torch.nn.functional.normalize(z, dim=-1)
    close(bank.visual[0], torch.nn.functional.normalize(units[0, 0] + units[1, 0], dim=0))
    for c in (1, 2):  # absent, soft and unknown entries do not enter
        close(bank.visual[c], torch.nn.functional.normalize(init[c], dim=0))
    assert torch.equal(bank.text, bank.init)


def test_the_growing_average_gives_every_batch_the_same_say() -> None:
    bank = PrototypeBank(1, 2, momentum=1.0)
    for angle in (0.0, 0.2, 0.4):
        bank.update(torch.tensor([[[np.cos(angle), np.sin(angle)]]]).float(), torch.ones(1, 1))
    assert abs(float(torch.atan2(bank.visual[0, 1], bank.visual[0, 0])) - 0.2) < 5e-3


def test_what_does_not_enter_may_hold_anything() -> None:
    bank = PrototypeBank(2, 3)
    z = torch.ones(2, 2, 3)
    z[0, 1], z[1, 0], z[1, 1] = float("nan"), float("inf"), float("nan")
    bank.update(z, torch.tensor([[1.0, -1.0], [1.0, 0.0]]), weights=torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    close(bank.visual[0], torch.full((3,), 3**-0.5))
    with pytest.raises(ValueError, match="PrototypeBank: regions must be finite, got 3 NaN or infinite of 12"):
        bank.update(z, torch.tensor([[1.0, -1.0], [1.0, 0.0]]).roll(1, 0))


def test_convention_weights_of_zero_and_less_stay_out() -> None:
    bank = PrototypeBank(1, 2)
    z = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[-1.0, 0.0]]])
    bank.update(z, torch.ones(3, 1), weights=torch.tensor([[0.5], [0.0], [-1.0]]))
    close(bank.visual, [[1.0, 0.0]])


def test_two_halves_make_one_batch() -> None:
    """What the all-reduce over ranks relies on: sums and masses add up."""
    z, y = normal(6, 4, 5), (labels(6, 4) == 1).double()
    whole = TF.class_sums(z, y)
    halves = [TF.class_sums(z[part], y[part]) for part in (slice(0, 2), slice(2, 6))]
    for index in range(2):
        close(halves[0][index] + halves[1][index], whole[index])


def test_no_gradient_and_nothing_kept_of_the_batch() -> None:
    bank = PrototypeBank(4, 6)
    z, t = normal(3, 4, 6).requires_grad_(), normal(4, 6, seed=1).requires_grad_()
    bank.update(z, labels(3, 4), text=t)
    assert not any(b.requires_grad for b in bank.buffers())
    assert list(bank.parameters()) == []
    before = bank.visual.clone()
    z.data.zero_()
    assert torch.equal(bank.visual, before)


def test_a_refused_update_leaves_the_state_alone() -> None:
    bank = PrototypeBank(4, 6)
    state = {key: x.clone() for key, x in bank.state_dict().items()}
    nan = torch.full((4, 6), float("nan"))
    for spoilt in (nan, torch.ones(4, 7), torch.ones(3, 6)):
        with pytest.raises(ValueError, match="PrototypeBank: text must"):
            bank.update(normal(3, 4, 6), torch.ones(3, 4), text=spoilt)
    assert all(torch.equal(bank.state_dict()[key], x) for key, x in state.items())


def test_resumed_equals_unbroken() -> None:
    unbroken = PrototypeBank(4, 6, init=normal(4, 6, seed=1))
    for step in range(2):
        unbroken.update(normal(3, 4, 6, seed=step), labels(3, 4), text=normal(4, 6, seed=step))
    resumed = PrototypeBank(4, 6)
    resumed.load_state_dict(copy.deepcopy(unbroken.state_dict()))
    for bank in (unbroken, resumed):
        bank.update(normal(3, 4, 6, seed=9), labels(3, 4, seed=9), text=normal(4, 6, seed=9))
    assert all(torch.equal(a, b) for a, b in zip(unbroken.buffers(), resumed.buffers(), strict=True))
    resumed.reset()
    close(resumed.visual, [oracles.unit(row) for row in oracles.array(normal(4, 6, seed=1))])
    assert not resumed.seen.any() and int(resumed.text_count) == 0


@pytest.mark.parametrize("change", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_state_keeps_its_precision_under_a_change_of_the_model(change: Any) -> None:
    """One step at momentum 0.99 or above would be lost in half precision."""
    bank, twin = (PrototypeBank(4, 6, init=normal(4, 6, seed=1)) for _ in range(2))
    model = change(torch.nn.Sequential(torch.nn.Linear(2, 2), bank))
    for module in (bank, twin):
        module.update(normal(3, 4, 6), labels(3, 4))
    assert model[0].weight.dtype != torch.float32
    assert bank.visual.dtype == torch.float32
    close(bank.visual, twin.visual)
    assert bank.to("meta").visual.device.type == "meta"
