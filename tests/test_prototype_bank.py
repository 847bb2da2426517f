"""PrototypeBank over several updates."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from cases import labels, normal, ring

from trm_losses import PrototypeBank
from trm_losses import functional as TF


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(oracles.array(actual), oracles.array(expected), rtol=1e-5, atol=1e-6)


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


# Several centres, absent entries and the queue ------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {"num_prototypes": 3, "queue_size": 4, "absent": True, "absent_every": 3}


def several_steps(bank: Any, steps: range = range(9)) -> None:
    """Positives gather around two directions a class, so that centres have something to find."""
    for step in steps:
        y = labels(5, 4, seed=step)
        y[:, 3] = torch.where(y[:, 3] == 1, 0, y[:, 3])  # the last class never has a positive
        z = 0.3 * normal(5, 4, 6, seed=step) + normal(2, 4, 6, seed=99)[torch.arange(5) % 2]
        w = torch.rand(5, 4, generator=torch.Generator().manual_seed(step)).double()
        w[step % 5] = 0.0
        bank.update(z, y, weights=w, ids=7 * torch.arange(5) + step)


def test_centres_queue_and_absent_prototypes_are_the_loops() -> None:
    init = normal(4, 6, seed=1)
    bank = PrototypeBank(4, 6, init=init, momentum=0.8, absent_momentum=0.6, **EVERYTHING)
    slow = oracles.Bank(init, 0.8, num_prototypes=3, queue_size=4, absent_momentum=0.6, absent_every=3)
    started = []
    for step in range(9):
        for each in (bank, slow):
            several_steps(each, range(step, step + 1))
        close(bank.visual, slow.visual)
        close(bank.absent, slow.absent)
        assert bank.count.tolist() == slow.count and bank.seen.tolist() == slow.seen
        features, ids = ring(slow, bank.queue_cursor.tolist())
        close(bank.queue, features)
        assert bank.queue_ids.tolist() == ids.tolist()
        started.append((bank.count > 0).sum(dim=1).tolist())
    assert started[0][0] == 1 and started[-1][:3] == [3, 3, 3] and started[-1][3] == 0
    assert (bank.count[:3] > 2).any(dim=0).all(), "every centre must have moved after its start"
    assert bank.absent_count.tolist() == slow.absent_count and int(bank.absent_step) == 9


def test_centres_that_have_not_started_change_no_similarity() -> None:
    bank, one = PrototypeBank(4, 6, num_prototypes=3, queue_size=50), PrototypeBank(4, 6)
    for step in range(2):
        z, y = normal(5, 4, 6, seed=step), labels(5, 4, seed=step)
        bank.update(z, y, ids=torch.arange(5))
        one.update(z, y)
    close(bank.visual, one.visual[:, None].expand(-1, 3, -1))
    assert torch.equal(bank.count[:, 0], one.count)
    assert torch.count_nonzero(bank.count[:, 1:]) == 0
    nearer = copy.deepcopy(bank)
    nearer.visual[:, 1] = TF.unit(z[0]).float()  # as rounding may have it: a copy that seems nearer takes nothing
    nearer.update(z, y, ids=torch.arange(5))
    assert torch.count_nonzero(nearer.count[:, 1:]) == 0
    f, t = normal(5, 4, 6, seed=9), normal(4, 6, seed=8)
    for a, b in zip(TF.prototype_similarities(f, bank.visual, t), TF.prototype_similarities(f, one.visual, t), strict=True):
        torch.testing.assert_close(a, b)


def test_a_centre_starts_at_the_farthest_feature_and_each_feature_moves_its_nearest() -> None:
    east, north, west = (torch.tensor(v) for v in ([1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]))
    bank = PrototypeBank(1, 2, num_prototypes=2, queue_size=3)
    bank.update(torch.stack([east, east])[:, None], torch.ones(2, 1), ids=torch.tensor([0, 1]))
    bank.update(west[None, None], torch.zeros(1, 1), ids=torch.tensor([2]))  # known absent: no start from it
    assert bank.count.tolist() == [[1, 0]]
    bank.update(torch.stack([east, north])[:, None], torch.ones(2, 1), ids=torch.tensor([3, 4]))
    assert bank.count.tolist() == [[2, 1]]  # the queue is full, north is farthest
    close(bank.visual[0, 1], north)
    first = bank.visual[0, 0].clone()
    bank.update((north + 0.5 * west)[None, None], torch.ones(1, 1), ids=torch.tensor([5]))
    assert torch.equal(bank.visual[0, 0], first) and bank.count.tolist() == [[2, 2]]
    assert bank.visual[0, 1, 0] < 0


@pytest.mark.parametrize("sizes", [(2, 2, 2, 2), (3, 2, 3), (1, 7, 1), (4, 4), (5, 0, 3), (9,), (0, 12, 5)], ids=str)
def test_the_ring_keeps_the_last_whatever_comes_at_once(sizes: tuple[int, ...]) -> None:
    """More than the room left, more than the whole ring: no tail is dropped."""
    bank, first, met = PrototypeBank(2, 3, queue_size=4), 0, []
    for size in sizes:
        ids = torch.arange(first, first + size)
        z = torch.stack([ids + 1.0, torch.ones(size), torch.zeros(size)], dim=1)[:, None].expand(-1, 2, -1)
        bank.update(z, torch.stack([torch.ones(size), ids % 2], dim=1), ids=ids)
        met += ids.tolist()
        first += size
        assert bank.memory is not None
        for c, expected in ((0, met[-4:]), (1, [i for i in met if i % 2][-4:])):
            held = bank.memory.ids[c]
            assert sorted(held[held >= 0].tolist()) == expected
            assert int((held < 0).sum()) == 4 - len(expected)
            for q in range(4):  # each feature lies beside its id
                if held[q] >= 0:
                    close(bank.memory.features[c, q], oracles.unit(np.array([float(held[q]) + 1, 1, 0])))


def test_without_a_queue_there_is_no_memory_and_ids_are_not_asked_for() -> None:
    bank = PrototypeBank(2, 3)
    bank.update(torch.ones(1, 2, 3), torch.ones(1, 2))
    assert bank.memory is None and bank.absent is None
    with pytest.raises(ValueError, match=r"PrototypeBank: ids \(B,\) must be given where there is a queue"):
        PrototypeBank(2, 3, queue_size=2).update(torch.ones(1, 2, 3), torch.ones(1, 2))


def test_absent_prototypes_move_at_most_every_fourth_update() -> None:
    bank = PrototypeBank(1, 2, absent=True)
    moved = []
    for step in range(9):
        before = bank.absent.clone()
        angle = torch.tensor(0.1 * step)
        z = torch.stack([torch.stack([angle.cos(), angle.sin()]), torch.tensor([-1.0, 0.0])])[:, None]
        bank.update(z, torch.tensor([[0.0], [0.3]]))  # only what is known to be absent enters
        moved.append(not torch.equal(bank.absent, before))
    assert moved == [step % 4 == 0 for step in range(9)] and bank.absent_count.tolist() == [3]
    assert not bank.seen.any(), "absent entries say nothing about the present"
    assert 0 < float(bank.absent[0, 1]) < 0.5


@pytest.mark.parametrize("centres", [1, 3])
def test_start_from_a_whole_pass(centres: int) -> None:
    """The mean of all sure known positives; the running mean goes on as after as many updates; repeated, it is k-means."""
    init, queue = normal(4, 6, seed=1), 4 if centres > 1 else 0
    bank = PrototypeBank(4, 6, init=init, num_prototypes=centres, queue_size=queue)
    slow = oracles.Bank(init, num_prototypes=centres, queue_size=queue)
    for each in (bank, slow):
        several_steps(each)
    text, untouched = bank.text.clone(), bank.count[3].clone()
    batches = []
    for step in range(3):
        size = 4 + step
        y = labels(size, 4, seed=step)
        y[:, 3] = torch.where(y[:, 3] == 1, -1, y[:, 3])
        scores = torch.rand(size, 4, generator=torch.Generator().manual_seed(step))
        batches.append((normal(size, 4, 6, seed=70 + step), y, scores))
    for score in (0.85, 0.3, 0.3):
        bank.start_from(iter(batches), min_score=score)
        slow.start_from(batches, score)
        close(bank.visual, slow.visual)
        assert bank.count.tolist() == slow.count
    default = copy.deepcopy(bank)
    default.start_from(batches)
    bank.start_from(batches, min_score=0.85)
    close(default.visual, bank.visual)
    assert torch.equal(bank.text, text) and torch.equal(bank.count[3], untouched)
    slow.start_from(batches, 0.85)
    for each in (bank, slow):
        several_steps(each, range(20, 23))
    close(bank.visual, slow.visual)
    bank.start_from([])  # nothing comes: nothing changes
    close(bank.visual, slow.visual)


def test_start_from_refuses_by_name() -> None:
    bank = PrototypeBank(2, 3)
    z, y = torch.ones(2, 2, 3), torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"PrototypeBank: scores must have shape \(B, C\) = \(2, 2\), got \(2, 3\)"):
        bank.start_from([(z, y, torch.ones(2, 3))])
    with pytest.raises(ValueError, match="PrototypeBank: regions must be finite"):
        bank.start_from([(z * float("nan"), y, y)])
    with pytest.raises(ValueError, match="PrototypeBank: min_score must be"):
        bank.start_from([(z, y, y)], min_score=1.5)
    assert not bank.seen.any()


def test_everything_resumes_resets_and_copies() -> None:
    unbroken = PrototypeBank(4, 6, init=normal(4, 6, seed=1), **EVERYTHING)
    start = copy.deepcopy(unbroken.state_dict())
    several_steps(unbroken, range(4))
    resumed, twin = PrototypeBank(4, 6, **EVERYTHING), copy.deepcopy(unbroken)
    resumed.load_state_dict(copy.deepcopy(unbroken.state_dict()))
    for bank in (unbroken, resumed, twin):
        several_steps(bank, range(4, 9))
    for other in (resumed, twin):
        assert all(torch.equal(a, b) for a, b in zip(unbroken.buffers(), other.buffers(), strict=True))
    unbroken.reset()
    assert all(torch.equal(x, start[key]) for key, x in unbroken.state_dict().items())
    assert (unbroken.queue_ids == -1).all()
    half = copy.deepcopy(twin).half()
    assert {b.dtype for b in half.buffers()} == {torch.float32, torch.int64} and torch.equal(half.queue, twin.queue)


def test_a_refused_update_leaves_the_queue_alone() -> None:
    bank = PrototypeBank(4, 6, **EVERYTHING)
    several_steps(bank)
    state = {key: x.clone() for key, x in bank.state_dict().items()}
    nan = normal(3, 4, 6)
    nan[0, 0] = float("nan")
    for z, y, ids in (
        (nan, torch.ones(3, 4), torch.arange(3)),
        (nan, torch.zeros(3, 4), torch.arange(3)),  # absent entries are read too
        (normal(3, 4, 6), torch.ones(3, 4), torch.tensor([0, -1, 1])),
    ):
        with pytest.raises(ValueError, match="PrototypeBank: (regions must be finite|ids must be at least 0)"):
            bank.update(z, y, ids=ids)
    assert all(torch.equal(bank.state_dict()[key], x) for key, x in state.items())
