"""Cases of the baselines: one signature, so one shape of case."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch

from tests.helpers import oracles
from tests.helpers.cases.case import Case, change, encodings, integers, refused
from tests.helpers.oracles import baselines as baseline_oracles
from tests.helpers.values import SAMPLES, Inputs, Result, generator, labels, normal
from trm_losses import baselines

# Baselines: one signature, so one shape of case. ``oracle(module, x, y, held, ids)`` is of plain numbers; ``state`` what is
# saved. -------------------------------------------------------------------------------------------------------------------

# Those with thresholds and ranks, where a rounding may turn a decision over.
DECIDE = ("LargeLoss", "EMAPLLoss", "SPLCLoss", "VLPLLoss", "GPRLoss", "PartialASLLoss")


class BaselineCase(NamedTuple):
    owner: str
    build: Callable[[int], Any]
    oracle: Callable[[Any, Any, Any, Any, Any], float]
    state: tuple[str, ...] = ()
    smooth: bool = True
    shows: tuple[str, ...] = ()
    bounded: bool = False  # a known label costs at most so much: one that is confidently wrong is doubted


def baseline_inputs(batch: int, classes: int) -> Inputs:
    """Images of a training set of SAMPLES, not in its order; some twice where there are more."""
    ids = (torch.arange(batch).flip(0) + SAMPLES - batch) % SAMPLES
    return {"logits": 2 * normal(batch, classes, seed=61), "targets": labels(batch, classes, seed=62), "ids": ids}


def call_baseline(module: Any, x: Inputs) -> Result:
    return module(x["logits"], x["targets"], ids=x.get("ids"))


def begun(module: Any, epoch: int = 1, epochs: int = 10) -> Any:
    module.begin_epoch(epoch, epochs)
    return module


def filled(module: Any, classes: int) -> Any:
    """A loss that keeps labels, after an update over a training set of which nothing is known, and in its last epoch."""
    module.begin_epoch(1, 10)
    unknown = torch.full((SAMPLES, classes), -1.0)
    module.update(2 * normal(SAMPLES, classes, seed=63), unknown, ids=torch.arange(SAMPLES))
    return begun(module, 9)


def role_loss(classes: int) -> Any:
    return baselines.ROLELoss(labels(SAMPLES, classes, seed=65), 1.5, generator=generator(66))


def large(scheme: Any, classes: int, delta: float = 0.15) -> Any:
    if scheme != "correct_permanently":
        return begun(baselines.LargeLoss(scheme=scheme, delta=delta), 2)
    module = baselines.LargeLoss(scheme=scheme, delta=delta, num_samples=SAMPLES, num_classes=classes)
    return filled(module, classes)


def large_oracle(module: Any, x: Any, y: Any, held: Any, ids: Any) -> float:
    permanent = module.scheme == "correct_permanently"
    if permanent:
        y = np.where((y == -1) & oracles.array(module.flipped)[ids].astype(bool), 1, y)
    rate = Fraction(str(module.delta)) * (1 if permanent else 2)
    return baseline_oracles.large_loss(x, y, held, module.scheme, rate)


PASL = {"gamma_pos": 1.0, "gamma_neg": 2.0, "gamma_unknown": 3.0}


def partial_asl(policy: Any, classes: int, **settings: Any) -> Any:
    return baselines.PartialASLLoss(classes, policy=policy, **{**PASL, **settings})


def partial_asl_oracle(module: Any, x: Any, y: Any, held: Any, ids: Any) -> float:
    out = {
        "negative": set(),
        "ignore": {i for i in np.ndindex(*y.shape) if y[i] == -1},
        "selective": baseline_oracles.left_out(held, y, module.prior.tolist(), module.prior_threshold, module.likely),
    }[module.policy]
    scale = 1 if module.reduction == "sum" else x.size
    return baseline_oracles.partial_asl(x, y, held, tuple(PASL.values()), module.margin, out) / scale


def vlpl(classes: int, **settings: Any) -> Any:
    similarities = 0.03 * normal(SAMPLES, classes, seed=67, dtype=torch.float32)
    return baselines.VLPLLoss(similarities, alpha=0.2, beta=0.7, temperature=0.02, **settings)


def gpr(classes: int, expected_positives: float = 1.5, **settings: Any) -> Any:
    scores = torch.sigmoid(normal(SAMPLES, classes, seed=68, dtype=torch.float32))
    return baselines.GPRLoss(scores, expected_positives, **settings)


def splc_oracle(module: Any, x: Any, y: Any, held: Any, ids: Any) -> float:
    total = baseline_oracles.splc(x, y, held, module.threshold, module.margin, module.gamma, bool(module.correcting))
    return total if module.reduction == "sum" else total / x.size


def hill_oracle(module: Any, x: Any, y: Any, held: Any, ids: Any) -> float:
    total = baseline_oracles.hill(x, y, held, module.strength, module.margin, module.gamma)
    return total if module.reduction == "sum" else total / x.size


def em_apl_oracle(m: Any, x: Any, y: Any, held: Any, ids: Any) -> float:
    soft, labelled = oracles.array(m.soft)[ids], oracles.array(m.labelled)[ids]
    return baseline_oracles.em_apl(x, y, held, m.alpha, m.beta, soft, labelled)


def role_oracle(m: Any, x: Any, y: Any, held: Any, ids: Any) -> float:
    theta = oracles.array(m.estimates)[ids]
    return baseline_oracles.role(x, theta, y, held, theta, 1.5)


BASELINES = {
    "assume negative": BaselineCase(
        "AssumeNegativeLoss",
        lambda c: baselines.AssumeNegativeLoss(),
        lambda m, x, y, held, ids: baseline_oracles.assume_negative(x, y, held),
    ),
    "assume negative, smoothing": BaselineCase(
        "AssumeNegativeLoss",
        lambda c: baselines.AssumeNegativeLoss(smoothing=0.1),
        lambda m, x, y, held, ids: baseline_oracles.assume_negative(x, y, held, 0.1),
        shows=("smoothing=0.1",),
    ),
    "weak assume negative": BaselineCase(
        "WeakAssumeNegativeLoss",
        lambda c: baselines.WeakAssumeNegativeLoss(),
        lambda m, x, y, held, ids: baseline_oracles.weak_assume_negative(x, y, held),
    ),
    "EPR": BaselineCase(
        "EPRLoss",
        lambda c: baselines.EPRLoss(1.5),
        lambda m, x, y, held, ids: baseline_oracles.epr(x, y, held, 1.5),
        shows=("expected_positives=1.5",),
    ),
    "ROLE": BaselineCase("ROLELoss", role_loss, role_oracle, state=("estimates",), smooth=False, shows=("num_samples=6",)),
    "EM": BaselineCase(
        "EMLoss",
        lambda c: baselines.EMLoss(alpha=0.3),
        lambda m, x, y, held, ids: baseline_oracles.em(x, y, held, 0.3),
        shows=("alpha=0.3",),
    ),
    "EM+APL": BaselineCase(
        "EMAPLLoss",
        lambda c: filled(baselines.EMAPLLoss(SAMPLES, c, alpha=0.3, beta=0.6, label_share=0.5, warmup=9), c),
        em_apl_oracle,
        state=("soft", "labelled", "passes"),
        shows=("beta=0.6", "warmup=9"),
    ),
    "large loss, reject": BaselineCase("LargeLoss", lambda c: large("reject", c), large_oracle, state=("rate",)),
    "large loss, correct": BaselineCase("LargeLoss", lambda c: large("correct", c), large_oracle, state=("rate",)),
    "large loss, correct permanently": BaselineCase(
        "LargeLoss",
        lambda c: large("correct_permanently", c),
        large_oracle,
        state=("rate", "flipped"),
        shows=("scheme='correct_permanently'", "delta=0.15"),
    ),
    "SPLC, first epoch": BaselineCase("SPLCLoss", lambda c: baselines.SPLCLoss(), splc_oracle, state=("correcting",)),
    "SPLC": BaselineCase(
        "SPLCLoss",
        lambda c: begun(baselines.SPLCLoss(threshold=0.55, margin=0.7, gamma=1.5, reduction="mean")),
        splc_oracle,
        state=("correcting",),
        shows=("threshold=0.55", "reduction='mean'"),
    ),
    "Hill": BaselineCase("HillLoss", lambda c: baselines.HillLoss(), hill_oracle, shows=("strength=1.5",)),
    "Hill, mean": BaselineCase(
        "HillLoss", lambda c: baselines.HillLoss(strength=1.3, margin=0.5, gamma=1.0, reduction="mean"), hill_oracle
    ),
    "partial BCE": BaselineCase(
        "PartialBCELoss",
        lambda c: baselines.PartialBCELoss(),
        lambda m, x, y, held, ids: baseline_oracles.partial_bce(x, y, held, -4.45, 5.45, 1),
    ),
    "partial BCE, mean of each image": BaselineCase(
        "PartialBCELoss",
        lambda c: baselines.PartialBCELoss(alpha=1.0, beta=0.0, gamma=-1.0),
        lambda m, x, y, held, ids: baseline_oracles.partial_bce(x, y, held, 1, 0, -1),
        shows=("gamma=-1.0",),
    ),
    "partial ASL, ignore": BaselineCase(
        "PartialASLLoss",
        lambda c: partial_asl("ignore", c, margin=0.05),
        partial_asl_oracle,
        state=("prior", "prior_steps"),
        smooth=False,
    ),
    "partial ASL, negative": BaselineCase(
        "PartialASLLoss",
        lambda c: partial_asl("negative", c, reduction="mean"),
        partial_asl_oracle,
        state=("prior", "prior_steps"),
        smooth=False,
    ),
    "partial ASL, selective": BaselineCase(
        "PartialASLLoss",
        lambda c: partial_asl("selective", c, margin=0.05, prior=torch.arange(c, 0.0, -1) / 10, prior_threshold=0.35, likely=1),
        partial_asl_oracle,
        state=("prior", "prior_steps"),
        smooth=False,
        shows=("policy='selective'", "likely=1"),
    ),
    "VLPL": BaselineCase(
        "VLPLLoss",
        lambda c: vlpl(c),
        lambda m, x, y, held, ids: baseline_oracles.vlpl(x, y, held, oracles.array(m.scores)[ids], 0.2, 0.7, 0.3, 0),
        state=("scores",),
    ),
    "VLPL, lowest left out": BaselineCase(
        "VLPLLoss",
        lambda c: vlpl(c, threshold=0.4, negative_share=0.4),
        lambda m, x, y, held, ids: baseline_oracles.vlpl(
            x, y, held, oracles.array(m.scores)[ids], 0.2, 0.7, 0.4, 2 * x.shape[1] // 5
        ),
        state=("scores",),
        shows=("negative_share=0.4",),
    ),
    "GR": BaselineCase(
        "GRLoss",
        lambda c: baselines.GRLoss(),
        lambda m, x, y, held, ids: baseline_oracles.gr(m, x, y, held),
        state=("ramps",),
        smooth=False,
    ),
    "GR, midway": BaselineCase(
        "GRLoss",
        lambda c: begun(baselines.GRLoss(slope=(0, 10), offset=(-2, -8), q_present=0.3, q_absent=1.5), 5, 8),
        lambda m, x, y, held, ids: baseline_oracles.gr(m, x, y, held),
        state=("ramps",),
        smooth=False,
        shows=("slope=(0, 10)", "q_absent=1.5"),
    ),
    "GPR": BaselineCase(
        "GPRLoss",
        lambda c: begun(gpr(c, negative_share=0.4, threshold=0.65), 6, 8),
        lambda m, x, y, held, ids: baseline_oracles.gpr(m, x, y, held, oracles.array(m.scores)[ids]),
        state=("ramps", "scores"),
        smooth=False,
        shows=("num_samples=6", "threshold=0.65", "weights=(0.4, 0.7)", "q_present=0.01"),
    ),
    "GCE": BaselineCase(
        "GCELoss", lambda c: baselines.GCELoss(), lambda m, x, y, held, ids: baseline_oracles.gce(x, y, 0.7), bounded=True
    ),
    "GCE, half": BaselineCase(
        "GCELoss",
        lambda c: baselines.GCELoss(q=0.5),
        lambda m, x, y, held, ids: baseline_oracles.gce(x, y, 0.5),
        shows=("q=0.5",),
        bounded=True,
    ),
}


def baseline_value(case: BaselineCase, module: Any, inputs: Inputs) -> Callable[[Any], float]:
    """The oracle as a function of the logits, with those of the inputs where no gradient passes."""
    y, ids, held = oracles.array(inputs["targets"]), inputs["ids"].numpy(), oracles.array(inputs["logits"])
    return lambda x: case.oracle(module, x, y, held, ids)


def baseline_case(name: str, case: BaselineCase) -> Case:
    return Case(
        name=name,
        owner=case.owner,
        build=case.build,
        inputs=baseline_inputs,
        call=call_baseline,
        oracle=lambda m, x: np.float64(baseline_value(case, m, x)(oracles.array(x["logits"]))),
        learns=("logits",),
        smooth=case.smooth,
        decides=case.owner in DECIDE,
        wrong={
            **refused(logits="B C", targets="B C", ids="B"),
            **integers("logits"),
            **encodings(),
            "ids: float": (change("ids", lambda i: i.float()), TypeError, "ids must be int64, got torch.float32"),
        },
        state=case.state,
        finite=("logits",),
        shows=case.shows,
    )


CASES = [baseline_case(name, case) for name, case in BASELINES.items()]
