"""State: files of tensors hold all of it, an interruption changes nothing, and classes that stay keep what is theirs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import trm_losses as tl
from tests.helpers import oracles
from tests.helpers.cases import CASES
from tests.helpers.cases.baselines import BASELINES
from tests.helpers.cases.case import Caller, Case, built, ids, through_file
from tests.helpers.cases.objective import objective
from tests.helpers.compare import agree
from tests.helpers.values import BATCH, CLASSES, SAMPLES, TOKENS, WIDTH, generator, labels, normal
from trm_losses import baselines, pseudo
from trm_losses._state import FullPrecisionState, in_eval_mode

safetensors = pytest.importorskip("safetensors.torch")


@pytest.mark.parametrize("case", [case for case in CASES if case.state], ids=ids)
def test_a_state_can_be_called_with(case: Case) -> None:
    """``torch.func.functional_call``: with the state of another module the call is that module's."""
    module, other, inputs = built(case), built(case), case.inputs(BATCH, CLASSES)
    for tensor in other.state_dict().values():
        tensor.zero_()
    state = {f"module.{key}": value.clone() for key, value in module.state_dict().items()}
    called = torch.func.functional_call(Caller(case, other), state, (inputs,))
    agree(called, case.call(module, inputs), rtol=2e-5, atol=1e-5)
    assert all(torch.count_nonzero(value) == 0 for value in other.state_dict().values())


# An interruption ----------------------------------------------------------------------------------------------------------


class Run:
    """All that a training keeps; ``step`` moves it, ``resumed`` is what a new process makes of its state."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        torch.manual_seed(0)
        self.build, self.module = build, build()
        groups = self.module.param_groups(lr=0.01) if hasattr(self.module, "param_groups") else []
        learned = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(groups or learned or [torch.zeros(1, requires_grad=True)], lr=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.05, total_steps=8)
        self.average = AveragedModel(self.module, multi_avg_fn=get_ema_multi_avg_fn(0.8))
        self.parts = {k: getattr(self, k) for k in ("module", "optimizer", "schedule", "average")}

    def resumed(self, how: str) -> Run:
        if how == "copy":
            return copy.deepcopy(self)
        other = Run((lambda: pickle.loads(pickle.dumps(self.module))) if how == "pickle" else self.build)
        for tensor in other.module.state_dict().values():
            tensor.fill_(1)
        state = through_file({**{k: part.state_dict() for k, part in self.parts.items()}, "random": torch.get_rng_state()})
        if how == "safetensors":
            state["module"] = safetensors.load(safetensors.save(self.module.state_dict()))
        for key, part in other.parts.items():
            part.load_state_dict(state[key])
        torch.manual_seed(99)
        torch.set_rng_state(state["random"])
        return other

    def learn(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.average.update_parameters(self.module)

    def state(self) -> list[Tensor]:
        return [*self.module.state_dict().values(), *self.average.state_dict().values()]


def goes_on(run: Run, step: Callable[[Run, int], Tensor], k: int, how: str, steps: int = 6) -> None:
    """The rest of a run, after a break behind step ``k``, is that of the run without."""
    for number in range(k):
        step(run, number)
    random = torch.get_rng_state()
    broken = run.resumed(how)
    for number in range(k, steps):
        torch.set_rng_state(random)
        one = step(run, number)
        torch.set_rng_state(random)
        two = step(broken, number)
        random = torch.get_rng_state()
        assert torch.equal(one, two), number
    assert all(torch.equal(a, b) for a, b in zip(run.state(), broken.state(), strict=True))


@st.composite
def options(draw: Any) -> dict[str, Any]:
    """Settings of an objective that go together."""
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    return {
        "settings": {"pooler": {"query": pick("tied", "free")}, **pick({}, {"class_chunk": 2})},
        "dropout": pick(0.0, 0.3),
        "rule": pick(*RULES),
        "labeler": {"warmup_steps": pick(0, 2), "ramp_steps": pick(0, 3), "expected_positives": pick(None, 1.5)},
    }


RULES: dict[str, Callable[[], pseudo.Rule]] = {
    "prototypes": lambda: pseudo.PrototypeRule(CLASSES),
    "lenient prototypes": lambda: pseudo.PrototypeRule(CLASSES, positive=0.55, negative=0.45, momentum=0.5),
    "a teacher": lambda: pseudo.TeacherRule(torch.rand(SAMPLES, CLASSES, generator=generator(8))),
}


def made(o: dict[str, Any]) -> nn.Module:
    module = objective(**o["settings"])
    module.labeler = tl.PseudoLabeler(CLASSES, RULES[o["rule"]](), **o["labeler"])
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = o["dropout"]
    return module


def objective_goes_on(o: dict[str, Any], k: int, how: str) -> None:
    def step(run: Run, number: int) -> Tensor:
        x = {
            "tokens": normal(BATCH, TOKENS, WIDTH, seed=number).float(),
            "text": normal(CLASSES, WIDTH, seed=2).float(),
            "targets": labels(BATCH, CLASSES, number).float(),
            "ids": (torch.arange(BATCH) + number) % SAMPLES,
        }
        output = run.module.train()(**x)
        run.learn(output.loss)
        run.module.update(output)  # type: ignore[operator]
        return output.loss.detach()  # type: ignore[no-any-return]

    goes_on(Run(lambda: made(o)), step, k, how)


breaks = given(options(), st.integers(0, 5), st.sampled_from(["file", "safetensors", "copy", "pickle"]))
# The scheduler of a copy does not know that its optimiser, a copy too, has begun.
began = pytest.mark.filterwarnings("ignore:Seems like `optimizer.step")


@began
@settings(max_examples=12, deadline=None, derandomize=True)
@breaks
def test_an_objective_goes_on_as_if_there_had_been_no_break(o: dict[str, Any], k: int, how: str) -> None:
    objective_goes_on(o, k, how)


@pytest.mark.nightly
@began
@settings(max_examples=300, deadline=None)
@breaks
def test_any_objective_goes_on_as_if_there_had_been_no_break(o: dict[str, Any], k: int, how: str) -> None:
    objective_goes_on(o, k, how)


class Scored(nn.Module):
    """A model that is nothing but its logits, and a loss."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.logits = nn.Parameter(2 * normal(SAMPLES, CLASSES, seed=4).float())
        self.loss = loss


@began
@pytest.mark.parametrize("how", ["file", "copy"])
@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_goes_on_as_if_there_had_been_no_break(name: str, how: str) -> None:
    k = int(torch.randint(0, 6, (), generator=generator(sum(map(ord, name + how)))))

    def step(run: Run, number: int) -> Tensor:
        rows, loss = (torch.arange(BATCH) + number) % SAMPLES, run.module.loss
        loss.begin_epoch(number, 6)  # type: ignore[union-attr,operator]
        x, y = run.module.logits[rows], labels(SAMPLES, CLASSES, 5)[rows].float()  # type: ignore[index]
        value = loss(x, y, ids=rows)  # type: ignore[operator]
        run.learn(value)
        loss.update(x.detach(), y, ids=rows)  # type: ignore[union-attr,operator]
        return value.detach()  # type: ignore[no-any-return]

    def build() -> nn.Module:
        if name != "EM+APL":
            return Scored(BASELINES[name].build(CLASSES))
        loss = baselines.EMAPLLoss(SAMPLES, CLASSES, warmup=2, published_epochs=6)
        loss.update(normal(SAMPLES, CLASSES), torch.full((SAMPLES, CLASSES), -1.0), ids=torch.arange(SAMPLES))
        return Scored(loss)

    goes_on(Run(build), step, k, how)


# Other classes ------------------------------------------------------------------------------------------------------------

PER_CLASS = [case for case in CASES if any("context" not in key and "weight" not in key for key in case.state)]


@pytest.mark.parametrize("case", PER_CLASS, ids=ids)
def test_the_state_of_other_classes_is_refused_by_their_number(case: Case) -> None:
    state, module = built(case, 4).state_dict(), built(case)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        assert "must be of 5 classes, got a state of 4; build it for 4 classes" in str(error), error
        assert "with_classes" in str(error) or not any(hasattr(part, "with_classes") for part in module.modules())
        assert "size mismatch" not in str(error)
    else:  # nothing of it is by class
        assert all(value.shape == module.state_dict()[key].shape for key, value in state.items())


KEPT = [3, None, 0, 1]


def columns(x: Tensor) -> Tensor:
    """Of all classes, what the new set sees; its new class is the last of the old set."""
    return x[:, [3, 4, 0, 1]] if x.ndim > 1 else x[[3, 4, 0, 1]]


def batches(steps: range) -> Any:
    for seed in steps:
        y = labels(3, CLASSES, seed)
        if seed < 4:
            y[:, 4] = -1  # of the new class nothing was known before
        yield normal(3, CLASSES, WIDTH, seed=seed), y


def test_classes_that_stay_take_their_prototypes_along() -> None:
    """Classes do not touch each other, so a bank that had all of them from the start is what the others must become."""
    start = normal(CLASSES, WIDTH, seed=30)
    whole, old = (tl.PrototypeBank(CLASSES, WIDTH, init=start) for _ in range(2))
    for z, y in batches(range(4)):
        for bank in (whole, old):
            bank.update(z, y)
    state = {key: value.clone() for key, value in old.state_dict().items()}
    bank = old.with_classes(KEPT, init=columns(start[None])[0])
    for z, y in batches(range(4, 9)):
        whole.update(z, y)
        bank.update(columns(z), columns(y))
    for key in bank.state_dict():
        one, two = bank.state_dict()[key], whole.state_dict()[key]
        torch.testing.assert_close(one, two if two.ndim == 0 else two[[3, 4, 0, 1]], rtol=0, atol=1e-6)
    assert all(torch.equal(value, old.state_dict()[key]) for key, value in state.items())
    bank.reset()
    torch.testing.assert_close(bank.text, columns(whole.init[None])[0])
    fresh = tl.PrototypeBank(4, WIDTH)
    fresh.load_state_dict(bank.state_dict())


def test_a_new_class_has_nothing_until_it_is_met() -> None:
    old = tl.PrototypeBank(3, WIDTH, init=normal(3, WIDTH))
    old.update(normal(2, 3, WIDTH, seed=1), torch.ones(2, 3), text=normal(3, WIDTH, seed=2))
    bank = old.with_classes([None, 2])
    assert bank.seen.tolist() == [False, True] and bank.num_classes == 2
    assert not bank.visual[0].any() and not bank.text[0].any() and torch.equal(bank.text[1], old.text[2])
    z, t = normal(1, 2, WIDTH, seed=3), normal(2, WIDTH, seed=4)
    bank.update(z, torch.tensor([[1.0, -1.0]]), text=t)
    torch.testing.assert_close(bank.visual[0].tolist(), oracles.unit(oracles.array(z[0, 0])).tolist(), rtol=0, atol=1e-6)
    torch.testing.assert_close(bank.text[0].tolist(), oracles.unit(oracles.array(t[0])).tolist(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("keep", [[], [0, 3], [-1], [5, None]], ids=str)
def test_classes_that_were_never_there_cannot_stay(keep: list[int | None]) -> None:
    for module in (tl.PrototypeBank(3, WIDTH), tl.PseudoLabeler(3)):
        with pytest.raises(ValueError, match=r"keep must be one place from 0 to num_classes - 1 = 2, or None .*, got \["):
            module.with_classes(keep)
    with pytest.raises(TypeError):
        tl.PrototypeBank(3, WIDTH).with_classes(["dog"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"init must have shape \(C, D\) = \(1, 8\), got \(3, 8\)"):
        tl.PrototypeBank(3, WIDTH).with_classes([None], init=normal(3, WIDTH))


@pytest.mark.parametrize("rule", RULES)
def test_classes_that_stay_take_their_statistics_along(rule: str) -> None:
    whole, old = (tl.PseudoLabeler(CLASSES, RULES[rule]()) for _ in range(2))
    bank = tl.PrototypeBank(CLASSES, WIDTH, init=normal(CLASSES, WIDTH, seed=30))
    for z, y in batches(range(4)):
        for labeler in (whole, old):
            labeler.update(z, y, bank)
        bank.update(z, y)
    if rule == "a teacher":
        whole.rule.estimates[:, 4] = -1  # type: ignore[index,operator]
    labeler = old.with_classes(KEPT)
    axes = {"similarity_sum": 2, "similarity_mass": 2, "known_count": 1, "estimates": 1}
    for key, value in labeler.state_dict().items():
        expected = whole.state_dict()[key]
        if (last := key.split(".")[-1]) in axes:
            expected = expected.index_select(axes[last], torch.tensor([3, 4, 0, 1]))
        assert torch.equal(value, expected), key
    assert labeler.num_classes == 4 and int(labeler.step) == 4
    labeler.update(normal(3, 4, WIDTH), labels(3, 4), bank.with_classes(KEPT))


# Modes --------------------------------------------------------------------------------------------------------------------


def test_modes_are_back_whichever_of_several_threads_leaves_last() -> None:
    module = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    first, second = in_eval_mode(module), in_eval_mode(module)
    first.__enter__()
    second.__enter__()
    assert not any(part.training for part in module.modules())
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert [part.training for part in module.modules()] == [True, True, False]


# Other defaults -----------------------------------------------------------------------------------------------------------


@contextmanager
def default(value: torch.dtype | str) -> Iterator[None]:
    """A default dtype, or a default device."""
    before = torch.get_default_dtype()
    if isinstance(value, str):
        torch.set_default_device(value)
    else:
        torch.set_default_dtype(value)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_state_that_is_kept_in_float32_begins_in_it(case: Case, dtype: torch.dtype) -> None:
    with default(dtype):
        parts = [part for part in case.build(CLASSES).modules() if isinstance(part, FullPrecisionState)]
    kinds = {buffer.dtype for part in parts for buffer in part.buffers(recurse=False) if buffer.is_floating_point()}
    assert kinds <= {torch.float32}


X, FEATURES, TEXT = normal(40, TOKENS, WIDTH).float(), normal(40, WIDTH, seed=1).float(), normal(CLASSES, WIDTH, seed=2).float()
LOGITS, Y = normal(40, CLASSES, seed=3).float(), labels(40, soft=False).float()
FOUND: dict[str, Callable[[], Any]] = {
    "Calibration": lambda: tl.Calibration(CLASSES, device="cpu").fit(LOGITS, Y).scale,
    "of single positives": lambda: (
        tl.Calibration(CLASSES, device="cpu").fit(LOGITS, Y.where(Y == 1, -1.0), expected_positives=2).scale
    ),
    "average precision": lambda: tl.metrics.mean_average_precision(LOGITS, Y),
    "calibration error": lambda: tl.metrics.calibration_error(LOGITS.sigmoid(), Y),
    "thresholds": lambda: torch.cat(tl.choose_thresholds(LOGITS.sigmoid(), Y)),
    "GaussianDiscriminant": lambda: tl.GaussianDiscriminant(CLASSES, WIDTH, device="cpu").fit([(X, Y)], TEXT).whitening,
    "GlobalHead": lambda: tl.GlobalHead(CLASSES, WIDTH, device="cpu").fit([(None, FEATURES, Y)]).weight,
    "PrototypeBank": lambda: tl.PrototypeBank(CLASSES, WIDTH, device="cpu").visual,
    "free queries": lambda: (
        tl.RegionPooler(CLASSES, WIDTH, query="free", device="cpu", dtype=torch.float32).state_dict()["query"].shape
    ),
}


@pytest.mark.parametrize("value", [torch.float64, torch.bfloat16, torch.float16, "meta"], ids=str)
@pytest.mark.parametrize("name", FOUND)
def test_what_is_found_does_not_follow_the_defaults(name: str, value: torch.dtype | str) -> None:
    with default(value):
        found = FOUND[name]()
    torch.testing.assert_close(found, FOUND[name](), rtol=0, atol=0)


@pytest.mark.parametrize("value", [torch.float64, torch.bfloat16, torch.float16, "meta"], ids=str)
def test_a_head_is_read_whatever_the_defaults_are(tmp_path: Path, value: torch.dtype | str) -> None:
    parts = tl.RegionPooler(CLASSES, WIDTH), tl.TextRegionMatchingLoss(CLASSES)
    whole = tl.GlobalHead(CLASSES, WIDTH, tl.GaussianDiscriminant(CLASSES, WIDTH).fit([X], TEXT)).fit([(X, FEATURES, Y)])
    head = tl.TRMHead(*parts, TEXT, list("abcde"), global_head=whole).finish([(X, FEATURES, Y)])
    head.save(tmp_path / "head.pt")
    with default(value):
        scores = tl.TRMHead.load(tmp_path / "head.pt").predict(X, FEATURES)
    assert torch.equal(scores, head.predict(X, FEATURES))


@pytest.mark.parametrize(
    "build",
    [
        lambda: tl.PromptLearner("residual", text=torch.ones(CLASSES, WIDTH)),
        lambda: tl.PromptLearner("shared", names=(torch.ones(CLASSES, 7, WIDTH), torch.full((CLASSES,), 6)), context_length=77),
        lambda: tl.TRMObjective.from_text(torch.ones(CLASSES, WIDTH), total_steps=9, recipe="paper"),
    ],
    ids=["residual", "shared", "paper"],
)
def test_what_was_built_without_values_takes_a_state(build: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        made = build()
    real = build()
    made.load_state_dict(real.state_dict(), assign=True)
    assert all(torch.equal(value, real.state_dict()[key]) for key, value in made.state_dict().items())
    assert getattr(made, "_prefix", None) == getattr(real, "_prefix", None)
