"""The equations against slow loops, known losses at degenerate settings, and what must hold at the edges."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import oracles
from tests.helpers.cases.contrast import SCENES, pseudo_positives
from tests.helpers.compare import close
from tests.helpers.values import labels, normal
from tests.helpers.watch import Watch
from trm_losses import MultimodalContrastiveLoss
from trm_losses import functional as TF
from trm_losses.functional import _log_sums

FOCUS = [(0.0, 0.0, 0.0), (1.0, 2.0, 0.05), (0.5, 0.5, 0.1), (0.0, 3.0, 0.0), (2.0, 0.0, 0.2), (0.0, 2.5, 0.1), (3.0, 3.0, 0.05)]


# Matching -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("detach_focus", [False, True])
@pytest.mark.parametrize("gamma_pos, gamma_neg, margin", FOCUS)
def test_asymmetric_loss_and_gradient_are_the_loops(
    gamma_pos: float, gamma_neg: float, margin: float, detach_focus: bool, soft: bool
) -> None:
    """The focusing factors' share of the gradient is there, or gone with ``detach_focus``."""
    x, y, w = (4 * normal(6, 7)).requires_grad_(), labels(6, 7, soft=soft), normal(6, 7, seed=1).abs()
    settings: dict[str, Any] = {"gamma_pos": gamma_pos, "gamma_neg": gamma_neg, "margin": margin, "detach_focus": detach_focus}
    expected = oracles.asymmetric(x, y, w, gamma_pos, gamma_neg, margin)
    mean, loss, entries = (TF.asymmetric_loss(x, y, w, reduction=name, **settings) for name in ("mean", "sum", "none"))
    close(entries, expected)
    close(loss, expected.sum())
    close(mean, expected.sum() / int((y >= 0).sum()))
    plain, slope = TF.asymmetric_loss(x, y, reduction="sum", **settings), oracles.asymmetric_gradient(x, y, *settings.values())
    close(plain, (expected / oracles.array(w)).sum())
    for part, factor in ((loss, oracles.array(w)), (plain, 1.0)):
        close(torch.autograd.grad(part, x)[0], factor * slope)
    assert ((y > 0) & (y < 1)).any() == soft and (y == -1).any()


def test_logits_of_any_size_stay_finite_and_a_wrong_positive_keeps_its_gradient() -> None:
    for y in (0.0, 1.0, 0.5):
        x = torch.tensor([-1e4, -200.0, -20.0, 0.0, 20.0, 200.0, 1e4], requires_grad=True)
        loss = TF.asymmetric_loss(x, torch.full_like(x, y), reduction="none")
        TF.asymmetric_loss(x, torch.full_like(x, y), reduction="sum").backward()
        assert x.grad is not None and torch.isfinite(loss).all() and torch.isfinite(x.grad).all()
        if y == 1:
            assert torch.allclose(loss[:3], -x[:3]) and torch.allclose(x.grad[:3], torch.tensor(-1.0))


@pytest.mark.parametrize("gamma_neg", [0.0, 0.5, 1.0, 2.0])
def test_absent_label_at_the_margin_has_a_finite_slope(gamma_neg: float) -> None:
    x = (torch.logit(torch.tensor(0.05)) + torch.linspace(-1e-3, 1e-3, 9)).requires_grad_()
    TF.asymmetric_loss(x, torch.zeros_like(x), gamma_neg=gamma_neg, reduction="sum").backward()
    assert x.grad is not None and torch.isfinite(x.grad).all() and (x.grad >= 0).all()


@pytest.mark.parametrize("margin", [0.05, 0.0])
@pytest.mark.parametrize("path", ["summed", "entries", "weights that learn"])
def test_what_is_unknown_may_hold_anything(path: str, margin: float) -> None:
    x = torch.tensor([0.5, float("nan"), float("inf"), -float("inf")], requires_grad=True)
    y = torch.tensor([1.0, -1.0, -1.0, -1.0])
    w = torch.tensor([1.0, float("nan"), 1.0, float("inf")], requires_grad=path == "weights that learn")
    loss = TF.asymmetric_loss(x, y, w, margin=margin, reduction="none" if path == "entries" else "sum").sum()
    loss.backward()
    close(loss.detach(), oracles.asymmetric([0.5], [1.0]).sum(), 1e-6)
    assert x.grad is not None and torch.isfinite(x.grad).all() and torch.count_nonzero(x.grad[1:]) == 0
    assert x.grad[0] < 0 and (w.grad is None or torch.count_nonzero(w.grad[1:]) == 0)


@pytest.mark.parametrize("margin", [0.05, 0.0])
def test_an_infinite_logit_that_is_right_costs_nothing_and_a_nan_is_not_hidden(margin: float) -> None:
    x = torch.tensor([float("inf"), -float("inf"), 0.5], requires_grad=True)
    y = torch.tensor([1.0, 0.0, 1.0])
    loss = TF.asymmetric_loss(x, y, margin=margin, reduction="sum")
    loss.backward()
    close(loss, oracles.asymmetric([0.5], [1.0]).sum(), 1e-6)
    assert x.grad is not None and torch.count_nonzero(x.grad[:2]) == 0
    assert TF.asymmetric_loss(torch.tensor([0.5, float("nan")]), torch.tensor([1.0, 0.0]), margin=margin).isnan()


@pytest.mark.parametrize("chunk", [3, 1 << 17])
def test_the_mean_counts_what_is_known_whatever_its_weight(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of integer labels: present, absent, and not the unknown."""
    monkeypatch.setattr("trm_losses.functional.asymmetric._CHUNK", chunk)
    x, y, w = normal(6, 7), labels(6, 7, soft=False), torch.full((6, 7), 0.125)
    known = sum(int(v) >= 0 for v in y.flatten())
    for targets in (y, y.int()):
        mean, total = (TF.asymmetric_loss(x, targets, w, reduction=name) for name in ("mean", "sum"))
        close(known * mean, total)
        close(total, oracles.asymmetric(x, y, w).sum())


def test_weights_may_learn() -> None:
    x, y, w = normal(4, 5), labels(4, 5), normal(4, 5, seed=1).abs().requires_grad_()
    TF.asymmetric_loss(x, y, w, reduction="sum").backward()
    close(w.grad, oracles.asymmetric(x, y))


@pytest.mark.parametrize("gamma_pos, gamma_neg, margin", FOCUS)
def test_asymmetric_loss_has_second_derivatives(gamma_pos: float, gamma_neg: float, margin: float) -> None:
    y, w = labels(3, 4), normal(3, 4, seed=1).abs()

    def function(x: Tensor) -> Tensor:
        return TF.asymmetric_loss(x, y, w, gamma_pos=gamma_pos, gamma_neg=gamma_neg, margin=margin)

    x = normal(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(function, (x,)) and torch.autograd.gradgradcheck(function, (x,))


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_asymmetric_loss_in_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trm_losses.functional.asymmetric._CHUNK", chunk)
    x, y, w = (4 * normal(6, 7)).requires_grad_(), labels(6, 7), normal(6, 7, seed=1).abs()
    loss = TF.asymmetric_loss(x, y, w, reduction="sum")
    loss.backward()
    close(loss, oracles.asymmetric(x, y, w).sum())
    close(x.grad, oracles.array(w) * oracles.asymmetric_gradient(x, y, 1.0, 2.0, 0.05, False))
    turned = normal(7, 6).T  # not contiguous
    close(TF.asymmetric_loss(turned, y, w, reduction="sum"), oracles.asymmetric(turned, y, w).sum())


def test_gradients_by_function_transforms() -> None:
    """``torch.func.grad`` of logits, of their loss, and of the contrast."""

    def loss(r: Tensor) -> Tensor:
        contrast = TF.multimodal_contrastive(r, normal(4, 5, seed=1), y)
        return TF.asymmetric_loss(TF.text_region_logits(r, normal(4, 5, seed=1), 7.0), y) + sum(contrast.values())

    r, y = normal(3, 4, 5).requires_grad_(), torch.ones(3, 4)
    (expected,) = torch.autograd.grad(loss(r), r)
    close(torch.func.grad(loss)(r.detach()), expected)


# Scores of tokens and of sets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 5.0])
def test_boosted_logits_are_the_loops(alpha: float, padded: bool) -> None:
    z, mask = normal(3, 6, 4), torch.zeros(3, 6, dtype=torch.bool)
    if padded:
        mask[0, 2:] = mask[1, 0] = mask[2] = True
    expected = np.zeros((3, 4))
    for b, c in np.ndindex(3, 4):
        real = [float(z[b, n, c]) for n in range(6) if not mask[b, n]]
        expected[b, c] = sum(alpha * v if v > 0 else v for v in real) / max(1, len(real))
    spoilt = torch.where(mask[..., None], torch.nan, z)
    close(TF.boost_logits(spoilt, alpha, key_padding_mask=mask if padded else None), expected)


def test_logits_without_a_boost_are_the_plain_head() -> None:
    """Pooling, then the layer; in value and gradient. Half precision is computed in float32."""
    tokens, layer = normal(2, 6, 8).requires_grad_(), torch.nn.Linear(8, 4).double()
    boosted, plain = TF.boost_logits(layer(tokens), 1.0), layer(tokens.mean(dim=1))
    close(boosted, plain)
    close(*(torch.autograd.grad(x.square().sum(), tokens)[0] for x in (boosted, plain)))
    assert torch.autograd.gradcheck(lambda z: TF.boost_logits(z, 5.0), normal(2, 3, 4).requires_grad_())
    assert TF.boost_logits(torch.full((1, 3000, 1), 6e4, dtype=torch.float16)).item() == pytest.approx(3e5, rel=1e-2)
    assert TF.boost_logits(torch.zeros(2, 0, 3)).tolist() == [[0.0] * 3] * 2
    with pytest.raises(ValueError, match="boost_logits: alpha must be at least 0, got -1"):
        TF.boost_logits(torch.zeros(1, 2, 3), -1)
    with pytest.raises(TypeError, match="key_padding_mask must be bool"):
        TF.boost_logits(torch.zeros(1, 2, 3), key_padding_mask=torch.zeros(1, 2))


@pytest.mark.parametrize("images, classes", [(7, 5), (7, 1), (1, 5), (1, 1), (2, 2)])
def test_standardised_scores_are_those_of_numpy(images: int, classes: int) -> None:
    """Rows, then columns; an axis of one entry is left out."""
    scores = 3 + 0.2 * normal(images, classes)
    expected = scores.numpy()
    for axis in (1, 0):
        if expected.shape[axis] > 1:
            centred = expected - expected.mean(axis=axis, keepdims=True)
            expected = centred / expected.std(axis=axis, ddof=1, keepdims=True)
    close(TF.standardise(scores), expected, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_equal_scores_become_zero(dtype: torch.dtype) -> None:
    equal = torch.full((5, 7), 0.3, dtype=dtype)
    assert torch.count_nonzero(TF.standardise(equal)) == 0
    equal[:, 0] = 0.1  # the same in every image
    assert torch.count_nonzero(TF.standardise(equal)) == 0
    assert TF.standardise(equal).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


# Attention ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes, heads", [(2, 2), (9, 4), (20, 8), (3, 1)])
def test_region_attention_rows_sum_to_one_and_are_the_loops(classes: int, heads: int) -> None:
    """Few classes fold the key projection into the queries, many project the tokens."""
    q = torch.nn.functional.normalize(normal(classes, 8), dim=-1)
    k = torch.nn.functional.normalize(normal(3, 5, 8, seed=1), dim=-1)
    w_q, w_k = normal(8, 8, seed=2), normal(8, 8, seed=3)
    a = TF.region_attention(q, k, w_q, w_k, 1.3, num_heads=heads)
    assert a.shape == (3, heads, classes, 5)
    close(a.sum(dim=-1), np.ones((3, heads, classes)))
    state = {"query_weight": w_q, "key_weight": w_k, "log_attention_scale": math.log(1.3)}
    close(a.mean(dim=1), oracles.pool(state, k, q, heads)[2])


# Transport -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes, tokens", [(5, 6), (1, 6), (5, 1), (1, 1)])
@pytest.mark.parametrize("iterations", [1, 7, 100])
def test_sinkhorn_is_the_loops(classes: int, tokens: int, iterations: int) -> None:
    scores, mass = 2 * normal(3, classes, tokens), normal(3, tokens, seed=1).softmax(dim=-1)
    mass[0, tokens // 2 + 1 :] = 0
    mass = mass / mass.sum(dim=-1, keepdim=True)
    actual = TF.sinkhorn_attention(scores, mass, iterations=iterations)
    close(
        actual,
        np.stack([oracles.sinkhorn(*(oracles.array(x) for x in one), iterations) for one in zip(scores, mass, strict=True)]),
    )
    close(actual.sum(dim=-1), np.ones((3, classes)))
    shifted = scores + 300 * normal(3, 1, tokens, seed=2)  # what the scores of a token have in common says nothing
    close(TF.sinkhorn_attention(shifted, mass, iterations=iterations), actual, rtol=1e-9)


def test_sinkhorn_with_free_columns_is_the_softmax() -> None:
    scores = 3 * normal(2, 5, 6)
    softmax = scores.softmax(dim=-1)
    close(TF.sinkhorn_attention(scores, iterations=1), softmax)
    # A mass that the softmax has anyway changes nothing.
    close(TF.sinkhorn_attention(scores, softmax.mean(dim=1), iterations=500), softmax, rtol=1e-6)


@pytest.mark.parametrize("scale", [8.0, 100.0])
def test_transport_is_the_loops(scale: float) -> None:
    cosines, mask = torch.tanh(normal(3, 5, 6)), torch.zeros(3, 6, dtype=torch.bool)
    mask[0, 3:] = mask[2] = True
    plan = TF.transport_attention(cosines, scale, key_padding_mask=mask)
    for b in range(2):
        real = ~mask[b]
        close(plan[b][:, real], oracles.transport(oracles.array(cosines[b][:, real]), scale), rtol=1e-9)
    assert torch.count_nonzero(plan.masked_select(mask[:, None])) == 0
    close(TF.transport_attention(cosines, scale)[1], plan[1])
    assert not TF.transport_attention(cosines.requires_grad_(), scale).requires_grad
    more = TF.transport_attention(cosines, scale, key_padding_mask=mask, iterations=200)
    close(more, plan, rtol=0, atol=1e-4)  # it has come to rest


def test_transport_refuses() -> None:
    for settings, message in (
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"smoothness": 0.01}, "smoothness must be at least 0.02"),
        ({"iterations": 0}, "iterations must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            TF.transport_attention(torch.zeros(1, 2, 3), **settings)
    with pytest.raises(ValueError, match=r"mass must have shape \(B, N\) = \(1, 3\)"):
        TF.sinkhorn_attention(torch.zeros(1, 2, 3), torch.zeros(1, 2))


# Distillation ---------------------------------------------------------------------------------------------------------


def test_distillation_stops_at_the_teacher_s_logits_not_at_what_made_them() -> None:
    """A tensor behind both logits learns through the student alone."""
    behind = normal(4, 5).requires_grad_()
    TF.region_distillation(behind, 2 * behind).backward()
    alone = behind.detach().clone().requires_grad_()
    TF.region_distillation(alone, 2 * behind.detach()).backward()
    assert behind.grad is not None and alone.grad is not None and behind.grad.abs().sum() > 0
    close(behind.grad, alone.grad)


def test_no_image_at_all() -> None:
    empty = torch.zeros(0, 5, requires_grad=True)
    assert TF.region_distillation(empty, empty.detach()).item() == 0
    assert TF.asymmetric_loss(empty, torch.zeros(0, 5)).item() == 0
    terms = TF.multimodal_contrastive(torch.zeros(0, 5, 3), torch.ones(5, 3), torch.zeros(0, 5))
    assert all(term.item() == 0 for term in terms.values())


@pytest.mark.parametrize(
    "only", [[], ["region_region"], ["text_region"], ["region_text", "text_prototype"], ["region_prototype"]], ids=str
)
def test_only_some_contrasts(only: list[str]) -> None:
    f, t, y, given = normal(6, 4, 8).requires_grad_(), normal(4, 8, seed=1), pseudo_positives(), SCENES["everything"]
    actual, expected = TF.multimodal_contrastive(f, t, y, only=only, **given), oracles.contrast(f, t, y, **given)
    for key, value in expected.items():
        close(actual[key], value if key in only else 0.0)
        assert actual[key].requires_grad, "a term that is not computed stays on the graph"


def test_a_term_that_is_switched_off_costs_nothing() -> None:
    """The number of operators falls with every weight that is 0."""
    counts = []
    for off in range(5):
        names = ("region_region", "region_text", "region_prototype", "text_prototype")
        contrast = MultimodalContrastiveLoss(**dict.fromkeys(names[:off], 0.0), validate=False)  # type: ignore[arg-type]
        with Watch() as seen:
            contrast(normal(6, 4, 8), normal(4, 8, seed=1), pseudo_positives(), prototypes=normal(4, 8, seed=6))
        counts.append(len(seen.bytes))
    assert counts == sorted(set(counts), reverse=True)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("scene", SCENES, ids=lambda name: name.replace(" ", "-"))
def test_five_contrasts_are_the_loops(learned: bool, scene: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of rows, computed again for the gradient, and at once."""
    y, given, slopes = pseudo_positives(), SCENES[scene], []
    for blocks in (True, False):
        if blocks:
            monkeypatch.setattr(_log_sums, "BLOCK", 5)
            monkeypatch.setattr(_log_sums, "_ROWS", 3)
        f, t = (x.requires_grad_(learned) for x in (normal(6, 4, 8), normal(4, 8, seed=1)))
        actual = TF.multimodal_contrastive(f, t, y, **given)
        assert list(actual) == ["region_region", "region_text", "text_region", "region_prototype", "text_prototype"]
        for key, value in oracles.contrast(f, t, y, **given).items():
            close(actual[key].detach(), value)
            assert value != 0 or (key.endswith("prototype") and ("prototypes" not in given or scene == "none seen"))
        if learned:
            slopes.append(torch.autograd.grad(sum(actual.values()), (f, t)))
        monkeypatch.undo()
    for a, e in zip(*slopes, strict=True) if learned else ():
        close(a, e, 1e-11)


# Images by their labels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("threshold", [0.9, 0.3])
def test_multi_label_contrast_is_the_loops(rows: int, weighted: bool, threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once and in blocks of rows."""
    monkeypatch.setattr(_log_sums, "_ROWS", rows)
    monkeypatch.setattr(_log_sums, "BLOCK", 11 * rows)
    f, y = normal(9, 8).requires_grad_(), labels(9, 4, seed=3)
    y[3], y[5] = -1, 0  # images without a positive label take no part
    w = normal(9, 4, seed=5).clamp(min=0) if weighted else None
    actual = TF.multi_label_contrastive(f, y, weights=w, temperature=0.2, anchor_threshold=threshold)
    close(actual, oracles.multi_label(f, y, w, 0.2, threshold))
    assert (y == 1).sum(dim=1).max() > 1 and actual > 0.1


def test_images_without_a_positive_label_take_no_part() -> None:
    """Whatever they hold, and whatever weights their entries have: not even NaN reaches the others."""
    f, y, w = normal(6, 8), labels(6, 4, seed=3), normal(6, 4, seed=1).abs()
    y[2] = -1
    y[4] = 0
    f[[2, 4]], w[y < 0.9] = torch.nan, torch.nan
    f.requires_grad_()
    TF.multi_label_contrastive(f, y, weights=w).backward()
    assert f.grad is not None and torch.count_nonzero(f.grad[[2, 4]]) == 0 and (f.grad[[0, 1]] != 0).all()
    rest = [0, 1, 3, 5]
    close(TF.multi_label_contrastive(f, y, weights=w), TF.multi_label_contrastive(f[rest], y[rest], weights=w[rest]))


@pytest.mark.parametrize("positives", ["none", "one", "one image", "one class", "all", "no image"])
def test_multi_label_contrast_at_the_edges(positives: str) -> None:
    y = torch.full((0 if positives == "no image" else 4, 3), -1.0)
    if positives in ("one", "one image"):
        y[1, : 1 if positives == "one" else 3] = 1
    elif positives == "one class":
        y[:, 1] = 1
    elif positives == "all":
        y[:] = 1
    f = normal(len(y), 8, dtype=torch.float32).requires_grad_()
    loss = TF.multi_label_contrastive(f, y, temperature=0.01)
    loss.backward()
    assert f.grad is not None and torch.isfinite(f.grad).all()
    assert (loss > 0) == (positives in ("one class", "all")) and torch.isfinite(loss)


def test_prototypes_get_no_gradient() -> None:
    p = normal(4, 8, seed=6).requires_grad_()
    terms = TF.multimodal_contrastive(normal(6, 4, 8).requires_grad_(), normal(4, 8, seed=1), pseudo_positives(), prototypes=p)
    sum(terms.values()).backward()
    assert p.grad is None


# Prototypes and similarities ------------------------------------------------------------------------------------------


def test_update_prototypes() -> None:
    old, sums = F.normalize(normal(4, 5), dim=-1), normal(4, 5, seed=1)
    mass, count = torch.tensor([2.0, 0.0, 0.5, 3.0], dtype=torch.float64), torch.tensor([0, 5, 1, 1000])
    before = [x.clone() for x in (old, count, sums, mass)]
    new, counts = TF.update_prototypes(old, count, sums, mass, momentum=0.9)
    for x, y in zip((old, count, sums, mass), before, strict=True):
        assert torch.equal(x, y)
    assert counts.tolist() == [1, 5, 2, 1001]
    assert torch.equal(new[1], old[1])  # no mass: as it was
    for c, m in ((0, 0.0), (2, 0.5), (3, 0.9)):
        mean = oracles.array(sums[c]) / float(mass[c])
        close(new[c], oracles.unit(m * oracles.array(old[c]) + (1 - m) * mean))


@pytest.mark.parametrize("seen", [None, [True, False, True, True], [False] * 4, [False, True, False, False]])
@pytest.mark.parametrize("block", [1 << 24, 40, 1])
def test_prototype_similarities(seen: Any, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tiles; with gradient in blocks of all rows, some and one. At a low temperature too."""
    monkeypatch.setattr(_log_sums, "BLOCK", block)
    monkeypatch.setattr(_log_sums, "_TILE", (3, 2))
    monkeypatch.setattr(_log_sums, "_TILED", 0)
    f, v, t = normal(5, 4, 6), 2 * normal(4, 6, seed=1), normal(4, 6, seed=2)
    mask = None if seen is None else torch.tensor(seen)
    for low in (1.0, 0.05):
        expected = oracles.similarities(f, v, t, seen, 0.3 * low, 0.2 * low)
        for given in (f, f.clone().requires_grad_()):
            actual = TF.prototype_similarities(given, v, t, seen=mask, temperature_visual=0.3 * low, temperature_text=0.2 * low)
            for a, e in zip(actual, expected, strict=True):
                close(a.detach(), e, 1e-9)
    for a, e in zip(TF.prototype_similarities(f, v, t), oracles.similarities(f, v, t, None), strict=True):
        close(a, e, 1e-9)


@pytest.mark.parametrize("temperature", [0.02, 0.07])
def test_inter_class_of_extremes_in_single_precision(temperature: float) -> None:
    """Regions on their own prototype, opposite to it and of no length: a sum of exponentials that neither overflows nor is 0."""
    v = torch.nn.functional.normalize(normal(4, 6, seed=1), dim=-1)
    f = torch.stack([v, -v, 0 * v, v.roll(1, 0), 1e-6 * v])
    expected = oracles.similarities(f, v, v, None, temperature, temperature)
    actual = TF.prototype_similarities(f.float(), v, v, temperature_visual=temperature, temperature_text=temperature)
    for a, e in zip(actual, expected, strict=True):
        close(a, e, 1e-4)
    empty = TF.prototype_similarities(f[:0].float(), v, v)
    assert all(x.shape == (0, 4) for x in empty)


def test_saliency_map() -> None:
    saliency = normal(2, 3, 8)
    for grid in ((2, 4), (8, 1)):
        actual = TF.saliency_map(saliency, grid)
        assert actual.shape == (2, 3, *grid)
        for b, c, i, j in np.ndindex(2, 3, *grid):
            assert actual[b, c, i, j] == saliency[b, c, i * grid[1] + j]
    with pytest.raises(ValueError, match=r"saliency_map: saliency must have shape .* = \(B, C, 6\), got \(2, 3, 8\); N is the"):
        TF.saliency_map(saliency, (2, 3))


def test_calibrate() -> None:
    s, gap = normal(3, 2), torch.tensor([0.4, 0.2]).double()
    present, absent = torch.tensor([[0.5, 0.3], [0.1, 0.2]]).double()
    actual = TF.calibrate(s, present, absent, gap, steepness=5.0)
    for b, c in np.ndindex(3, 2):
        middle = (float(present[c]) + float(absent[c])) / 2
        close(actual[b, c], oracles.sigmoid(5 * (float(s[b, c]) - middle) / float(gap[c])))
    close(TF.calibrate((present + absent)[None] / 2, present, absent, gap), np.full((1, 2), 0.5))
    none = torch.zeros(2, dtype=present.dtype, requires_grad=True)
    found = TF.calibrate(torch.stack([present + 1, present - 1]), present, present, none)
    close(found, np.array([[1.0, 1.0], [0.0, 0.0]]))
    (gradient,) = torch.autograd.grad(found.sum(), none)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("y, x", [(1.0, -math.inf), (0.3, math.inf), (0.3, -math.inf)])
def test_infinite_logits_that_are_wrong_cost_infinitely(y: float, x: float) -> None:
    assert TF.asymmetric_loss(torch.tensor([[x, 1.0]]), torch.tensor([[y, -1.0]]), reduction="sum") == math.inf


def test_soft_targets_and_broadcast_weights_get_what_the_entries_get() -> None:
    x, y, w = normal(4, 3), torch.rand(4, 3, dtype=torch.float64, requires_grad=True), normal(3, seed=2).abs()
    slopes = [
        torch.autograd.grad(part, y)[0]
        for part in (TF.asymmetric_loss(x, y, w, reduction="sum"), TF.asymmetric_loss(x, y, w, reduction="none").sum())
    ]
    torch.testing.assert_close(*slopes)
    hard = labels(4, 3)
    whole = TF.asymmetric_loss(x, hard, w.expand(4, 3), reduction="sum")
    torch.testing.assert_close(TF.asymmetric_loss(x, hard, w, reduction="sum"), whole)


def test_logits_pass_through_function_transforms() -> None:
    r, t = normal(3, 4, 8), normal(4, 8, seed=1)
    one = torch.func.vmap(lambda r: TF.text_region_logits(r[None], t, 2.0)[0])(r)
    torch.testing.assert_close(one, TF.text_region_logits(r, t, 2.0))


@pytest.mark.parametrize(("classes", "first"), [(4, 0), (2, 2), (2, -1)])
def test_similarities_are_of_classes_that_have_prototypes(classes: int, first: int) -> None:
    prototypes = torch.eye(3)
    with pytest.raises(ValueError, match=f"of classes that have prototypes, 3 of them; got {classes} from class"):
        TF.prototype_similarities(torch.ones(2, classes, 3), prototypes, prototypes, first=first)
    TF.prototype_similarities(torch.ones(2, 2, 3), prototypes, prototypes, first=1)
