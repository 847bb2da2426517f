"""What must hold for any input: order does not matter, unknown labels do not count, lengths do not where directions are
compared."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.helpers.cases.bank import filled_bank
from tests.helpers.cases.labeler import filled_labeler
from tests.helpers.cases.objective import objective
from tests.helpers.values import WIDTH, normal, shaken
from trm_losses import PrototypeBank, PseudoLabeler, RegionPooler, TextRegionMatchingLoss
from trm_losses import functional as TF

few = settings(max_examples=25, deadline=None, derandomize=True)
fewer = settings(few, max_examples=10)
seeds = st.integers(0, 10_000)
sizes = st.integers(1, 5)
gammas = st.sampled_from([0.0, 0.5, 1.0, 2.0, 4.0])
margins = st.sampled_from([0.0, 0.05, 0.2])


def scene(seed: int, batch: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    values = torch.tensor([1.0, 1.0, 0.0, -1.0, 0.4], dtype=torch.float64)
    y = values[torch.randint(0, 5, (batch, classes), generator=source)]
    return normal(batch, classes, 6, seed=seed), normal(classes, 6, seed=seed + 1), y


def orders(data: Any, batch: int, classes: int) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(data.draw(st.permutations(range(n)))) for n in (batch, classes))  # type: ignore[return-value]


@torch.no_grad()
def reorder(module: nn.Module, classes: Tensor) -> None:
    """Give every parameter and buffer that is by class, and so has a size of C, this order of the classes."""
    for tensor in (*module.parameters(), *module.buffers()):
        for dim, size in enumerate(tensor.shape):
            if size == len(classes):
                tensor.copy_(tensor.index_select(dim, classes))


def agree(one: Any, two: Any, tolerance: float = 1e-9) -> None:
    for x, z in zip(one, two, strict=True):
        torch.testing.assert_close(x, z, rtol=tolerance, atol=tolerance)


@fewer
@given(seeds, st.data())
def test_the_whole_step_follows_the_order(seed: int, data: Any) -> None:
    """Terms, logits and pseudo-labels of the objective, and what its update leaves in statistics and prototypes."""
    tokens, t, y = normal(6, 7, WIDTH, seed=seed), normal(5, WIDTH, seed=seed + 1), scene(seed, 6, 5)[2]
    b, c = orders(data, 6, 5)
    one, two = objective(5).double(), objective(5).double()
    reorder(two, c)
    for _ in range(2):
        x, z = one(tokens, t, y), two(tokens[b], t[c], y[b][:, c])
        agree(x.terms.values(), z.terms.values(), 1e-5)
        agree((x.logits[b][:, c], *(part[b][:, c] for part in x.pseudo)), (z.logits, *z.pseudo), 1e-5)
        one.update(x), two.update(z)
    reorder(one, c)
    agree(one.buffers(), two.buffers(), 1e-5)


@few
@given(seeds, st.floats(-100, 100))
def test_an_unknown_region_moves_no_supervised_term_and_no_state(seed: int, value: float) -> None:
    """Of known labels and sure statistics, that is: pseudo-labels, distillation and their like do look at unknown entries."""
    f, t, y = normal(4, 5, WIDTH, seed=seed), normal(5, WIDTH, seed=seed + 1), scene(seed, 4, 5)[2]
    y[1, 2] = -1
    moved = f.clone()
    moved[1, 2] += value
    matching = TextRegionMatchingLoss(5).double()
    agree([matching(f, t, y)], [matching(moved, t, y)])
    agree([TF.multi_label_contrastive(f[:, 2], y[:, 2:3])], [TF.multi_label_contrastive(moved[:, 2], y[:, 2:3])])
    agree(TF.multimodal_contrastive(f, t, y).values(), TF.multimodal_contrastive(moved, t, y).values())
    bank = filled_bank()
    states = []
    for features in (f, moved):
        labeler, twin = filled_labeler(), filled_bank()
        labeler.update(features, y, bank), twin.update(features, y)
        states.append((*labeler.buffers(), *twin.buffers()))
    agree(*states, tolerance=1e-6)


@few
@given(seeds, sizes, sizes)
def test_an_image_of_which_nothing_is_known_changes_no_mean(seed: int, batch: int, classes: int) -> None:
    f, t, y = scene(seed, batch, classes)
    prototypes = normal(classes, 6, seed=seed + 2)
    more = torch.cat([f, 3 * normal(1, classes, 6, seed=seed + 4)])
    unknown = torch.cat([y, torch.full((1, classes), -1.0)])

    def results(f: Tensor, y: Tensor) -> list[Tensor]:
        logits = TF.text_region_logits(f, t, 3.0)
        terms = TF.multimodal_contrastive(f, t, y, prototypes=prototypes)
        return [TF.asymmetric_loss(logits, y), TF.multi_label_contrastive(f.mean(dim=1), y), *terms.values()]

    agree(results(f, y), results(more, unknown))
    one, two = (PrototypeBank(classes, 6) for _ in range(2))
    one.update(f, y), two.update(more, unknown)
    agree(one.buffers(), two.buffers(), 1e-6)
    labelers = [PseudoLabeler(classes), PseudoLabeler(classes)]
    labelers[0].update(f, y, one), labelers[1].update(more, unknown, one)
    agree(labelers[0].buffers(), labelers[1].buffers(), 1e-6)


@few
@given(seeds, sizes, sizes, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_lengths_do_not_matter_where_directions_are_compared(
    seed: int, batch: int, classes: int, size: float, text_size: float
) -> None:
    f, t, y = scene(seed, batch, classes)
    v, tokens = normal(classes, 6, seed=seed + 2), normal(batch, 7, 6, seed=seed + 3)
    torch.manual_seed(0)
    pooler = shaken(RegionPooler(classes, 6, num_heads=2, query_head=False)).double()

    def results(f: Tensor, t: Tensor, v: Tensor, tokens: Tensor) -> list[Tensor]:
        return [
            *TF.multimodal_contrastive(f, t, y, prototypes=v).values(),
            TF.multi_label_contrastive(f[:, 0], y),
            *TF.prototype_similarities(f, v, t),
            *pooler(tokens, t),
        ]

    agree(results(f, t, v, tokens), results(size * f, text_size * t, text_size * v, size * tokens), 1e-7)


@few
@given(st.floats(0.02, 0.98), st.floats(-8, 8), gammas, gammas, margins)
def test_a_soft_label_is_met_best_by_its_own_probability(
    label: float, logit: float, gamma_pos: float, gamma_neg: float, margin: float
) -> None:
    """No rule that a rising logit helps holds of a soft label: beyond it the loss rises again, whatever the focusing."""
    target = torch.tensor([label], dtype=torch.float64)
    options: dict[str, Any] = {"gamma_pos": gamma_pos, "gamma_neg": gamma_neg, "margin": margin}
    best = TF.asymmetric_loss(torch.logit(target), target, **options)
    assert best <= TF.asymmetric_loss(torch.tensor([logit], dtype=torch.float64), target, **options) + 1e-12
