"""Hostile arguments: every call gives the right value or refuses by name; it writes to no argument and never gives NaN.

And a hostile device: one without float64.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import trm_losses as tl
from tests.helpers.cases import CASES
from tests.helpers.cases.bank import filled_bank
from tests.helpers.cases.baselines import BASELINES, baseline_inputs
from tests.helpers.cases.global_head import head_inputs, unfitted
from tests.helpers.cases.labeler import filled_labeler
from tests.helpers.cases.objective import head
from tests.helpers.values import (
    TOKENS,
    WIDTH,
    Inputs,
    generator,
    image_labels,
    normal,
    region_text,
    shaken,
    token_text,
    two_logits,
    with_padding,
    with_prototypes,
    with_weights,
)
from tests.helpers.values import labels as given_labels
from trm_losses import baselines, labels, metrics
from trm_losses import functional as TF
from trm_losses._precision import unit

EXAMPLES = int(os.environ.get("TRM_LOSSES_EXAMPLES", "20000"))


class Part(NamedTuple):
    """Something to call. ``smooth``: a rounding moves its value by a rounding; ``nan``: it may say NaN; ``pure``: it looks at no
    values."""

    owner: str
    build: Callable[[int], Any]
    inputs: Callable[[int, int], Inputs]
    call: Callable[[Any, Inputs], Any]
    smooth: bool = True
    nan: bool = False
    pure: bool = False


# A rounding may turn a decision over, and with it the value.
DECIDE = tuple(
    """
    PseudoLabeler TRMObjective ChunkedTRMObjective LargeLoss EMAPLLoss SPLCLoss VLPLLoss GPRLoss PartialASLLoss
    PrototypeBank
    """.split()
)
PARTS = {
    case.name: Part(case.owner, case.build, case.inputs, case.call, not case.owner.startswith(DECIDE))
    for case in CASES
    if case.owner != "PrototypeBank" and (case.owner != "PromptLearner" or case.inputs(1, 1))
}


def function(owner: str, call: Callable[..., Any], inputs: Callable[[int, int], Inputs], **options: Any) -> Part:
    return Part(owner, lambda c: None, inputs, lambda _, x: call(**x), **options)


def method(owner: str, build: Callable[[int], Any], name: str, inputs: Callable[[int, int], Inputs], **options: Any) -> Part:
    def call(module: Any, x: Inputs) -> Any:
        given = getattr(module, name)(**x)
        return tuple(b.clone() for b in module.buffers()) if given is None else given

    return Part(owner, build, inputs, call, **options)


def only(inputs: Callable[[int, int], Inputs], *names: str, **more: Callable[[int, int], Any]) -> Callable[[int, int], Inputs]:
    return lambda b, c: {**{k: v for k, v in inputs(b, c).items() if k in names}, **{k: f(b, c) for k, f in more.items()}}


def hard(b: int, c: int) -> Tensor:
    return given_labels(b, c, seed=3, soft=False)


def padding(b: int) -> Tensor:
    return torch.arange(b * TOKENS).view(b, TOKENS) % 4 == 3


def scored(b: int, c: int) -> Inputs:
    return {"scores": normal(b, c, seed=1), "targets": hard(b, c)}


def logits(b: int, c: int) -> Tensor:
    return 2 * normal(b, c, seed=1)


def past(b: int, c: int) -> Inputs:
    return {"regions": normal(b, c, WIDTH, seed=1), "targets": given_labels(b, c, seed=3)}


def pictured(b: int, c: int) -> Inputs:
    return {**head_inputs(b, c), "targets": given_labels(b, c, seed=3)}


def rated(b: int, c: int) -> Inputs:
    return {"scores": torch.sigmoid(normal(b, c, seed=1)), "targets": hard(b, c)}


def calibrated(module: tl.Calibration, x: Inputs) -> tuple[Tensor, ...]:
    return tuple(buffer.clone() for buffer in module.fit(**x).buffers())


def fitted(module: tl.GlobalHead, x: Inputs) -> tuple[Tensor, ...]:
    batch = x["tokens"], x["penultimate"], x["targets"], x["key_padding_mask"]
    return tuple(buffer.clone() for buffer in module.fit([batch]).buffers(recurse=False))


def finished(module: tl.TRMHead, x: Inputs) -> tuple[Tensor, ...]:
    module.finish([(x["tokens"], None, x["targets"], x["key_padding_mask"])])
    assert module.calibration is not None
    return module.calibration.scale, module.calibration.shift


PARTS |= {
    "from_ternary": function("from_ternary", labels.from_ternary, lambda b, c: {"labels": hard(b, c)}),
    "from_positive_only": function(
        "from_positive_only", labels.from_positive_only, lambda b, c: {"labels": hard(b, c).clamp(min=0)}
    ),
    "from_nan": function("from_nan", labels.from_nan, lambda b, c: {"labels": given_labels(b, c, seed=3)}),
    "known_fraction": function("known_fraction", labels.known_fraction, lambda b, c: {"targets": hard(b, c)}),
    "hide_labels": function("hide_labels", labels.hide_labels, lambda b, c: {"targets": hard(b, c)}),
    "keep_single_positive": function("keep_single_positive", labels.keep_single_positive, lambda b, c: {"targets": hard(b, c)}),
    "move_positives": function(
        "move_positives",
        lambda targets, truth: labels.move_positives(targets, truth, 0.5),
        lambda b, c: {"targets": hard(b, c), "truth": hard(b, c).clamp(min=0)},
    ),
    "class_weights": function("class_weights", labels.class_weights, lambda b, c: {"targets": given_labels(b, c, seed=3)}),
    "sample_classes": function(
        "sample_classes",
        lambda targets: labels.sample_classes(targets, 3, generator=generator()),
        lambda b, c: {"targets": hard(b, c)},
    ),
    "average_precision": function("average_precision", metrics.average_precision, scored, smooth=False, nan=True),
    "mean_average_precision": function("mean_average_precision", metrics.mean_average_precision, scored, smooth=False, nan=True),
    **{
        f"f1_scores, {' '.join(options)}": function(
            "f1_scores",
            partial(metrics.f1_scores, **options),
            scored,
            smooth=False,
            nan=True,  # type: ignore[arg-type]
        )
        for options in ({"threshold": 0.1}, {"top_k": 1})
    },
    "calibration_error": function("calibration_error", metrics.calibration_error, rated, smooth=False, nan=True),
    "choose_thresholds": function("choose_thresholds", tl.choose_thresholds, rated, smooth=False),
    "calibration, fit": Part(
        "Calibration", tl.Calibration, lambda b, c: {"logits": logits(b, c), "targets": hard(b, c)}, calibrated, smooth=False
    ),
    "evaluate": function(
        "evaluate",
        lambda scores, targets: tuple(metrics.evaluate(scores, targets, threshold=0.0).values()),
        scored,
        smooth=False,
        nan=True,
    ),
    "ROLE, start": function(
        "ROLELoss",
        lambda targets: baselines.ROLELoss(targets, 1.5, generator=generator()).estimates.detach(),
        lambda b, c: {"targets": given_labels(b, c, seed=3)},
    ),
    "matching, loss of logits": method(
        "TextRegionMatchingLoss",
        lambda c: tl.TextRegionMatchingLoss(c),
        "loss",
        only(with_weights, "targets", "weights", logits=logits),
    ),
    "matching, calibrate_bias": Part(
        "TextRegionMatchingLoss",
        lambda c: tl.TextRegionMatchingLoss(c),
        only(region_text, "regions", "text"),
        lambda m, x: (m.calibrate_bias(**x, prior=0.2), m.bias.detach().clone())[1],
    ),
    "bank, update": method(
        "PrototypeBank",
        lambda c: tl.PrototypeBank(c, WIDTH),
        "update",
        lambda b, c: {**past(b, c), "weights": torch.sigmoid(logits(b, c))},
        smooth=False,
    ),
    "bank, update with text": method("PrototypeBank", lambda c: tl.PrototypeBank(c, WIDTH), "update", with_weights),
    "labeler, update": Part(
        "PseudoLabeler",
        filled_labeler,
        past,
        lambda m, x: (m.update(x["regions"], x["targets"], filled_bank(m.num_classes)), tuple(b.clone() for b in m.buffers()))[1],
        smooth=False,
    ),
    "global head, fit": Part("GlobalHead", unfitted, pictured, fitted, smooth=False),
    "pooler, entries": Part(
        "RegionPooler",
        lambda c: shaken(tl.RegionPooler(c, WIDTH, num_heads=2)),
        lambda b, c: {**token_text(b, c), "mask": hard(b, c) == 1},
        lambda m, x: m.entries(m.prepare(x["tokens"], x["text"]), x["mask"]).features,
    ),
    "head, finish": Part("TRMHead", head, lambda b, c: {**with_padding(b, c), "targets": hard(b, c)}, finished, smooth=False),
    "head, predict": Part(
        "TRMHead",
        head,
        only(with_padding, "tokens", "key_padding_mask"),
        lambda m, x: m.predict(x["tokens"], key_padding_mask=x["key_padding_mask"]),
    ),
    **{
        f"{name}, update": method(case.owner, case.build, "update", baseline_inputs, smooth=False)
        for name, case in BASELINES.items()
        if case.state and not name.startswith("VLPL") and name != "ROLE"
    },
    "saliency_map": Part(
        "saliency_map",
        lambda c: None,
        lambda b, c: {"saliency": normal(b, c, TOKENS)},
        lambda _, x: TF.saliency_map(x["saliency"], (2, TOKENS // 2)),
        nan=True,
    ),
}


# Values are the caller's: of functions, twists of values are finite ones.
PARTS |= {
    f"function {name}": function(name, call, inputs, pure=True)
    for name, call, inputs in (
        ("asymmetric_loss", TF.asymmetric_loss, only(with_weights, "targets", "weights", logits=logits)),
        (
            "text_region_logits",
            lambda **x: TF.text_region_logits(**x, scale=5.0),
            lambda b, c: {"regions": normal(b, c, WIDTH), "text": normal(c, WIDTH), "bias": normal(c)},
        ),
        (
            "region_attention",
            lambda **x: TF.region_attention(**x, scale=2.0, num_heads=2),
            lambda b, c: {
                "queries": normal(c, WIDTH, seed=1),
                "keys": normal(b, TOKENS, WIDTH, seed=2),
                "query_weight": normal(WIDTH, WIDTH, seed=3),
                "key_weight": normal(WIDTH, WIDTH, seed=4),
                "key_padding_mask": padding(b),
            },
        ),
        ("boost_logits", TF.boost_logits, lambda b, c: {"token_logits": normal(b, TOKENS, c), "key_padding_mask": padding(b)}),
        (
            "transport_attention",
            TF.transport_attention,
            lambda b, c: {"similarity": torch.tanh(normal(b, c, TOKENS)), "key_padding_mask": padding(b)},
        ),
        (
            "sinkhorn_attention",
            TF.sinkhorn_attention,
            lambda b, c: {"scores": normal(b, c, TOKENS), "mass": normal(b, TOKENS, seed=1).softmax(dim=-1)},
        ),
        ("standardise", TF.standardise, lambda b, c: {"scores": normal(b, c)}),
        ("region_distillation", TF.region_distillation, two_logits),
        ("multimodal_contrastive", lambda **x: tuple(TF.multimodal_contrastive(**x).values()), with_prototypes),
        ("multi_label_contrastive", TF.multi_label_contrastive, image_labels),
        ("class_sums", TF.class_sums, lambda b, c: {"features": normal(b, c, WIDTH), "weights": normal(b, c).clamp(min=0)}),
        (
            "update_prototypes",
            TF.update_prototypes,
            lambda b, c: {
                "prototypes": unit(normal(c, WIDTH)),
                "count": torch.arange(c),
                "sums": normal(c, WIDTH, seed=2),
                "mass": torch.arange(c).double(),
            },
        ),
        (
            "prototype_similarities",
            TF.prototype_similarities,
            lambda b, c: {
                "features": normal(b, c, WIDTH),
                "visual": normal(c, WIDTH, seed=2),
                "text": normal(c, WIDTH, seed=3),
                "seen": torch.arange(c) != 1,
            },
        ),
        (
            "calibrate",
            TF.calibrate,
            lambda b, c: {
                "similarity": normal(b, c),
                "mean_present": normal(c),
                "mean_absent": normal(c, seed=2),
                "gap": torch.ones(c),
            },
        ),
    )
}


# What may be done to an argument ------------------------------------------------------------------------------------------

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OTHERS = (torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)
LAYOUTS = ("transposed", "strided", "offset", "expanded")
VALUES = (float("nan"), float("inf"), -float("inf"), 1e-42, -1e-42, 1e6, -1e6, 0.0, -0.0, 1.0, -1.0, 0.5, 2.0, -2.0, 7.0)
SHAPES = ("empty", "dropped", "none", "extra", "longer", "shorter")
OBJECTS = (None, 3, 2.5, "text", [], np.ones((2, 2)))


def laid(x: Tensor, layout: str) -> Tensor:
    """The same values in another place; expanded: the first row in the place of all."""
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1) if x.ndim else x
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, 3)], dim=-1)[..., 0]
    if layout == "offset":
        return torch.cat([torch.ones_like(x).flatten()[:3], x.flatten()])[min(3, x.numel()) :].view(x.shape)
    return x[:1].expand(x.shape) if x.ndim and len(x) else x


def shaped(x: Tensor, shape: str, dim: int) -> Tensor:
    dim = dim % max(1, x.ndim)
    if shape == "none":
        return x.new_ones(())
    if shape == "extra" or not x.ndim:
        return x[None]
    if shape == "dropped":
        return x.select(dim, 0) if x.shape[dim] else x.new_ones(x.shape[:dim] + x.shape[dim + 1 :])
    if shape == "empty":
        return x.narrow(dim, 0, 0)
    if shape == "longer":
        return torch.cat([x, x.narrow(dim, 0, min(1, x.shape[dim]))], dim=dim)
    return x.narrow(dim, 0, max(0, x.shape[dim] - 1))


def placed(x: Tensor, place: int, value: float) -> Tensor:
    """One entry, or with a negative place all of them, at a value as near as the type has it."""
    x = x.detach().clone(memory_format=torch.contiguous_format)
    if x.numel():
        x.view(-1)[slice(None) if place < 0 else place % x.numel()] = torch.tensor(value, dtype=torch.float64).to(x.dtype)
    return x


class Twist(NamedTuple):
    """``kind`` of change and with what; the first three kinds leave an argument as good as it was."""

    kind: str
    what: Any = None
    where: int = 0

    def __call__(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if self.kind == "layout":
            return laid(x, self.what)
        if self.kind == "grad":
            return x.detach().requires_grad_() if x.is_floating_point() and x.dtype in FLOATS else x
        if self.kind == "dtype":
            return x.to(self.what)
        if self.kind == "value":
            return placed(x, self.where, self.what)
        return shaped(x, self.what, self.where) if self.kind == "shape" else self.what


twists = st.one_of(
    st.builds(Twist, st.just("layout"), st.sampled_from(LAYOUTS)),
    st.just(Twist("grad")),
    st.builds(Twist, st.just("value"), st.sampled_from(VALUES), st.integers(-1, 40)),
    st.builds(Twist, st.just("dtype"), st.sampled_from((*FLOATS, *OTHERS))),
    st.builds(Twist, st.just("shape"), st.sampled_from(SHAPES), st.integers(0, 2)),
    st.builds(Twist, st.just("object"), st.sampled_from(OBJECTS)),
)


class Plan(NamedTuple):
    part: str
    batch: int
    classes: int
    dtype: torch.dtype
    twists: dict[str, list[Twist]]


@st.composite
def plans(draw: Any) -> Plan:
    part = draw(st.sampled_from(sorted(PARTS)))
    batch, classes = draw(st.sampled_from([4, 0, 1, 2])), draw(st.sampled_from([5, 1, 2, 3]))
    names = sorted(PARTS[part].inputs(4, 3))
    chosen = draw(st.lists(st.tuples(st.sampled_from(names), twists), max_size=3)) if names else []
    if PARTS[part].pure:
        chosen = [(k, t) for k, t in chosen if t.kind != "value" or (0 if k in ("count", "mass") else -1) <= t.what <= 1]
    changes: dict[str, list[Twist]] = {}
    for name, twist in chosen:
        changes.setdefault(name, []).append(twist)
    return Plan(part, batch, classes, draw(st.sampled_from(FLOATS)), changes)


# What says nothing of no images, and refuses them.
NOT_EMPTY = (
    *"average_precision mean_average_precision f1_scores evaluate calibration_error choose_thresholds known_fraction".split(),
    *"hide_labels keep_single_positive move_positives class_weights sample_classes ROLELoss".split(),
    *("calibration, fit", "matching, calibrate_bias", "global head, fit"),
)


# What must hold ---------------------------------------------------------------------------------------------------------

TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3, torch.float16: 8e-2, torch.bfloat16: 3e-1}


def bits(x: Tensor) -> bytes:
    return x.detach().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8).numpy().tobytes()


def look(x: Any) -> Any:
    """Everything about an argument that a call must leave as it is."""
    if not isinstance(x, Tensor):
        return repr(x)
    grad = None if x.grad is None else (id(x.grad), bits(x.grad))
    return bits(x), x.shape, x.stride(), x.dtype, x.requires_grad, x._version, grad


def state(module: Any) -> dict[str, Any]:
    return {k: bits(v) for k, v in module.state_dict().items()} if isinstance(module, nn.Module) else {}


def results(value: Any) -> tuple[Tensor, ...]:
    return tuple(map(torch.as_tensor, value)) if isinstance(value, tuple) else (torch.as_tensor(value),)


def as_drawn(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def check(plan: Plan) -> None:
    part = PARTS[plan.part]
    torch.manual_seed(0)
    module = part.build(plan.classes)
    module = module.to(plan.dtype) if isinstance(module, nn.Module) else module
    inputs: dict[str, Any] = {k: as_drawn(x, plan.dtype) for k, x in part.inputs(max(2, plan.batch), plan.classes).items()}
    if plan.batch < 2:  # the makers of inputs want two images
        rows = {k for k, x in part.inputs(4, plan.classes).items() if len(x) == 4 and plan.classes != 4}
        inputs = {k: x[: plan.batch] if k in rows else x for k, x in inputs.items()}
    for name, changes in plan.twists.items():
        for twist in changes:
            inputs[name] = twist(inputs[name])
    harmless = all(t.kind in ("layout", "grad") for changes in plan.twists.values() for t in changes)
    plain = copy.deepcopy(module), {k: x.detach().clone().contiguous() if isinstance(x, Tensor) else x for k, x in inputs.items()}
    for x in inputs.values():
        if isinstance(x, Tensor) and x.requires_grad:
            x.grad = torch.full_like(x, 0.25)
    before, held = {k: look(x) for k, x in inputs.items()}, state(module)
    try:
        given = results(part.call(module, inputs))
    except (TypeError, ValueError) as error:
        text = str(error)
        assert re.match(r"\w+: ", text), f"says not who refuses: {text}"
        named = {word for name in inputs for word in (name, name.split(".")[-1])} | {"queries", "batches"}
        assert any(re.search(rf"\b{name}\b", text) for name in named), f"names no argument: {text}"
        nothing = plan.batch == 0 and {plan.part, part.owner} & {*NOT_EMPTY}
        one_kind = "targets must hold known" in text  # of a few labels, or of the first row in the place of all
        assert not harmless or nothing or one_kind, f"refuses what is in order: {text}"
        assert held == state(module), "a refused call changed the state"
        assert before == {k: look(x) for k, x in inputs.items()}, "a refused call changed an argument"
        return
    assert before == {k: look(x) for k, x in inputs.items()}, "changed an argument"
    finite = all(torch.isfinite(x).all() for x in given)
    assert finite or part.nan, "not finite"
    large = any(t.kind == "value" and abs(t.what) > 10 for changes in plan.twists.values() for t in changes)
    exact = large or not part.smooth
    twin, clean = plain
    if not exact:
        twin = twin.double() if isinstance(twin, nn.Module) else twin
        clean = {k: x.double() if isinstance(x, Tensor) and x.dtype in FLOATS else x for k, x in clean.items()}
    types = [plan.dtype, *(x.dtype for x in inputs.values() if isinstance(x, Tensor) and x.dtype in FLOATS)]
    tolerance = max(TOLERANCE[dtype] for dtype in types)
    for one, two in zip(given, results(part.call(twin, clean)), strict=True):
        one, two = one.detach().double(), two.detach().double()
        assert one.shape == two.shape
        room = tolerance * (1 + two.nan_to_num().abs().max()) if two.numel() else 0
        assert torch.equal(one.isnan(), two.isnan()) and ((one - two).nan_to_num().abs() <= room).all(), (
            f"{one.flatten()[:4].tolist()} is not {two.flatten()[:4].tolist()}"
        )
    attached = [x.sum() for x in given if x.requires_grad]
    if attached:
        learned = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
        if isinstance(module, nn.Module):
            learned += [p for p in module.parameters() if p.requires_grad]
        for x in learned:
            x.grad = None
        total = torch.stack([x.float() for x in attached]).sum()
        for grad in torch.autograd.grad(total, learned, allow_unused=True):
            fits = grad is None or torch.isfinite(grad.float()).all() or (large and grad.dtype == torch.float16)
            assert fits, "a gradient is not finite"
        assert {k: look(x)[:5] for k, x in inputs.items() if isinstance(x, Tensor)} == {
            k: v[:5] for k, v in before.items() if isinstance(inputs[k], Tensor)
        }, "the backward pass changed an argument"


# Labels in every type ----------------------------------------------------------------------------------------------------

LABELS = {"targets", "labels"}


def test_every_part_that_takes_labels_is_among_them() -> None:
    def takes(thing: Any) -> bool:
        given = inspect.getmembers(thing, inspect.isfunction) if inspect.isclass(thing) else [("", thing)]
        return any(name != "__new__" and LABELS & set(inspect.signature(f).parameters) for name, f in given)

    public = {n: getattr(m, n) for m in (tl, baselines, TF, labels, metrics) for n in m.__all__}
    wanted = {n for n, thing in public.items() if (inspect.isclass(thing) or inspect.isfunction(thing)) and takes(thing)}
    wanted -= {"write_features"}  # which writes files: test_given_features.py
    assert len(wanted) > 30 and wanted <= {part.owner for part in PARTS.values() if LABELS & set(part.inputs(4, 3))}


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("name", [name for name, part in PARTS.items() if LABELS & set(part.inputs(4, 3))])
def test_labels_mean_the_same_in_every_type(name: str, validate: bool) -> None:
    """Also -1 in uint8, which is 255 there; and what a rounding has put outside [0, 1]."""
    part, inputs = PARTS[name], PARTS[name].inputs(4, 5)
    (key,) = LABELS & set(inputs)

    def called(y: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        module = part.build(5)
        for each in module.modules() if isinstance(module, nn.Module) else ():
            if hasattr(each, "validate"):
                each.validate = validate
        return results(part.call(module, {**inputs, key: y}))

    def agree(y: Tensor, expected: tuple[Tensor, ...]) -> None:
        for one, two in zip(called(y), expected, strict=True):
            torch.testing.assert_close(one.double(), two.double(), rtol=1e-6, atol=1e-6, equal_nan=True)

    y = inputs[key]
    y = torch.where((y > 0) & (y < 1), 1.0, y)
    expected = called(y)
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.float16, torch.bfloat16, torch.float32):
        agree(y.long().to(dtype), expected)
    if validate and not part.pure and name not in ("from_ternary", "from_positive_only"):
        off = torch.where(y > 0, 1 + 2.0**-52, torch.where(y == 0, -(2.0**-52), y))
        assert (off != y).any()
        agree(off, expected)
    agree((y > 0).to(torch.bool), called((y > 0).double()))


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(plans())
def test_every_call_is_right_or_refused_by_name(plan: Plan) -> None:
    check(plan)


@pytest.mark.nightly
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), report_multiple_bugs=False)
@given(plans())
def test_every_call_is_right_or_refused_by_name_all_night(plan: Plan) -> None:
    check(plan)


class WithoutFloat64(Tensor):
    """A tensor on a device without float64, as Apple's GPU: it refuses any such result until it is brought to the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> WithoutFloat64:
        made = Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), dtype=held.dtype, device=held.device)
        made.held = held
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.cpu, Tensor.tolist):
            args = [args[0].held]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def placed(x: Any) -> Any:
            if not isinstance(x, Tensor) or isinstance(x, cls):
                return x
            assert x.dtype != torch.float64, f"{func} gives float64"
            return cls(x)

        held = tree_map(lambda x: x.held if isinstance(x, cls) else x, [args, kwargs or {}])
        return tree_map(placed, func(*held[0], **held[1]))


def loss_of(given: tuple[Tensor, ...]) -> Tensor | None:
    attached = [x.sum() for x in given if x.requires_grad]
    return torch.stack(attached).sum() if attached else None


@pytest.mark.parametrize("name", sorted(PARTS))
def test_every_call_works_on_a_device_without_float64(name: str) -> None:
    """Values and gradients are those of the CPU."""
    part = PARTS[name]
    torch.manual_seed(0)
    module = part.build(5)
    inputs = {key: as_drawn(x, torch.float32) for key, x in part.inputs(4, 5).items()}
    there = {key: WithoutFloat64(x.clone()) for key, x in inputs.items()}
    moved = module
    if isinstance(module, tl.PseudoLabels):
        module = tl.PseudoLabels(*(x.float() for x in module))
        moved = tl.PseudoLabels(*(WithoutFloat64(x) for x in module))
    if isinstance(module, nn.Module):
        moved = copy.deepcopy(module.float())
        for each in moved.modules():
            for key, p in each._parameters.items():
                each._parameters[key] = None if p is None else nn.Parameter(WithoutFloat64(p.data), p.requires_grad)
            for key, b in each._buffers.items():
                each._buffers[key] = None if b is None else WithoutFloat64(b)
    expected, actual = results(part.call(module, inputs)), results(part.call(moved, there))
    for one, two in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.detach().cpu(), two.detach(), equal_nan=True)
    losses = loss_of(actual), loss_of(expected)
    if losses[0] is not None and losses[1] is not None:
        losses[0].backward()
        losses[1].backward()
        for one, two in zip(moved.parameters(), module.parameters(), strict=True) if isinstance(module, nn.Module) else ():
            assert (one.grad is None) == (two.grad is None)
            if one.grad is not None:
                torch.testing.assert_close(one.grad.cpu(), two.grad)
