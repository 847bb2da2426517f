"""Compiled for any batch size, and while steps are counted; exported, and run by another runtime."""

from __future__ import annotations

import contextlib
import copy
import io
import shutil
import warnings
from collections.abc import Iterator

import pytest
import torch

import trm_losses as tl
from tests.helpers import trust
from tests.helpers.cases.objective import objective
from tests.helpers.values import CLASSES, TOKENS, WIDTH, labels, normal, shaken

# One of each way through the code: the others share theirs, and compile for one batch size in test_modules.py.
DYNAMIC = ("matching", "contrast, weights and prototypes", "pseudo-labels", "large loss, correct", "ROLE", "GPR")


@contextlib.contextmanager
def no_recompile() -> Iterator[None]:
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


@pytest.mark.parametrize("name", DYNAMIC)
def test_one_graph_for_all_batch_sizes(name: str) -> None:
    """Batches of 8, 3 and 5: value and gradient are those of float64, and the second and third are not compiled for."""
    part = trust.named(name)
    row = trust.compiled(part, trust.PRECISIONS[0], "aot_eager" if name == "matching" else "eager")
    assert trust.passed(row, part), row


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor writes C++; no compiler is here")
def test_by_inductor() -> None:
    part = trust.named("asymmetric loss")
    row = trust.compiled(part, trust.PRECISIONS[0], "inductor")
    assert trust.passed(row, part), row


@pytest.mark.parametrize("labelled", [True, False], ids=["pseudo-labels", "without"])
def test_steps_of_the_objective_are_one_graph(labelled: bool) -> None:
    """Steps that buffers count, from warm-up to ramp, and batches of other sizes; what is learned and kept is as in eager."""
    torch._dynamo.reset()
    made = objective()
    if labelled:
        made.labeler.warmup_steps, made.labeler.ramp_steps = int(made.labeler.step) + 2, 3  # type: ignore[union-attr]
    else:
        made.labeler = None
    twin = copy.deepcopy(made)
    whole = torch.compile(made, fullgraph=True, dynamic=True, backend="eager")
    weights = []
    for step, batch in enumerate((7, 3, 5, 8)):  # the first is unlike every other size: torch ties sizes that are alike
        tokens, text = (x.float() for x in (normal(batch, TOKENS, WIDTH, seed=step), normal(CLASSES, WIDTH, seed=9)))
        targets = labels(batch, CLASSES, seed=step).float()
        with no_recompile() if step else contextlib.nullcontext():
            actual = whole(tokens, text, targets)
        expected = twin(tokens, text, targets)
        for module, output in ((made, actual), (twin, expected)):
            output.loss.backward()
            with torch.no_grad():
                for p in module.parameters():
                    p -= 0.05 * p.grad
                    p.grad = None
            module.update(output)
        torch.testing.assert_close(actual.loss, expected.loss)
        weights.append(0.0 if actual.pseudo is None else float(actual.pseudo.weights.max()))
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(made.state_dict()[key], value, rtol=1e-4, atol=1e-5, msg=key)
    assert not labelled or (weights[:2] == [0.0, 0.0] and weights[3] > weights[2] >= 0)


def test_onnx_is_what_we_compute() -> None:
    runtime = pytest.importorskip("onnxruntime")
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    torch.manual_seed(0)
    parts = tl.RegionPooler(CLASSES, WIDTH, num_heads=2), tl.TextRegionMatchingLoss(CLASSES)
    made = shaken(tl.TRMHead(*parts, torch.randn(CLASSES, WIDTH), [f"class {c}" for c in range(CLASSES)])).eval()
    logits = normal(40, CLASSES)
    made.calibration = tl.Calibration(CLASSES).fit(logits, (logits > normal(40, CLASSES, seed=1)).long())
    shapes = {"tokens": {0: torch.export.Dim.DYNAMIC}}
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(made, (torch.randn(2, TOKENS, WIDTH),), dynamo=True, dynamic_shapes=shapes, verbose=False).save(file)
    session = runtime.InferenceSession(file.getvalue())
    for batch in (1, 3, 9):
        tokens = torch.randn(batch, TOKENS, WIDTH)
        (got,) = session.run(None, {"tokens": tokens.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), made(tokens).detach(), rtol=1e-4, atol=1e-4)
