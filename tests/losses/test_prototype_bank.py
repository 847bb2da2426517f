"""PrototypeBank over several updates."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.helpers import compare, oracles
from tests.helpers.values import labels, normal
from trm_losses import PrototypeBank

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
        w = torch.rand(5, 4, generator=torch.Generator().manual_seed(step)).double() - 0.2 if weighted else None
        bank.update(z, y, weights=w, text=t if step != 2 else None)
        slow.update(z, y, w, t if step != 2 else None)
        close(bank.visual, slow.visual)
        close(bank.text, slow.text)
        assert bank.count.tolist() == slow.count and bank.seen.tolist() == slow.seen
        assert int(bank.text_count) == slow.text_count
    assert bank.seen.tolist() == [True, True, True, False]


def test_what_does_not_enter_may_hold_anything() -> None:
    bank = PrototypeBank(2, 3)
    z = torch.ones(2, 2, 3)
    z[0, 1], z[1, 0], z[1, 1] = float("nan"), float("inf"), float("nan")
    bank.update(z, torch.tensor([[1.0, -1.0], [1.0, 0.0]]), weights=torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    close(bank.visual[0], torch.full((3,), 3**-0.5))
    with pytest.raises(ValueError, match="PrototypeBank: regions must be finite, got 3 NaN or infinite of 12"):
        bank.update(z, torch.tensor([[1.0, -1.0], [1.0, 0.0]]).roll(1, 0))


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
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="PrototypeBank: weights must be finite"):
            bank.update(normal(3, 4, 6), torch.ones(3, 4), weights=torch.full((3, 4), value))
        bank.update(normal(3, 4, 6), torch.zeros(3, 4), weights=torch.full((3, 4), value))  # read nowhere
    assert all(torch.equal(bank.state_dict()[key], x) for key, x in state.items())


def test_a_reset_bank_stands_at_its_start() -> None:
    bank = PrototypeBank(4, 6, init=normal(4, 6, seed=1))
    bank.update(normal(3, 4, 6), labels(3, 4), text=normal(4, 6))
    bank.reset()
    close(bank.visual, [oracles.unit(row) for row in oracles.array(normal(4, 6, seed=1))])
    assert not bank.seen.any() and int(bank.text_count) == 0
