"""What pseudo-labels are worth on the val images of the drawn VOC: each rule, none at all, and oracles that know the truth.

    python benchmarks/pseudo_labels.py --seeds 1 2 3 4 5 --known 0.1 0.5 single
    python benchmarks/pseudo_labels.py --method trm-region-pseudo --rules none oracle-positive oracle-negative oracle-unsure

An oracle gives unknown entries their true label after the warm-up, with the weights of the preset's own rule: all of them, or
those that are present, absent, on the wrong side of one half by the model's own probability, between 0.1 and 0.9, or outside.
The last column is the share of the whole oracle's gain that a rule reaches, from means over the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trm_losses import PseudoLabeler
from trm_losses.labels import UNKNOWN
from trm_losses.pseudo import Decision, Evidence, Rule
from trm_pipeline import methods
from trm_pipeline.config.presets import PSEUDO_RULES
from trm_pipeline.config.settings import override
from trm_pipeline.files import CACHE, folder_argument
from trm_pipeline.progress import escape_output
from trm_pipeline.report.markdown import markdown
from trm_pipeline.run import arguments, prepare
from trm_pipeline.run.cells import Cell, build
from trm_pipeline.training import loop as training

# Which unknown entries are told, by their truth and the model's own probability.
ORACLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "oracle": lambda y, p: y >= 0,
    "oracle-positive": lambda y, p: y == 1,
    "oracle-negative": lambda y, p: y == 0,
    "oracle-wrong": lambda y, p: (p > 0.5) != (y == 1),
    "oracle-unsure": lambda y, p: (p > 0.1) & (p < 0.9),
    "oracle-sure": lambda y, p: (p <= 0.1) | (p >= 0.9),
}


class Oracle(Rule):
    """Tells the truth (N, C) about the unknown entries it is asked to tell."""

    needs = ("logits", "ids")

    def __init__(self, truth: Tensor, told: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.truth, self.told = truth, told

    def decide(self, evidence: Evidence) -> Decision:
        assert evidence.ids is not None and evidence.logits is not None
        truth = self.truth[evidence.ids].to(evidence.logits)
        told = self.told(truth, torch.sigmoid(evidence.logits))
        return Decision(torch.where(told, truth, float(UNKNOWN)), torch.where(told, truth, 0.5))


def run(args: argparse.Namespace, cell: Cell) -> float:
    """mAP on val at the last epoch; the cell's method is the rule."""
    torch.set_num_threads(1)
    typed = ["--tune", "--cache", str(args.cache), *(["--set", *args.set] if args.set else [])]
    data = prepare.prepare(arguments.parse(typed))
    rule = cell.method
    preset = override(data.preset, [f"pseudo_rule={rule}"]) if rule in PSEUDO_RULES else data.preset
    method, targets = build(data, cell, method=args.method, preset=preset)
    if not isinstance(method, methods.TRM) or method.objective.labeler is None:
        raise ValueError(f"--method must be one with pseudo-labels, got {args.method}")
    if rule == "none":
        method.objective.labeler = None  # and no pseudo-label in prototypes or contrast either
    if rule in ORACLES:
        own = method.objective.labeler
        method.objective.labeler = PseudoLabeler(
            own.num_classes,
            Oracle(data.targets, ORACLES[rule]),
            weight_pos=own.weight_pos,
            weight_neg=own.weight_neg,
            cap=False,
            warmup_steps=own.warmup_steps,
            ramp_steps=own.ramp_steps,
        )
    trained = training.train(
        method,
        data.features,
        targets,
        data.test_features,
        data.test_targets,
        encode=data.encode,
        preset=preset,
        seed=cell.seed,
        device=data.device,
        label=cell.label,
        single=cell.known == "single",
    )
    return trained.metrics["mAP"]


def main() -> None:
    escape_output()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rules", nargs="+", default=["none", *PSEUDO_RULES, "oracle"], choices=["none", *PSEUDO_RULES, *ORACLES])
    p.add_argument("--known", type=arguments.known_argument, nargs="+", default=[0.1, 0.5])
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    p.add_argument("--method", default="trm", choices=("trm", "trm-region-pseudo"))
    p.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="change settings of the preset")
    p.add_argument("--jobs", type=int, default=2)
    p.add_argument("--cache", type=folder_argument, default=CACHE)
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    cells = [Cell(rule, known, seed) for seed in args.seeds for known in args.known for rule in args.rules]
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        found = dict(zip(cells, pool.map(partial(run, args), cells), strict=True))
    if args.json:
        args.json.write_text(json.dumps([[*cell, value] for cell, value in found.items()], indent=1) + "\n", encoding="utf-8")
    for known in args.known:
        cell = {rule: [found[Cell(rule, known, seed)] for seed in args.seeds] for rule in args.rules}
        setting = "single positive labels" if known == "single" else f"{100 * known:g} % known labels"
        print(f"\n{args.method} at {setting}, {len(args.seeds)} seeds: mAP (%) on val")
        table = [["rule", "mAP", "over none, paired", "share of the oracle's gain"]]
        for rule, values in cell.items():
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            gain, share = "", ""
            if "none" in cell and rule != "none":
                gains = [a - b for a, b in zip(values, cell["none"], strict=True)]
                gain = f"{statistics.fmean(gains):+.1f}" + (f" ± {statistics.stdev(gains):.1f}" if len(gains) > 1 else "")
                if "oracle" in cell:
                    whole = statistics.fmean(cell["oracle"]) - statistics.fmean(cell["none"])
                    share = f"{100 * statistics.fmean(gains) / whole:.0f} %" if whole else ""
            table.append([rule, f"{statistics.fmean(values):.1f}{spread}", gain, share])
        print(markdown(table))


if __name__ == "__main__":
    main()
