"""Numbers of the losses of other methods: what was published, and what suits the drawn VOC."""

from __future__ import annotations

__all__ = ["LOSSES", "TUNED", "TUNED_SINGLE"]

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

# Losses of other methods, by the names of the grid: what was published, for VOC where it depends on the data.
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
    "gce": {"q": 0.7},
    # Methods that are more than a loss. SCPNet reads splc too; the share of tokens that its strong view lacks is ours.
    "scpnet": {"top": 5, "weight": 0.125, "balance": 2.0, "temperature": 0.3, "neighbours": 20, "drop": 0.5},
    "sst": {"threshold": 0.95, "fall": 0.025, "floor": 0.75, "memory": 100, "weight_pairs": 10.0, "weight_distance": 0.05},
    "sarb": {"alpha": 0.5, "beta": 0.5, "prototypes": 10, "weight_distance": 0.05},
}

# What the losses take on the drawn VOC: of ten settings of each the best one on the val images (benchmarks/choose_losses.py).
TUNED: dict[str, dict[str, float]] = {
    "linear+an": {"lr_factor": 0.3},
    "linear+an-ls": {"smoothing": 0.05},
    "*+an-ls": {"smoothing": 0.001},
    "linear+wan": {"lr_factor": 0.5},
    "linear+role": {},
    "*+role": {"rate": 300.0, "lr_factor": 0.3},
    "*+em": {"alpha": 0.003},
    "linear+em-apl": {"alpha": 0.003, "lr_factor": 0.3},
    "*+em-apl": {"alpha": 0.01, "beta": 0.4},
    "linear+ll-r": {"delta": 0.02},
    "*+ll-r": {"delta": 0.04},
    "linear+ll-ct": {"delta": 0.0005, "lr_factor": 0.3},
    "*+ll-ct": {"delta": 0.01},
    "linear+ll-cp": {"lr_factor": 0.3},
    "*+ll-cp": {"delta": 0.01},
    "*+splc": {"gamma": 0.0},
    "linear+hill": {"strength": 1.2},
    "*+hill": {"strength": 1.0},
    "linear+partial-bce": {"alpha": -1.0, "beta": 2.0},
    "*+partial-bce": {"gamma": 0.5},
    "linear+pasl-ignore": {"gamma_neg": 0.0, "lr_factor": 0.3},
    "*+pasl-ignore": {"gamma_neg": 0.0},
    "linear+pasl-negative": {"gamma_unknown": 0.0, "gamma_neg": 0.0, "lr_factor": 0.3},
    "*+pasl-negative": {"gamma_unknown": 0.0, "gamma_neg": 0.0},
    "linear+pasl-selective": {},
    "*+pasl-selective": {"gamma_neg": 0.0},
    "linear+vlpl": {"alpha": 0.01, "threshold": 0.2},
    "*+vlpl": {"alpha": 0.003},
    "*+scpnet": {"weight": 0.01, "drop": 0.1},
    "*+sarb": {"alpha": 0.9, "beta": 0.9},
}
TUNED_SINGLE: dict[str, dict[str, float]] = {
    "linear+an-ls": {"lr_factor": 3.0},
    "*+an-ls": {"smoothing": 0.001},
    "linear+wan": {},
    "*+wan": {"lr_factor": 0.2},
    "*+epr": {"lr_factor": 0.3},
    "linear+role": {"rate": 300.0, "lr_factor": 3.0},
    "*+role": {"rate": 300.0, "lr_factor": 0.3},
    "linear+em": {"lr_factor": 0.3},
    "*+em": {"alpha": 0.01, "lr_factor": 0.1},
    "linear+em-apl": {"lr_factor": 0.3},
    "*+em-apl": {"alpha": 0.01, "beta": 0.4, "lr_factor": 0.1},
    "linear+ll-r": {"delta": 0.0005},
    "*+ll-r": {"delta": 0.01},
    "linear+ll-ct": {"delta": 0.0005},
    "*+ll-ct": {"delta": 0.01},
    "linear+ll-cp": {"delta": 0.0003},
    "*+ll-cp": {"delta": 0.01},
    "*+splc": {"gamma": 0.0, "threshold": 0.9},
    "linear+hill": {"strength": 2.0},
    "*+hill": {"gamma": 0.0},
    "linear+partial-bce": {"alpha": -1.0, "beta": 2.0},
    "*+partial-bce": {"alpha": 0.0, "beta": 1.0},
    "*+pasl-negative": {"gamma_unknown": 0.0, "gamma_neg": 0.0},
    "*+pasl-selective": {"likely": 2},
    "linear+vlpl": {"lr_factor": 0.3},
    "*+vlpl": {"alpha": 0.1, "lr_factor": 0.1},
    "*+scpnet": {"weight": 0.01, "drop": 0.1},
    "*+sst": {"weight_pairs": 1.0, "lr_factor": 0.3},
    "*+sarb": {"alpha": 0.8, "beta": 0.8, "lr_factor": 0.3},
}
