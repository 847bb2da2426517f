"""ChunkedTRMObjective: some classes at a time have the results of all at once, in less memory."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import trm_losses as tl
from tests.helpers.cases.bank import filled_bank
from tests.helpers.cases.objective import objective, objective_inputs
from tests.helpers.values import CLASSES, TOKENS, WIDTH, labels, normal
from tests.helpers.watch import Watch
from trm_losses import functional as TF
from trm_losses import regions
from trm_losses.pseudo import TeacherRule


def taught() -> tl.PseudoLabeler:
    return tl.PseudoLabeler(CLASSES, TeacherRule(torch.rand(20, CLASSES, generator=torch.Generator().manual_seed(1))))


# Which parts of the objective, whose decisions and gates are at work, are others or missing; and settings of the pooler.
ALONE = dict.fromkeys(("distillation", "contrast", "bank", "labeler"))
CHUNKED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alone": (ALONE, {}),
    "defaults": ({}, {}),
    "contrast alone": ({**ALONE, "contrast": tl.MultimodalContrastiveLoss()}, {}),
    "bank alone": ({**ALONE, "bank": filled_bank()}, {}),
    "one head": ({}, {"query_head": False}),
    "one head and a teacher": ({"labeler": taught()}, {"query_head": False}),
    "one head, a teacher and no contrast": ({"labeler": taught(), "contrast": None}, {"query_head": False}),
    "free queries": ({}, {"query": "free"}),
    "a teacher": ({"labeler": taught()}, {}),
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

    def run(**in_chunks: int) -> list[Any]:
        module = objective(pooler=pooler, **in_chunks)
        for key, part in copy.deepcopy(parts).items():
            setattr(module, key, part)
        module.double()
        results: list[Any] = []
        for step in range(2):
            given = {**x, "ids": x["ids"] + 6 * step}
            given |= {key: x[key].clone().requires_grad_() for key in ("tokens", "text")}
            output = module(**given)
            assert isinstance(output.features, Tensor) == (not in_chunks)
            module.zero_grad()
            output.loss.backward()
            results += [output.loss, *output.terms.values(), output.logits, output.region_logits, *(output.pseudo or ())]
            results += [p.grad for p in (given["tokens"], given["text"], *module.parameters())]
            module.update(output)
            results += [x.clone() for x in module.buffers()]
        return results

    actual, expected = run(class_chunk=chunk), run()
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

    def largest(class_chunk: int) -> tuple[int, int]:
        module = tl.ChunkedTRMObjective.from_text(text, total_steps=10, recipe="paper")
        module.class_chunk = class_chunk
        with mock.patch.object(TF, "prototype_similarities", wraps=TF.prototype_similarities) as compared, Watch() as seen:
            output = module(tokens, text, y)
            output.loss.backward()
            module.update(output)
        return max(seen.bytes) // 4, compared.call_count

    whole, in_chunks = largest(classes), largest(chunk)
    assert whole[0] >= 4 * batch * classes * width
    assert in_chunks[0] < batch * classes * width
    assert (whole[1], in_chunks[1]) == (1, classes // chunk)


def test_the_size_of_a_chunk_is_chosen_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = objective(class_chunk=None).double(), objective_inputs(4, CLASSES)
    assert isinstance(module(**x).features, Tensor)
    monkeypatch.setattr(regions, "_WHOLE", 0)
    monkeypatch.setattr(regions, "_BLOCK", 2 * 4 * 4 * (WIDTH + TOKENS))  # two classes
    with mock.patch.object(module.pooler, "map_classes", wraps=module.pooler.map_classes) as mapped:
        assert isinstance(module(**x).features, TF.Entries)
    assert mapped.call_args.args[2] == 2


def test_regions_that_are_given_are_taken_whole() -> None:
    module, x = objective(class_chunk=2).double(), objective_inputs(4, CLASSES)
    found = module.pooler(x["tokens"], x["text"])
    output = module(found, x["text"], x["targets"])
    assert output.features is found.query
    torch.testing.assert_close(output.loss, module(**x).loss)


def test_refuses_an_empty_chunk() -> None:
    with pytest.raises(ValueError, match="^ChunkedTRMObjective: class_chunk must be at least 1, got 0"):
        objective(class_chunk=0)
