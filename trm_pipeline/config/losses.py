"""Losses of other methods by the names of the grid: their classes, what was published, and what may be chosen in its place."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from trm_losses import baselines

_NAMED: dict[str, Callable[..., Any]] = {
    "an": baselines.AssumeNegativeLoss,
    "an-ls": baselines.AssumeNegativeLoss,
    "wan": baselines.WeakAssumeNegativeLoss,
    "epr": baselines.EPRLoss,
    "role": baselines.ROLELoss,
    "em": baselines.EMLoss,
    "em-apl": baselines.EMAPLLoss,
    "ll-r": baselines.LargeLoss,
    "ll-ct": baselines.LargeLoss,
    "ll-cp": baselines.LargeLoss,
    "splc": baselines.SPLCLoss,
    "hill": baselines.HillLoss,
    "partial-bce": baselines.PartialBCELoss,
    "pasl-ignore": baselines.PartialASLLoss,
    "pasl-negative": baselines.PartialASLLoss,
    "pasl-selective": baselines.PartialASLLoss,
    "vlpl": baselines.VLPLLoss,
    "gr": baselines.GRLoss,
    "gpr": baselines.GPRLoss,
}
# Any other loss is called as its class is, GCELoss gce, and has the numbers that its constructor has.
_OTHERS: dict[str, Callable[..., Any]] = {
    re.sub("(?<=[a-z])(?=[A-Z])", "-", name.removesuffix("Loss")).lower(): getattr(baselines, name)
    for name in baselines.__all__
    if getattr(baselines, name) not in _NAMED.values()
}
MADE_BY = {**_NAMED, **_OTHERS}


def _numbers(loss: Callable[..., Any]) -> dict[str, float]:
    given = {parameter.name: parameter.default for parameter in inspect.signature(loss).parameters.values()}
    return {name: value for name, value in given.items() if type(value) in (int, float)}


GR: dict[str, float] = {
    "slope_start": 0.0,
    "slope_end": 2.0,
    "offset_start": -2.0,
    "offset_end": -2.0,
    "center_start": 0.5,
    "center_end": 0.8,
    "width_start": 2.0,
    "width_end": 0.5,
    "q_present": 0.01,
    "q_absent": 1.0,
}

# What was published, for VOC where it depends on the data.
LOSSES: dict[str, dict[str, float]] = {
    "an": {},
    "an-ls": {"smoothing": 0.1},
    "wan": {},
    "epr": {},  # k: from the known labels, or expected_positives
    "role": {"rate": 10.0},  # k likewise; of the labels' learning rate, in rates of the head
    "em": {"alpha": 0.2},
    "em-apl": {"alpha": 0.2, "beta": 0.02, "label_share": 0.9, "warmup": 5, "published_epochs": 10},
    "ll-r": {"delta": 0.002, "published_epochs": 10},
    "ll-ct": {"delta": 0.002, "published_epochs": 10},
    "ll-cp": {"delta": 0.001, "published_epochs": 10},
    "splc": {"threshold": 0.6, "margin": 1.0, "gamma": 2.0, "start": 1 / 31},  # share of the training before it corrects
    "hill": {"strength": 1.5, "margin": 1.0, "gamma": 2.0},
    "partial-bce": {"alpha": -4.45, "beta": 5.45, "gamma": 1.0},
    # Of the three published settings the one for labels that are missing at random.
    "pasl-ignore": {"gamma_pos": 0.0, "gamma_neg": 1.0, "margin": 0.0},
    "pasl-negative": {"gamma_pos": 0.0, "gamma_neg": 1.0, "gamma_unknown": 4.0, "margin": 0.0},
    "pasl-selective": {
        "gamma_pos": 0.0,
        "gamma_neg": 1.0,
        "gamma_unknown": 4.0,
        "margin": 0.0,
        "prior_threshold": 0.5,
        "likely": 5,
    },
    "vlpl": {"alpha": 0.2, "beta": 0.7, "temperature": 0.01, "threshold": 0.3, "negative_share": 0.0},
    "gr": GR,
    "gpr": {
        **GR,
        "temperature": 0.01,
        "threshold": 0.5,
        "negative_share": 0.2,
        "weight_low": 0.4,
        "weight_high": 0.7,
        "confidence": 0.9,
        "weight_expected": 0.05,
    },
    **{name: _numbers(loss) for name, loss in _OTHERS.items()},
    # Methods that are more than a loss. SCPNet reads splc too; the share of tokens that its strong view lacks is ours.
    "scpnet": {"top": 5, "weight": 0.125, "balance": 2.0, "temperature": 0.3, "neighbours": 20, "drop": 0.5},
    "sst": {"threshold": 0.95, "fall": 0.025, "floor": 0.75, "memory": 100, "weight_pairs": 10.0, "weight_distance": 0.05},
    "sarb": {"alpha": 0.5, "beta": 0.5, "prototypes": 10, "weight_distance": 0.05},
}

# Numbers that --choose tries in place of the published ones, which suit networks that are trained whole and not frozen features.
CANDIDATES: dict[str, tuple[dict[str, float], ...]] = {
    "an-ls": ({"smoothing": 0.05}, {"smoothing": 0.01}, {"smoothing": 0.001}),
    "role": ({"rate": 100.0}, {"rate": 300.0}, {"rate": 1000.0}),
    "em": ({"alpha": 0.1}, {"alpha": 0.01}, {"alpha": 0.003}),
    "em-apl": ({"alpha": 0.1, "beta": 0.9}, {"alpha": 0.01, "beta": 0.4}, {"alpha": 0.003}),
    "ll-r": ({"delta": 0.0005}, {"delta": 0.01}, {"delta": 0.04}),
    "ll-ct": ({"delta": 0.0005}, {"delta": 0.004}, {"delta": 0.01}),
    "ll-cp": ({"delta": 0.0003}, {"delta": 0.002}, {"delta": 0.01}),
    "splc": ({"gamma": 0.0}, {"margin": 0.0}, {"gamma": 0.0, "threshold": 0.9}),
    "hill": ({"strength": 1.0}, {"strength": 2.0}, {"gamma": 0.0}),
    "partial-bce": ({"gamma": 0.5}, {"alpha": -1.0, "beta": 2.0}, {"alpha": 0.0, "beta": 1.0}),
    "pasl-ignore": ({"gamma_neg": 0.0}, {"gamma_neg": 2.0}, {"margin": 0.05}),
    "pasl-negative": ({"gamma_unknown": 0.0, "gamma_neg": 0.0}, {"gamma_unknown": 2.0, "gamma_neg": 0.0}, {"gamma_unknown": 2.0}),
    "pasl-selective": ({"gamma_neg": 0.0}, {"gamma_unknown": 0.0, "gamma_neg": 0.0}, {"likely": 2}),
    "vlpl": ({"alpha": 0.1}, {"alpha": 0.01, "threshold": 0.2}, {"alpha": 0.003}),
    "gr": ({"slope_end": 10.0, "offset_end": -8.0}, {"q_absent": 1.5}, {"width_end": 2.0}),
    "gpr": ({"slope_end": 10.0, "offset_end": -8.0}, {"negative_share": 0.0}, {"weight_expected": 0.0}),
    "gce": ({"q": 0.3}, {"q": 0.5}, {"q": 0.9}),
    "scpnet": ({"weight": 0.03}, {"weight": 0.03, "drop": 0.25}, {"weight": 0.01, "drop": 0.1}),
    "sst": ({"weight_pairs": 1.0}, {"weight_pairs": 0.1}, {"weight_distance": 0.5}),
    "sarb": ({"alpha": 0.8, "beta": 0.8}, {"alpha": 0.9, "beta": 0.9}, {"weight_distance": 0.5}),
}
