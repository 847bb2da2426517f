"""Arguments that once went through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import trm_losses as tl
from tests.helpers.cases.objective import head
from tests.helpers.values import BATCH, CLASSES, WIDTH, labels, normal, region_text
from trm_losses import baselines
from trm_losses.labels import from_ternary
from trm_losses.metrics import average_precision
from trm_losses.pseudo import TeacherRule

# Arguments ----------------------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
EIGHT = torch.float8_e4m3fn


def spoiled(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x.view(-1)[0] = value
    return x


def contrast(**more: Any) -> Any:
    return tl.MultimodalContrastiveLoss()(**{**region_text(BATCH, CLASSES), **more})


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "name, call",
    [
        ("logits", lambda w: tl.TextRegionMatchingLoss(CLASSES).loss(spoiled(torch.ones(4, CLASSES), w), labels())),
        ("init", lambda w: tl.PrototypeBank(3, 4, init=spoiled(torch.ones(3, 4), w))),
    ],
)
def test_nothing_infinite_goes_through(name: str, call: Callable[[float], Any], value: float) -> None:
    call(0.5)
    with pytest.raises(ValueError, match=f"{name} must be finite, got 1 NaN or infinite of"):
        call(value)


@pytest.mark.parametrize("dtype", [EIGHT, torch.complex64], ids=str)
def test_types_that_cannot_be_compared_are_refused_by_name(dtype: torch.dtype) -> None:
    x = region_text(BATCH, CLASSES)
    for call in (
        lambda: tl.TextRegionMatchingLoss(CLASSES)(*{**x, "targets": labels().to(dtype)}.values()),
        lambda: baselines.EMLoss()(normal(4, CLASSES), labels().to(dtype)),
        lambda: average_precision(normal(4, CLASSES), labels(soft=False).to(dtype)),
    ):
        with pytest.raises(TypeError, match=r"\w+: targets must .*bools, integers or floats, got"):
            call()
    with pytest.raises(TypeError, match="regions must be a floating-point tensor, got"):
        tl.TextRegionMatchingLoss(CLASSES)(*{**x, "regions": x["regions"].to(dtype)}.values())
    with pytest.raises(TypeError, match="from_ternary: labels must hold bools, integers or floats, got"):
        from_ternary(labels(soft=False).to(dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool], ids=str)
def test_places_and_ids_are_int64(dtype: torch.dtype) -> None:
    """torch reads places in uint8 as a mask."""
    z, rows, own = normal(2, WIDTH), torch.tensor([0, 1]), torch.tensor([1, 0])
    labeler = tl.PseudoLabeler(CLASSES, TeacherRule(torch.ones(4, CLASSES)))
    for name, call in (
        ("regions.row", lambda: contrast(regions=tl.functional.Entries(z, rows.to(dtype), own))),
        ("regions.own", lambda: contrast(regions=tl.functional.Entries(z, rows, own.to(dtype)))),
        ("ids", lambda: labeler(None, labels(), tl.PrototypeBank(CLASSES, WIDTH), ids=torch.arange(4).to(dtype))),
    ):
        with pytest.raises(TypeError, match=rf"\w+: {name} must be int64, got {dtype}"):
            call()


@pytest.mark.parametrize(
    "call",
    [
        lambda word: tl.functional.asymmetric_loss(normal(4, CLASSES), labels(), reduction=word),
        lambda word: tl.functional.region_distillation(normal(4, CLASSES), normal(4, CLASSES), reduction=word),
        lambda word: tl.TextRegionMatchingLoss(CLASSES).loss(normal(4, CLASSES), labels(), reduction=word),
    ],
)
def test_a_reduction_is_a_word_that_is_known(call: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"\w+: reduction must be one of 'none', 'mean', 'sum', got 'avg'"):
        call("avg")


def test_names_of_classes_are_words() -> None:
    """Tensors of equal numbers are not equal in a set."""
    parts, numbers = (tl.RegionPooler(2, 4), tl.TextRegionMatchingLoss(2), torch.ones(2, 4)), cast(Any, torch.zeros(2))
    with pytest.raises(TypeError, match="TRMHead: class_names must be str, got Tensor"):
        tl.TRMHead(*parts, numbers)


def test_classes_of_prompts_are_places() -> None:
    prompts = tl.PromptLearner("fixed", text=torch.eye(3))
    assert torch.equal(prompts(torch.tensor([2, 0], dtype=torch.int32)), torch.eye(3)[[2, 0]])
    for classes in ([3], [-1], [0, 7]):
        with pytest.raises(ValueError, match="PromptLearner: classes must be from 0 to num_classes - 1 = 2, got"):
            prompts(torch.tensor(classes))
    with pytest.raises(TypeError, match="PromptLearner: classes must be int64 or int32, got torch.float32"):
        prompts(torch.ones(1))


def test_a_mask_of_entries_is_bool() -> None:
    pooler = tl.RegionPooler(2, 4)
    prepared = pooler.prepare(normal(1, 3, 4).float(), normal(2, 4).float())
    with pytest.raises(TypeError, match="RegionPooler: mask must be bool, True at the entries that are read, got torch.float32"):
        pooler.entries(prepared, torch.ones(1, 2))


def test_nothing_is_a_batch_too() -> None:
    """No classes, no images."""
    pooler = tl.RegionPooler(2, 4)
    regions = pooler(normal(2, 3, 4).float(), torch.ones(0, 4))
    assert regions.query.shape == (2, 0, 4)
    loss = baselines.LargeLoss(scheme="correct_permanently", num_samples=3, num_classes=2)
    loss.begin_epoch(1, 2)
    nothing = torch.ones(0, 2), torch.ones(0, 2)
    assert loss(*nothing, ids=torch.arange(0)) == 0
    loss.update(*nothing, ids=torch.arange(0))
    with pytest.raises(ValueError, match=r"TextRegionMatchingLoss: regions must hold at least one image, got shape \(0, 2, 4\)"):
        tl.TextRegionMatchingLoss(2).calibrate_bias(torch.ones(0, 2, 4), torch.ones(2, 4), 0.5)
    with pytest.raises(ValueError, match=r"prototypes must have shape \(C, D\)"):
        contrast(prototypes=torch.ones(CLASSES, 0, WIDTH))


@pytest.mark.parametrize("tokens", [None, 2.5, "text"])
def test_a_head_asks_for_tensors(tokens: Any) -> None:
    module = head(3)
    with pytest.raises(TypeError, match="RegionPooler: tokens must be a torch.Tensor, got"):
        module.predict(tokens)
