"""What holds for every Module: one table of cases (cases.py), run by the tests here."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trm_losses as tl
from tests.helpers.cases import CASES
from tests.helpers.cases.case import Caller, Case, built, ids, through_file
from tests.helpers.cases.contrast import call_contrast
from tests.helpers.compare import agree, tensors
from tests.helpers.values import BATCH, CLASSES, Inputs, region_text
from trm_losses import baselines, pseudo
from trm_losses._state import FullPrecisionState

safetensors = pytest.importorskip("safetensors.torch")

LOSSES = [case for case in CASES if case.is_loss]
REFUSALS = [(case, key) for case in CASES for key in case.wrong]


def to(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {key: x.to(dtype) if x.is_floating_point() and key != "targets" else x.clone() for key, x in inputs.items()}


@pytest.mark.parametrize("batch, classes", [(BATCH, CLASSES), (1, CLASSES), (BATCH, 1), (1, 1)])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_value_is_the_oracles(case: Case, batch: int, classes: int) -> None:
    """Also with one sample, and with one class."""
    module, inputs = built(case, classes), case.inputs(batch, classes)
    assert case.oracle is not None
    float32_state = ("PrototypeBank", "PseudoLabeler", "TRMObjective", "PromptLearner", "GaussianDiscriminant", "Calibration")
    room = {"rtol": 2e-5, "atol": 1e-5} if case.owner.endswith(float32_state) else {}
    if case.owner == "GlobalHead":  # the minimum of a sum in single precision
        room = {"rtol": 2e-3, "atol": 2e-2}
    agree(case.call(module, inputs), case.oracle(module, inputs), **room)


@pytest.mark.parametrize("case", [case for case in CASES if case.twin], ids=ids)
def test_module_is_its_function(case: Case) -> None:
    module, inputs = built(case), case.inputs(BATCH, CLASSES)
    assert case.twin is not None
    agree(case.call(module, inputs), case.twin(module, inputs), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", [case for case in CASES if case.learns and case.smooth], ids=ids)
def test_gradcheck(case: Case) -> None:
    """Inputs and parameters together, in float64."""
    module, inputs = built(case, 3), case.inputs(3, 3)
    names = [name for name, p in module.named_parameters() if p.numel() <= 40]
    parameters = [dict(module.named_parameters())[name].detach().clone().requires_grad_() for name in names]
    learned = [inputs[key].clone().requires_grad_() for key in case.learns]

    def function(*values: Tensor) -> Any:
        state = dict(zip(names, values[len(learned) :], strict=True))
        given = {**inputs, **dict(zip(case.learns, values[: len(learned)], strict=True))}
        return torch.func.functional_call(Caller(case, module), {f"module.{k}": v for k, v in state.items()}, (given,))

    if case.owner.endswith("TRMObjective"):  # teachers and pseudo-labels carry no gradient, so the numbers would not agree
        assert isinstance(module, tl.TRMObjective)
        module.distillation = module.labeler = None
    assert torch.autograd.gradcheck(function, (*learned, *parameters), fast_mode=True)


@pytest.mark.parametrize("case, key", REFUSALS, ids=ids)
def test_refuses_by_name(case: Case, key: str) -> None:
    module, inputs = built(case), case.inputs(BATCH, CLASSES)
    spoil, error, message = case.wrong[key]
    case.call(module, inputs)
    with pytest.raises(error, match=message) as caught:
        case.call(module, spoil(inputs))
    inner = {"GlobalHead": ("GaussianDiscriminant",), "PseudoLabeler": ("TeacherRule",)}.get(case.owner, ())
    parts = (case.owner, *inner, *(("RegionPooler", "TextRegionMatchingLoss", "PseudoLabeler") if "TRM" in case.owner else ()))
    assert str(caught.value).startswith(parts)


def test_every_rule_has_a_case_and_an_oracle() -> None:
    held = {type(case.build(2).rule) for case in CASES if case.owner == "PseudoLabeler" and case.oracle is not None}
    public = [getattr(pseudo, name) for name in pseudo.__all__]
    assert {value for value in public if issubclass(value, pseudo.Rule)} - {pseudo.Rule} == held


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case, name", [(case, name) for case in CASES for name in case.finite], ids=ids)
def test_refuses_what_is_not_finite(case: Case, name: str, value: float) -> None:
    module, inputs = built(case), case.inputs(BATCH, CLASSES)
    inputs[name].view(-1)[0] = value
    name = "queries" if case.owner.endswith(("RegionPooler", "TRMObjective")) and name == "text" else name
    with pytest.raises(ValueError, match=f"{name} must be finite, got 1 NaN or infinite of"):
        case.call(module, inputs)


@pytest.mark.parametrize("case", [c for c in CASES if c.finite and hasattr(c.build(2), "validate")], ids=ids)
def test_validate_false_checks_no_values(case: Case) -> None:
    module, inputs = built(case), case.inputs(BATCH, CLASSES)
    module.validate = False  # type: ignore[assignment]
    inputs[case.finite[0]].view(-1)[0] = float("nan")
    case.call(module, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.owner != "PromptLearner"], ids=ids)
def test_module_in_another_precision(case: Case, dtype: torch.dtype) -> None:
    """Runs, computes losses in float32 at least, and running state stays float32; :mod:`test_precision` says how near it is."""
    module = built(case, dtype=torch.float32)
    floats = {key: x.clone() for key, x in module.state_dict().items() if x.is_floating_point()}
    module = module.to(dtype)
    for result in tensors(case.call(module, to(case.inputs(BATCH, CLASSES), dtype))):
        assert torch.isfinite(result).all()
        assert result.dtype in (torch.float32, torch.float64, torch.int64) or case.owner.endswith(("Pooler", "TRMHead"))
    for part in module.modules():
        if isinstance(part, FullPrecisionState):
            assert {b.dtype for b in part.buffers()} <= {torch.float32, torch.int64, torch.bool}
    if isinstance(module, FullPrecisionState):
        kept = {key: x for key, x in module.named_buffers() if x.is_floating_point()}
        assert all(torch.equal(x, floats[key]) for key, x in kept.items() if case.owner != "PrototypeBank" or key == "init")


@pytest.mark.parametrize("case", [case for case in CASES if case.compiles], ids=ids)
def test_compiles_whole(case: Case) -> None:
    """The compiled graph, which keeps every entry, gives what eager gives, which drops those that are no anchor."""
    torch._dynamo.reset()
    module, inputs = built(case), case.inputs(BATCH, CLASSES)
    run = torch.compile(Caller(case, module), fullgraph=True, backend="aot_eager")
    given, twins = ({k: x.clone().requires_grad_(k in case.learns) for k, x in inputs.items()} for _ in range(2))
    actual, expected = run(given), case.call(module, twins)
    agree(actual, tuple(e.detach() for e in tensors(expected)) if isinstance(expected, tuple) else expected)
    if case.learns:
        sum(x.square().sum() for x in tensors(actual)).backward()
        sum(x.square().sum() for x in tensors(expected)).backward()
        for key in case.learns:
            torch.testing.assert_close(given[key].grad, twins[key].grad)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_copies_agree(case: Case, copied: Any) -> None:
    module, inputs = built(case), case.inputs(BATCH, CLASSES)
    twin = copied(module)
    agree(case.call(twin, inputs), case.call(module, inputs), rtol=2e-5, atol=1e-5)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in module.parameters()}


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_state(case: Case) -> None:
    """Names are pinned; what is saved, with weights_only or as safetensors, gives a fresh module the same results."""
    module, inputs = built(case), case.inputs(BATCH, CLASSES)
    assert tuple(module.state_dict()) == case.state or set(module.state_dict()) == set(case.state)
    for state in (through_file(module.state_dict()), safetensors.load(safetensors.save(module.state_dict()))):
        torch.manual_seed(99)
        fresh = case.build(CLASSES).double()
        for tensor in fresh.state_dict().values():
            tensor.zero_()
        fresh.load_state_dict(state)
        agree(case.call(fresh, inputs), case.call(module, inputs), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_forward_writes_nothing(case: Case, training: bool) -> None:
    """Neither to its arguments nor to its own state, whatever the mode."""
    module, inputs = built(case).train(training), case.inputs(BATCH, CLASSES)
    before = {key: (x.clone(), x._version) for key, x in inputs.items()}
    case.call(module, inputs)
    assert all(torch.equal(inputs[key], x) and inputs[key]._version == v for key, (x, v) in before.items())
    if case.owner != "PrototypeBank":  # whose call is its update
        state = {key: x.clone() for key, x in module.state_dict().items()}
        case.call(module, inputs)
        assert all(torch.equal(module.state_dict()[key], x) for key, x in state.items())


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_repr_shows_settings(case: Case) -> None:
    text = repr(built(case))
    assert case.owner in text
    for part in case.shows:
        assert part in text


@pytest.mark.parametrize("case", LOSSES, ids=ids)
def test_nothing_known_is_zero_and_on_the_graph(case: Case) -> None:
    module, inputs = built(case), case.inputs(BATCH, CLASSES)
    inputs["targets"] = torch.full_like(inputs["targets"], -1.0)
    regions, text = inputs["regions"].requires_grad_(), inputs["text"].requires_grad_()
    loss = case.call(module, inputs)
    assert torch.count_nonzero(loss) == 0
    loss.sum().backward()
    for x in (regions, text, *module.parameters()):
        assert x.grad is not None
        assert torch.count_nonzero(x.grad) == 0


@pytest.mark.parametrize("targets", [0.0, 1.0, "one of each"])
@pytest.mark.parametrize("case", LOSSES, ids=ids)
def test_extreme_batches_are_finite(case: Case, targets: Any) -> None:
    """No positives, all positive, one single positive."""
    module, inputs = built(case), case.inputs(BATCH, CLASSES)
    if targets == "one of each":
        inputs["targets"] = torch.full_like(inputs["targets"], -1.0)
        inputs["targets"][1, 2], inputs["targets"][2, 3] = 1, 0
    else:
        inputs["targets"] = torch.full_like(inputs["targets"], targets)
    inputs["regions"].requires_grad_()
    loss = case.call(module, inputs).sum()
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(inputs["regions"].grad).all()
    assert loss >= 0


@pytest.mark.parametrize("case", LOSSES, ids=ids)
def test_unknown_entries_get_exactly_no_gradient(case: Case) -> None:
    module, inputs = built(case), case.inputs(BATCH, CLASSES)
    regions = inputs["regions"].requires_grad_()
    case.call(module, inputs).sum().backward()
    unknown = inputs["targets"] == -1
    assert unknown.any() and torch.count_nonzero(regions.grad[unknown]) == 0
    present = inputs["targets"] == 1
    weight = inputs.get("weights", torch.ones_like(inputs["targets"]))
    assert (regions.grad[present & (weight > 0)].abs().sum(dim=-1) > 0).all()


def test_contrast_in_float16_with_long_rows() -> None:
    """The sum that keeps an empty batch on the graph must not overflow."""
    inputs = region_text(2, 3)
    regions = torch.full((2, 3, 30000), 4.0, dtype=torch.float16, requires_grad=True)
    text = torch.ones(3, 30000)
    empty = torch.full_like(inputs["targets"], -1.0)
    loss = call_contrast(tl.MultimodalContrastiveLoss(), {"regions": regions, "text": text, "targets": empty})
    loss.backward()
    assert loss == 0 and torch.count_nonzero(regions.grad) == 0


SETTINGS: list[tuple[Any, dict[str, Any], str]] = [
    (lambda **k: tl.RegionPooler(3, 8, **k), {"num_heads": 3}, "num_heads must divide dim = 8, got 3"),
    (lambda **k: tl.RegionPooler(3, 8, **k), {"query": "fixed"}, "query must be one of 'tied', 'free', got"),
    (lambda **k: tl.RegionPooler(3, 8, **k), {"assignment": "optimal"}, "assignment must be one of 'softmax', 'transport', got"),
    (lambda **k: tl.RegionPooler(3, 8, query="free", **k), {"assignment": "transport"}, "query must be 'tied' with assignment="),
    (lambda **k: tl.RegionPooler(3, 8, **k), {"query_init": torch.ones(3, 8)}, "query_init starts free queries"),
    (
        lambda **k: tl.RegionPooler(3, 8, query="free", **k),
        {"query_init": torch.ones(3, 9)},
        r"query_init must have shape \(C, D\) = \(3, 8\), got \(3, 9\)",
    ),
    (lambda **k: tl.TextRegionMatchingLoss(3, **k), {"scale": 101.0}, "scale must be above 0 and at most 100"),
    (lambda **k: tl.TextRegionMatchingLoss(3, **k), {"reduction": "avg"}, "reduction must be one of"),
    (tl.RegionDistillationLoss, {"reduction": "avg"}, "reduction must be one of"),
    (lambda **k: tl.PrototypeBank(3, 8, **k), {"init": torch.ones(2, 8)}, r"init must have shape \(C, D\) = \(3, 8\)"),
]


# Processes that share the tests must name them alike, and a function's repr is its place in memory.
@pytest.mark.parametrize("build, settings, message", SETTINGS, ids=[f"{n}-{'-'.join(s)}" for n, (_, s, _) in enumerate(SETTINGS)])
def test_refuses_settings(build: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**settings)


NEEDED: dict[str, Any] = {"num_classes": 3, "dim": 8, "num_samples": 2, "expected_positives": 1.0}
NEEDED |= dict.fromkeys(("targets", "similarities", "scores", "estimates"), torch.ones(2, 3))
ABOVE_0 = set(
    """
    num_classes dim num_samples width num_heads tokens_per_class published_epochs warmup mlp_ratio attention_scale spread
    temperature temperature_region temperature_visual temperature_text expected_positives anchor_threshold
    """.split()
)
SHARES = set(
    """
    dropout momentum text_momentum shrinkage unknown_weight anchor_threshold smoothing label_share delta q negative_share
    confidence prior_threshold positive negative
    """.split()
)
ANY = {
    ("TextRegionMatchingLoss", "bias"),
    ("GPRLoss", "threshold"),
    *(("PartialBCELoss", name) for name in ("alpha", "beta", "gamma")),
}
NUMBERS: list[tuple[Any, str]] = []
MADE: list[Any] = []
for _kind in dict.fromkeys(getattr(module, name) for module in (tl, baselines, pseudo) for name in module.__all__):
    if inspect.isclass(_kind) and issubclass(_kind, nn.Module):
        _arguments = {k: p for k, p in inspect.signature(_kind).parameters.items() if p.kind != p.VAR_KEYWORD}
        if {k for k, p in _arguments.items() if p.default is p.empty} <= set(NEEDED):
            NUMBERS += [(_kind, k) for k, p in _arguments.items() if p.annotation.split(" | ")[0] in ("int", "float")]
            MADE.append(_kind)


def needed(kind: Any) -> dict[str, Any]:
    given = {k: NEEDED[k] for k, p in inspect.signature(kind).parameters.items() if k in NEEDED and p.default is p.empty}
    return given | ({"width": 2} if kind is tl.GlobalHead else {})


@pytest.mark.parametrize("kind", MADE)
def test_ranks_are_taken_by_the_constructor(kind: Any) -> None:
    if hasattr(kind(**needed(kind)), "distributed"):
        assert kind(**needed(kind), distributed=True).distributed is True


@pytest.mark.parametrize("kind, name", NUMBERS, ids=lambda value: getattr(value, "__name__", value))
def test_every_number_is_checked(kind: Any, name: str) -> None:
    """No number, far too small, zero where it divides, and more than a whole."""
    given = needed(kind)
    given |= {"scheme": "correct_permanently", "num_samples": 2, "num_classes": 3} if kind is baselines.LargeLoss else {}
    for wrong in (
        [float("nan")] + [-1e9] * ((kind.__name__, name) not in ANY) + [0] * (name in ABOVE_0) + [1.01] * (name in SHARES)
    ):
        with pytest.raises(
            ValueError, match=f"^{kind.__name__}: {name} must be (a number|.*at (least|most)|above).*, got {wrong}"
        ):
            kind(**{**given, name: wrong})
