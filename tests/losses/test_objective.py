"""TRMObjective: each term, which parts may be left out, the order of a step, and the leak it must not have."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import trm_losses as tl
from tests.helpers import compare, oracles
from tests.helpers.cases.bank import filled_bank
from tests.helpers.cases.contrast import weighted
from tests.helpers.cases.objective import objective, objective_inputs, objective_terms
from tests.helpers.values import CLASSES, TOKENS, WIDTH, labels, named_right, normal, shaken
from trm_losses import functional as TF
from trm_losses.pseudo import PrototypeRule, TeacherRule
from trm_pipeline.config import presets

close = partial(compare.close, rtol=2e-5, atol=2e-5)  # state is float32


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
    regions = module.pooler(x["tokens"], x["text"])
    query = module.matching.logits(regions.query, x["text"])
    region = module.matching.logits(regions.region, x["text"])
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
            oracles.contrast(output.features, x["text"], y),
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
    y, z = oracles.array(x["targets"]), oracles.array(output.features)
    entering, weights = y.copy(), np.zeros_like(y)
    for b, c in np.ndindex(*y.shape):
        confidence = oracles.sigmoid(float(output.logits[b, c].detach()))
        if y[b, c] == 1 and (warmup or confidence >= module.confident):
            weights[b, c] = confidence
        made = output.pseudo.targets[b, c] > 0 and output.pseudo.scores[b, c] >= module.sure
        if y[b, c] == -1 and made and not warmup:
            entering[b, c], weights[b, c] = 1, confidence
    if not warmup:
        assert (weights[y == -1] > 0).any() and (weights[y == 1] == 0).any(), "both gates must be at work here"
    labeler.update(output.features, x["targets"], module.bank)  # against prototypes that did not move yet
    slow.update(z, entering, weights, x["text"])
    module.update(output)
    close(module.bank.visual, slow.visual)
    close(module.bank.text, slow.text)
    assert module.bank.count.tolist() == slow.count
    for a, b in zip(module.labeler.buffers(), labeler.buffers(), strict=True):
        close(a, b)


def test_without_labeler_every_known_positive_enters_with_its_confidence() -> None:
    module, x = small(bank=tl.PrototypeBank(CLASSES, WIDTH)), objective_inputs(6, CLASSES)
    output = module(**x)
    module.update(output)
    slow = oracles.Bank(np.zeros((CLASSES, WIDTH)))
    slow.update(output.features, x["targets"], torch.sigmoid(output.logits), x["text"])
    assert module.bank is not None
    close(module.bank.visual, slow.visual)


ESTIMATES = torch.tensor([[0.9, 0.2, 0.4]] * 6)  # of a teacher


def test_from_text_makes_a_region_head_and_no_pseudo_labels() -> None:
    """The embedded preset, which the README's table is of, has no other settings of these parts."""
    text, preset = normal(3, 8, dtype=torch.float32), presets.EMBEDDED
    parts = ("pooler", "distillation", "contrast", "bank", "labeler", "objective", "prototype")
    assert not any(getattr(preset, name) for name in parts) and preset.matching == {"gamma_pos": 0, "gamma_neg": 0, "margin": 0}
    for module in (
        tl.TRMObjective.from_text(text, total_steps=200),
        tl.TRMObjective.from_text(text, total_steps=200, labeler={}),
        tl.TRMObjective.from_text(text, total_steps=200, labeler=None, objective={"lambda_pseudo": 0}),
    ):
        assert (module.pooler.query_head, module.pooler.num_heads) == (
            False,
            1,
        ) and module.distillation is module.contrast is module.bank is module.labeler is None
        assert (module.matching.gamma_pos, module.matching.gamma_neg, module.matching.margin) == (0, 0, 0)
        assert (module.lambda_region, module.lambda_contrast) == (1, 0)
        output = module(normal(4, TOKENS, 8).float(), text, labels(4, 3).float())
        assert set(output.terms) == {"matching_query"} and output.pseudo is None
        module.update(output)


RULES: dict[str, Any] = {"prototypes": (lambda: PrototypeRule(3), 20), "teacher": (lambda: TeacherRule(ESTIMATES), 0)}


@pytest.mark.parametrize("recipe", ["default", "paper"])
@pytest.mark.parametrize("name", RULES)
def test_from_text_has_the_schedule_that_suits_the_rule(name: str, recipe: Any) -> None:
    text, (make, steps) = normal(3, 8, dtype=torch.float32), RULES[name]
    rule = make()
    module = tl.TRMObjective.from_text(
        text, total_steps=200, rule=rule, recipe=recipe, logit_scale=50.0, distributed=True, validate=False
    )
    labeler, bank = module.labeler, module.bank
    assert labeler is not None and labeler.rule is rule and labeler.expected_positives is None
    assert (bank is None) == (name == "teacher" and recipe == "default"), "nothing would read it"
    assert (module.lambda_pseudo, labeler.warmup_steps, labeler.ramp_steps) == (1, steps, steps)
    assert module.pooler.query_head == (module.distillation is not None) == (module.contrast is not None) == (recipe == "paper")
    if bank is not None:
        torch.testing.assert_close(bank.visual, torch.nn.functional.normalize(text, dim=-1))
    parts = [module.pooler, module.matching, bank, labeler, module.distillation, module.contrast]
    for part in filter(None, parts):
        assert part.validate is False and (part is module.pooler or part.distributed is True)


def test_from_text_weighs_a_teacher_by_what_else_says_absent() -> None:
    """By half of the classes where no absent label is known; a rule that is not soft decides too little for that."""

    def made(rule: Any, **options: Any) -> tl.TRMObjective:
        text = normal(5, 8, dtype=torch.float32)
        return tl.TRMObjective.from_text(text, total_steps=200, rule=rule, expected_positives=1.5, **options)

    taught = made(TeacherRule(torch.rand(6, 5)))
    assert taught.lambda_pseudo == 2.5 and taught.labeler is not None and taught.labeler.expected_positives == 1.5
    assert made(TeacherRule(torch.rand(6, 5)), objective={"lambda_pseudo": 0.7}).lambda_pseudo == 0.7
    assert made(TeacherRule(torch.rand(6, 5)), labeler={"expected_positives": None}).lambda_pseudo == 1
    assert made(PrototypeRule(5)).lambda_pseudo == 1


def test_from_text_lets_a_teacher_speak_from_the_first_step() -> None:
    """Softly, of every unknown label, and whether or not steps are counted: a teacher waits for nothing."""
    text, y = normal(3, 8, dtype=torch.float32), torch.full((2, 3), -1.0)
    y[0, 0] = 1
    module = tl.TRMObjective.from_text(text, total_steps=20, rule=TeacherRule(ESTIMATES))
    output = module(normal(2, TOKENS, 8).float(), text, y, ids=torch.tensor([5, 0]))
    assert set(output.terms) == {"matching_query", "pseudo_query"} and output.pseudo is not None
    close(output.pseudo.targets, torch.where(y == -1, ESTIMATES[:2], -1.0))
    close(output.pseudo.weights, (y == -1).float())
    with pytest.raises(ValueError, match="PseudoLabeler: ids must be given for TeacherRule"):
        module(normal(2, TOKENS, 8).float(), text, y)


def test_from_text_has_all_parts_of_the_paper() -> None:
    text, plain = normal(3, 8, dtype=torch.float32), tl.TextRegionMatchingLoss(3)
    module = tl.TRMObjective.from_text(text, total_steps=200, recipe="paper", logit_scale=50.0)
    labeler = module.labeler
    assert labeler is not None and isinstance(labeler.rule, PrototypeRule) and labeler.rule.temperature_text == 2 / 50
    assert (module.lambda_pseudo, labeler.warmup_steps, labeler.ramp_steps) == (1, 20, 20)
    for name in ("gamma_pos", "gamma_neg", "margin"):
        assert getattr(module.matching, name) == getattr(plain, name) > 0
    assert (module.lambda_contrast, module.lambda_region, module.lambda_distillation) == (0.1, 1, 1)
    output = module(normal(4, TOKENS, 8).float(), text, labels(4, 3).float())
    heads = {f"{term}_{head}" for term in ("matching", "pseudo") for head in ("query", "region")}
    assert set(output.terms) == {*heads, "distillation", "contrast"}
    module.update(output)


def test_from_text_takes_settings_by_part() -> None:
    """Also in place of what is said for all of them."""
    text, start, own = normal(3, 8, dtype=torch.float32), normal(3, 8, seed=5), {"validate": True, "distributed": False}
    module = tl.TRMObjective.from_text(
        text,
        total_steps=200,
        recipe="paper",
        expected_positives=1.5,
        pooler={"dropout": 0.3, "query": "free", "validate": True},
        matching={"gamma_neg": 1.5, **own},
        distillation={"temperature": 2.0, **own},
        contrast={"temperature": 0.2, **own},
        bank={"momentum": 0.5, "init": start, **own},
        labeler={"warmup_steps": 3, "expected_positives": 2.0, **own},
        objective={"lambda_contrast": 0.3},
        distributed=True,
        validate=False,
    )
    held = [part for part in module.modules() if hasattr(part, "validate")]
    assert len(held) == 6 and all(part.validate and not getattr(part, "distributed", False) for part in held)
    assert module.distillation is not None and module.contrast is not None and module.bank is not None
    assert module.labeler is not None and module.pooler.dropout_rate == 0.3 and module.bank.momentum == 0.5
    assert (module.matching.gamma_neg, module.matching.gamma_pos, module.distillation.temperature) == (1.5, 1, 2)
    assert (module.contrast.temperature, module.labeler.warmup_steps, module.labeler.ramp_steps) == (0.2, 3, 20)
    assert (module.lambda_contrast, module.lambda_pseudo, module.labeler.expected_positives) == (0.3, 1, 2)
    close(module.bank.init, torch.nn.functional.normalize(start, dim=1))
    torch.testing.assert_close(module.pooler.query, text, check_dtype=False)
    chunked = tl.ChunkedTRMObjective.from_text(text, total_steps=200, objective={"class_chunk": 2})
    assert isinstance(chunked, tl.ChunkedTRMObjective) and chunked.class_chunk == 2
    taught = tl.TRMObjective.from_text(text, total_steps=200, rule=TeacherRule(ESTIMATES), labeler={"ramp_steps": 3})
    assert taught.labeler is not None and (taught.labeler.warmup_steps, taught.labeler.ramp_steps) == (0, 3)


def test_from_text_adds_to_one_recipe_what_the_other_has() -> None:
    text = normal(3, 8, dtype=torch.float32)
    more = tl.TRMObjective.from_text(
        text, total_steps=200, pooler={"query_head": True}, matching={"margin": 0.05}, objective={"lambda_contrast": 0.3}
    )
    assert more.pooler.query_head and more.distillation is not None and more.contrast is not None and more.bank is not None
    assert (more.matching.margin, more.matching.gamma_neg, more.lambda_contrast) == (0.05, 0, 0.3) and more.labeler is None
    for less in (
        {"distillation": None, "contrast": None, "labeler": None},
        {"objective": {"lambda_contrast": 0, "lambda_distillation": 0}},
        {"objective": dict.fromkeys(("lambda_contrast", "lambda_distillation", "lambda_pseudo"), 0)},
        {"pooler": {"query_head": False}},
    ):
        module = tl.TRMObjective.from_text(text, total_steps=200, recipe="paper", **less)  # type: ignore[arg-type]
        assert module.distillation is None and (module.contrast is None) == ("pooler" not in less)
        assert (module.labeler is None) == (module.bank is None) == ("labeler" in less or "lambda_pseudo" in str(less))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"total_steps": 0}, "total_steps must be at least 1"),
        ({"text": torch.ones(8)}, r"text must have shape \(C, D\)"),
        ({"recipe": "papers"}, "recipe must be one of 'default', 'paper', got 'papers'"),
        ({"labeler": {"warmup_steps": 3}}, "labeler needs a rule to ask, got rule=None; give a TeacherRule or PrototypeRule"),
        *(
            ({"rule": rule, "recipe": recipe, "labeler": None}, "rule needs a labeler that asks it, got labeler=None")
            for rule, recipe in ((TeacherRule(ESTIMATES), "default"), (PrototypeRule(3), "paper"))
        ),
        (
            {"labeler": {"warmup_steps": 3}, "objective": {"lambda_pseudo": 0}, "recipe": "paper"},
            "labeler needs a rule to ask, got lambda_pseudo=0; leave one of both out",
        ),
        ({"rule": PrototypeRule(3), "objective": {"lambda_pseudo": 0}}, "rule needs a labeler that asks it, got lambda_pseudo=0"),
        ({"labeler": {"rule": PrototypeRule(3)}}, "labeler must be settings beside the rule, got a PrototypeRule in it"),
        ({"expected_positives": 1.5}, "expected_positives needs a rule that uses it, got rule=None; GlobalHead.fit and"),
        ({"contrast": {"temperature": 0.2}}, "contrast needs a factor, such as objective="),
        ({"bank": {"momentum": 0.9}}, "bank needs contrast or a rule to read it"),
        ({"distillation": {"temperature": 2.0}}, "distillation needs a factor and two heads: pooler="),
        ({"matching": {"reduction": "sum"}}, "matching must have reduction='mean', got 'sum'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_from_text_refuses_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^TRMObjective: {message}"):
        tl.TRMObjective.from_text(**{"text": torch.eye(3), "total_steps": 200, **options})


def test_from_text_refuses_what_a_part_does_not_take() -> None:
    with pytest.raises(TypeError, match="dropouts"):
        tl.TRMObjective.from_text(torch.eye(3), total_steps=200, pooler={"dropouts": 0.1})
    with pytest.raises(ValueError, match="PseudoLabeler: rule must have num_classes = 4, got 3"):
        tl.TRMObjective.from_text(torch.eye(4), total_steps=200, rule=TeacherRule(ESTIMATES))


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


def test_ids_reach_the_output() -> None:
    module, x, ids = small(), objective_inputs(6, CLASSES), torch.arange(6)
    assert module(**x, ids=ids).ids is ids and module(**x).ids is None
    with pytest.raises(ValueError, match=r"TRMObjective: ids must have shape \(B\) = \(6\), got \(5,\)"):
        module(**x, ids=torch.arange(5))


WRONG: list[tuple[Any, str]] = [
    (lambda: small(labeler=tl.PseudoLabeler(CLASSES)), "bank must be given for PrototypeRule, which compares"),
    (lambda: small(bank=tl.PrototypeBank(CLASSES, WIDTH + 1)), "bank must have the pooler's dim = 8, got 9"),
    (lambda: small(bank=tl.PrototypeBank(CLASSES + 1, WIDTH)), "all parts must have the same num_classes, got .*'bank': 6"),
    (lambda: small(distillation=tl.RegionDistillationLoss(reduction="sum")), "distillation must have reduction='mean'"),
    (lambda: small(lambda_region=-1.0), "lambda_region must be at least 0"),
    (
        lambda: tl.TRMObjective(tl.RegionPooler(3, 8), tl.TextRegionMatchingLoss(4)),
        "all parts must have the same num_classes, got {'pooler': 3, 'matching': 4}",
    ),
]


@pytest.mark.parametrize("build, message", WRONG, ids=lambda value: str(value)[:20].replace(" ", "-"))
def test_refuses_parts_that_do_not_fit(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^TRMObjective: {message}"):
        build()


def test_no_class_identity_leaks_into_the_features() -> None:
    """On noise the query level says "class c" hardly more often than the region level, before and after training on it."""
    torch.manual_seed(0)
    classes, width, tokens = 20, 64, 4
    text, test = torch.randn(classes, width), torch.randn(128, tokens, width)
    module = tl.TRMObjective.from_text(text, total_steps=30, recipe="paper")
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
