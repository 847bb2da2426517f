"""PromptLearner: what each mode gives, what it trains and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.cases.prompts import names
from tests.helpers.values import normal
from trm_losses import PromptEmbeddings, PromptLearner

TEXT = normal(5, 8, dtype=torch.float32)


def test_fixed_and_residual_start_at_the_unit_text() -> None:
    unit = torch.nn.functional.normalize(TEXT, dim=-1)
    fixed, residual = PromptLearner("fixed", text=TEXT), PromptLearner("residual", text=TEXT)
    torch.testing.assert_close(fixed(), unit)
    torch.testing.assert_close(residual(), unit)
    assert list(fixed.parameters()) == [] and [n for n, _ in residual.named_parameters()] == ["delta"]
    assert set(fixed.state_dict()) == {"reference"} and fixed.num_classes == 5
    residual().sum().backward()
    assert residual.delta.grad is not None and torch.equal(residual.delta.grad, torch.ones(5, 8))
    torch.testing.assert_close(residual.reference, unit)
    assert not fixed().requires_grad


@pytest.mark.parametrize("dtype, expected", [(torch.float16, torch.float32), (torch.float64, torch.float64)])
def test_texts_are_at_least_float32(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert PromptLearner("residual", text=TEXT.to(dtype))().dtype == expected


@pytest.mark.parametrize("mode, shape", [("shared", (3, 8)), ("csc", (5, 3, 8))])
def test_contexts_stand_between_start_and_name(mode: Any, shape: tuple[int, ...]) -> None:
    embedded = alike(5)  # end tokens at 2, 3, 4, 2, 3 of 7
    learner = PromptLearner(mode, names=embedded, num_context=3)
    assert tuple(learner.context.shape) == shape and learner.num_classes == 5
    embeddings, eot, _ = learner()
    assert isinstance(learner(), PromptEmbeddings) and tuple(embeddings.shape) == (5, 5 + 3, 8)
    assert torch.equal(eot, embedded.eot + 3)
    for c in range(5):
        context = learner.context if mode == "shared" else learner.context[c]
        assert torch.equal(embeddings[c, 0], embedded.embeddings[c, 0])
        assert torch.equal(embeddings[c, 1:4], context)
        assert torch.equal(embeddings[c, eot[c]], embedded.embeddings[c, embedded.eot[c]])
        assert torch.equal(embeddings[c, 4:], embedded.embeddings[c, 1:5])
    embeddings.sum().backward()
    assert [n for n, _ in learner.named_parameters()] == ["context"]
    assert learner.context.grad is not None
    assert torch.equal(learner.context.grad, torch.full(shape, 5.0 if mode == "shared" else 1.0))


def test_a_plain_pair_of_names_will_do() -> None:
    learner = PromptLearner("shared", names=names(5)[:2], num_context=3)
    assert torch.equal(learner.eot, names(5).eot + 3)


@pytest.mark.parametrize("mode", ["shared", "csc"])
def test_contexts_learn_in_float32_among_names_in_half_precision(mode: Any) -> None:
    embedded = names(5)._replace(embeddings=names(5).embeddings.half())
    learner = PromptLearner(mode, names=embedded, num_context=3)
    assert learner.context.dtype == torch.float32 and learner().embeddings.dtype == torch.float16


def test_contexts_start_small() -> None:
    torch.manual_seed(0)
    start = PromptLearner("csc", names=names(50), num_context=16).context
    assert abs(start.std().item() - 0.02) < 1e-3 and abs(start.mean().item()) < 1e-3


def test_the_tower_s_limit() -> None:
    learner = PromptLearner("shared", names=names(5), num_context=5, context_length=10)
    assert learner().embeddings.shape[1] == 10
    with pytest.raises(
        ValueError, match="PromptLearner: class 2 takes 5 tokens, with num_context = 6 that is over the tower's 10"
    ):
        PromptLearner("shared", names=names(5), num_context=6, context_length=10)


BUILDS: dict[str, dict[str, Any]] = {
    "fixed": {"text": TEXT},
    "residual": {"text": TEXT},
    "shared": {"names": names(5), "num_context": 3},
    "csc": {"names": names(5), "num_context": 3},
}


@pytest.mark.parametrize("mode", BUILDS)
def test_rows_of_some_classes(mode: Any) -> None:
    torch.manual_seed(0)
    learner = PromptLearner(mode, **BUILDS[mode])
    for parameter in learner.parameters():
        torch.nn.init.normal_(parameter)
    for classes in ([3, 0, 3], [1], []):
        whole, rows = learner(), learner(torch.tensor(classes, dtype=torch.long))
        for all_of_it, some in zip(*((x,) if isinstance(x, torch.Tensor) else x[:2] for x in (whole, rows)), strict=True):
            assert some.shape == (len(classes), *all_of_it.shape[1:])
            assert all(torch.equal(some[i], all_of_it[c]) for i, c in enumerate(classes))
    if mode != "fixed":
        rows = learner(torch.tensor([3, 0, 3]))
        (rows if isinstance(rows, torch.Tensor) else rows.embeddings).sum().backward()
        (gradient,) = (p.grad for p in learner.parameters())
        assert gradient is not None
        per_class = torch.tensor([1.0, 0, 0, 2, 0])
        wanted = torch.tensor(3.0) if mode == "shared" else per_class.view(-1, *[1] * (gradient.dim() - 1))
        assert torch.equal(gradient, wanted.expand(gradient.shape))
    for bad, error in ((torch.tensor(1), ValueError), ([1], TypeError)):
        with pytest.raises(error, match="^PromptLearner: classes must"):
            learner(bad)  # type: ignore[arg-type]


def alike(classes: int) -> PromptEmbeddings:
    """Names that begin with the same token, as those of a tokenizer do."""
    embeddings, eot, _ = names(classes)
    return PromptEmbeddings(torch.cat([embeddings[:1, :1].expand(classes, 1, -1), embeddings[:, 1:]], dim=1), eot)


def test_the_prefix_says_what_all_rows_share() -> None:
    shared, csc = (PromptLearner(mode, names=alike(5), num_context=3) for mode in ("shared", "csc"))
    for learner, prefix in ((shared, 4), (csc, 1), (PromptLearner("shared", names=alike(1), num_context=2), 3)):
        for prompts in (learner(), learner(torch.tensor([0]))):
            assert isinstance(prompts, PromptEmbeddings) and prompts.prefix == prefix
            assert all(torch.equal(row[:prefix], prompts.embeddings[0, :prefix]) for row in prompts.embeddings)
    other_starts = PromptLearner("shared", names=names(5), num_context=3)
    found = other_starts()  # of a tokenizer without a start token: contexts come before the names
    assert isinstance(found, PromptEmbeddings) and found.prefix == 3
    assert torch.equal(found.embeddings[:, 3:], names(5).embeddings[:, : found.embeddings.shape[1] - 3])
    ends_at_once = PromptLearner("shared", names=PromptEmbeddings(alike(2).embeddings, torch.tensor([0, 2])), num_context=3)
    assert ends_at_once().prefix == 0  # the feature of class 0 stands on the last context
    shared.load_state_dict(other_starts.state_dict())
    assert shared().prefix == 3
    shared.load_state_dict(PromptLearner("shared", names=alike(5), num_context=3).state_dict())
    assert shared().prefix == 4


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"mode": "learned"}, ValueError, "mode must be one of 'fixed', 'residual', 'shared', 'csc', got 'learned'"),
    ({"mode": "fixed"}, ValueError, r"mode='fixed' needs text \(C, D\)"),
    ({"mode": "residual", "names": names(5)}, ValueError, "mode='residual' needs text"),
    ({"mode": "shared", "text": TEXT}, ValueError, "mode='shared' needs names"),
    ({"mode": "csc"}, ValueError, "mode='csc' needs names"),
    ({"mode": "fixed", "text": TEXT[0]}, ValueError, r"text must have shape \(C, D\)"),
    ({"mode": "fixed", "text": TEXT.tolist()}, TypeError, "text must be a torch.Tensor, got list"),
    ({"mode": "residual", "text": TEXT / 0}, ValueError, "text must be finite"),
    ({"mode": "shared", "names": names(5), "num_context": 0}, ValueError, "num_context must be at least 1, got 0"),
    (
        {"mode": "shared", "names": PromptEmbeddings(names(5).embeddings, names(4).eot)},
        ValueError,
        r"names.eot must have shape \(C\) = \(5\), got \(4,\)",
    ),
]


@pytest.mark.parametrize("settings, error, message", WRONG, ids=lambda value: str(value)[:40].replace(" ", "-"))
def test_refuses(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^PromptLearner: {message}"):
        PromptLearner(**settings)
