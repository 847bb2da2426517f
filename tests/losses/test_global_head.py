"""The head of whole images: its equation and its minimum, another library, ranks, degenerate images, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trm_losses as tl
from tests.helpers import oracles
from tests.helpers.cases.discriminant import discriminant
from tests.helpers.cases.global_head import FEATURES, Images, global_head, head_inputs, labelled_images, seen, slow_head, unfitted
from tests.helpers.ranks import Pool, group_of
from tests.helpers.values import CLASSES, WIDTH, normal

VIEWS = ("both", "prior", "penultimate")


def close(actual: Tensor, expected: Any, atol: float = 0.02) -> None:
    """As near as single precision finds a minimum: its value is flat to a rounding some way around it."""
    np.testing.assert_allclose(oracles.array(actual), oracles.array(expected), rtol=2e-3, atol=atol)


def scores(module: tl.GlobalHead, batch: int = 20) -> Tensor:
    x = head_inputs(batch, module.num_classes)
    return module(x["tokens"], x["penultimate"], key_padding_mask=x["key_padding_mask"])


def expected_scores(module: tl.GlobalHead, slow: oracles.GlobalHead) -> Any:
    x = head_inputs(20, module.num_classes)
    return slow.logits(*seen(module, x["tokens"], x["penultimate"], x["key_padding_mask"]))


def relabelled(change: Callable[[Tensor], Tensor]) -> Images:
    return [(x, f, change(y.clone()), mask) for x, f, y, mask in labelled_images()]


def without_a_class(y: Tensor) -> Tensor:
    y[:, 1] = -1
    return y


def single_positives(y: Tensor) -> Tensor:
    return torch.where(y == 1, 1.0, -1.0).double()


LABELS = [
    (lambda y: y, {}),  # some of them soft
    (without_a_class, {"expected_positives": 0.5}),
    (single_positives, {"expected_positives": 1.2}),
]


@pytest.mark.parametrize("change, options", LABELS, ids=["some", "nothing of a class", "single positives"])
@pytest.mark.parametrize(
    "settings", [{"unknown_weight": 0.0}, {"shrinkage": 0.3, "spread": 1.5}], ids=["standardised", "whitened"]
)
@pytest.mark.parametrize("views", VIEWS)
def test_fit_is_the_minimum_of_the_equation(views: str, settings: Any, change: Any, options: dict[str, float]) -> None:
    images = relabelled(change)
    module = unfitted(views=views, **settings).fit(iter(images), **options)
    slow = slow_head(module, images, **options)
    close(scores(module), expected_scores(module, slow))
    assert module.total == sum(len(batch[2]) for batch in images)
    # From the layer on f back to that on what is standardised and whitened.
    layer = oracles.array(module.weight) * slow.f_deviation @ np.linalg.inv(slow.root) - float(module.mix[1]) * slow.v.T
    bias = oracles.array(module.bias) + oracles.array(module.scale) * slow.g_mean - slow.shift
    theta = np.concatenate([layer.ravel(), bias, oracles.array(module.mix)])
    assert np.abs(slow.gradient(slow.start)).max() > 1 and np.abs(slow.gradient(theta)).max() < 5e-3
    assert slow.objective(theta) - slow.objective(slow.theta) < 1e-5 * slow.objective(slow.start)


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("expected, change", [(None, lambda y: y), (1.2, single_positives)], ids=["some", "single positives"])
def test_estimates_stand_for_unknown_labels(views: str, expected: float | None, change: Callable[[Tensor], Tensor]) -> None:
    images = relabelled(change)
    draw = torch.Generator().manual_seed(5)
    given = [torch.rand(y.shape, generator=draw) for _, _, y, _ in images]
    given = [torch.where(torch.rand(x.shape, generator=draw) < 0.3, float("nan"), x) for x in given]  # some are not estimated
    told = [(*image, x) for image, x in zip(images, given, strict=True)]
    module = unfitted(views=views, unknown_weight=0.4).fit(told, expected_positives=expected)
    slow = slow_head(module, images, expected, torch.cat(given).nan_to_num(-1.0))
    close(scores(module), expected_scores(module, slow))
    without = unfitted(views=views, unknown_weight=0.4).fit(images, expected_positives=expected)
    assert (scores(module) - scores(without)).abs().max() > 0.1
    # Of known labels an estimate says nothing, nor does one that is not there.
    empty = [(*image, torch.where(image[2] == -1, torch.nan, 0.5)) for image in images]
    same = unfitted(views=views, unknown_weight=0.4).fit(empty, expected_positives=expected)
    assert torch.equal(scores(same), scores(without))


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("expected", [None, 1.0])
def test_without_a_known_label_the_prior_is_left(views: str, expected: float | None) -> None:
    """At a level of 0, or at that of what is expected."""
    images, x = relabelled(lambda y: torch.full_like(y, -1)), head_inputs(20, CLASSES)
    module = unfitted(views=views).fit(images, expected_positives=expected)
    slow = slow_head(module, images, expected)
    g, _ = seen(module, x["tokens"], x["penultimate"], x["key_padding_mask"])
    level = 0.0 if expected is None else -1.3862943611 + slow.shift  # one of five classes
    close(scores(module), (g - slow.g_mean) / slow.g_deviation + level, atol=2e-5)


@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_without_a_prior_it_is_logistic_regression(spread: float) -> None:
    """scikit-learn's, whose intercept is a feature of the size that gives it the same penalty."""
    linear = pytest.importorskip("sklearn.linear_model")
    f, y = 2 + normal(60, FEATURES), (normal(60, 2, seed=1) + normal(60, FEATURES)[:, :2] > 0).long()
    y = torch.cat([y, 1 - y], dim=1)  # half of all labels are present, so intercepts are expected at 0
    module = tl.GlobalHead(4, FEATURES, spread=spread).fit([(None, f, y)])
    x = ((f - f.mean(dim=0)) / f.std(dim=0, correction=0)).numpy()
    x = np.concatenate([x, np.full((60, 1), FEATURES**0.5)], axis=1)
    for c in range(4):
        peer = linear.LogisticRegression(C=spread**2 / FEATURES, fit_intercept=False, tol=1e-8).fit(x, y[:, c].numpy())
        close(module(None, f)[:, c], peer.decision_function(x))


@pytest.mark.parametrize("shrinkage", [0.0, 0.2, 1.0])
def test_more_features_than_images(shrinkage: float) -> None:
    images = [(x, normal(len(x), 50, seed=len(x)), y, mask) for x, _, y, mask in labelled_images()]
    module = unfitted(width=50, shrinkage=shrinkage).fit(images)
    x, f = head_inputs(9, CLASSES)["tokens"], normal(9, 50, seed=3)
    assert torch.isfinite(module(x, f)).all()
    if shrinkage:
        close(module(x, f), slow_head(module, images).logits(*seen(module, x, f)))


@pytest.mark.parametrize("shrinkage", [0.3, 1.0])
def test_a_constant_feature_says_nothing(shrinkage: float) -> None:
    def more(f: Tensor) -> Tensor:
        return torch.cat([torch.full((len(f), 1), 1234.5), f], dim=1)

    plain = global_head(shrinkage=shrinkage)
    module = unfitted(width=FEATURES + 1, shrinkage=shrinkage).fit([(x, more(f), y, m) for x, f, y, m in labelled_images()])
    x = head_inputs(20, CLASSES)
    close(module(x["tokens"], more(x["penultimate"])), plain(x["tokens"], x["penultimate"]))
    assert module.weight[:, 0].abs().max() < 1e-6


@pytest.mark.parametrize("images, classes", [(1, 1), (1, CLASSES), (2, 1), (9, 1)])
@pytest.mark.parametrize("label", [0, 1, -1])
def test_small_sets_give_an_answer(images: int, classes: int, label: int) -> None:
    x, f, y = normal(images, 3, WIDTH), normal(images, FEATURES), torch.full((images, classes), label)
    for views in VIEWS:
        for shrinkage in (0.2, 1.0):
            module = unfitted(classes, views, shrinkage=shrinkage)
            assert torch.isfinite(module.fit([(x, f, y)])(x, f)).all()
            assert torch.isfinite(module.fit([(x, f, y)], expected_positives=0.6)(x, f)).all()
            assert module(x[:0], f[:0]).shape == (0, classes)


def test_the_sizes_of_batches_do_not_matter() -> None:
    """Nor an empty one among them, nor that they come once."""
    images = [(x[:, :3], f, y) for x, f, y, _ in labelled_images()]
    whole = [tuple(torch.cat(part) for part in zip(*images, strict=True))]
    none = [tuple(part[:0] for part in whole[0])]
    one, two = unfitted().fit(whole), unfitted().fit(batch for batch in [*images, *none])
    close(scores(one), scores(two))
    assert one.total == two.total


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fit_needs_no_gradient_around_it(mode: Any) -> None:
    with mode():
        module = unfitted().fit(labelled_images())
    close(scores(module), scores(global_head()))
    assert not any(buffer.requires_grad for buffer in module.buffers())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_head_of_its_values(dtype: torch.dtype) -> None:
    images = [(x.to(dtype), f.to(dtype), y, mask) for x, f, y, mask in labelled_images()]
    with torch.autocast("cpu", torch.bfloat16):
        half = unfitted().fit(images)
        assert scores(half).dtype == torch.float32
    close(scores(half), scores(unfitted().fit([(x.double(), f.double(), y, mask) for x, f, y, mask in images])))


def test_tokens_get_the_gradient_of_the_prior_and_of_the_layer() -> None:
    module, x = global_head(), head_inputs(4, CLASSES)
    assert module.prior is not None
    tokens, f = x["tokens"].float().requires_grad_(), x["penultimate"].float()
    expected = torch.autograd.grad((module.scale * module.prior(tokens)).sum(), tokens)
    assert float(expected[0].abs().max()) > 1e-3
    torch.testing.assert_close(torch.autograd.grad(module(tokens, f).sum(), tokens), expected)


def test_what_lies_under_the_padding_does_not_matter() -> None:
    spoiled = [(x.masked_fill(mask[..., None], torch.nan), f, y, mask) for x, f, y, mask in labelled_images()]
    module, x = unfitted().fit(spoiled), head_inputs(4, CLASSES)
    close(scores(module), scores(global_head()), atol=1e-6)
    spoiled_tokens = x["tokens"].masked_fill(x["key_padding_mask"][..., None], torch.nan)
    close(module(spoiled_tokens, x["penultimate"], key_padding_mask=x["key_padding_mask"]), scores(module, 4), atol=1e-6)


X, P, Y = normal(2, 3, WIDTH), normal(2, FEATURES), torch.ones(2, CLASSES)
REFUSED: list[tuple[Any, type[Exception], str]] = [
    ((X, P), ValueError, r"a batch must be \(tokens, penultimate, targets\), or .* as a fifth, got 2 parts"),
    ({"tokens": X}, ValueError, "a batch must be .*, got dict"),
    ((None, P, Y), ValueError, "tokens must be given where there is a prior, got None"),
    ((X, None, Y), ValueError, "penultimate must be given where there is a width, got None; backbones give it, and so do feat"),
    ((X, P, None), TypeError, "targets must be a torch.Tensor, got NoneType"),
    ((X, P[:, 1:], Y), ValueError, r"penultimate must have shape \(B, W\) = \(2, 6\), got \(2, 5\); backbones give it"),
    ((X, P[:1], Y), ValueError, r"penultimate must have shape \(B, W\) = \(2, 6\), got \(1, 6\)"),
    ((X[:1], P, Y), ValueError, r"tokens must have shape \(B, N, D\) = \(2, N, D\), got \(1, 3, 8\)"),
    ((X, P, Y[:, 1:]), ValueError, r"targets must have shape \(B, C\) = \(B, 5\), got \(2, 4\)"),
    ((X, P.log(), Y), ValueError, "penultimate must be finite, got .* NaN"),
    ((X, P, Y + 1), ValueError, "targets must be 1"),
    ((X[..., 1:], P, Y), ValueError, r"tokens must have shape .*, got \(2, 3, 7\)"),
    ((X.log(), P, Y), ValueError, "tokens must be finite, got .* NaN"),
    ((X, P, Y, torch.ones(2, 3)), TypeError, "key_padding_mask must be bool"),
    ((X, P, Y, None, 2.0 * Y), ValueError, "estimates must be probabilities, NaN or -1, got 2; take their sigmoid"),
    ((X, P, Y, None, Y[:, 1:]), ValueError, r"estimates must have shape \(B, C\) = \(2, 5\), got \(2, 4\)"),
    ((X, P, Y, None, Y, Y), ValueError, "a batch must be .*, or with estimates as a fifth, got 6 parts"),
    ((X[:0], P[:0], Y[:0]), ValueError, "batches must hold at least one image, got none; a generator is read once"),
]


@pytest.mark.parametrize("batch, error, message", REFUSED, ids=range(len(REFUSED)))
def test_a_refused_fit_says_why_and_changes_nothing(batch: Any, error: type[Exception], message: str) -> None:
    module = global_head()
    state = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=f"^(GlobalHead|GaussianDiscriminant): {message}"):
        module.fit([*labelled_images()[: not message.startswith("batches")], batch])
    assert all(torch.equal(module.state_dict()[key], value) for key, value in state.items())


def test_logits_before_fit_are_refused_unless_a_state_was_loaded() -> None:
    for views in VIEWS:
        module = unfitted(views=views)
        with pytest.raises(RuntimeError, match=r"GlobalHead: nothing was fitted yet; call fit\(batches\), or load a state"):
            scores(module)
        module.load_state_dict(global_head(views=views).state_dict())
        close(scores(module), scores(global_head(views=views)), atol=1e-6)
    assert scores(unfitted(validate=False)).count_nonzero() == 0


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"width": None}, "width or prior must be given, or there is nothing to tell images apart by"),
    ({"prior": discriminant(3)}, "prior must have num_classes = 2, got 3"),
]


@pytest.mark.parametrize("settings, message", SETTINGS, ids=lambda value: str(value)[:20])
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^GlobalHead: {message}"):
        tl.GlobalHead(**{"num_classes": 2, "width": 3, **settings})


@pytest.mark.parametrize(
    "targets, expected, message",
    [
        (
            torch.tensor([[1, -1, -1, -1, 1], [-1, -1, 1, -1, -1]]),
            None,
            "targets .* known absent labels, got 3 .*give expected_pos",
        ),
        (Y, 0.0, "expected_positives must be above 0, got 0.0"),
        (Y, 5.0, "expected_positives must be below num_classes = 5, got 5.0"),
    ],
    ids=["needed", "none", "all"],
)
def test_expected_positives_are_asked_for_and_checked(targets: Tensor, expected: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"^GlobalHead: {message}"):
        unfitted().fit([(X, P, targets)], expected_positives=expected)


def test_other_classes() -> None:
    """One that stays keeps its logits; a new one has its prior on the mean scale and no layer."""
    old, text, x = global_head(), normal(3, WIDTH, seed=9), head_inputs(7, 3)
    other = old.with_classes([4, None, 0], text=text)
    assert other.num_classes == 3 and other.prior is not None and old.num_classes == CLASSES
    got = scores(other, 7)
    close(got[:, [0, 2]], scores(old, 7)[:, [4, 0]], atol=1e-5)
    new = other.prior(x["tokens"], key_padding_mask=x["key_padding_mask"])[:, 1]
    close(got[:, 1], old.scale.mean() * new + old.bias.mean(), atol=1e-5)
    close(scores(old.with_classes([1, 3]), 7), scores(old, 7)[:, [1, 3]], atol=1e-5)
    with pytest.raises(ValueError, match="text must be given for new classes"):
        old.with_classes([0, None])
    alone = global_head(views="penultimate")
    close(scores(alone.with_classes([2]), 7), scores(alone, 7)[:, 2:3], atol=1e-5)
    with pytest.raises(ValueError, match="GlobalHead: keep must name trained classes where there is no prior, got a new one"):
        alone.with_classes([2, None])
    with pytest.raises(ValueError, match="GlobalHead: keep must be one place from 0 to num_classes - 1 = 4"):
        old.with_classes([5])


SIZES = {2: (20, 2), 3: (9, 0, 13)}


def fitted(rank: int, world: int, views: str) -> dict[str, Tensor]:
    """On the images of a rank, in batches of its own size; one rank may have no image. The first ones alone have estimates."""
    first = sum(SIZES[world][:rank])
    x, f, y, estimates = (part[first : first + SIZES[world][rank]] for part in joined())
    module = unfitted(views=views, shrinkage=0.5, distributed=group_of(world))
    batches = zip(*(part.split(2 + rank) for part in (x, f, y, estimates)), strict=True)
    return module.fit(told(*batch) if rank == 0 else batch[:3] for batch in batches).state_dict()


def told(x: Tensor, f: Tensor, y: Tensor, estimates: Tensor) -> tuple[Tensor | None, ...]:
    return x, f, y, None, estimates


def joined() -> list[Tensor]:
    """All images, with estimates of those of the first rank."""
    x, f, y = (torch.cat(part).float() for part in zip(*((x[:, :3], f, y) for x, f, y, _ in labelled_images()), strict=True))
    return [x, f, y, (normal(len(y), CLASSES, seed=7) > 0).float()]


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_equal_one_process(pools: Callable[[int], Pool], world: int, views: str) -> None:
    images = joined()
    images[3][SIZES[world][0] if world > 1 else len(images[3]) :] = -1
    whole = unfitted(views=views, shrinkage=0.5, distributed=True).fit([told(*images)])
    if world == 1:
        return close(scores(whole), scores(unfitted(views=views, shrinkage=0.5).fit([told(*images)])), atol=1e-6)
    states = pools(world).run(fitted, world, views, world=world)
    for state in states:
        assert all(torch.equal(value, states[0][key]) for key, value in state.items())
    other = unfitted(views=views)
    other.load_state_dict(states[0])
    close(scores(other), scores(whole))
    assert other.total == whole.total


def test_scores_of_the_prior_stand_for_the_tokens() -> None:
    images = [batch[:3] for batch in labelled_images()]
    module = unfitted(views="both").fit(images)
    given = [(module.prior(x), f, y) for x, f, y in images]
    again = copy.deepcopy(module).fit(given)
    for (x, f, _), (g, _, _) in zip(images, given, strict=True):
        close(again(g, f), module(x, f), atol=1e-5)
    with pytest.raises(ValueError, match=r"tokens must have shape \(B, C\)"):
        module(given[0][0][:, 1:], given[0][1])
    with pytest.raises(ValueError, match="tokens must be finite, got "):
        module(given[0][0].where(torch.eye(*given[0][0].shape) == 0, torch.nan), given[0][1])
