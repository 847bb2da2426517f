"""Two, three and four processes with gloo against one on the joined batch: losses, gradients and running state."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import trm_losses as tl
from tests.helpers.cases import CASES, NAMED
from tests.helpers.cases.bank import filled_bank
from tests.helpers.cases.baselines import BASELINES
from tests.helpers.cases.case import Case, built, ids
from tests.helpers.cases.objective import objective
from tests.helpers.ranks import Pool, group_of, spread
from tests.helpers.values import CLASSES, SAMPLES, WIDTH, Inputs, labels, normal
from trm_losses import baselines
from trm_losses._distributed import (
    count_per_rank,
    gather_rows,
    joined_sum,
    resolve_group,
    sum_over_ranks,
    sum_per_rank,
    with_gradients_of_ranks,
)
from trm_losses.functional import _log_sums

ROWS = 7
UNEQUAL = {2: (5, 2), 3: (4, 1, 2), 4: (3, 1, 2, 1)}


class Split(NamedTuple):
    """Rows of each rank for each number of ranks; the ranks on which nothing is known, nothing is present, nothing learns."""

    sizes: dict[int, tuple[int, ...]]
    unknown: tuple[int, ...] = ()
    absent: tuple[int, ...] = ()
    frozen: tuple[int, ...] = ()


SPLITS: dict[str, Split] = {
    "unequal": Split(UNEQUAL),
    "nothing known on one rank": Split({2: (4, 3), 3: (2, 3, 2), 4: (2, 3, 1, 1)}, unknown=(1,)),
    "nothing known on the larger rank": Split(UNEQUAL, unknown=(0,)),
    "nothing known anywhere": Split(UNEQUAL, unknown=(0, 1, 2, 3)),
    "nothing present on one rank": Split(UNEQUAL, absent=(1,)),
    "no row on one rank": Split({2: (7, 0), 3: (4, 0, 3), 4: (4, 0, 0, 3)}),
    "nothing learns on one rank": Split(UNEQUAL, frozen=(1,)),
}
# The quick suite: two ranks over everything, more over these.
FEW = ("objective", "contrast, prototypes", "large loss, reject", "partial ASL, selective")


def cases(*lists: Any) -> list[Any]:
    """All combinations with 2, 3 and 4 ranks; what is left to the nightly suite is marked so."""
    found = [()]
    for values in (*lists, SPLITS, (2, 3, 4)):
        found = [(*case, value) for case in found for value in values]
    return [
        pytest.param(
            *case,
            id="-".join(map(str, case)).replace(" ", "-"),
            marks=[] if case[-1] == 2 or (case[0] in FEW and case[-2].startswith(("unequal", "no row"))) else pytest.mark.nightly,
        )
        for case in found
    ]


@pytest.fixture(scope="session")
def pool(pools: Callable[[int], Pool]) -> Pool:
    return pools(2)


def part(rank: int | None, split: str, world: int) -> slice:
    """The rows of a rank; all of them for the one process of rank None."""
    if rank is None:
        return slice(None)
    sizes = SPLITS[split].sizes[world]
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def joined_targets(split: str, world: int) -> Tensor:
    y = labels(ROWS, CLASSES, seed=41)
    y[5:, 0] = 1  # partners of the first class on several ranks
    for rank in range(world):
        rows = y[part(rank, split, world)]
        if rank in SPLITS[split].unknown:
            rows.fill_(-1)
        if rank in SPLITS[split].absent:
            rows[rows > 0] = 0
    return y


def close(actual: Tensor, expected: Tensor, name: str | None = None) -> None:
    """To the last digits of float64; state in float32 to its own."""
    if expected.dtype == torch.float64:
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, msg=name)
    else:
        torch.testing.assert_close(actual, expected, msg=name)


# What ranks have in common; all else has a row for each image.
SHARED = ("text", "prototypes", "seen")
IN_BLOCKS = " in blocks"


def case_of(loss: str) -> Case:
    return NAMED[loss.removesuffix(IN_BLOCKS)]


def inputs_of(rank: int | None, loss: str, split: str, world: int, learning: bool = True) -> Inputs:
    """A rank's rows of the whole batch; the first of what learns differs by rank."""
    case, rows = case_of(loss), part(rank, split, world)
    x = case.inputs(ROWS, CLASSES)
    x |= {"targets": joined_targets(split, world)} if "targets" in x else {}
    own = {key: value if key in SHARED else value[rows].clone() for key, value in x.items()}
    return {key: value.requires_grad_(learning) if key in case.learns else value for key, value in own.items()}


def build(loss: str, distributed: Any) -> nn.Module:
    return spread(built(case_of(loss)), distributed)


def gradients(rank: int | None, loss: str, split: str, world: int) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Loss, gradient of this rank's own, gradients of what ranks share; rank None: one process, the joined batch."""
    case, x = case_of(loss), inputs_of(rank, loss, split, world)
    own, *common = (x[key] for key in case.learns)
    own.requires_grad_(rank not in SPLITS[split].frozen)
    module = build(loss, distributed=rank is not None and group_of(world))
    in_blocks = rank is not None and IN_BLOCKS in loss  # a rank's rows find themselves among the keys of all, in every block
    with mock.patch.object(_log_sums, "BLOCK", 6 if in_blocks else _log_sums.BLOCK):
        value = case.call(module, x)
        if value.requires_grad:
            value.backward()
    shared = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}
    shared |= {key: x.grad for key, x in zip(case.learns[1:], common, strict=True) if x.grad is not None}
    return value.detach(), own.grad, shared


ONE_EACH = ("matching", "distillation", "contrast, prototypes", "contrast of images", "objective")
IN_PARTS = ("contrast, prototypes in blocks", "contrast of images in blocks", "objective, classes in chunks")
LOSSES = (*ONE_EACH, *IN_PARTS, *BASELINES)


@pytest.mark.parametrize(("loss", "split", "world"), cases(LOSSES))
def test_average_over_ranks_is_one_process(pools: Callable[[int], Pool], loss: str, split: str, world: int) -> None:
    """DDP averages gradients: then the loss and every gradient are those of the joined batch."""
    ranks = pools(world).run(gradients, loss, split, world, world=world)
    value, whole, shared = gradients(None, loss, split, world)
    assert whole is not None
    close(torch.stack([r[0] for r in ranks]).mean(), value)
    for rank, (_, own, _) in enumerate(ranks):
        assert (own is None) == (rank in SPLITS[split].frozen)
        if own is not None:
            close(own / world, whole[part(rank, split, world)])
    for name, gradient in shared.items():
        if name in ranks[0][2]:
            close(torch.stack([r[2][name] for r in ranks]).mean(dim=0), gradient, name)
    assert SPLITS[split].frozen or all(set(r[2]) == set(shared) for r in ranks)
    if split == "unequal":
        assert whole.abs().max() > 1e-3 and all(g.abs().max() > 1e-6 for g in shared.values())


def compiled(rank: int, loss: str) -> bool:
    """Whether the compiled loss and its gradient are those of the plain one; as a whole graph it is refused, never wrong."""
    found, case = [], case_of(loss)
    for compile_it in (False, True):
        torch._dynamo.reset()
        x, module = inputs_of(rank, loss, "unequal", 2), build(loss, distributed=True)
        value = case.call(torch.compile(module, backend="aot_eager") if compile_it else module, x)
        value.backward()
        found.append((value.detach(), *(x[key].grad for key in case.learns)))
    with pytest.raises(Exception, match=r"torch\.compiler\.disable"):
        case.call(torch.compile(module, fullgraph=True, backend="eager"), x)
    return all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("loss", [*ONE_EACH[2:4], "large loss, reject", pytest.param("objective", marks=pytest.mark.nightly)])
def test_compiled_on_ranks(pool: Pool, loss: str) -> None:
    assert pool.run(compiled, loss) == [True, True]


def without_backward(rank: int, loss: str, absent: str) -> Tensor | None:
    """Gradient of the first rank's own, while the second takes no part in the backward pass."""
    case, x = case_of(loss), inputs_of(rank, loss, "unequal", 2, learning=rank == 0)
    module = build(loss, distributed=True)
    with torch.set_grad_enabled(rank == 0 or absent != "no gradient"):
        value = case.call(module.requires_grad_(rank == 0 or absent == "no backward"), x)
    if rank == 0:
        value.backward()
        return x[case.learns[0]].grad
    return None


@pytest.mark.parametrize("absent", ["no backward", "nothing learns", "no gradient"])
@pytest.mark.parametrize("loss", ONE_EACH[2:])
def test_no_rank_waits_in_the_backward_pass(pool: Pool, loss: str, absent: str) -> None:
    """One rank's loss is not followed by a backward pass, holds nothing that learns, or is computed without gradient."""
    gradient = pool.run(without_backward, loss, absent)[0]
    expected = gradients(None, loss, "unequal", 2)[1]
    assert expected is not None
    if absent != "no gradient":  # where the second rank's loss is no part of what is trained
        close(gradient / 2, expected[part(0, "unequal", 2)])
    assert gradient.abs().max() > 1e-6


def updates(rank: int | None, split: str, world: int) -> dict[str, Tensor]:
    """State of bank and labeler after three steps of the objective."""
    module = build("objective", rank is not None and group_of(world))
    rows = part(rank, split, world)
    for step in range(3):
        tokens = normal(ROWS, 4, WIDTH, seed=50 + step)[rows]
        y = joined_targets(split, world).roll(step, 1)[rows]
        output = module(tokens, normal(CLASSES, WIDTH, seed=60 + step), y)
        module.update(output)
    return {key: x for key, x in module.state_dict().items() if key.startswith(("bank", "labeler"))}


def agree(ranks: list[dict[str, Tensor]], one: dict[str, Tensor]) -> None:
    """Bit for bit between ranks, and with one process up to rounding."""
    for key in one:
        assert all(torch.equal(ranks[0][key], other[key]) for other in ranks[1:]), key
        close(ranks[0][key], one[key], key)
    assert all(set(rank) == set(one) for rank in ranks)


@pytest.mark.parametrize(("split", "world"), cases())
def test_running_state_agrees(pools: Callable[[int], Pool], split: str, world: int) -> None:
    one = updates(None, split, world)
    agree(pools(world).run(updates, split, world, world=world), one)
    assert len(one) == 9
    start = objective().state_dict()
    assert not torch.equal(one["bank.text"], start["bank.text"])
    known = split != "nothing known anywhere"
    assert torch.equal(one["labeler.known_count"], start["labeler.known_count"]) != known


def scores_without_absent(rank: int | None, split: str, world: int) -> Tensor:
    """Scores where no absent label was ever known, so that the unknown ones of the batch stand for them."""
    labeler, bank = tl.PseudoLabeler(CLASSES), filled_bank()
    first = normal(30, CLASSES, WIDTH, seed=31) + bank.visual
    labeler.update(first, torch.where(labels(30, CLASSES, 31) == 1, 1.0, -1.0), bank)
    labeler.distributed = rank is not None and group_of(world)
    y = joined_targets(split, world)
    rows = part(rank, split, world)
    return labeler(normal(ROWS, CLASSES, WIDTH, seed=70)[rows], torch.where(y == 1, 1.0, -1.0)[rows], bank).scores


@pytest.mark.parametrize(("split", "world"), cases())
def test_unknown_entries_of_all_ranks_stand_for_absent_ones(pools: Callable[[int], Pool], split: str, world: int) -> None:
    ranks, one = pools(world).run(scores_without_absent, split, world, world=world), scores_without_absent(None, split, world)
    close(torch.cat(ranks), one)
    if split == "unequal":
        alone = scores_without_absent(None, split, world)
        assert alone.std() > 0.01


def baseline_updates(rank: int | None, name: str, split: str, world: int) -> dict[str, Tensor]:
    """What a baseline keeps after three epochs of one step."""
    module = build(name, rank is not None and group_of(world))
    rows = part(rank, split, world)
    for step in range(3):
        module.begin_epoch(2 + 3 * step, 10)
        y, ids = joined_targets(split, world).roll(step, 1), torch.arange(ROWS).roll(2 * step) % SAMPLES
        module.update(2 * normal(ROWS, CLASSES, seed=80 + step)[rows], y[rows], ids=ids[rows])
    return dict(module.state_dict())


STATEFUL = [name for name, case in BASELINES.items() if case.state]


@pytest.mark.parametrize(("name", "split", "world"), cases(STATEFUL))
def test_what_baselines_keep_agrees(pools: Callable[[int], Pool], name: str, split: str, world: int) -> None:
    agree(pools(world).run(baseline_updates, name, split, world, world=world), one := baseline_updates(None, name, split, world))
    start = build(name, False).state_dict()
    moves = [key for key in one if key in ("soft", "flipped", "prior") and "selective" not in name]
    assert split != "unequal" or not any(torch.equal(one[key], start[key]) for key in moves)


def alone(rank: int, loss: str) -> Tensor:
    """With ``distributed=False`` a rank must not wait for the others, even where a group exists."""
    if rank == 0:
        return torch.zeros(())
    return case_of(loss).call(build(loss, distributed=False), inputs_of(rank, loss, "unequal", 2)).detach()


def test_not_distributed_is_local(pool: Pool) -> None:
    for loss in (*ONE_EACH, "EPR", "large loss, reject"):
        torch.testing.assert_close(pool.run(alone, loss)[1], alone(1, loss))


# Readings that leave parameters out or bring others: each of them must get its gradient on every rank.
WRAPPED: list[dict[str, Any]] = [{}, {"pooler": {"query": "free"}}, {"pooler": {"query_head": False}}]


def wrapped(rank: int | None, settings: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two steps under DistributedDataParallel itself; rank None: one process, the joined batch."""
    model = spread(objective(**settings), rank is not None)
    parallel = model if rank is None else nn.parallel.DistributedDataParallel(model)
    optimizer, rows = torch.optim.SGD(model.parameters(), lr=0.1), part(rank, "unequal", 2)
    for step in range(2):
        y = joined_targets("unequal", 2).roll(step, 1)[rows]
        output = parallel(normal(ROWS, 4, WIDTH, seed=70 + step)[rows].float(), normal(CLASSES, WIDTH, seed=80).float(), y)
        optimizer.zero_grad()
        output.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        model.update(output)
    return gradients, dict(model.state_dict())


@pytest.mark.parametrize("settings", WRAPPED, ids=["defaults", "free", "one head"])
def test_under_distributed_data_parallel(pool: Pool, settings: dict[str, Any]) -> None:
    one = wrapped(None, settings)
    for rank in pool.run(wrapped, settings):
        for found, wanted in zip(rank, one, strict=True):  # gradients, state
            assert found.keys() == wanted.keys()
            for key, value in wanted.items():
                torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, msg=key)


def messages(rank: int, batch: int, classes: int, width: int, positives: int) -> dict[str, int]:
    """Bytes that a rank hands to collectives in a step of each part, with so many positives in a batch of its own."""
    sent: list[int] = []

    def counting(original: Callable[..., Any], which: int) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            sent.append(args[which].numel() * args[which].element_size())
            return original(*args, **options)

        return call

    y = torch.zeros(batch * classes)
    y[torch.arange(positives) * 7 % len(y)] = 1  # 7 and the number of entries have no common factor
    y = y.view(batch, classes)
    z, text = normal(batch, classes, width, seed=rank).float(), normal(classes, width, seed=9).float()
    logits, ids = z[..., 0].clone().requires_grad_(), torch.arange(batch) + batch * rank
    bank = tl.PrototypeBank(classes, width, distributed=True)
    labeler = tl.PseudoLabeler(classes, distributed=True)
    contrast, z_learned = tl.MultimodalContrastiveLoss(distributed=True), z.clone().requires_grad_()
    large = baselines.LargeLoss(delta=0.05, distributed=True)
    large.begin_epoch(1, 10)
    apl = baselines.EMAPLLoss(2 * batch, classes, distributed=True)
    parts: dict[str, Callable[[], Any]] = {
        "matching": lambda: tl.TextRegionMatchingLoss(classes, distributed=True).loss(logits, y),
        "distillation": lambda: tl.RegionDistillationLoss(distributed=True)(logits, logits.detach()),
        "contrast": lambda: contrast(z_learned, text, y).backward(),
        "bank": lambda: bank.update(z, y),
        "labeler": lambda: (labeler(z, y, bank), labeler.update(z, y, bank)),
        "EPR": lambda: baselines.EPRLoss(2.0, distributed=True)(logits, y),
        "large loss": lambda: large(logits, -torch.ones_like(y)),
        "EM+APL": lambda: (apl(logits, y, ids=ids), apl.update(logits, y, ids=ids)),
    }
    found = {}
    with (
        mock.patch.object(dist, "all_reduce", counting(dist.all_reduce, 0)),
        mock.patch.object(dist, "all_gather", counting(dist.all_gather, 1)),
    ):
        for name, part in parts.items():
            sent.clear()
            part()
            found[name] = sum(sent)
    return found


def test_messages_are_as_small_as_they_can_be(pool: Pool) -> None:
    """Anchors and sums travel, never a value of the size (B, C, D)."""
    batch, classes, width, positives, world = 9, 11, 16, 13, 2
    sizes, number = 16 * world, 4  # of a gather: rows and whether they learn, of each rank; a number is a float
    largest = 10  # of the entries of both ranks a twentieth, rounded up
    expected = {
        "matching": number,
        "distillation": number,
        # Anchors, their class and validity, the gradients of two terms by the anchors of all ranks, two counts.
        "contrast": 2 * sizes + positives * (4 * width + 16) + 2 * world * positives * 4 * width + 2 * number,
        "bank": classes * 4 * (width + 1),
        "labeler": 4 * classes * number + 10 * classes * number,
        "EPR": 3 * number,
        "large loss": 8 + sizes + largest * number + number,
        "EM+APL": number + 2 * sizes + 8 * batch + 4 * batch * classes,
    }
    assert pool.run(messages, batch, classes, width, positives) == [expected, expected]


def groups(rank: int) -> list[bool]:
    world, one = dist.group.WORLD, dist.new_group([0])
    found = [resolve_group(True) is world, resolve_group(world) is world, resolve_group(False) is None]
    return [*found, rank == 1 or resolve_group(one) is None]


def test_which_group_is_reduced_over(pool: Pool) -> None:
    """None where it has one rank."""
    assert pool.run(groups) == [[True] * 4] * 2


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_copies_have_the_same_ranks(case: Case) -> None:
    """A process group cannot be copied, so every part keeps its own, and so does a part of it."""
    module, group = nn.ModuleList([built(case)]), dist.ProcessGroup(0, 1)
    for part in module.modules():
        if hasattr(part, "distributed"):
            part.distributed = group
    for twin, part in zip(copy.deepcopy(module).modules(), module.modules(), strict=True):
        assert twin is not part and getattr(twin, "distributed", None) is getattr(part, "distributed", None)


def test_a_process_group_is_refused_in_a_pickle() -> None:
    part = tl.TextRegionMatchingLoss(2, distributed=dist.ProcessGroup(0, 1))
    with pytest.raises(
        TypeError, match="TextRegionMatchingLoss: distributed must be True or False to be pickled.*; save state_dict"
    ):
        pickle.dumps(part)


def test_copies_of_compiled_parts_are_their_own() -> None:
    """Whatever a compiler attached to a part goes on with the weights of that part."""
    part = tl.TextRegionMatchingLoss(2, distributed=True)
    part.compile(backend="eager")
    wrapped = torch.compile(tl.TextRegionMatchingLoss(2), backend="eager")
    assert type(copy.deepcopy(wrapped)) is type(wrapped)
    x = torch.ones(1, 2, 3), torch.ones(2, 3), torch.ones(1, 2)
    before, twin = part(*x), copy.deepcopy(part)
    with torch.no_grad():
        twin.bias.fill_(100.0)
    assert twin(*x) > before + 1


def test_one_process_needs_no_group() -> None:
    assert resolve_group(True) is None and resolve_group(False) is None
    value, rows = torch.ones(3), torch.ones(2, 3)
    assert all(f(value, None) is value for f in (sum_over_ranks, count_per_rank, sum_per_rank, joined_sum))
    joined = gather_rows(rows, None)
    assert joined.rows is rows and joined.real.tolist() == [True, True] and joined.first == 0
    assert with_gradients_of_ranks([value], rows, joined, None)[0] is value
