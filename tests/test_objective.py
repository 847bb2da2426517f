"""TRMObjective: each term, which parts may be left out, the order of a step, and the leak it must not have."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import numpy as np
import oracles
import pytest
import torch
from cases import (
    CLASSES,
    TOKENS,
    WIDTH,
    filled_bank,
    filled_labeler,
    labels,
    normal,
    objective,
    objective_inputs,
    objective_terms,
    shaken,
    weighted,
)
from torch import Tensor

import trm_losses as tl
from trm_losses import functional as TF


def close(actual: Any, expected: Any, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(oracles.array(actual), oracles.array(expected), rtol=tolerance, atol=tolerance)


def small(**parts: Any) -> tl.TRMObjective:
    torch.manual_seed(0)
    pooler = shaken(tl.RegionPooler(CLASSES, WIDTH, num_heads=2, dropout=0.0))
    return tl.TRMObjective(pooler, tl.TextRegionMatchingLoss(CLASSES), **parts).double()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "lambdas",
    [{}, {"lambda_region": 0.3, "lambda_pseudo": 0.6, "lambda_distillation": 2.0, "lambda_contrast": 0.7}],
    ids=["defaults", "others"],
)
def test_every_term_is_the_equation_s(lambdas: dict[str, float]) -> None:
    module, x = objective(**lambdas).double(), objective_inputs(6, CLASSES)
    output, expected = module(**x), objective_terms(module, x)
    assert set(output.terms) == set(expected)
    for key, value in expected.items():
        close(output.terms[key], value)
        assert value > 1e-3, "an oracle of zero would test nothing"
    close(output.loss, sum(expected.values()))
    assert output.pseudo is not None and (output.pseudo.targets == 0).any() and (output.pseudo.targets > 0).any()
    query = module.matching.logits(output.regions.query, x["text"])
    region = module.matching.logits(output.regions.region, x["text"])
    close(output.logits, query)
    close(output.region_logits, region)
    assert output.text is x["text"] and output.targets is x["targets"]


def test_regions_may_be_given_and_padding_goes_to_the_pooler() -> None:
    module, x = objective().double(), objective_inputs(4, CLASSES)
    mask = torch.zeros(4, TOKENS, dtype=torch.bool)
    mask[:, 3:] = True
    padded = module(**x, key_padding_mask=mask)
    assert not torch.allclose(padded.loss, module(**x).loss)
    regions = module.pooler(x["tokens"], x["text"], key_padding_mask=mask)
    close(module(regions, x["text"], x["targets"]).loss, padded.loss)


PARTS: list[tuple[dict[str, Any], set[str]]] = [
    ({}, {"matching_query", "matching_region"}),
    ({"distillation": tl.RegionDistillationLoss()}, {"matching_query", "matching_region", "distillation"}),
    ({"contrast": tl.MultimodalContrastiveLoss()}, {"matching_query", "matching_region", "contrast"}),
    ({"bank": filled_bank()}, {"matching_query", "matching_region"}),
    (
        {"bank": filled_bank(), "labeler": tl.PseudoLabeler(CLASSES)},
        {"matching_query", "matching_region", "pseudo_query", "pseudo_region"},
    ),
]


@pytest.mark.parametrize("parts, terms", PARTS, ids=lambda value: "-".join(sorted(value)) or "none")
def test_parts_may_be_left_out(parts: dict[str, Any], terms: set[str]) -> None:
    module, x = small(**copy.deepcopy(parts)), objective_inputs(4, CLASSES)
    output = module(**x)
    assert set(output.terms) == terms
    close(output.loss, sum(float(t.detach()) for t in output.terms.values()))
    output.loss.backward()
    module.update(output)  # needs none of the parts either
    if "contrast" in parts:
        y = oracles.array(x["targets"])
        expected = weighted(
            oracles.contrast(output.regions.query, x["text"], y),
            dict.fromkeys(("region_region", "region_text", "region_prototype", "text_prototype"), 1.0),
        )
        close(output.terms["contrast"], 0.1 * expected)


def test_without_query_head_there_is_one_head() -> None:
    pooler = tl.RegionPooler(CLASSES, WIDTH, num_heads=2, query_head=False)
    parts = {"distillation": tl.RegionDistillationLoss(), "bank": filled_bank(), "labeler": tl.PseudoLabeler(CLASSES)}
    module = tl.TRMObjective(pooler, tl.TextRegionMatchingLoss(CLASSES), **parts).double()
    output = module(**objective_inputs(4, CLASSES))
    assert set(output.terms) == {"matching_query", "pseudo_query"}
    assert output.region_logits is output.logits
    close(output.loss, sum(float(t.detach()) for t in output.terms.values()))


def test_the_size_of_the_loss_does_not_depend_on_the_share_of_known_labels() -> None:
    module, x = small(), objective_inputs(4, CLASSES)
    more = {
        "tokens": torch.cat([x["tokens"], x["tokens"]]),
        "text": x["text"],
        "targets": torch.cat([x["targets"], torch.full_like(x["targets"], -1.0)]),
    }
    close(module(**more).loss, module(**x).loss, 1e-10)


def test_all_known_gives_no_pseudo_loss_and_all_unknown_no_matching_loss() -> None:
    module, x = objective().double(), objective_inputs(4, CLASSES)
    full = module(**{**x, "targets": (x["targets"] > 0.5).double()})
    assert full.terms["pseudo_query"] == 0 and full.terms["pseudo_region"] == 0
    empty = module(**{**x, "targets": torch.full_like(x["targets"], -1.0)})
    assert empty.terms["matching_query"] == 0 and empty.terms["matching_region"] == 0
    for output in (full, empty):
        module.zero_grad()
        output.loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters())


def test_only_trained_parts_learn_and_the_text_stays() -> None:
    module, x = objective().double(), objective_inputs(4, CLASSES)
    before, text = {n: p.detach().clone() for n, p in module.named_parameters()}, x["text"].clone()
    buffers = {n: b.clone() for n, b in module.named_buffers()}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(**x).loss.backward()
    optimizer.step()
    assert torch.equal(x["text"], text)
    assert all(torch.equal(b, buffers[n]) for n, b in module.named_buffers())
    assert all(not torch.equal(p, before[n]) for n, p in module.named_parameters())


def test_the_teacher_is_not_pulled_by_its_student() -> None:
    """With every other term off, the region logits get no gradient of their own: R moves through Z = R + ... alone."""
    module = small(distillation=tl.RegionDistillationLoss(), lambda_region=0.0)
    region, query = normal(3, CLASSES, WIDTH).requires_grad_(), normal(3, CLASSES, WIDTH, seed=1).requires_grad_()
    output = module(tl.Regions(region, query, torch.ones(3, CLASSES, 2)), normal(CLASSES, WIDTH, seed=2), labels(3, CLASSES))
    grads = torch.autograd.grad(output.terms["distillation"], (region, query), allow_unused=True)
    assert grads[0] is None or torch.count_nonzero(grads[0]) == 0
    assert grads[1].abs().sum() > 0


@pytest.mark.parametrize("warmup", [0, 10])
def test_what_enters_statistics_and_prototypes(warmup: int) -> None:
    """After the warm-up sure known positives and sure pseudo-positives, each with its confidence; before, every known one."""
    module, x = objective().double(), objective_inputs(8, CLASSES)
    assert module.labeler is not None and module.bank is not None
    module.labeler.warmup_steps = warmup
    output = module(**x)
    assert output.pseudo is not None
    slow, labeler = oracles.Bank(module.bank.init), copy.deepcopy(module.labeler)
    slow.visual, slow.count = oracles.array(module.bank.visual), module.bank.count.tolist()
    slow.text, slow.text_count = oracles.array(module.bank.text), int(module.bank.text_count)
    y, z = oracles.array(x["targets"]), oracles.array(output.regions.query)
    entering, weights = y.copy(), np.zeros_like(y)
    for b, c in np.ndindex(*y.shape):
        confidence = oracles.sigmoid(float(output.logits[b, c].detach()))
        if y[b, c] == 1 and (warmup or confidence >= module.bank_confidence):
            weights[b, c] = confidence
        made = output.pseudo.targets[b, c] > 0 and output.pseudo.scores[b, c] >= module.bank_pseudo_score
        if y[b, c] == -1 and made and not warmup:
            entering[b, c], weights[b, c] = 1, confidence
    if not warmup:
        assert (weights[y == -1] > 0).any() and (weights[y == 1] == 0).any(), "both gates must be at work here"
    labeler.update(output.regions.query, x["targets"], module.bank)  # against prototypes that did not move yet
    slow.update(z, entering, weights, x["text"])
    module.update(output)
    close(module.bank.visual, slow.visual)
    close(module.bank.text, slow.text)
    assert module.bank.count.tolist() == slow.count
    torch.testing.assert_close(list(module.labeler.buffers()), list(labeler.buffers()))


def test_an_averaged_model_s_vote_reaches_scores_and_histograms() -> None:
    module, x = objective().double(), objective_inputs(8, CLASSES)
    module.labeler, vote = filled_labeler(rule="quantile", ema_weight=0.8), 3 * normal(8, CLASSES, seed=71)
    labeler = copy.deepcopy(module.labeler)
    output = module(**x, ema_logits=vote)
    expected = labeler(output.regions.query, x["targets"], module.bank, ema_logits=vote)
    assert output.pseudo is not None
    for a, b in zip(output.pseudo, expected, strict=True):
        close(a, b)
    assert not torch.allclose(expected.scores, labeler(output.regions.query, x["targets"], module.bank).scores)
    labeler.update(output.regions.query, x["targets"], module.bank, scores=expected.scores)
    module.update(output)
    assert torch.equal(module.labeler.histogram, labeler.histogram)
    small()(**x, ema_logits=vote)  # nobody to vote with


def test_without_labeler_every_known_positive_enters_with_its_confidence() -> None:
    module, x = small(bank=tl.PrototypeBank(CLASSES, WIDTH)), objective_inputs(6, CLASSES)
    output = module(**x)
    module.update(output)
    slow = oracles.Bank(np.zeros((CLASSES, WIDTH)))
    slow.update(output.regions.query, x["targets"], torch.sigmoid(output.logits), x["text"])
    assert module.bank is not None
    close(module.bank.visual, slow.visual)


def step(module: tl.TRMObjective, optimizer: torch.optim.Optimizer, seed: int) -> Tensor:
    output = module(normal(4, TOKENS, WIDTH, seed=seed), normal(CLASSES, WIDTH, seed=7), labels(4, CLASSES, seed))
    optimizer.zero_grad()
    output.loss.backward()
    optimizer.step()
    module.update(output)
    return output.loss.detach()


def test_resumed_equals_unbroken() -> None:
    unbroken = objective().double()
    optimizer = torch.optim.SGD(unbroken.parameters(), lr=0.05)
    first = step(unbroken, optimizer, 1)
    resumed = objective().double()
    for p in resumed.parameters():
        p.data.zero_()
    resumed.load_state_dict(copy.deepcopy(unbroken.state_dict()))
    again = torch.optim.SGD(resumed.parameters(), lr=0.05)
    for seed in (2, 3):
        assert torch.equal(step(unbroken, optimizer, seed), step(resumed, again, seed))
    assert all(torch.equal(a, b) for a, b in zip(unbroken.state_dict().values(), resumed.state_dict().values(), strict=True))
    assert not torch.equal(first, step(unbroken, optimizer, 1))


def test_from_text_has_the_defaults_of_the_method() -> None:
    text = normal(3, 8, dtype=torch.float32)
    module = tl.TRMObjective.from_text(text, total_steps=200, logit_scale=50.0, distributed=True, validate=False)
    assert module.labeler is not None and module.bank is not None
    assert module.distillation is not None and module.contrast is not None
    assert (module.labeler.warmup_steps, module.labeler.ramp_steps) == (20, 20)
    assert module.labeler.temperature_text == 2 / 50
    assert (module.matching.gamma_pos, module.matching.gamma_neg, module.matching.margin) == (1.0, 2.0, 0.05)
    assert module.distillation.temperature == 4.0 and module.lambda_contrast == 0.1
    assert (module.lambda_region, module.lambda_pseudo, module.lambda_distillation) == (1.0, 1.0, 1.0)
    torch.testing.assert_close(module.bank.visual, torch.nn.functional.normalize(text, dim=-1))
    for part in (module, module.matching, module.distillation, module.contrast, module.bank, module.labeler):
        assert part.distributed is True
    for part in (module.pooler, module.matching, module.distillation, module.contrast, module.bank, module.labeler):
        assert part.validate is False
    with pytest.raises(ValueError, match="TRMObjective: total_steps must be at least 1"):
        tl.TRMObjective.from_text(text, total_steps=0)
    with pytest.raises(ValueError, match=r"TRMObjective: text must have shape \(C, D\)"):
        tl.TRMObjective.from_text(text[0], total_steps=10)


def test_each_similarity_is_computed_once() -> None:
    """One for each head, whatever reads it; the bias comes after."""
    module, x = objective().double(), objective_inputs(4, CLASSES)
    with mock.patch.object(TF, "text_region_logits", wraps=TF.text_region_logits) as counted:
        module(**x)
    assert counted.call_count == 2


def test_texts_of_another_number_of_classes_are_refused_here() -> None:
    module, x = objective().double(), objective_inputs(4, CLASSES)
    with pytest.raises(ValueError, match=r"^TRMObjective: text must have shape \(C, D\) = \(5, D\), got \(4, 8\)"):
        module(x["tokens"], x["text"][1:], x["targets"])


OPTIONS: dict[str, Any] = {
    "contrast": tl.MultimodalContrastiveLoss(overlap=0.6, absent_negatives=True, temperature=0.3, temperature_region=0.4),
    "bank": tl.PrototypeBank(CLASSES, WIDTH, num_prototypes=2, queue_size=2, absent=True),
}


def test_ids_and_saliency_reach_the_contrast_and_the_queue() -> None:
    module, x = small(**copy.deepcopy(OPTIONS)), objective_inputs(6, CLASSES)
    assert module.bank is not None and module.contrast is not None
    for step in range(3):
        ids = torch.arange(6) + 3 * step
        output = module(**x, ids=ids)
        y = oracles.array(x["targets"])
        given: dict[str, Any] = {"prototypes": module.bank.visual, "seen": module.bank.seen, "absent_negatives": True}
        given |= {"saliency": output.regions.saliency, "overlap": 0.6, "memory": module.bank.memory, "ids": ids}
        given |= {"temperature": 0.3, "temperature_region": 0.4}
        names = ("region_region", "region_text", "region_prototype", "text_prototype")
        expected = weighted(oracles.contrast(output.regions.query, x["text"], y, **given), dict.fromkeys(names, 1.0))
        close(output.terms["contrast"], 0.1 * expected)
        assert output.ids is ids
        before = module.bank.queue_ids.clone()
        output.loss.backward()
        assert torch.equal(module.bank.queue_ids, before), "nothing enters before the optimiser's step"
        module.update(output)
        entered = {int(ids[b]) for b in range(6) if y[b, 0] == 1}
        assert set(module.bank.queue_ids[0].tolist()) <= entered | {-1} and entered
    assert (module.bank.count > 0).any(dim=0).all()


def test_the_resumed_queue_equals_the_unbroken() -> None:
    unbroken, resumed = (small(**copy.deepcopy(OPTIONS)) for _ in range(2))
    x = objective_inputs(6, CLASSES)
    for step in range(5):
        losses = []
        for module in (unbroken, resumed):
            output = module(**{**x, "tokens": normal(6, TOKENS, WIDTH, seed=step)}, ids=torch.arange(6) + step)
            module.update(output)
            losses.append(output.loss)
        assert torch.equal(*losses)
        state = copy.deepcopy(unbroken.state_dict())
        resumed = small(**copy.deepcopy(OPTIONS))
        resumed.load_state_dict(state)


def test_a_bank_with_a_queue_asks_for_ids() -> None:
    module, x = small(**copy.deepcopy(OPTIONS)), objective_inputs(6, CLASSES)
    with pytest.raises(ValueError, match=r"TRMObjective: ids \(B,\) must be given where the bank keeps a queue"):
        module(**x)
    with pytest.raises(ValueError, match=r"TRMObjective: ids must have shape \(B\) = \(6\), got \(5,\)"):
        module(**x, ids=torch.arange(5))
    assert small()(**x).ids is None


def chunk_parts(**options: Any) -> dict[str, Any]:
    """All parts, with a labeller whose decisions and gates are at work."""
    labeler = {"rule": "prototype", "threshold_pos": 0.6, "threshold_neg": 0.4, **options.pop("labeler", {})}
    return {
        "distillation": tl.RegionDistillationLoss(),
        "contrast": tl.MultimodalContrastiveLoss(),
        "bank": filled_bank(),
        "labeler": filled_labeler(**{k: v for k, v in labeler.items() if v is not None}),
        "anchor_score": 0.65,
        "bank_confidence": 0.5,
        "bank_pseudo_score": 0.62,
        **options,
    }


RULE: dict[str, Any] = {"threshold_pos": None, "threshold_neg": None}
CHUNKED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alone": ({}, {}),
    "defaults": (chunk_parts(), {}),
    "contrast alone": ({"contrast": tl.MultimodalContrastiveLoss()}, {}),
    "bank alone": ({"bank": filled_bank()}, {}),
    "one head": (chunk_parts(), {"query_head": False}),
    "one head and neighbours": (chunk_parts(labeler={"rule": "neighbour", "num_samples": 20, **RULE}), {"query_head": False}),
    "free queries": (chunk_parts(), {"query": "free"}),
    "summed distillation": (chunk_parts(distillation=tl.RegionDistillationLoss(reduction="sum")), {}),
    "every option of contrast and bank": (chunk_parts(**OPTIONS), {}),
    "quantile": (chunk_parts(labeler={"rule": "quantile", "ema_weight": 0.5, **RULE}), {}),
    "logit": (chunk_parts(labeler={"rule": "logit", "threshold_neg": -0.5}), {}),
    "neighbour": (chunk_parts(labeler={"rule": "neighbour", "num_samples": 20, **RULE}, pseudo_per="known"), {}),
}


@pytest.mark.parametrize("targets", ["mixed", "all unknown", "all known"])
@pytest.mark.parametrize("chunk", [1, 2, 4])
@pytest.mark.parametrize("name", CHUNKED)
def test_classes_in_chunks_are_all_classes_at_once(name: str, chunk: int, targets: str) -> None:
    """Loss, terms, pseudo-labels, every gradient, and after two steps the state of bank and labeller."""
    parts, pooler = CHUNKED[name]
    x, mask = objective_inputs(6, CLASSES), torch.zeros(6, TOKENS, dtype=torch.bool)
    mask[:2, 4:] = mask[2] = True
    x |= {"targets": {"mixed": x["targets"], "all unknown": torch.full_like(x["targets"], -1.0)}.get(targets, x["targets"].abs())}
    x |= {"key_padding_mask": mask, "ids": torch.arange(6)}
    if name == "quantile":
        x["ema_logits"] = 3 * normal(6, CLASSES, seed=71)

    def run(class_chunk: int | None) -> list[Any]:
        torch.manual_seed(0)
        made = shaken(tl.RegionPooler(CLASSES, WIDTH, num_heads=2, dropout=0.0, **pooler))
        loss = shaken(tl.TextRegionMatchingLoss(CLASSES, scale=5.0))
        module = tl.TRMObjective(made, loss, **copy.deepcopy(parts), class_chunk=class_chunk).double()  # type: ignore[arg-type]
        if name.endswith(("neighbour", "neighbours")):
            module.labeler.estimates.copy_(torch.rand(20, CLASSES, generator=torch.Generator().manual_seed(1)))
        results: list[Any] = []
        for step in range(2):
            given = {**x, "ids": x["ids"] + 6 * step}
            given |= {key: x[key].clone().requires_grad_() for key in ("tokens", "text")}
            output = module(**given)
            assert isinstance(output.regions, tl.Regions) == (class_chunk is None)
            module.zero_grad()
            output.loss.backward()
            results += [output.loss, *output.terms.values(), output.logits, output.region_logits, *(output.pseudo or ())]
            results += [p.grad for p in (given["tokens"], given["text"], *module.parameters())]
            module.update(output)
            results += [x.clone() for x in module.buffers()]
        return results

    actual, expected = run(chunk), run(None)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        if a is None or e is None:  # a query head that nothing reads has no gradient
            assert a is e
        elif a.dtype == torch.float32:  # running state
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)
        else:  # float64, but for scores and weights that are made of that state
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-7)


def test_in_chunks_no_value_has_classes_times_width() -> None:
    """The largest value of a step, among all that its operators make; and the prototypes are compared once."""
    classes, width, batch, chunk = 300, 64, 8, 20
    text, tokens = normal(classes, width, seed=1, dtype=torch.float32), normal(batch, 4, width, dtype=torch.float32)
    y = labels(batch, classes, soft=False).float()
    y[y == 1], y[:, 0] = 0, 1  # one positive an image

    def largest(class_chunk: int | None) -> tuple[int, int]:
        module = tl.TRMObjective.from_text(text, total_steps=10)
        module.class_chunk = class_chunk
        sizes = [0]

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                made = function(*args, **(kwargs or {}))
                sizes.extend(x.untyped_storage().nbytes() // 4 for x in [made] if isinstance(x, Tensor))
                return made

        with mock.patch.object(TF, "prototype_similarities", wraps=TF.prototype_similarities) as compared, Watch():
            output = module(tokens, text, y)
            output.loss.backward()
            module.update(output)
        return max(sizes), compared.call_count

    whole, in_chunks = largest(None), largest(chunk)
    assert whole[0] >= 4 * batch * classes * width
    assert in_chunks[0] < batch * classes * width
    assert (whole[1], in_chunks[1]) == (1, classes // chunk)


WRONG: list[tuple[Any, str]] = [
    (lambda: small(labeler=tl.PseudoLabeler(CLASSES)), "labeler needs bank"),
    (lambda: small(bank=tl.PrototypeBank(CLASSES, WIDTH + 1)), "bank must have the pooler's dim = 8, got 9"),
    (lambda: small(bank=tl.PrototypeBank(CLASSES + 1, WIDTH)), "all parts must have the same num_classes, got .*'bank': 6"),
    (lambda: small(lambda_region=-1.0), "lambda_region must be at least 0"),
    (lambda: small(class_chunk=0), "class_chunk must be at least 1, got 0"),
    (
        lambda: tl.TRMObjective(tl.RegionPooler(3, 8), tl.TextRegionMatchingLoss(4)),
        "all parts must have the same num_classes, got {'pooler': 3, 'matching': 4}",
    ),
]


@pytest.mark.parametrize("build, message", WRONG, ids=lambda value: str(value)[:20].replace(" ", "-"))
def test_refuses_parts_that_do_not_fit(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^TRMObjective: {message}"):
        build()


def named_right(features: Tensor, text: Tensor) -> float:
    """The share of (b, c) whose feature is closest to the text of class c."""
    unit = torch.nn.functional.normalize
    nearest = torch.einsum("bcd,kd->bck", unit(features, dim=-1), unit(text, dim=-1)).argmax(dim=-1)
    return float((nearest == torch.arange(len(text))).float().mean())


def test_no_class_identity_leaks_into_the_features() -> None:
    """On noise the query level says "class c" hardly more often than the region level, before and after training on it."""
    torch.manual_seed(0)
    classes, width, tokens = 20, 64, 4
    text, test = torch.randn(classes, width), torch.randn(128, tokens, width)
    module = tl.TRMObjective.from_text(text, total_steps=30)
    delta = torch.nn.Parameter(torch.zeros_like(text))
    optimizer = torch.optim.AdamW([*module.parameters(), delta], lr=3e-3)
    start = module.pooler.eval()(test, text)
    assert named_right(start.query, text) == named_right(start.region, text) < 0.3
    module.train()
    for _ in range(30):
        y = (torch.rand(32, classes) < 0.2).float()
        y[torch.rand_like(y) < 0.5] = -1
        output = module(torch.randn(32, tokens, width), text + delta, y)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        module.update(output)
    with torch.no_grad():
        trained = module.pooler.eval()(test, text + delta)
        assert not torch.allclose(trained.query, trained.region, atol=1e-2)
        assert abs(named_right(trained.query, text + delta) - named_right(trained.region, text + delta)) < 0.1
        assert named_right(trained.query, text + delta) < 0.3
        leaky = trained.region + torch.nn.functional.normalize(text + delta, dim=-1)  # what a residual from Q would do
        assert named_right(leaky, text + delta) > 0.95
