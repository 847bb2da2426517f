"""RegionPooler: both orders of its products, its start, padding, and what the text and the queries do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import oracles
from tests.helpers.values import normal, shaken
from trm_losses import RegionPooler
from trm_losses.regions import Regions, class_chunk

READINGS: list[dict[str, Any]] = [{}, {"query": "free"}, {"query_head": False}, {"assignment": "transport"}]

SIZES = [(2, 6, 2), (20, 3, 4), (20, 3, 1), (3, 40, 4), (9, 2, 8), (1, 1, 1)]


@pytest.mark.parametrize("classes, tokens, heads", SIZES)
def test_every_order_of_products_is_the_loops(classes: int, tokens: int, heads: int) -> None:
    """Sizes on both sides of "project the tokens or the queries" and "pool the tokens first or project them first"."""
    pooler = shaken(RegionPooler(classes, 8, num_heads=heads)).double()
    v, t = normal(2, tokens, 8), normal(classes, 8, seed=1)
    for actual, expected in zip(pooler(v, t), oracles.pool(dict(pooler.state_dict()), v, t, heads), strict=True):
        np.testing.assert_allclose(oracles.array(actual), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("reading", READINGS, ids=str)
def test_at_the_start_the_query_level_is_the_region_level(reading: dict[str, Any]) -> None:
    text = normal(5, 8, seed=1, dtype=torch.float32)
    tokens = normal(3, 6, 8, dtype=torch.float32)
    region, z, saliency = RegionPooler(5, 8, **reading)(tokens, text)
    assert torch.equal(region, z)
    if "query" not in reading and "assignment" not in reading:
        cosines = torch.cosine_similarity(text[:, None], tokens[:, None], dim=-1)
        plain = RegionPooler(5, 8, num_heads=1, **reading)(tokens, text)
        torch.testing.assert_close(plain.saliency, (8 * cosines).softmax(dim=-1))
    torch.testing.assert_close(saliency.sum(dim=-1), torch.ones(3, 5))


@pytest.mark.parametrize("reading", [r for r in READINGS if r.get("query") != "free" and "assignment" not in r], ids=str)
@pytest.mark.parametrize("classes", [1, 5, 40])
def test_any_number_of_texts_and_each_by_itself(reading: dict[str, Any], classes: int) -> None:
    """A class is pooled as if it were the only one; num_classes is that of the training set."""
    pooler, tokens = shaken(RegionPooler(3, 8, **reading)), normal(2, 6, 8, dtype=torch.float32)
    text = normal(classes, 8, seed=1, dtype=torch.float32)
    together = pooler(tokens, text)
    for c in {0, classes // 2, classes - 1}:
        for part, alone in zip(together, pooler(tokens, text[c : c + 1]), strict=True):
            torch.testing.assert_close(part[:, c : c + 1], alone)


def test_free_queries_start_where_told_and_do_not_follow_the_text() -> None:
    text, tokens = normal(5, 8, seed=1, dtype=torch.float32), normal(3, 6, 8, dtype=torch.float32)
    free = RegionPooler(5, 8, query="free", query_init=text)
    tied = RegionPooler(5, 8)
    torch.testing.assert_close(free(tokens).saliency, tied(tokens, text).saliency)
    torch.testing.assert_close(free(tokens, 5 * text.flip(0)).saliency, free(tokens).saliency)
    assert free.query is not None and free.query.data_ptr() != text.data_ptr()
    free(tokens).region.square().sum().backward()
    assert free.query.grad is not None and free.query.grad.abs().sum() > 0


def test_an_image_of_padding_alone_is_zero_and_harmless() -> None:
    pooler = RegionPooler(5, 8, dropout=0.0)
    tokens, text = normal(2, 6, 8, dtype=torch.float32).requires_grad_(), normal(5, 8, seed=1, dtype=torch.float32)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1] = True
    region, query, saliency = pooler(tokens, text, key_padding_mask=mask)
    assert torch.count_nonzero(saliency[1]) == 0 and torch.count_nonzero(region[1]) == 0
    (region.square().sum() + query.square().sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in pooler.parameters() if p.grad is not None)
    assert tokens.grad is not None and torch.isfinite(tokens.grad).all() and torch.count_nonzero(tokens.grad[1]) == 0


def test_dropout_touches_the_query_level_in_training_only() -> None:
    pooler = shaken(RegionPooler(5, 8))
    for part in pooler.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.5
    tokens, text = normal(2, 6, 8, dtype=torch.float32), normal(5, 8, seed=1, dtype=torch.float32)
    one, two = pooler(tokens, text), pooler(tokens, text)
    torch.testing.assert_close(one.region, two.region)
    assert not torch.allclose(one.query, two.query)
    pooler.eval()
    torch.testing.assert_close(pooler(tokens, text).query, pooler(tokens, text).query)


@pytest.mark.parametrize("reading", READINGS, ids=str)
def test_trains_every_parameter(reading: dict[str, Any]) -> None:
    """None is made that a reading does not use: DistributedDataParallel would wait for its gradient. A plan has none to train."""
    pooler = shaken(RegionPooler(5, 8, **reading))
    regions = pooler(normal(2, 6, 8, dtype=torch.float32), normal(5, 8, seed=1, dtype=torch.float32))
    assert reading.get("query_head", True) or regions.query is regions.region
    regions.query.pow(3).sum().backward()
    fixed = {name for name, p in pooler.named_parameters() if not p.requires_grad}
    assert fixed == ({"query_weight", "key_weight", "log_attention_scale"} if "assignment" in reading else set())
    for name, p in pooler.named_parameters():
        assert name in fixed or (p.grad is not None and p.grad.abs().sum() > 0), name


def test_tokens_in_another_precision_take_the_pooler_s() -> None:
    tokens, text = normal(2, 6, 8), normal(5, 8, seed=1)
    pooler = RegionPooler(5, 8)
    expected = pooler(tokens.float(), text.float())
    for dtype in (torch.float64, torch.float16):
        region, _, saliency = pooler(tokens.to(dtype), text.to(dtype))
        assert region.dtype == saliency.dtype == torch.float32
        torch.testing.assert_close(region, expected.region, atol=2e-2, rtol=0)


def test_device_and_dtype_of_the_parameters() -> None:
    assert {p.dtype for p in RegionPooler(2, 8, query="free", dtype=torch.float64).parameters()} == {torch.float64}
    assert {p.device.type for p in RegionPooler(2, 8, device="meta").parameters()} == {"meta"}


def test_one_query_s_hidden_width_may_be_odd() -> None:
    assert RegionPooler(2, 11, num_heads=1, mlp_ratio=15 / 11).mlp[1].out_features == 15
    assert RegionPooler(2, 8, mlp_ratio=0.01).mlp[1].out_features == 1


def test_no_image_reaches_the_mlp_past_its_dropout() -> None:
    """At probability 1 only what no dropout touches is left: R, and the same addition for every image."""
    pooler = RegionPooler(5, 8, dropout=1.0)
    tokens, text = normal(2, 6, 8, dtype=torch.float32), normal(5, 8, seed=1, dtype=torch.float32)
    torch.nn.init.normal_(pooler.mlp[4].weight)
    torch.nn.init.normal_(pooler.mlp[4].bias)
    pooler.mlp[3].p = 0.0
    region, query, _ = pooler(tokens, text)
    assert (query - region).abs().max() > 0.1
    torch.testing.assert_close((query - region)[0], (query - region)[1])


@pytest.mark.parametrize("reading", [{**r, **n} for r in READINGS for n in ({}, {"num_heads": 2})], ids=str)
@pytest.mark.parametrize("tokens, size", [(3, 1), (3, 7), (60, 4), (3, 100)])
def test_chunks_of_classes_are_the_whole(reading: dict[str, Any], tokens: int, size: int) -> None:
    """Values and gradients, on both sides of every order of products, whether or not the chunks come out even."""
    pooler, weight = shaken(RegionPooler(23, 8, **reading)).double(), normal(3, 23, 8, seed=2)
    mask = torch.zeros(3, tokens, dtype=torch.bool)
    mask[0, 1:] = mask[1] = True

    def run(chunked: bool) -> list[Tensor]:
        v, t = normal(3, tokens, 8).requires_grad_(), normal(23, 8, seed=1).requires_grad_()
        prepared = pooler.prepare(v, t, key_padding_mask=mask)
        if chunked:
            widths = []

            def use(regions: Regions, part: slice) -> dict[str, Tensor]:
                widths.append(regions.region.shape[1])
                return {"sum": (regions.query * weight[:, part]).sum(dim=-1), **regions._asdict()}

            made = [*pooler.map_classes(use, prepared, size).values()]
            assert widths[0] == min(size, 23) and max(widths) <= size and sum(widths) == 23
        else:
            regions = pooler(v, t, key_padding_mask=mask)
            made = [(regions.query * weight).sum(dim=-1), *regions]
        pooler.zero_grad()
        sum(x.square().sum() for x in made).backward()
        return [*made, *(p.grad for p in (v, t, *pooler.parameters()) if p.grad is not None)]

    for actual, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


def test_a_chunk_computed_again_has_the_same_dropout() -> None:
    """The loss is linear in what the last layer gives, so its gradient is what the forward pass fed that layer."""
    pooler = shaken(RegionPooler(6, 8))
    for part in pooler.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.5
    fed: list[Tensor] = []
    pooler.mlp[4].register_forward_pre_hook(lambda _, given: fed.append(given[0].detach()))
    tokens, text = normal(2, 6, 8, dtype=torch.float32), normal(6, 8, seed=1, dtype=torch.float32)
    made = pooler.map_classes(lambda regions, _: {"sum": regions.query.sum(dim=-1)}, pooler.prepare(tokens, text), 2)
    first = torch.cat([x.flatten(0, 1) for x in fed])
    made["sum"].sum().backward()
    assert len(fed) == 6 and not torch.equal(fed[0], fed[1])
    torch.testing.assert_close(pooler.mlp[4].weight.grad, first.sum(dim=0).expand(8, -1))


def test_chunks_keep_no_regions_for_the_backward_pass() -> None:
    """What autograd keeps does not grow with the regions: it is the results and what the chunks share."""
    pooler, held = RegionPooler(64, 8, dropout=0.0), []
    text = normal(64, 8, seed=1, dtype=torch.float32)
    prepared = pooler.prepare(normal(4, 6, 8, dtype=torch.float32), text)

    def logits(regions: Regions, part: slice) -> dict[str, Tensor]:
        return {"logits": torch.einsum("bcd,cd->bc", regions.query, text[part])}

    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.numel()) or x, lambda x: x):  # type: ignore[func-returns-value]
        pooler.map_classes(logits, prepared, 8)
    in_chunks, held[:] = sum(held), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.numel()) or x, lambda x: x):  # type: ignore[func-returns-value]
        logits(pooler.pool(prepared), slice(None))
    assert in_chunks < sum(held) / 20


@pytest.mark.parametrize("batch, classes, tokens, dim", [(64, 20, 49, 512), (64, 80, 49, 512), (1, 1, 1, 1), (0, 20, 49, 512)])
def test_few_classes_are_taken_at_once(batch: int, classes: int, tokens: int, dim: int) -> None:
    assert class_chunk(batch, classes, tokens, dim) == classes


@pytest.mark.parametrize("batch, tokens, dim", [(8, 49, 512), (64, 196, 1024), (4096, 784, 4096)])
def test_many_classes_are_taken_in_chunks_that_do_not_grow_with_them(batch: int, tokens: int, dim: int) -> None:
    small, large = class_chunk(batch, 10_000, tokens, dim), class_chunk(batch, 100_000, tokens, dim)
    assert small == large and 1 <= small < 10_000
    assert small == 1 or 4 * batch * small * dim <= 2**22


@pytest.mark.parametrize("reading", READINGS, ids=str)
def test_some_classes_by_index(reading: dict[str, Any]) -> None:
    pooler = shaken(RegionPooler(23, 8, **reading))
    prepared = pooler.prepare(normal(2, 6, 8, dtype=torch.float32), normal(23, 8, seed=1, dtype=torch.float32))
    every = pooler.pool(prepared)
    for some in (slice(2, 5), torch.tensor([7, 0, 7])):
        for part, whole in zip(pooler.pool(prepared, some), every, strict=True):
            torch.testing.assert_close(part, whole[:, some])
    alone = pooler.pool(prepared, query_head=False)
    assert alone.query is alone.region
    torch.testing.assert_close(alone.region, every.region)
    with pytest.raises(ValueError, match="RegionPooler: size must be at least 1, got 0"):
        pooler.map_classes(lambda regions, _: regions._asdict(), prepared, 0)


@pytest.mark.parametrize("reading", READINGS, ids=str)
def test_tokens_and_texts_of_inference_mode_are_trained_on(reading: dict[str, Any]) -> None:
    """As a frozen tower often gives them: the gradient is that of the same numbers made outside."""
    with torch.inference_mode():
        tokens, text = normal(2, 6, 8), normal(5, 8, seed=1)
    pooler = shaken(RegionPooler(5, 8, dropout=0.0, **reading)).double()
    learned = [p for p in pooler.parameters() if p.requires_grad]
    found, expected = (
        torch.autograd.grad(pooler(v, t).query.square().sum(), learned, allow_unused=True)
        for v, t in ((tokens, text), (normal(2, 6, 8), normal(5, 8, seed=1)))
    )
    torch.testing.assert_close(found, expected)


# Tokens shared out among the classes -----------------------------------------------------------------------------------------


def test_no_gradient_passes_through_the_plan() -> None:
    """What there is, is that of the tokens under a plan that is given; the text teaches nothing here."""
    pooler = shaken(RegionPooler(5, 8, assignment="transport", query_head=False)).double()
    v, t = normal(2, 6, 8).requires_grad_(), normal(5, 8, seed=1).requires_grad_()
    region, _, plan = pooler(v, t)
    assert not plan.requires_grad
    weight = normal(2, 5, 8, seed=2)
    (found,) = torch.autograd.grad((region * weight).sum(), v)
    other = v.detach().requires_grad_()
    (expected,) = torch.autograd.grad(((plan @ torch.nn.functional.normalize(other, dim=-1)) * weight).sum(), other)
    torch.testing.assert_close(found, expected)
    assert [name for name, p in pooler.named_parameters() if p.requires_grad] == []
