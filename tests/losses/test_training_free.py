"""The training-free classifier: its equation, ranks, chunks, degenerate streams."""

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
from tests.helpers.cases.discriminant import DISCRIMINANT, discriminant, token_stream
from tests.helpers.ranks import Pool, group_of
from tests.helpers.values import CLASSES, WIDTH, normal
from trm_losses import _token_stream

TEXT = normal(CLASSES, WIDTH, seed=7)


def close(actual: Tensor, expected: Any, atol: float = 2e-6) -> None:
    np.testing.assert_allclose(oracles.array(actual), oracles.array(expected), rtol=2e-5, atol=atol)


def made(**settings: Any) -> tl.GaussianDiscriminant:
    return tl.GaussianDiscriminant(CLASSES, WIDTH, **{**DISCRIMINANT, **settings})


def images(part: int) -> list[Any]:
    return [row for batch in token_stream() for row in batch[part].numpy()]


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("k", [2, 7, 100])
def test_fit_is_the_equation(labels: bool, padded: bool, k: int) -> None:
    stream = [(x, y if labels else None, mask if padded else None) for x, y, mask in token_stream()]
    module = made(tokens_per_class=k).fit(stream, TEXT)
    prototypes, mean, covariance, count = oracles.discriminant(
        images(0), TEXT, images(1) if labels else None, images(2) if padded else None, k=k, scale=5, label_weight=2
    )
    close(module.prototypes, prototypes)
    close(module.mean, mean)
    assert module.count.tolist() == count
    shrunk = 0.8 * covariance + 0.2 * np.trace(covariance) / WIDTH * np.eye(WIDTH)
    close(torch.linalg.inv(module.whitening.double() @ module.whitening.double()), shrunk)
    x = normal(4, 6, WIDTH, seed=3)
    expected = oracles.discriminant_scores(x, prototypes, mean, covariance, shrinkage=0.2, sharpness=3)
    close(module(x), expected, atol=1e-5)
    for whitened, rows in ((module.whiten(x), unit_rows(x)), (module.whitened_text, prototypes)):
        close(oracles.array(whitened), (oracles.array(rows) - mean) @ oracles.array(module.whitening), atol=1e-5)


def unit_rows(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


@pytest.mark.parametrize("labels", [False, True])
def test_the_sizes_of_batches_and_chunks_do_not_matter(labels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(30, 4, WIDTH), torch.cat([batch[1] for batch in token_stream()])[:22].repeat(2, 1)[:30]
    whole = made().fit([(x, y if labels else None)], TEXT)
    for size, block in ((1, 1 << 22), (7, 1), (30, 64)):
        monkeypatch.setattr(_token_stream, "_BLOCK", block)
        stream = ((x[i : i + size], y[i : i + size] if labels else None) for i in range(0, 30, size))
        other = made().fit(stream, TEXT)
        for key, value in whole.state_dict().items():
            close(other.state_dict()[key], value)
    tokens = normal(3, 4, WIDTH, seed=2)
    for chunk in (1, 2, CLASSES, 100):
        close(whole(tokens, chunk=chunk), whole(tokens))


def test_the_least_doubtful_tokens_stay_however_they_come() -> None:
    """Many batches, in rising and in falling order of doubt."""
    x = normal(200, 3, WIDTH)
    doubt = torch.softmax(5 * unit_rows(x) @ unit_rows(TEXT).T, dim=-1).amax(dim=(1, 2))
    found = [made(tokens_per_class=5).fit(x[order].split(9), TEXT) for order in (doubt.argsort(), doubt.argsort(descending=True))]
    close(found[0].prototypes, found[1].prototypes)
    close(found[0].whitening, found[1].whitening)


@pytest.mark.parametrize("batch, tokens, classes, dim", [(1, 1, 1, 4), (1, 1, 3, 4), (1, 5, 1, 4), (2, 3, 4, 64), (3, 7, 2, 3)])
def test_small_streams_give_an_answer(batch: int, tokens: int, classes: int, dim: int) -> None:
    """One image, one token, one class, more dimensions than tokens."""
    x, text = normal(batch, tokens, dim).float(), normal(classes, dim, seed=1).float()
    for targets in (None, torch.ones(batch, classes), torch.zeros(batch, classes), torch.full((batch, classes), -1.0)):
        module = tl.GaussianDiscriminant(classes, dim).fit([(x, targets)], text)
        assert torch.isfinite(module(x)).all() and torch.isfinite(module.whitening).all()
        assert module(x).abs().max() <= 1.0001


def test_tokens_that_are_all_the_same_are_not_whitened() -> None:
    module = made().fit([torch.ones(5, 3, WIDTH)], TEXT)
    assert torch.equal(module.whitening, torch.eye(WIDTH))
    assert torch.isfinite(module(torch.ones(1, 3, WIDTH))).all()


def test_an_image_of_padding_alone_scores_zero() -> None:
    mask = torch.tensor([[True] * 4, [False] * 4])
    scores = discriminant()(normal(2, 4, WIDTH), key_padding_mask=mask)
    assert torch.count_nonzero(scores[0]) == 0 and torch.count_nonzero(scores[1]) == CLASSES
    stream = [(normal(2, 4, WIDTH), torch.ones(2, CLASSES), mask)]
    alone = [(normal(2, 4, WIDTH)[1:], torch.ones(1, CLASSES))]
    for one, two in zip(made().fit(stream, TEXT).buffers(), made().fit(alone, TEXT).buffers(), strict=True):
        close(one, two)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tokens_give_the_classifier_of_their_values(dtype: torch.dtype) -> None:
    stream = [(x.to(dtype), y, mask) for x, y, mask in token_stream()]
    with torch.autocast("cpu", torch.bfloat16):
        half = made().fit(stream, TEXT.to(dtype))
        scores = half(stream[0][0])
    whole = made().fit([(x.double(), y, mask) for x, y, mask in stream], TEXT.to(dtype).double())
    for one, two in zip(half.buffers(), whole.buffers(), strict=True):
        assert one.dtype in (torch.float32, torch.int64)
        close(one, two, atol=2e-5)
    close(scores, whole(stream[0][0].double()), atol=5e-5)


REFUSED: list[tuple[Any, Any, type[Exception], str]] = [
    ([normal(2, 3, WIDTH + 1)], TEXT, ValueError, r"tokens must have shape \(B, N, D\) = \(B, N, 8\), got \(2, 3, 9\)"),
    (normal(2, 3, WIDTH), TEXT, ValueError, r"tokens must have shape .*, got \(3, 8\); batches is a list or stream"),
    ([normal(2, 3, WIDTH)], TEXT[1:], ValueError, r"text must have shape \(C, D\) = \(5, 8\), got \(4, 8\)"),
    ([normal(2, 3, WIDTH)], TEXT.log(), ValueError, "text must be finite"),
    ([normal(2, 3, WIDTH).log()], TEXT, ValueError, "tokens must be finite, got .* NaN"),
    ([(normal(2, 3, WIDTH), torch.ones(3, CLASSES))], TEXT, ValueError, r"targets must have shape \(B, C\) = \(2, 5\)"),
    ([(normal(2, 3, WIDTH), torch.full((2, CLASSES), 2))], TEXT, ValueError, "targets must be 1"),
    ([(normal(2, 3, WIDTH), None, torch.ones(2, 3))], TEXT, TypeError, "key_padding_mask must be bool"),
    ([normal(2, 3, WIDTH), (normal(2, 3, WIDTH), torch.ones(2, CLASSES))], TEXT, ValueError, "every batch must have targets"),
    ([()], TEXT, ValueError, r"a batch must be tokens .* or \(tokens, targets, key_padding_mask\), got tuple"),
    ([{"tokens": 1}], TEXT, ValueError, "a batch must be tokens .*, got dict"),
    ([(None,)], TEXT, TypeError, "tokens must be a torch.Tensor, got NoneType"),
    ([], TEXT, ValueError, "batches must hold at least one token, got none; a generator is read once"),
    ([normal(0, 3, WIDTH)], TEXT, ValueError, "batches must hold at least one token"),
]


@pytest.mark.parametrize("batches, text, error, message", REFUSED, ids=range(len(REFUSED)))
def test_a_refused_fit_says_why_and_changes_nothing(batches: Any, text: Any, error: type[Exception], message: str) -> None:
    module = discriminant()
    state = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=f"GaussianDiscriminant: {message}"):
        module.fit(batches, text)
    assert all(torch.equal(module.state_dict()[key], value) for key, value in state.items())


def test_an_image_without_tokens_says_nothing() -> None:
    """With labels as without."""
    one, two = (tl.GaussianDiscriminant(*TEXT.shape) for _ in range(2))
    images = (normal(4, 3, WIDTH), torch.ones(4, len(TEXT)))
    one.fit([images], TEXT)
    two.fit([(normal(2, 0, WIDTH), torch.ones(2, len(TEXT))), images], TEXT)
    torch.testing.assert_close(two.state_dict(), one.state_dict())


def test_scores_before_fit_are_refused() -> None:
    for call in (lambda m: m(normal(1, 2, WIDTH)), lambda m: m.whiten(normal(2, WIDTH)), lambda m: m.whitened_text):
        with pytest.raises(RuntimeError, match="GaussianDiscriminant: nothing was fitted yet; call fit"):
            call(made())


def test_other_classes() -> None:
    """A class that stays keeps its prototype, a new one has its text; whitening is of all."""
    old, text = discriminant(), normal(3, WIDTH, seed=9)
    other = old.with_classes([4, None, 0], text=text)
    assert other.num_classes == 3 and other.count.tolist() == [int(old.count[4]), 0, int(old.count[0])]
    close(other.prototypes, torch.stack([old.prototypes[4], unit_rows(text[1]).float(), old.prototypes[0]]))
    x = normal(2, 3, WIDTH)
    close(other(x)[:, [0, 2]], old(x)[:, [4, 0]])
    close(old.with_classes([1])(x), old(x)[:, 1:2])
    with pytest.raises(ValueError, match="text must be given for new classes"):
        old.with_classes([0, None])
    with pytest.raises(RuntimeError, match="prototypes must be of 5 classes, got a state of 3; build it for 3 classes"):
        made().load_state_dict(other.state_dict())


SIZES = {2: (20, 2), 3: (9, 0, 13), 4: (5, 10, 0, 7)}


def fitted(rank: int, world: int, labels: bool) -> dict[str, Tensor]:
    """On the images of a rank, in batches of its own size; one rank may have no image."""
    x, y = normal(22, 5, WIDTH, seed=40).float(), torch.cat([batch[1] for batch in token_stream()]).float()
    first = sum(SIZES[world][:rank])
    own = slice(first, first + SIZES[world][rank])
    module = made(distributed=group_of(world))
    stream = zip(x[own].split(2 + rank), y[own].split(2 + rank), strict=True)
    return module.fit(((a, b if labels else None) for a, b in stream), TEXT.float()).state_dict()


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_equal_one_process(pools: Callable[[int], Pool], world: int, labels: bool) -> None:
    x, y = normal(22, 5, WIDTH, seed=40).float(), torch.cat([batch[1] for batch in token_stream()]).float()
    whole = made(distributed=True).fit([(x, y if labels else None)], TEXT.float()).state_dict()
    states = pools(world).run(fitted, world, labels, world=world)
    for state in states:
        for key, value in whole.items():
            torch.testing.assert_close(state[key], value, rtol=1e-6, atol=1e-7)
            assert torch.equal(state[key], states[0][key])
