"""Numbers of the field's other losses for the drawn VOC, chosen on its val images with the same budget for each.

    python benchmarks/choose_losses.py --jobs 2
    python benchmarks/choose_losses.py --losses scpnet --output runs/choose-scpnet
    python benchmarks/choose_losses.py --losses sst sarb --heads text-pixel --output runs/choose-blends

Each loss has ten settings to choose from: the published one with the head's rates as they are, and nine others of its own
numbers and of ``lr_factor``. What is taken is that of the highest mAP on val, last epoch: one for 10 and 50 % known labels (their
mean) and one for single positives, for the linear head and for all others, of which the text-pixel head is asked. What is printed
at the end is what stands in ``presets.py``. SCPNet reads SPLC's numbers, those of the preset, and so has its turn after SPLC.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trm_pipeline.config.losses import LOSSES
from trm_pipeline.config.presets import Known
from trm_pipeline.files import CACHE, folder_argument
from trm_pipeline.methods.grid import GRID, PEERS
from trm_pipeline.report.markdown import markdown
from trm_pipeline.report.rows import Row
from trm_pipeline.run import arguments, experiment

Numbers = dict[str, float]

BUDGET = 10
_RATES: list[Numbers] = [{}, {"lr_factor": 0.3}, {"lr_factor": 3.0}]
_RATES_ALONE: list[Numbers] = [
    *_RATES,
    {"lr_factor": 0.1},
    {"lr_factor": 2.0},
    {"lr_factor": 10.0},
    {"lr_factor": 0.5},
    {"lr_factor": 1.5},
    {"lr_factor": 0.2},
    {"lr_factor": 5.0},
]
CANDIDATES: dict[str, list[Numbers]] = {
    "an": _RATES_ALONE,
    "an-ls": [
        *_RATES,
        {"smoothing": 0.05},
        {"smoothing": 0.02},
        {"smoothing": 0.005},
        {"smoothing": 0.002},
        {"smoothing": 0.001},
        {"smoothing": 0.005, "lr_factor": 0.3},
        {"smoothing": 0.001, "lr_factor": 0.3},
    ],
    "wan": _RATES_ALONE,
    "epr": _RATES_ALONE,
    "role": [
        {},
        {"rate": 100.0},
        {"rate": 300.0},
        {"rate": 1000.0},
        {"rate": 1000.0, "lr_factor": 0.3},
        {"rate": 300.0, "lr_factor": 3.0},
        {"rate": 30.0},
        {"rate": 100.0, "lr_factor": 0.3},
        {"rate": 300.0, "lr_factor": 0.3},
        {"rate": 300.0, "lr_factor": 0.1},
    ],
    "em": [
        {},
        {"lr_factor": 0.3},
        {"lr_factor": 0.1},
        {"alpha": 0.1},
        {"alpha": 0.01},
        {"alpha": 0.1, "lr_factor": 0.3},
        {"alpha": 0.01, "lr_factor": 0.3},
        {"alpha": 0.01, "lr_factor": 0.1},
        {"alpha": 0.003},
        {"alpha": 0.003, "lr_factor": 0.3},
    ],
    "em-apl": [
        {},
        {"lr_factor": 0.3},
        {"lr_factor": 0.1},
        {"alpha": 0.1, "beta": 0.9},
        {"alpha": 0.01, "beta": 0.4},
        {"alpha": 0.1, "beta": 0.9, "lr_factor": 0.3},
        {"alpha": 0.01, "beta": 0.4, "lr_factor": 0.3},
        {"alpha": 0.01, "beta": 0.4, "lr_factor": 0.1},
        {"alpha": 0.01},
        {"alpha": 0.003, "lr_factor": 0.3},
    ],
    "ll-r": [
        *_RATES,
        {"delta": 0.004},
        {"delta": 0.01},
        {"delta": 0.02},
        {"delta": 0.04},
        {"delta": 0.0005},
        {"delta": 0.02, "lr_factor": 0.3},
        {"delta": 0.004, "lr_factor": 0.3},
    ],
    "ll-ct": [
        *_RATES,
        {"delta": 0.0005},
        {"delta": 0.004},
        {"delta": 0.01},
        {"delta": 0.02},
        {"delta": 0.0001},
        {"delta": 0.0005, "lr_factor": 0.3},
        {"delta": 0.004, "lr_factor": 0.3},
    ],
    "ll-cp": [
        *_RATES,
        {"delta": 0.0003},
        {"delta": 0.002},
        {"delta": 0.005},
        {"delta": 0.0001},
        {"delta": 0.01},
        {"delta": 0.0003, "lr_factor": 0.3},
        {"delta": 0.002, "lr_factor": 0.3},
    ],
    "splc": [
        *_RATES,
        {"threshold": 0.8},
        {"margin": 0.0},
        {"gamma": 0.0},
        {"threshold": 0.9},
        {"threshold": 0.8, "lr_factor": 0.3},
        {"gamma": 0.0, "margin": 0.0},
        {"gamma": 0.0, "threshold": 0.9},
    ],
    "hill": [
        *_RATES,
        {"strength": 1.0},
        {"margin": 0.0},
        {"gamma": 0.0},
        {"strength": 1.2},
        {"strength": 2.0},
        {"strength": 1.0, "lr_factor": 0.3},
        {"gamma": 0.0, "margin": 0.0},
    ],
    "partial-bce": [
        *_RATES,
        {"gamma": 0.5},
        {"alpha": -1.0, "beta": 2.0},
        {"alpha": 0.0, "beta": 1.0},
        {"alpha": -1.0, "beta": 2.0, "lr_factor": 0.3},
        {"alpha": 0.0, "beta": 1.0, "lr_factor": 0.3},
        {"lr_factor": 0.5},
        {"lr_factor": 2.0},
    ],
    "pasl-ignore": [
        *_RATES,
        {"gamma_neg": 0.0},
        {"gamma_neg": 2.0},
        {"gamma_neg": 3.0},
        {"gamma_neg": 0.0, "lr_factor": 0.3},
        {"gamma_neg": 0.0, "lr_factor": 2.0},
        {"gamma_neg": 0.5},
        {"margin": 0.05},
    ],
    "pasl-negative": [
        *_RATES,
        {"gamma_unknown": 2.0},
        {"gamma_unknown": 0.0, "gamma_neg": 0.0},
        {"gamma_neg": 3.0},
        {"gamma_unknown": 0.0, "gamma_neg": 0.0, "lr_factor": 0.3},
        {"gamma_unknown": 1.0, "gamma_neg": 0.0},
        {"gamma_unknown": 2.0, "gamma_neg": 0.0},
        {"gamma_unknown": 0.0},
    ],
    "pasl-selective": [
        *_RATES,
        {"gamma_unknown": 2.0, "prior_threshold": 0.05},
        {"gamma_unknown": 0.0, "gamma_neg": 0.0},
        {"gamma_neg": 3.0},
        {"gamma_neg": 0.0},
        {"gamma_neg": 0.0, "lr_factor": 0.3},
        {"likely": 2},
        {"likely": 10},
    ],
    "vlpl": [
        *_RATES,
        {"alpha": 0.1},
        {"alpha": 0.01},
        {"threshold": 0.5},
        {"alpha": 0.01, "lr_factor": 0.3},
        {"alpha": 0.003},
        {"alpha": 0.01, "threshold": 0.2},
        {"alpha": 0.1, "lr_factor": 0.1},
    ],
    "scpnet": [
        *_RATES,
        {"weight": 0.03},
        {"weight": 0.5},
        {"drop": 0.25},
        {"weight": 0.03, "drop": 0.25},
        {"drop": 0.1},
        {"weight": 0.01, "drop": 0.1},
        {"weight": 0.03, "drop": 0.25, "lr_factor": 0.3},
    ],
    "sst": [
        *_RATES,
        {"weight_pairs": 1.0},
        {"weight_distance": 0.5},
        {"threshold": 0.85, "floor": 0.65},
        {"weight_pairs": 0.1},
        {"weight_distance": 0.0},
        {"weight_pairs": 1.0, "lr_factor": 0.3},
        {"threshold": 0.99, "floor": 0.95},
    ],
    "sarb": [
        *_RATES,
        {"alpha": 0.8, "beta": 0.8},
        {"weight_distance": 0.5},
        {"weight_distance": 0.0},
        {"alpha": 0.8, "beta": 0.8, "lr_factor": 0.3},
        {"alpha": 0.8, "beta": 0.8, "weight_distance": 0.0},
        {"prototypes": 3},
        {"alpha": 0.9, "beta": 0.9},
    ],
}
"""The first of each is the published one; numbers it does not name are too."""
REGIMES: dict[str, tuple[Known, ...]] = {"tuned": (0.1, 0.5), "tuned_single": ("single",)}
"""What the preset calls them, and the shares whose mean decides."""


def scores(rounds: Sequence[Sequence[Row]], method: str, shares: Sequence[Known]) -> list[float]:
    """Of each setting: the mean of mAP over shares and seeds."""
    return [statistics.fmean(row["mAP"] for row in rows if row["method"] == method and row["known"] in shares) for rows in rounds]


def chosen(found: Mapping[str, Sequence[float]]) -> dict[str, Numbers]:
    """The best setting of each method, as a preset has them; left out are the published one and what all heads share."""
    best: dict[str, Numbers] = {}
    for method, values in found.items():
        head, _, loss = method.partition("+")
        best[f"*+{loss}" if head == "text-pixel" else method] = CANDIDATES[loss][values.index(max(values))]
    shared = {method: best.get(f"*+{method.partition('+')[2]}", {}) for method in best}
    return {name: numbers for name, numbers in best.items() if numbers != ({} if name.startswith("*") else shared[name])}


def said(numbers: Numbers) -> str:
    """For people."""
    return " ".join(f"{name}={value:g}" for name, value in numbers.items()) or "published"


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--losses",
        nargs="+",
        choices=list(CANDIDATES),
        help="default: all but scpnet, sst and sarb",
        default=[loss for loss in CANDIDATES if loss not in PEERS],
    )
    p.add_argument("--heads", nargs="+", default=["linear", "text-pixel"], choices=["linear", "text-pixel"])
    p.add_argument("--seeds", type=int, nargs="+", default=[1])
    p.add_argument("--jobs", type=int, default=2)
    p.add_argument("--cache", type=folder_argument, default=CACHE)
    p.add_argument("--output", type=Path, default=Path("runs/choose"), help="a folder for each round, to go on after a break")
    args = p.parse_args(argv)
    if {"splc", "scpnet"} <= set(args.losses):
        p.error("--losses: scpnet reads the numbers of splc, which differ from round to round; choose one after the other")
    methods = [f"{head}+{loss}" for loss in args.losses for head in args.heads if f"{head}+{loss}" in GRID]
    rounds = []
    for number in range(BUDGET):
        # All numbers are given, so that what stands in the preset by now does not matter.
        numbers = {loss: {"lr_factor": 1.0, **LOSSES[loss], **CANDIDATES[loss][number]} for loss in args.losses}
        given = [f"{loss}.{name}={value}" for loss, options in numbers.items() for name, value in options.items()]
        typed = [
            "--tune",
            "--known",
            "0.1",
            "0.5",
            "single",
            "--seeds",
            *map(str, args.seeds),
            "--methods",
            *methods,
            "--jobs",
            str(args.jobs),
            "--cache",
            str(args.cache),
            "--output",
            str(args.output / str(number)),
            "--resume",
            "--set",
            *given,
        ]
        rounds.append(experiment.run(arguments.parse(typed)))
    for regime, shares in REGIMES.items():
        found = {method: scores(rounds, method, shares) for method in methods}
        table = [["method", "settings"]]
        for method, values in found.items():
            tried = zip(CANDIDATES[method.partition("+")[2]], values, strict=True)
            table.append([method, "; ".join(f"{said(numbers)} {value:.1f}" for numbers, value in tried)])
        print(f"\n{regime}: mAP (%) on val\n{markdown(table)}")
        for name, numbers in chosen(found).items():
            print(f'    "{name}": {numbers},')


if __name__ == "__main__":
    main()
