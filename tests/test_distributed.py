"""Two processes with gloo against one on the joined batch: losses, gradients and running state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from _ddp import Pool
from cases import CLASSES, WIDTH, everything_contrast, filled_bank, filled_labeler, generator, labels, normal, objective
from torch import Tensor, nn

import trm_losses as tl
from trm_losses import _contrast
from trm_losses import functional as TF
from trm_losses._distributed import count_per_rank, gather_rows, resolve_group, sum_over_ranks

WORLD = 2
ROWS = 7
# Rows of rank 0 (the rest are rank 1's), and the ranks on which nothing is known.
SPLITS: dict[str, tuple[int, tuple[int, ...]]] = {
    "unequal": (5, ()),
    "nothing known on one rank": (4, (1,)),
    "nothing known on the larger rank": (5, (0,)),
    "nothing known anywhere": (3, (0, 1)),
    "no row on one rank": (7, ()),
}


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    pool = Pool(WORLD)
    yield pool
    pool.close()


def part(rank: int, split: str) -> slice:
    first = SPLITS[split][0]
    return slice(0, first) if rank == 0 else slice(first, ROWS)


def joined_targets(split: str) -> Tensor:
    y = labels(ROWS, CLASSES, seed=41)
    y[5:, 0] = 1  # partners of the first class on both ranks
    for rank in SPLITS[split][1]:
        y[part(rank, split)] = -1
    return y


def joined(loss: str, split: str) -> dict[str, Tensor]:
    """The whole batch; the first entry is what differs by rank and learns."""
    y = joined_targets(split)
    weights = torch.rand(ROWS, CLASSES, generator=generator(42), dtype=torch.float64)
    if loss == "distillation of features":
        student, teacher = normal(ROWS, CLASSES, WIDTH, seed=43), normal(ROWS, CLASSES, WIDTH, seed=44)
        return {"features": student, "teacher": teacher, "weights": weights * (y == 1)}  # none present on some ranks
    if "distillation" in loss:
        student, teacher = 3 * normal(ROWS, CLASSES, seed=43), 3 * normal(ROWS, CLASSES, seed=44)
        return {"features": student, "teacher": teacher, "weights": weights[:, 0]}
    if "objective" in loss:
        return {"features": normal(ROWS, 4, WIDTH, seed=45), "targets": y}
    if loss == "images":
        return {"features": normal(ROWS, WIDTH, seed=48), "targets": y, "weights": weights}
    if loss == "contrast options":
        saliency = (1.5 * normal(ROWS, CLASSES, 6, seed=49)).softmax(dim=-1)
        features = normal(ROWS, CLASSES, WIDTH, seed=46)
        return {"features": features, "targets": y, "weights": weights, "saliency": saliency, "ids": torch.arange(ROWS)}
    return {"features": normal(ROWS, CLASSES, WIDTH, seed=46), "targets": y, "weights": weights}


def build(loss: str, distributed: Any) -> nn.Module:
    if loss == "matching":
        return tl.TextRegionMatchingLoss(CLASSES, scale=5.0, distributed=distributed).double()
    if "distillation" in loss:
        form: Any = {"binary distillation": "kl_binary", "distillation of features": "cosine"}.get(loss, "kl_class")
        return tl.RegionDistillationLoss(form=form, distributed=distributed)
    if loss == "contrast":
        return tl.MultimodalContrastiveLoss(distributed=distributed)
    if loss in ("contrast options", "images"):
        torch.manual_seed(0)
        return everything_contrast(CLASSES, distributed=distributed).double()
    if loss == "objective in chunks":
        distillation = {"form": "cosine"}
        return objective(distributed=distributed, distillation=distillation, class_chunk=2).double()
    return objective(distributed=distributed).double()


def compute(loss: str, module: Any, batch: dict[str, Tensor], text: Tensor) -> Tensor:
    if "distillation" in loss:
        return module(batch["features"], batch["teacher"], batch["weights"])
    if "objective" in loss:
        return module(batch["features"], text, batch["targets"]).loss
    if loss == "images":
        return module(batch["features"], None, batch["targets"], weights=batch["weights"])
    if loss == "contrast options":
        options = {key: batch[key] for key in ("weights", "saliency", "ids")}
        memory = TF.Memory(normal(CLASSES, 3, WIDTH, seed=39), torch.arange(-1, 3 * CLASSES - 1).view(CLASSES, 3) % 9)
        options |= {"memory": memory, "prototypes": normal(CLASSES, 2, WIDTH, seed=38)}
        return module(batch["features"], text, batch["targets"], **options)
    if loss == "contrast":
        bank = filled_bank()
        options = {"prototypes": bank.visual, "seen": bank.seen, "weights": batch["weights"]}
        return module(batch["features"], text, batch["targets"], **options)
    return module(batch["features"], text, batch["targets"], batch["weights"])


def gradients(rank: int | None, loss: str, split: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, gradient of this rank's features, gradients of what ranks share; rank None: one process, the joined batch."""
    rows = slice(None) if rank is None else part(rank, split)
    batch = {key: x[rows] for key, x in joined(loss, split).items()}
    batch["features"] = batch["features"].clone().requires_grad_()
    text = normal(CLASSES, WIDTH, seed=47).requires_grad_()
    module = build(loss, distributed=rank is not None)
    value = compute(loss, module, batch, text)
    value.backward()
    shared = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    if "distillation" not in loss and loss != "images":
        assert text.grad is not None
        shared["text"] = text.grad
    assert batch["features"].grad is not None
    return value.detach(), batch["features"].grad, shared


LOSSES = (
    "matching",
    "distillation",
    "binary distillation",
    "distillation of features",
    "contrast",
    "contrast options",
    "images",
    "objective",
    "objective in chunks",
)


@pytest.mark.parametrize("split", SPLITS, ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("loss", LOSSES)
def test_average_over_ranks_is_one_process(pool: Pool, loss: str, split: str) -> None:
    """DDP averages gradients: then the loss and every gradient are those of the joined batch."""
    ranks = pool.run(gradients, loss, split)
    value, features, shared = gradients(None, loss, split)
    torch.testing.assert_close(torch.stack([r[0] for r in ranks]).mean(), value)
    torch.testing.assert_close(torch.cat([r[1] for r in ranks]) / WORLD, features)
    assert all(set(r[2]) == set(shared) for r in ranks)
    for name, gradient in shared.items():
        torch.testing.assert_close(torch.stack([r[2][name] for r in ranks]).mean(dim=0), gradient, msg=name)
    if split == "unequal":
        assert features.abs().max() > 1e-3 and all(g.abs().max() > 1e-6 for g in shared.values())


def gradients_in_blocks(rank: int, loss: str, split: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    with mock.patch.object(_contrast, "_ROWS", 2):
        return gradients(rank, loss, split)


@pytest.mark.parametrize("loss", ["contrast options", "images"])
@pytest.mark.parametrize("split", SPLITS, ids=lambda name: name.replace(" ", "-"))
def test_blocks_of_rows_on_ranks(pool: Pool, loss: str, split: str) -> None:
    """A rank's rows find themselves among the keys of all, in every block."""
    ranks = pool.run(gradients_in_blocks, loss, split)
    value, features, _ = gradients(None, loss, split)
    torch.testing.assert_close(torch.stack([r[0] for r in ranks]).mean(), value)
    torch.testing.assert_close(torch.cat([r[1] for r in ranks]) / WORLD, features)


def updates(rank: int | None, split: str) -> dict[str, Tensor]:
    """State of bank and labeler after three steps of the objective."""
    module = objective(distributed=rank is not None).double()
    for step in range(3):
        rows = slice(None) if rank is None else part(rank, split)
        tokens = normal(ROWS, 4, WIDTH, seed=50 + step)[rows]
        y = joined_targets(split).roll(step, 1)[rows]
        output = module(tokens, normal(CLASSES, WIDTH, seed=60 + step), y)
        module.update(output)
    return {key: x for key, x in module.state_dict().items() if key.startswith(("bank", "labeler"))}


@pytest.mark.parametrize("split", SPLITS, ids=lambda name: name.replace(" ", "-"))
def test_running_state_agrees(pool: Pool, split: str) -> None:
    """Bit for bit between ranks, and with one process up to rounding."""
    first, second = pool.run(updates, split)
    one = updates(None, split)
    assert set(one) == set(first) and len(one) == 9
    for key in one:
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], one[key], msg=key)
    start = objective().state_dict()
    assert not torch.equal(one["bank.text"], start["bank.text"])
    known = split != "nothing known anywhere"
    assert torch.equal(one["labeler.known_count"], start["labeler.known_count"]) != known


def labeler_updates(rank: int | None, split: str) -> dict[str, Tensor]:
    """State of a labeler with histograms and co-occurrence after three steps."""
    labeler = filled_labeler(rule="quantile", relation=0.1)
    labeler.distributed = rank is not None  # filled with the same on every rank before
    rows = slice(None) if rank is None else part(rank, split)
    for step in range(3):
        z, y = normal(ROWS, CLASSES, WIDTH, seed=70 + step)[rows], joined_targets(split).roll(step, 1)[rows]
        labeler.update(z, y, filled_bank())
    return dict(labeler.state_dict())


@pytest.mark.parametrize("split", SPLITS, ids=lambda name: name.replace(" ", "-"))
def test_histograms_and_cooccurrence_agree(pool: Pool, split: str) -> None:
    first, second = pool.run(labeler_updates, split)
    one, start = labeler_updates(None, split), filled_labeler(rule="quantile", relation=0.1).state_dict()
    for key in one:
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], one[key], msg=key)
    assert not torch.equal(one["histogram"], start["histogram"])
    known = split != "nothing known anywhere"
    assert torch.equal(one["cooccurrence"], start["cooccurrence"]) != known


def bank_updates(rank: int | None, split: str, split_passes: bool) -> dict[str, Tensor]:
    """State of a bank with every option after five steps, and then after a whole pass in batches of its own."""
    bank = tl.PrototypeBank(
        CLASSES,
        WIDTH,
        num_prototypes=2,
        queue_size=3,
        absent=True,
        absent_every=2,
        init=normal(CLASSES, WIDTH, seed=91),
        distributed=rank is not None,
    )
    rows = slice(None) if rank is None else part(rank, split)
    for step in range(5):
        z, y = normal(ROWS, CLASSES, WIDTH, seed=90 + step)[rows], joined_targets(split).roll(step, 1)[rows]
        bank.update(z, y, ids=torch.arange(ROWS)[rows] + 10 * step)
    if split_passes:
        z, y = normal(ROWS, CLASSES, WIDTH, seed=96), joined_targets(split)
        scores = torch.rand(ROWS, CLASSES, generator=generator(97))
        own = [torch.arange(ROWS)] if rank is None else list(torch.arange(ROWS)[rows].split(1))  # as many batches as rows
        bank.start_from([(z[i], y[i], scores[i]) for i in own], min_score=0.2)
    return dict(bank.state_dict())


@pytest.mark.parametrize("split_passes", [False, True], ids=["updates", "start-from"])
@pytest.mark.parametrize("split", SPLITS, ids=lambda name: name.replace(" ", "-"))
def test_centres_and_queues_agree(pool: Pool, split: str, split_passes: bool) -> None:
    """Bit for bit between ranks; the queue, its ids and its cursor also with one process, the means up to rounding."""
    first, second = pool.run(bank_updates, split, split_passes)
    one = bank_updates(None, split, split_passes)
    assert set(first) == set(one) and len(one) == 11
    for key in one:
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], one[key], msg=key)
    assert torch.equal(first["queue_ids"], one["queue_ids"])
    assert bool((one["queue_ids"] >= 0).any()) == (split != "nothing known anywhere")


def alone(rank: int, loss: str) -> Tensor:
    """With ``distributed=False`` a rank must not wait for the others, even where a group exists."""
    if rank == 0:
        return torch.zeros(())
    batch = {key: x[part(rank, "unequal")] for key, x in joined(loss, "unequal").items()}
    return compute(loss, build(loss, distributed=False), batch, normal(CLASSES, WIDTH, seed=47)).detach()


def test_not_distributed_is_local(pool: Pool) -> None:
    for loss in ("matching", "distillation", "contrast", "contrast options", "images", "objective"):
        batch = {key: x[part(1, "unequal")] for key, x in joined(loss, "unequal").items()}
        expected = compute(loss, build(loss, distributed=False), batch, normal(CLASSES, WIDTH, seed=47)).detach()
        torch.testing.assert_close(pool.run(alone, loss)[1], expected)


# Readings and forms that leave parameters out or bring others: each of them must get its gradient on every rank.
WRAPPED: list[dict[str, Any]] = [
    {},
    {
        "pooler": {"query": "conditioned", "mlp_input": "region"},
        "matching": {"form": "pair_free", "dim": WIDTH},
        "distillation": {"form": "cosine"},
    },
    {"pooler": {"query": "free", "residual": "query"}, "distillation": {"form": "kl_binary"}},
]


def wrapped(rank: int, settings: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two steps under DistributedDataParallel itself."""
    model = objective(distributed=True, **settings)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        rows = part(rank, "unequal")
        y = joined_targets("unequal").roll(step, 1)[rows]
        output = parallel(normal(ROWS, 4, WIDTH, seed=70 + step)[rows].float(), normal(CLASSES, WIDTH, seed=80).float(), y)
        optimizer.zero_grad()
        output.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        model.update(output)
    return gradients, dict(model.state_dict())


@pytest.mark.parametrize("settings", WRAPPED, ids=["defaults", "conditioned", "residual"])
def test_under_distributed_data_parallel(pool: Pool, settings: dict[str, Any]) -> None:
    model = objective(**settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        y = joined_targets("unequal").roll(step, 1)
        output = model(normal(ROWS, 4, WIDTH, seed=70 + step).float(), normal(CLASSES, WIDTH, seed=80).float(), y)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        model.update(output)
    for gradients, state in pool.run(wrapped, settings):
        for name, p in model.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-4, msg=name)
        for key, value in model.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-4, msg=key)


def helpers(rank: int) -> dict[str, Any]:
    world = dist.group.WORLD
    one = dist.new_group([0])
    rows = torch.full((2 - rank, 3), float(rank + 1), requires_grad=True)
    everything, real, begin = gather_rows(rows, world)
    (everything * torch.arange(12.0).view(4, 3) * real[:, None]).sum().backward()
    return {
        "groups": (
            resolve_group(True) is world,
            resolve_group(world) is world,
            resolve_group(False) is None,
            rank == 1 or resolve_group(one) is None,
        ),
        "sum": sum_over_ranks(torch.tensor(float(rank + 1)), world),
        "count": count_per_rank(torch.tensor(float(rank + 1)), world),
        "rows": everything.detach(),
        "real": real,
        "begin": begin,
        "gradient": rows.grad,
    }


def test_sums_and_gathers(pool: Pool) -> None:
    """Ranks of two rows and one: padded, marked, and the gradient of both ranks' use comes back."""
    first, second = pool.run(helpers)
    for answer in (first, second):
        assert all(answer["groups"])
        assert answer["sum"] == 3 and answer["count"] == 1.5
        assert answer["rows"].tolist() == [[1.0] * 3, [1.0] * 3, [2.0] * 3, [0.0] * 3]
        assert answer["real"].tolist() == [True, True, True, False]
    assert (first["begin"], second["begin"]) == (0, 2)
    weight = torch.arange(12.0).view(4, 3)
    assert torch.equal(first["gradient"], 2 * weight[:2]) and torch.equal(second["gradient"], 2 * weight[2:3])


def test_one_process_needs_no_group() -> None:
    assert resolve_group(True) is None and resolve_group(False) is None
    value, rows = torch.ones(3), torch.ones(2, 3)
    assert sum_over_ranks(value, None) is value and count_per_rank(value, None) is value
    joined_rows, real, begin = gather_rows(rows, None)
    assert joined_rows is rows and real.tolist() == [True, True] and begin == 0
