"""What questions are worth: mAP after rounds of answers, by which pairs were asked; and how well wrong labels are found.

    python benchmarks/asking.py                        # drawn VOC: asked of train, scored on val
    python benchmarks/asking.py --features FEATURES    # given features, likewise

Few labels are known, an oracle answers, and the head of whole images learns anew after each round. Wrong labels are known
positives that were moved to absent classes of their images. They are looked for by scores of models that have not seen them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from trm_losses import GlobalHead
from trm_losses.labels import UNKNOWN, hide_labels, move_positives
from trm_losses.metrics import average_precision, mean_average_precision
from trm_pipeline.data import given, voc
from trm_pipeline.files import write_json
from trm_pipeline.folder.review.ask import doubted
from trm_pipeline.folder.review.choice import worth_asking
from trm_pipeline.methods.global_head import global_logits
from trm_pipeline.report.markdown import markdown
from trm_pipeline.report.statistics import paired
from trm_pipeline.run.arguments import parse
from trm_pipeline.run.prepare import prepare
from trm_pipeline.run.prepared import Prepared

Pairs = list[tuple[int, int]]
Ask = Callable[[Tensor, Tensor, int, torch.Generator], Pairs]


def _highest(worth: Tensor, targets: Tensor, count: int) -> Pairs:
    places = torch.where(targets == UNKNOWN, worth, -torch.inf).flatten().topk(count).indices
    return [divmod(int(place), targets.shape[1]) for place in places]


WAYS: dict[str, Ask] = {
    "ours": lambda p, y, count, draw: worth_asking(p, y, count),
    "nearest to one half": lambda p, y, count, draw: _highest(-(p - 0.5).abs(), y, count),
    "random": lambda p, y, count, draw: _highest(torch.rand(y.shape, generator=draw), y, count),
}


def learned(data: Prepared, targets: Tensor) -> GlobalHead:
    """The head of whole images, from these labels."""
    data.heads.clear()
    head = data.global_head(targets, data.preset, single=False)
    assert head is not None
    return head


def curve(data: Prepared, ask: Ask, seed: int, rounds: int, count: int, share: float) -> list[float]:
    """mAP (%) on the other images before the first round and after each."""
    known, draw = hide_labels(data.targets, share, seed=seed), torch.Generator().manual_seed(seed)
    found = []
    for _ in range(rounds + 1):
        head = learned(data, known)
        scores = global_logits(head, data.test_features, 256)
        found.append(100 * float(mean_average_precision(scores, data.test_targets)))
        for i, c in ask(global_logits(head, data.features, 256).sigmoid(), known, count, draw):
            known[i, c] = data.targets[i, c]
    return found


def suspected(data: Prepared, seed: int, share: float, folds: int = 5) -> float:
    """Average precision (%) at which known labels that are wrong stand before others."""
    known = hide_labels(data.targets, share, seed=seed)
    given_labels = move_positives(known, data.targets, 0.1, seed=seed)
    wrong = (given_labels != UNKNOWN) & (given_labels != data.targets)
    fold = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed)) % folds
    scores = torch.empty(known.shape)
    for k in range(folds):
        held = torch.where((fold == k)[:, None], float(UNKNOWN), given_labels)
        scores[fold == k] = global_logits(learned(data, held), data.features, 256).sigmoid()[fold == k]
    order = doubted(given_labels, scores)
    places = torch.tensor([i * known.shape[1] + c for i, c in order])
    rank = -torch.arange(len(places), dtype=torch.float64)[:, None]
    return 100 * float(average_precision(rank, wrong.flatten()[places].long()[:, None]))


def main(argv: list[str] | None = None) -> None:
    """Both tables."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--features", type=Path, help="a folder of given features; default: the drawn VOC")
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--count", type=int, default=200, help="questions of a round")
    p.add_argument("--share", type=float, default=0.02, help="of labels that are known before")
    p.add_argument("--json", type=Path, help="file for the figures")
    args = p.parse_args(argv)
    typed = ["--tune", *([str(args.features)] if args.features else [])]
    data = prepare(parse(typed, given.SOURCE if args.features else voc.SOURCE))
    curves = {
        way: [curve(data, ask, seed, args.rounds, args.count, args.share) for seed in args.seeds] for way, ask in WAYS.items()
    }
    areas = {way: [statistics.mean(row[1:]) for row in found] for way, found in curves.items()}
    rows = [("questions", *(f"after {r}" for r in range(args.rounds + 1)), "mean of rounds", "ours above it")]
    for way, found in curves.items():
        means = [f"{statistics.mean(values):.1f}" for values in zip(*found, strict=True)]
        apart = [a - b for a, b in zip(areas["ours"], areas[way], strict=True)]
        rows.append((way, *means, f"{statistics.mean(areas[way]):.2f}", "–" if way == "ours" else _with_interval(apart)))
    print(f"{data.name}: mAP (%), {args.share:.0%} of the labels known, {args.count} answers a round, {len(args.seeds)} seeds")
    print(markdown(rows))
    suspects = {share: [suspected(data, seed, share) for seed in args.seeds] for share in (1.0, 0.5)}
    print("\nA tenth of the known positives moved: average precision (%) of finding the wrong labels among the known")
    print(markdown([("labels known", "found"), *((f"{k:.0%}", f"{statistics.mean(v):.1f}") for k, v in suspects.items())]))
    if args.json:
        write_json(args.json, {"curves": curves, "suspects": suspects})


def _with_interval(apart: list[float]) -> str:
    """The mean difference with its 95 % interval over seeds."""
    if len(apart) < 2:
        return f"{apart[0]:+.2f}"
    found = paired(apart)
    return f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f})"


if __name__ == "__main__":
    main()
