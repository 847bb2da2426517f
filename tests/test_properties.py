"""What must hold for any input: order does not matter, unknown labels do not count, prototypes are unit vectors."""

from __future__ import annotations

from typing import Any

import torch
from cases import filled_bank, filled_labeler, normal, shaken
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trm_losses import PrototypeBank, RegionPooler
from trm_losses import functional as TF

few = settings(max_examples=25, deadline=None)
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


@few
@given(seeds, sizes, sizes, st.data())
def test_losses_do_not_depend_on_the_order_of_samples_or_classes(seed: int, batch: int, classes: int, data: Any) -> None:
    f, t, y = scene(seed, batch, classes)
    prototypes, seen = normal(classes, 6, seed=seed + 2), normal(classes, seed=seed + 3) > -0.5
    weights = normal(batch, classes, seed=seed + 4).abs()
    b, c = orders(data, batch, classes)

    def results(f: Tensor, t: Tensor, y: Tensor, p: Tensor, seen: Tensor, w: Tensor) -> list[Tensor]:
        logits = TF.text_region_logits(f, t, 3.0)
        terms = TF.multimodal_contrastive(f, t, y, prototypes=p, seen=seen, weights=w)
        return [TF.asymmetric_loss(logits, y, w), TF.region_distillation(logits, 2 * logits.square()), *terms.values()]

    one = results(f, t, y, prototypes, seen, weights)
    two = results(f[b][:, c], t[c], y[b][:, c], prototypes[c], seen[c], weights[b][:, c])
    for x, z in zip(one, two, strict=True):
        torch.testing.assert_close(x, z, rtol=1e-9, atol=1e-9)


@few
@given(seeds, sizes, sizes, st.data())
def test_contrasts_with_memory_maps_and_labels_do_not_depend_on_the_order(seed: int, batch: int, classes: int, data: Any) -> None:
    f, t, y = scene(seed, batch, classes)
    prototypes, past = normal(classes, 2, 6, seed=seed + 2), normal(classes, 3, 6, seed=seed + 3)
    past_ids = torch.arange(-1, 3 * classes - 1).view(classes, 3) % 5
    saliency, ids = (2 * normal(batch, classes, 4, seed=seed + 4)).softmax(dim=-1), torch.arange(batch)
    b, c = orders(data, batch, classes)
    given = {"overlap": 0.5, "absent_negatives": True}
    one = TF.multimodal_contrastive(
        f, t, y, prototypes=prototypes, saliency=saliency, memory=TF.Memory(past, past_ids), ids=ids, **given
    )
    two = TF.multimodal_contrastive(
        f[b][:, c],
        t[c],
        y[b][:, c],
        prototypes=prototypes[c].flip(1),
        saliency=saliency[b][:, c],
        memory=TF.Memory(past[c].flip(1), past_ids[c].flip(1)),
        ids=ids[b],
        **given,
    )
    for x, z in zip(one.values(), two.values(), strict=True):
        torch.testing.assert_close(x, z, rtol=1e-9, atol=1e-9)
    images = f.mean(dim=1)
    torch.testing.assert_close(TF.multi_label_contrastive(images, y), TF.multi_label_contrastive(images[b], y[b][:, c]))


@few
@given(seeds, sizes, sizes, st.data())
def test_poolers_and_similarities_follow_the_order(seed: int, batch: int, classes: int, data: Any) -> None:
    tokens, t = normal(batch, 7, 6, seed=seed), normal(classes, 6, seed=seed + 1)
    b, c = orders(data, batch, classes)
    torch.manual_seed(0)
    pooler = shaken(RegionPooler(classes, 6, num_heads=2)).double()
    for x, z in zip(pooler(tokens, t), pooler(tokens[b], t[c]), strict=True):
        torch.testing.assert_close(x[b][:, c], z, rtol=1e-9, atol=1e-9)
    f, v, seen = normal(batch, classes, 6, seed=seed), normal(classes, 6, seed=seed + 2), normal(classes, seed=seed) > 0
    similar = TF.prototype_similarities(f, v, t, seen=seen)
    for x, z in zip(similar, TF.prototype_similarities(f[b][:, c], v[c], t[c], seen=seen[c]), strict=True):
        torch.testing.assert_close(x[b][:, c], z, rtol=1e-9, atol=1e-9)


@few
@given(seeds, sizes, st.data())
def test_pseudo_labels_follow_the_order(seed: int, batch: int, data: Any) -> None:
    settings = data.draw(st.sampled_from([{"threshold_pos": 0.6, "threshold_neg": 0.4}, {"rule": "quantile", "relation": 0.2}]))
    labeler, bank = filled_labeler(**settings), filled_bank()
    f, y = normal(batch, 5, 8, seed=seed) + bank.visual, scene(seed, batch, 5)[2]
    b, c = orders(data, batch, 5)
    one = labeler(f, y, bank)
    for buffer in (*labeler.buffers(), bank.visual, bank.text, bank.count):
        if buffer.dim():
            for classes_at in [d for d, n in enumerate(buffer.shape) if n == 5]:
                buffer.copy_(buffer.index_select(classes_at, c))
    for x, z in zip(one, labeler(f[b][:, c], y[b][:, c], bank), strict=True):
        torch.testing.assert_close(x[b][:, c], z, rtol=1e-5, atol=1e-6)


@few
@given(seeds, gammas, gammas, margins, st.floats(-1e6, 1e6))
def test_an_unknown_logit_may_be_anything(seed: int, gamma_pos: float, gamma_neg: float, margin: float, value: float) -> None:
    f, t, y = scene(seed, 4, 3)
    y[1, 2] = -1
    options: dict[str, Any] = {"gamma_pos": gamma_pos, "gamma_neg": gamma_neg, "margin": margin}
    logits = TF.text_region_logits(f, t, 3.0)
    moved = logits.clone()
    moved[1, 2] = value
    assert torch.equal(TF.asymmetric_loss(moved, y, **options), TF.asymmetric_loss(logits, y, **options))
    other = f.clone()
    other[1, 2] += value
    for a, b in zip(TF.multimodal_contrastive(other, t, y).values(), TF.multimodal_contrastive(f, t, y).values(), strict=True):
        assert torch.equal(a, b)


@few
@given(st.floats(-30, 30), st.floats(0, 10), gammas, gammas, margins)
def test_a_rising_logit_never_hurts_a_present_label_nor_helps_an_absent_one(
    logit: float, rise: float, gamma_pos: float, gamma_neg: float, margin: float
) -> None:
    """True whatever the settings: both (1 - p)^g (-log p) falls and q^g (-log(1 - q)) rises with p, for every g >= 0."""
    x = torch.tensor([logit, logit + rise], dtype=torch.float64)
    options: dict[str, Any] = {"gamma_pos": gamma_pos, "gamma_neg": gamma_neg, "margin": margin, "reduction": "none"}
    present = TF.asymmetric_loss(x, torch.ones(2), **options)
    absent = TF.asymmetric_loss(x, torch.zeros(2), **options)
    assert present[1] <= present[0] * (1 + 1e-12) and absent[0] <= absent[1] * (1 + 1e-9) + 1e-15


@few
@given(st.lists(seeds, min_size=1, max_size=6), st.floats(0, 1), st.floats(1e-3, 1e3))
def test_prototypes_stay_unit_vectors(seen: list[int], momentum: float, size: float) -> None:
    bank = PrototypeBank(3, 6, init=normal(3, 6), momentum=momentum, text_momentum=momentum)
    for seed in seen:
        f, t, y = scene(seed, 4, 3)
        bank.update(size * f, y, weights=normal(4, 3, seed=seed).abs(), text=size * t)
        torch.testing.assert_close(bank.visual.norm(dim=-1), torch.ones(3))
        torch.testing.assert_close(bank.text.norm(dim=-1), torch.ones(3))
