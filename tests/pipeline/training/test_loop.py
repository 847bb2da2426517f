"""The loop: steps that are skipped, precision, repeatability, the trace of pseudo-labels, curves."""

import os
import sys
import types

import pytest
import torch

from tests.helpers.grid import setting, train
from tests.helpers.runs import read_json
from trm_losses import PseudoLabels, TRMHead
from trm_pipeline import methods
from trm_pipeline.run import prepared
from trm_pipeline.training import loop as training
from trm_pipeline.training.pseudo_trace import PseudoTrace

# How right pseudo-labels are


def test_pseudo_labels_are_counted_as_loops_count_them():
    torch.manual_seed(0)
    truth = torch.randint(-1, 2, (12, 5)).float()
    trace = PseudoTrace(truth)
    counts = {"pos": [0, 0, 0], "neg": [0, 0, 0]}
    for index in torch.randperm(12).split(4):
        targets = torch.where(torch.rand(4, 5) < 0.3, truth[index], -1.0)
        labels = torch.where(targets == -1, torch.tensor([-1.0, 0.0, 0.7])[torch.randint(3, (4, 5))], -1.0)
        trace.add(PseudoLabels(labels, torch.ones(4, 5), torch.ones(4, 5)), targets, index)
        for row, i in enumerate(index.tolist()):
            for c in range(5):
                if targets[row, c] != -1 or truth[i, c] == -1:
                    continue
                label, true = float(labels[row, c]), float(truth[i, c])
                for key, said, is_true in (("pos", label > 0, true == 1), ("neg", label == 0, true == 0)):
                    counts[key][0] += said and is_true
                    counts[key][1] += said
                    counts[key][2] += is_true
    trace.point(7)
    trace.point(8)
    first, empty = trace.points
    assert first == {
        "step": 7,
        "positive_precision": pytest.approx(counts["pos"][0] / counts["pos"][1], abs=1e-4),
        "positive_recall": pytest.approx(counts["pos"][0] / counts["pos"][2], abs=1e-4),
        "negative_precision": pytest.approx(counts["neg"][0] / counts["neg"][1], abs=1e-4),
        "negative_recall": pytest.approx(counts["neg"][0] / counts["neg"][2], abs=1e-4),
        "decided": counts["pos"][1] + counts["neg"][1],
    }
    assert empty == {**dict.fromkeys(first, None), "step": 8, "decided": 0}


def test_a_run_leaves_the_trace_of_its_pseudo_labels(run, tmp_path):
    run("--methods", "trm-rule-teacher", "trm", "linear", "--set", "batch_size=4", "pseudo_warmup=0")
    (path,) = (tmp_path / "out" / "pseudo").iterdir()
    points = read_json(path)
    assert path.name == "trm-rule-teacher-known0.5-seed1.json"
    assert [point["step"] for point in points] == [3, 5, 8, 10, 13, 15, 18, 20]
    assert points[-1]["decided"] > 0


def test_the_hidden_truth_changes_nothing_but_the_trace(run, tmp_path, monkeypatch):
    settings = ("--methods", "trm-rule-teacher", "--set", "batch_size=8", "pseudo_warmup=0")
    first = run(*settings, output=tmp_path / "a")
    original = prepared.train
    monkeypatch.setattr(prepared, "train", lambda *a, truth, **k: original(*a, truth=1 - truth, **k))
    assert run(*settings, output=tmp_path / "b") == first
    traces = [read_json(tmp_path / name / "pseudo" / "trm-rule-teacher-known0.5-seed1.json") for name in "ab"]
    assert traces[0] != traces[1]


# Switches


def test_mixed_precision_is_close_and_not_equal(run, tmp_path):
    states = []
    for name, amp in (("full", []), ("mixed", ["--amp"])):
        run("--methods", "trm", "--set", "batch_size=8", *amp, output=tmp_path / name)
        states.append(TRMHead.load(tmp_path / name / "trm-known0.5-seed1.pt").state_dict())
    weights = [state["matching.bias"] for state in states]
    assert not torch.equal(*weights)
    torch.testing.assert_close(*weights, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("overflow", [False, True])
def test_a_step_whose_gradient_overflows_is_not_taken(overflow):
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100 if overflow else 4.0)
    taken = training.take_step((1e10 * weight).sum(), optimizer, scaler, [weight], 0.5)
    assert taken is not overflow
    assert float(weight.detach()) == (2.0 if overflow else 1.5)


def test_a_skipped_step_moves_neither_average_nor_prototypes(run, monkeypatch):
    monkeypatch.setattr(training, "take_step", lambda *a: False)
    calls = []
    monkeypatch.setattr(methods.TRM, "after_step", lambda self: calls.append(1))
    monkeypatch.setattr(training.AveragedModel, "update_parameters", lambda self, model: calls.append(1))
    run("--methods", "trm")
    assert not calls


def test_deterministic_algorithms_are_asked_for(run, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    run("--methods", "zero-shot-global")
    assert asked == [] and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    run("--methods", "zero-shot-global", "--deterministic")
    assert asked == [True] and torch.backends.cudnn.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_deterministic_runs_write_the_same_bytes(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", torch.backends.cudnn.deterministic)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        for output in (tmp_path / "a", tmp_path / "b"):
            run("--methods", "trm", "trm-rule-teacher", "linear", "--deterministic", output=output)
    finally:
        torch.use_deterministic_algorithms(False)
    for name in ("results.json", "run.json", "pseudo/trm-rule-teacher-known0.5-seed1.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_tensorboard_gets_losses_and_scores(run, tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            self.run = folder.name
            written.append((self.run, "purge", purge_step))

        def add_scalar(self, name, value, step):
            written.append((self.run, name, step))

        def close(self):
            written.append((self.run, "close", 0))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    run("--methods", "text-pixel", "--tensorboard")
    name = "text-pixel-known0.5-seed1"
    points = [(name, curve, epoch) for epoch in (1, 2) for curve in ("loss/matching", "test/mAP")]
    assert written == [(name, "purge", 1), *points, (name, "close", 0)]


def test_tensorboard_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit, match="pip install tensorboard"):
        run("--methods", "text-pixel", "--tensorboard")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("single", "wanted"), [(True, [1.0] * 3 + [0.0] * 7), (False, [0.0] * 10)])
def test_unknown_labels_count_as_absent_for_as_long_as_the_method_says(single, wanted, monkeypatch):
    given = []

    def loss(self, batch, text, targets, weak_negative=0.0):
        given.append(weak_negative)
        return {"zero": 0 * self.linear.weight.sum()}

    monkeypatch.setattr(methods.LinearProbe, "loss", loss)
    monkeypatch.setattr(methods.LinearProbe, "weak_negative_steps", lambda self, preset, total: 3)
    chosen = setting(single=single)
    train(methods.METHODS["linear"](chosen), chosen)
    assert given == wanted


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_a_run_of_few_steps_has_a_schedule(epochs):
    """Of two steps an epoch, with a warm-up of one step in all."""
    chosen = setting(epochs=epochs, warmup_share=0.5 / epochs)
    assert train(methods.METHODS["linear"](chosen), chosen).metrics["mAP"] > 0
