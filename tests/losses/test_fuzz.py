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
from tests.helpers.cases.case import Case
from tests.helpers.cases.global_head import head_inputs, unfitted
from tests.helpers.cases.labeler import filled_labeler
from tests.helpers.cases.objective import head
from tests.helpers.compare import tensors
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


def function(
    call: Callable[..., Any], inputs: Callable[[int, int], Inputs], name: str = "", owner: str = "", **options: Any
) -> Case:
    """A case without a module."""
    owner = owner or getattr(call, "func", call).__name__  # of a partial one
    return Case(name or owner, lambda c: None, inputs, lambda _, x: call(**x), owner, **options)


def method(
    name: str, owner: str, build: Callable[[int], Any], call: str, inputs: Callable[[int, int], Inputs], **options: Any
) -> Case:
    def called(module: Any, x: Inputs) -> Any:
        given = getattr(module, call)(**x)
        return tuple(b.clone() for b in module.buffers()) if given is None else given

    return Case(name, build, inputs, called, owner, **options)


def only(inputs: Callable[[int, int], Inputs], *names: str, **more: Callable[[int, int], Any]) -> Callable[[int, int], Inputs]:
    return lambda b, c: {**{k: v for k, v in inputs(b, c).items() if k in names}, **{k: f(b, c) for k, f in more.items()}}


def hard(b: int, c: int) -> Tensor:
    return given_labels(b, c, seed=3, soft=False)


def padding(b: int) -> Tensor:
    return torch.arange(b * TOKENS).view(b, TOKENS) % 4 == 3


def targets(b: int, c: int) -> Inputs:
    return {"targets": hard(b, c)}


def scored(b: int, c: int) -> Inputs:
    return {"scores": normal(b, c, seed=1), "targets": hard(b, c)}


def logits(b: int, c: int) -> Tensor:
    return 2 * normal(b, c, seed=1)


def with_logits(b: int, c: int) -> Inputs:
    return {"logits": logits(b, c), **targets(b, c)}


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


CALLS = [
    function(labels.from_ternary, lambda b, c: {"labels": hard(b, c)}),
    function(labels.from_positive_only, lambda b, c: {"labels": hard(b, c).clamp(min=0)}),
    function(labels.from_nan, lambda b, c: {"labels": given_labels(b, c, seed=3)}),
    function(labels.known_fraction, targets),
    function(labels.hide_labels, targets),
    function(labels.keep_single_positive, targets),
    function(partial(labels.move_positives, share=0.5), lambda b, c: {**targets(b, c), "truth": hard(b, c).clamp(min=0)}),
    function(labels.class_weights, lambda b, c: {"targets": given_labels(b, c, seed=3)}),
    function(lambda targets: labels.sample_classes(targets, 3, generator=generator()), targets, owner="sample_classes"),
    function(metrics.average_precision, scored, decides=True, nan=True),
    function(metrics.mean_average_precision, scored, decides=True, nan=True),
    function(partial(metrics.f1_scores, threshold=0.1), scored, "f1_scores, threshold", decides=True, nan=True),
    function(partial(metrics.f1_scores, top_k=1), scored, "f1_scores, top_k", decides=True, nan=True),
    function(metrics.calibration_error, rated, decides=True, nan=True),
    function(tl.choose_thresholds, rated, decides=True),
    Case("calibration, fit", tl.Calibration, with_logits, calibrated, "Calibration", decides=True),
    function(
        lambda scores, targets: tuple(metrics.evaluate(scores, targets, threshold=0.0).values()),
        scored,
        owner="evaluate",
        decides=True,
        nan=True,
    ),
    function(
        lambda targets: baselines.ROLELoss(targets, 1.5, generator=generator()).estimates.detach(),
        lambda b, c: {"targets": given_labels(b, c, seed=3)},
        "ROLE, start",
        owner="ROLELoss",
    ),
    method(
        "matching, loss of logits",
        "TextRegionMatchingLoss",
        tl.TextRegionMatchingLoss,
        "loss",
        only(with_weights, "targets", "weights", logits=logits),
    ),
    Case(
        "matching, calibrate_bias",
        tl.TextRegionMatchingLoss,
        only(region_text, "regions", "text"),
        lambda m, x: (m.calibrate_bias(**x, prior=0.2), m.bias.detach().clone())[1],
        "TextRegionMatchingLoss",
    ),
    method(
        "bank, update",
        "PrototypeBank",
        lambda c: tl.PrototypeBank(c, WIDTH),
        "update",
        lambda b, c: {**past(b, c), "weights": torch.sigmoid(logits(b, c))},
        decides=True,
    ),
    method("bank, update with text", "PrototypeBank", lambda c: tl.PrototypeBank(c, WIDTH), "update", with_weights),
    Case(
        "labeler, update",
        filled_labeler,
        past,
        lambda m, x: (m.update(x["regions"], x["targets"], filled_bank(m.num_classes)), tuple(b.clone() for b in m.buffers()))[1],
        "PseudoLabeler",
        decides=True,
    ),
    Case("global head, fit", unfitted, pictured, fitted, "GlobalHead", decides=True),
    Case(
        "pooler, entries",
        lambda c: shaken(tl.RegionPooler(c, WIDTH, num_heads=2)),
        lambda b, c: {**token_text(b, c), "mask": hard(b, c) == 1},
        lambda m, x: m.entries(m.prepare(x["tokens"], x["text"]), x["mask"]).features,
        "RegionPooler",
    ),
    Case("head, finish", head, lambda b, c: {**with_padding(b, c), "targets": hard(b, c)}, finished, "TRMHead", decides=True),
    Case(
        "head, predict",
        head,
        only(with_padding, "tokens", "key_padding_mask"),
        lambda m, x: m.predict(x["tokens"], key_padding_mask=x["key_padding_mask"]),
        "TRMHead",
    ),
    *(
        method(f"{name}, update", case.owner, case.build, "update", baseline_inputs, decides=True)
        for name, case in BASELINES.items()
        if case.state and not name.startswith("VLPL") and name != "ROLE"
    ),
    function(partial(TF.saliency_map, grid=(2, TOKENS // 2)), lambda b, c: {"saliency": normal(b, c, TOKENS)}, nan=True),
]


# Values are the caller's: of functions, twists of values are finite ones.
pure = partial(function, pure=True)
CALLS += [
    pure(TF.asymmetric_loss, only(with_weights, "targets", "weights", logits=logits)),
    pure(
        partial(TF.text_region_logits, scale=5.0),
        lambda b, c: {"regions": normal(b, c, WIDTH), "text": normal(c, WIDTH), "bias": normal(c)},
    ),
    pure(
        partial(TF.region_attention, scale=2.0, num_heads=2),
        lambda b, c: {
            "queries": normal(c, WIDTH, seed=1),
            "keys": normal(b, TOKENS, WIDTH, seed=2),
            "query_weight": normal(WIDTH, WIDTH, seed=3),
            "key_weight": normal(WIDTH, WIDTH, seed=4),
            "key_padding_mask": padding(b),
        },
    ),
    pure(TF.boost_logits, lambda b, c: {"token_logits": normal(b, TOKENS, c), "key_padding_mask": padding(b)}),
    pure(TF.transport_attention, lambda b, c: {"similarity": torch.tanh(normal(b, c, TOKENS)), "key_padding_mask": padding(b)}),
    pure(TF.sinkhorn_attention, lambda b, c: {"scores": normal(b, c, TOKENS), "mass": normal(b, TOKENS, seed=1).softmax(dim=-1)}),
    pure(TF.standardise, lambda b, c: {"scores": normal(b, c)}),
    pure(TF.region_distillation, two_logits),
    pure(lambda **x: tuple(TF.multimodal_contrastive(**x).values()), with_prototypes, owner="multimodal_contrastive"),
    pure(TF.multi_label_contrastive, image_labels),
    pure(TF.class_sums, lambda b, c: {"features": normal(b, c, WIDTH), "weights": normal(b, c).clamp(min=0)}),
    pure(
        TF.update_prototypes,
        lambda b, c: {
            "prototypes": unit(normal(c, WIDTH)),
            "count": torch.arange(c),
            "sums": normal(c, WIDTH, seed=2),
            "mass": torch.arange(c).double(),
        },
    ),
    pure(
        TF.prototype_similarities,
        lambda b, c: {
            "features": normal(b, c, WIDTH),
            "visual": normal(c, WIDTH, seed=2),
            "text": normal(c, WIDTH, seed=3),
            "seen": torch.arange(c) != 1,
        },
    ),
    pure(
        TF.calibrate,
        lambda b, c: {
            "similarity": normal(b, c),
            "mean_present": normal(c),
            "mean_absent": normal(c, seed=2),
            "gap": torch.ones(c),
        },
    ),
]
PARTS = {
    case.name: case for case in (*CASES, *CALLS) if case.name != "bank" and (case.owner != "PromptLearner" or case.inputs(1, 1))
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


def loss_of(given: tuple[Tensor, ...]) -> Tensor | None:
    attached = [x.sum().float() for x in given if x.requires_grad]
    return torch.stack(attached).sum() if attached else None


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
        given = tensors(part.call(module, inputs))
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
    exact = large or part.decides
    twin, clean = plain
    if not exact:
        twin = twin.double() if isinstance(twin, nn.Module) else twin
        clean = {k: x.double() if isinstance(x, Tensor) and x.dtype in FLOATS else x for k, x in clean.items()}
    types = [plan.dtype, *(x.dtype for x in inputs.values() if isinstance(x, Tensor) and x.dtype in FLOATS)]
    tolerance = max(TOLERANCE[dtype] for dtype in types)
    for one, two in zip(given, tensors(part.call(twin, clean)), strict=True):
        one, two = one.detach().double(), two.detach().double()
        assert one.shape == two.shape
        room = tolerance * (1 + two.nan_to_num().abs().max()) if two.numel() else 0
        assert torch.equal(one.isnan(), two.isnan()) and ((one - two).nan_to_num().abs() <= room).all(), (
            f"{one.flatten()[:4].tolist()} is not {two.flatten()[:4].tolist()}"
        )
    total = loss_of(given)
    if total is not None:
        learned = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
        if isinstance(module, nn.Module):
            learned += [p for p in module.parameters() if p.requires_grad]
        for x in learned:
            x.grad = None
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
        return tensors(part.call(module, {**inputs, key: y}))

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
    expected, actual = tensors(part.call(module, inputs)), tensors(part.call(moved, there))
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
