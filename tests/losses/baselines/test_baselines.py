"""Baselines: gradients against the derivative of slow loops, schedules, state, and the limits in which one is another."""

import math
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch

from tests.helpers import compare, oracles
from tests.helpers.cases.baselines import BASELINES, baseline_inputs, baseline_value, call_baseline, gpr, vlpl
from tests.helpers.oracles import baselines as baseline_oracles
from tests.helpers.values import BATCH, CLASSES, SAMPLES, labels, normal
from trm_losses import baselines

close = partial(compare.close, rtol=1e-6, atol=1e-9)

NAMES = list(BASELINES)


def built(name, classes=CLASSES):
    return BASELINES[name].build(classes).double()


def gradient(name, module, inputs):
    logits = inputs["logits"].clone().requires_grad_()
    call_baseline(module, {**inputs, "logits": logits}).backward()
    return logits.grad


def ids_of(batch):
    return torch.arange(batch)


def test_every_public_loss_is_among_the_cases():
    """A loss without a slow loop to be compared with, in value and gradient, does not pass."""
    assert {type(case.build(CLASSES)).__name__ for case in BASELINES.values()} == set(baselines.__all__)


SIZES = [(BATCH, CLASSES, None), (1, CLASSES, None), (BATCH, 1, None)]
OF_ONE_KIND = [(BATCH, CLASSES, target) for target in (-1.0, 0.0, 1.0)]  # nothing known, all absent, all present


@pytest.mark.parametrize("batch, classes, target", SIZES + OF_ONE_KIND)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_those_of_the_oracle(name, batch, classes, target):
    module, inputs = built(name, classes), baseline_inputs(batch, classes)
    if target is not None:
        inputs["targets"].fill_(target)
    function, x = baseline_value(BASELINES[name], module, inputs), oracles.array(inputs["logits"])
    close(call_baseline(module, inputs), function(x), rtol=1e-9)
    close(gradient(name, module, inputs), baseline_oracles.slope(function, x))


def test_gradient_of_the_learned_labels():
    module, inputs = built("ROLE"), baseline_inputs(BATCH, CLASSES)
    gradient("ROLE", module, inputs)
    x, y, ids = oracles.array(inputs["logits"]), oracles.array(inputs["targets"]), inputs["ids"].numpy()
    theta = oracles.array(module.estimates)[ids]
    expected = np.zeros((SAMPLES, CLASSES))
    expected[ids] = baseline_oracles.slope(lambda live: baseline_oracles.role(x, live, y, x, theta, 1.5), theta)
    close(module.estimates.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_saturated_logits(name, dtype):
    """Finite, and what is confidently wrong keeps its gradient, which log(p + 1e-5) would not; but where it is doubted."""
    module, inputs = BASELINES[name].build(CLASSES), baseline_inputs(BATCH, CLASSES)
    inputs["logits"] = (1e4 * inputs["logits"].sign()).to(dtype)
    inputs["targets"][:2] = torch.tensor([[1.0, 0.0, -1.0, 1.0, -1.0]] * 2)
    inputs["logits"][0] = torch.tensor([-1e4, 1e4, 1e4, -1e4, -1e4])
    slope = gradient(name, module, inputs)
    assert torch.isfinite(call_baseline(module, inputs)) and torch.isfinite(slope).all()
    if BASELINES[name].bounded:
        assert torch.count_nonzero(slope[0]) == 0
        return
    assert (slope[0, [0, 3]] < 0).all()
    assert slope[0, 1] > 0 or (module.margin > 0 and "ASL" in name)  # whose margin keeps 1 - q away from 0


@pytest.mark.parametrize("loss", "AssumeNegative WeakAssumeNegative EM Hill SPLC Large PartialBCE GR GCE".split())
def test_no_class_costs_nothing(loss):
    logits = torch.zeros(4, 0, requires_grad=True)
    value = getattr(baselines, f"{loss}Loss")()(logits, torch.zeros(4, 0))
    value.backward()
    assert value == 0 and logits.grad.shape == (4, 0)


@pytest.mark.parametrize("logit", [0.0, 8.0, -30.0, 30.0])
def test_entropy_of_what_is_sure_is_exact(logit):
    """To the last digits, in float32 and on both sides, where 1 - p is 0 already; with one unknown entry it is the loss."""
    loss = baselines.EMLoss(alpha=1.0)(torch.tensor([[logit]]), torch.tensor([[-1.0]]))
    size = abs(logit)
    close(-loss, math.log1p(math.exp(-size)) + size * math.exp(-size) / (1 + math.exp(-size)), rtol=1e-6, atol=0)


# The limits in which one is another ----------------------------------------------------------------------------------------


def value(module, **changes):
    x = {**baseline_inputs(BATCH, CLASSES), **changes}
    return float(call_baseline(module.double(), x))


def test_ladder_of_assume_negative():
    plain = value(baselines.AssumeNegativeLoss())
    close(value(baselines.AssumeNegativeLoss(smoothing=0.0)), plain)
    close(value(baselines.LargeLoss(delta=0.5)), plain)  # before the first epoch nothing is large
    first = baselines.LargeLoss(scheme="correct", delta=0.5)
    first.begin_epoch(0, 10)
    close(value(first), plain)
    close(value(baselines.SPLCLoss(margin=0.0, gamma=0.0, reduction="mean")), plain)
    settings = {"gamma_pos": 0.0, "gamma_neg": 0.0, "gamma_unknown": 0.0, "reduction": "mean"}
    close(value(baselines.PartialASLLoss(CLASSES, policy="negative", **settings)), plain)
    close(value(baselines.PartialASLLoss(CLASSES, policy="selective", likely=0, **settings)), plain)
    two = baseline_inputs(BATCH, 2)  # the weight of two classes is 1
    close(call_baseline(baselines.WeakAssumeNegativeLoss(), two), call_baseline(baselines.AssumeNegativeLoss(), two))


def test_ladder_of_known_cross_entropy():
    plain = value(baselines.PartialBCELoss(alpha=0.0, beta=1.0))
    close(value(baselines.EMLoss(alpha=0.0)), plain)
    close(value(baselines.EMAPLLoss(SAMPLES, CLASSES, alpha=0.0)), plain)
    close(value(vlpl(CLASSES, threshold=1.0, negative_share=1.0)), plain)
    settings = {"gamma_pos": 0.0, "gamma_neg": 0.0, "reduction": "mean"}
    close(value(baselines.PartialASLLoss(CLASSES, policy="ignore", **settings)), plain)
    many = {"policy": "selective", "gamma_unknown": 1.0, "likely": CLASSES, **settings}  # more than there are unknown
    close(value(baselines.PartialASLLoss(CLASSES, **many)), plain)
    frequent = {**many, "likely": 0, "prior": torch.ones(CLASSES), "prior_threshold": 0.9}
    close(value(baselines.PartialASLLoss(CLASSES, **frequent)), plain)
    y = torch.ones(BATCH, CLASSES)
    close(
        value(baselines.PartialBCELoss(), targets=y), value(baselines.PartialBCELoss(alpha=0.0, beta=1.0), targets=y)
    )  # g(1) = 1


def test_ladder_of_gr():
    """K = 0 and V = 1 leave the loss of absence, K = 1 that of presence; q from 0 to 1."""
    sure = {"slope": (0.0, 0.0), "width": (math.inf, math.inf)}
    absence, presence = ({**sure, "offset": (b, b)} for b in (-800.0, 800.0))
    plain = value(baselines.AssumeNegativeLoss())
    close(value(baselines.GRLoss(**absence, q_absent=0.0)), plain)
    close(value(baselines.GRLoss(**absence, q_absent=1e-9)), plain)
    inputs = baseline_inputs(BATCH, CLASSES)
    x, unknown = inputs["logits"], inputs["targets"] == -1
    known = value(baselines.EMLoss(alpha=0.0))
    close(value(baselines.GRLoss(**absence)), known + float(torch.sigmoid(x)[unknown].sum()) / x.numel())
    close(value(baselines.GRLoss(**presence, q_present=1.0)), known + float(torch.sigmoid(-x)[unknown].sum()) / x.numel())
    present = torch.where(unknown, 1.0, inputs["targets"])
    close(value(baselines.GRLoss(**presence, q_present=0.0)), value(baselines.AssumeNegativeLoss(), targets=present))
    weightless = {**absence, "center": (9.0, 9.0), "width": (0.1, 0.1)}
    close(value(baselines.GRLoss(**weightless)), known)


@pytest.mark.parametrize("epoch", [0, 3, 7])
def test_gpr_without_pseudo_labels_and_expectation_is_gr(epoch):
    alone = {"negative_share": 0.0, "threshold": math.inf, "weight_expected": 0.0}
    modules = baselines.GRLoss(), gpr(CLASSES, **alone)
    for module in modules:
        module.begin_epoch(epoch, 8)
    close(*(value(module) for module in modules), rtol=1e-12)
    close(*(gradient("GPR", module, baseline_inputs(BATCH, CLASSES)) for module in modules), rtol=1e-12)


def test_gpr_where_pseudo_labels_are_all_there_is():
    """Everything present by the teacher, at a weight of one: the cross-entropy of soft labels."""
    module = gpr(CLASSES, float(CLASSES), threshold=0.0, weights=(1.0, 1.0), confidence=0.9, weight_expected=0.0)
    y = baseline_inputs(BATCH, CLASSES)["targets"]
    close(value(module), value(baselines.EMLoss(alpha=0.0), targets=torch.where(y == -1, 0.9, y)))
    absent = gpr(CLASSES, threshold=math.inf, negative_share=1.0, width=(math.inf, math.inf), weight_expected=0.0)
    close(value(absent), value(baselines.AssumeNegativeLoss()))


@pytest.mark.parametrize("q", [0.1, 0.7, 1.0])
def test_a_doubted_label_costs_less_than_cross_entropy_and_is_bounded(q):
    x = torch.linspace(-60, 60, 241, dtype=torch.float64)[:, None].requires_grad_()
    for target in (0.0, 1.0):
        y = torch.full((1, 1), target)
        doubted, plain = (torch.stack([loss(row[None], y) for row in x]) for loss in (baselines.GCELoss(q=q), baselines.EMLoss()))
        assert (doubted <= plain * (1 + 1e-12)).all() and (doubted <= 1 / q).all()
        ours, theirs = (torch.autograd.grad(part.sum(), x, retain_graph=True)[0] for part in (doubted, plain))
        p = torch.sigmoid(x if target else -x)
        close(ours, theirs * p**q)
    close(value(baselines.GCELoss(q=0.0)), value(baselines.EMLoss(alpha=0.0)))
    close(value(baselines.GCELoss(q=1e-9)), value(baselines.EMLoss(alpha=0.0)))


def test_hill_has_no_slope_where_the_model_is_sure():
    logits = torch.tensor([[-40.0, 0.0, 40.0]], requires_grad=True)
    baselines.HillLoss()(logits, torch.full((1, 3), -1.0)).backward()
    close(logits.grad, [[0, 0.1875, 0]])  # (3 p - 3 p ** 2) p (1 - p) at p = 1 / 2


# Schedules ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [5, 10, 30])
@pytest.mark.parametrize("scheme", ["reject", "correct", "correct_permanently"])
def test_rate_of_large_loss(scheme, epochs):
    sizes = {"num_samples": 2, "num_classes": 3} if scheme == "correct_permanently" else {}
    module = baselines.LargeLoss(scheme=scheme, delta=0.004, **sizes)
    for epoch in range(epochs):
        module.begin_epoch(epoch, epochs)
        published = math.floor(epoch / epochs * 10 + 1e-9)  # the epoch of ten that this one lies in
        step = min(published, 1) if scheme == "correct_permanently" else published
        assert float(module.rate) == pytest.approx(0.004 * step)


def test_large_loss_takes_as_many_as_it_says():
    """Also where the share of the batch is a whole number, which rounding may not lift by one."""
    x, unknown = normal(30, 50, seed=1), torch.full((30, 50), -1.0)
    for delta in (0.002, 0.004, 0.0021):
        module = baselines.LargeLoss(scheme="reject", delta=delta)
        for epoch in range(10):
            module.begin_epoch(epoch, 10)
            logits = x.clone().requires_grad_()
            module(logits, unknown).backward()
            rejected = logits.grad == 0
            assert int(rejected.sum()) == math.ceil(round(1500 * delta * epoch, 6))
            assert not rejected.any() or x[rejected].min() > x[~rejected].max()


@pytest.mark.parametrize("scheme", ["reject", "correct"])
def test_large_loss_touches_unknown_entries_alone(scheme):
    """Even where more are asked for than there are."""
    module = baselines.LargeLoss(scheme=scheme, delta=0.9)
    module.begin_epoch(1, 10)
    logits, targets = normal(2, 3, seed=1).requires_grad_(), torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    module(logits, targets).backward()
    p = torch.sigmoid(logits.detach())
    expected = (p - targets) / 6
    expected[0, 2] = 0 if scheme == "reject" else (p[0, 2] - 1) / 6
    close(logits.grad, expected)


def test_permanent_corrections_stay():
    """Three epochs against sets of entries; what is corrected makes room for others."""
    module = baselines.LargeLoss(scheme="correct_permanently", delta=0.05, num_samples=SAMPLES, num_classes=CLASSES)
    y = np.full((SAMPLES, CLASSES), -1.0)
    y[:, 0], y[2, 1] = 1, 0
    current = y.copy()
    for epoch in range(3):
        module.begin_epoch(epoch, 10)
        for batch in (np.array([4, 1, 3]), np.array([0, 5, 2])):
            x = 2 * normal(3, CLASSES, seed=int(batch[0]))  # the same in each epoch: its largest are flipped already
            targets, ids = torch.as_tensor(y[batch]), torch.as_tensor(batch)
            rate = Fraction("0.05") * (epoch > 0)
            expected = baseline_oracles.large_loss(oracles.array(x), current[batch], oracles.array(x), "correct", rate)
            close(module(x, targets, ids=ids), expected)
            for b, c in baseline_oracles.large_entries(oracles.array(x), current[batch], rate):
                current[batch[b], c] = 1
            module.update(x, targets, ids=ids)
        close(module.flipped, (y == -1) & (current == 1))
    assert int(module.flipped.sum()) == 4  # one of fifteen in each batch, but none in the first epoch


@pytest.mark.parametrize("epochs", [1, 8, 30])
def test_ramps_of_gr(epochs):
    """At the start before any epoch; of 8 epochs w and b are at (e - 1) / 8 in the published e-th, the others at e / 8."""
    module = baselines.GRLoss()
    assert module.ramps.tolist() == [0, 0]
    for epoch in range(epochs):
        module.begin_epoch(epoch, epochs)
        close(module.ramps, [epoch / epochs, (epoch + 1) / epochs], rtol=1e-6)
    close(module._now(module.width, 1, torch.zeros(())), 0.5)


def test_splc_corrects_after_the_first_epoch():
    module, logits, unknown = baselines.SPLCLoss(), torch.tensor([[0.3, 0.6]]), torch.full((1, 2), -1.0)
    slopes = []
    for epoch in (None, 0, 1, 9):
        if epoch is not None:
            module.begin_epoch(epoch, 10)
        x = logits.clone().requires_grad_()
        module(x, unknown).backward()
        slopes.append(x.grad.sign().tolist())
    assert slopes == [[[1.0, 1.0]]] * 2 + [[[1.0, -1.0]]] * 2  # sigmoid(0.3) = 0.57 and sigmoid(0.6) = 0.65
    assert bool(baselines.SPLCLoss(start=0).correcting)


@pytest.mark.parametrize("epochs", [5, 10, 20])
def test_passes_of_apl(epochs):
    """The same entries, at the same shares of the training, whatever its length."""
    n, classes, share = 23, 3, "0.9"
    module = baselines.EMAPLLoss(n, classes, label_share=float(share), warmup=6)
    y = oracles.array(labels(n, classes, seed=5))
    y[:, 2] = -1
    labelled, done = np.zeros((n, classes), dtype=bool), 0
    soft = np.full((n, classes), np.nan)
    p = np.zeros((n, classes))
    for epoch in range(epochs):
        for _ in range(2):  # told twice, it is the same epoch
            module.begin_epoch(epoch, epochs)
        due = min(max(10 * epoch // epochs - 6 + 1, 0), 4)
        for _ in range(due - done):
            new = baseline_oracles.label_least_probable(p, y == -1, labelled, share, 4)
            soft[new & ~labelled] = p[new & ~labelled]
            labelled = new
        done = max(due, done)
        close(module.labelled, labelled)
        close(oracles.array(module.soft)[labelled], soft[labelled], rtol=1e-6)
        x = 2 * normal(n, classes, seed=20 + epoch)
        for batch in torch.arange(n).flip(0).split(5):
            module.update(x[batch], torch.as_tensor(y)[batch], ids=batch)
        p = np.vectorize(oracles.sigmoid)(oracles.array(x))
    # Four passes; of five epochs the last begins before the fourth.
    assert labelled[:, 2].sum() == (3 if epochs == 5 else 4) * (9 * n // 40) and not labelled[y != -1].any()


def test_apl_keeps_its_labels_where_it_asks_for_more_than_there_are():
    module = baselines.EMAPLLoss(6, 1, label_share=1.0, warmup=1, published_epochs=3)
    logits, targets = torch.arange(6.0)[:, None], torch.full((6, 1), -1.0)
    module.update(logits, targets, ids=ids_of(6))
    module.begin_epoch(1, 3)
    assert module.labelled.flatten().tolist() == [True] * 3 + [False] * 3
    targets[4:] = 0  # told meanwhile
    module.update(-logits, targets, ids=ids_of(6))
    close(module.soft[:3], torch.sigmoid(logits[:3]))
    module.begin_epoch(2, 3)
    module.begin_epoch(2, 3)
    assert module.labelled.flatten().tolist() == [True] * 4 + [False] * 2


def test_apl_takes_the_whole_training_set_at_once():
    """The last of an image that is there twice, in memory that does not grow with the square of the number of images."""
    many = 300_000
    module = baselines.EMAPLLoss(many - 1, 1)
    logits, targets, ids = torch.zeros(many, 1), torch.full((many, 1), -1.0), ids_of(many)
    logits[-1], ids[-1] = 2.0, 5
    module.update(logits, targets, ids=ids)
    assert module.soft[5].item() == pytest.approx(oracles.sigmoid(2.0)) and set(module.soft[6:].flatten().tolist()) == {0.5}


def test_apl_says_that_nothing_was_given():
    module = baselines.EMAPLLoss(4, 2)
    for epoch in range(5):
        module.begin_epoch(epoch, 10)
    with pytest.raises(ValueError, match=r"EMAPLLoss: update\(.*\) must be called .* before epoch 5 of 10.*; got no call"):
        module.begin_epoch(5, 10)


# State -------------------------------------------------------------------------------------------------------------------


def test_start_of_the_learned_labels():
    y = labels(40, CLASSES, seed=3)
    theta = baselines.ROLELoss(y, 1.5, generator=torch.Generator().manual_seed(0)).estimates.detach()
    expected = {1.0: 0.995, 0.0: 0.005, 0.3: 0.3, 0.95: 0.95}
    for label, p in expected.items():
        assert theta[y == label].numel()
        close(torch.sigmoid(theta[y == label]), np.full(int((y == label).sum()), p), rtol=1e-5)
    drawn = theta[y == -1]
    bound = math.log(0.6 / 0.4)
    assert -bound <= drawn.min() < -0.8 * bound and 0.8 * bound < drawn.max() <= bound
    again = baselines.ROLELoss(y, 1.5, generator=torch.Generator().manual_seed(0))
    close(again.estimates, theta)
    torch.manual_seed(1)  # the default generator may stand where that of the seed 0 begins
    assert not again.estimates.equal(baselines.ROLELoss(y, 1.5).estimates)
    assert baselines.ROLELoss(y, 1.5, dtype=torch.float64).estimates.dtype == torch.float64


def test_learned_labels_learn_ten_times_as_fast():
    module = baselines.ROLELoss(labels(SAMPLES, CLASSES), 1.5)
    model = torch.nn.Parameter(torch.zeros(4, CLASSES))
    optimizer = torch.optim.SGD([{"params": [model]}, *module.param_groups(lr=0.1)], lr=0.1, weight_decay=0.5)
    module(model, labels(SAMPLES, CLASSES)[:4], ids=ids_of(4)).backward()
    before = module.estimates.detach().clone()
    optimizer.step()
    close(module.estimates.detach(), before - 1.0 * module.estimates.grad)


def test_prior_is_the_mean_probability_of_the_stream():
    module = baselines.PartialASLLoss(CLASSES, policy="ignore")
    seen = [2 * normal(4, CLASSES, seed=seed) for seed in range(3)]
    for x in seen:
        module.update(x, labels(4, CLASSES))
    mean = [sum(oracles.sigmoid(float(v)) for x in seen for v in x[:, c]) / 12 for c in range(CLASSES)]
    close(module.prior, mean, rtol=1e-6)
    selective = baselines.PartialASLLoss(CLASSES, policy="selective", prior=module.prior)
    selective.update(seen[0], labels(4, CLASSES))
    assert torch.equal(selective.prior, module.prior) and selective.prior is not module.prior


def test_selective_leaves_out_what_is_likely():
    """The most probable of the batch, not of each image; those of frequent classes count among them."""
    module = baselines.PartialASLLoss(3, policy="selective", likely=1, prior=torch.tensor([0.0, 0.0, 0.9]))
    logits = torch.tensor([[3.0, 2.0, 4.0], [-1.0, 0.0, -2.0]], requires_grad=True)
    module(logits, torch.full((2, 3), -1.0)).backward()
    assert (logits.grad > 0).tolist() == [[False, True, False], [True, True, False]]


def test_scores_of_vlpl_are_a_softmax_of_the_similarities():
    similarities = 0.05 * normal(SAMPLES, CLASSES, seed=3)
    close(baselines.VLPLLoss(similarities).scores, baseline_oracles.softmax_rows(similarities, 0.01), rtol=1e-5)
    close(baselines.VLPLLoss(similarities.half()).scores, baseline_oracles.softmax_rows(similarities.half(), 0.01), rtol=1e-5)


# Errors ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ROLE", "EM+APL", "large loss, correct permanently", "VLPL", "GPR"])
def test_ids_are_needed_and_checked(name):
    module, inputs = built(name), baseline_inputs(BATCH, CLASSES)
    owner = BASELINES[name].owner
    for call in (module, module.update) if name.startswith(("EM", "large")) else (module,):
        with pytest.raises(ValueError, match=rf"{owner}: ids \(B,\) must be given"):
            call(inputs["logits"], inputs["targets"])
        for wrong, got in ((inputs["ids"] + 1, "3 to 6"), (inputs["ids"] - 3, "-1 to 2")):
            with pytest.raises(ValueError, match=rf"{owner}: ids must be from 0 to num_samples - 1 = 5, got {got}"):
                call(inputs["logits"], inputs["targets"], ids=wrong)
    with pytest.raises(ValueError, match=r"must have shape \(B, C\) = \(B, 5\), got \(4, 4\)"):
        module(inputs["logits"][:, :4], inputs["targets"][:, :4], ids=inputs["ids"])


def test_epochs_are_checked():
    for loss in (baselines.EMLoss(), baselines.LargeLoss()):  # without a schedule, and with one
        owner = type(loss).__name__
        with pytest.raises(ValueError, match=f"{owner}: epoch must be at least 0 and at most 9, got 10"):
            loss.begin_epoch(10, 10)
        with pytest.raises(ValueError, match=f"{owner}: epochs must be at least 1, got 0"):
            loss.begin_epoch(0, 0)


SETTINGS = [
    (lambda **k: baselines.ROLELoss(expected_positives=1.0, **k), {"targets": torch.ones(3)}, r"targets must have shape \(n,"),
    (lambda **k: baselines.ROLELoss(expected_positives=1.0, **k), {"targets": torch.full((3, 2), 2)}, "targets must be 1"),
    (lambda **k: baselines.EMAPLLoss(2, 3, **k), {"warmup": 10}, "warmup must be at least 1 and at most 9, got 10"),
    (baselines.LargeLoss, {"scheme": "flip"}, "scheme must be one of 'reject', 'correct', 'correct_permanently', got 'flip'"),
    (baselines.LargeLoss, {"delta": 0.4, "num_classes": 3}, "must be given where .* and there alone, got None and 3"),
    (baselines.LargeLoss, {"scheme": "correct_permanently"}, "must be given where .*, got None and None with scheme='correct_p"),
    (baselines.SPLCLoss, {"threshold": 1.1}, "threshold must be at least 0 and at most 1"),
    (baselines.SPLCLoss, {"reduction": "none"}, "reduction must be one of 'mean', 'sum', got 'none'"),
    (baselines.HillLoss, {"reduction": "avg"}, "reduction must be one of 'mean', 'sum'"),
    (lambda **k: baselines.PartialASLLoss(3, **k), {"policy": "drop"}, "policy must be one of 'ignore', 'negative', 'selective'"),
    (lambda **k: baselines.PartialASLLoss(3, **k), {"prior": torch.ones(4)}, r"prior must have shape \(C\) = \(3\), got \(4,\)"),
    (
        lambda **k: baselines.PartialASLLoss(3, policy="ignore", **k),
        {"prior": torch.ones(3)},
        "prior must be given with policy='selective' alone, got one with policy='ignore'",
    ),
    (baselines.VLPLLoss, {"similarities": torch.ones(3)}, r"similarities must have shape \(n, C\)"),
    (baselines.VLPLLoss, {"similarities": torch.full((3, 2), torch.inf)}, "similarities must be finite"),
    (baselines.GRLoss, {"offset": (0.0, float("nan"))}, "offset must be a number, got nan"),
    (baselines.GRLoss, {"width": (1.0, 0.0)}, "width must be above 0, got 0.0"),
    (lambda **k: baselines.GPRLoss(expected_positives=1.0, **k), {"scores": torch.ones(3)}, r"scores must have shape \(n, C\)"),
    (
        lambda **k: baselines.GPRLoss(torch.ones(3, 2), 1.0, **k),
        {"weights": (0.7, 0.4)},
        "weights must be at least 0 and at most 0.4",
    ),
    (
        lambda **k: baselines.GPRLoss(torch.ones(3, 2), 1.0, **k),
        {"weights": (0.4, 1.1)},
        "weights must be at least 0 and at most 1",
    ),
]


@pytest.mark.parametrize("build, settings, message", SETTINGS, ids=[f"{n}-{'-'.join(s)}" for n, (_, s, _) in enumerate(SETTINGS)])
def test_refuses_settings(build, settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)
