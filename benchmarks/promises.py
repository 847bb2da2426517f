"""What calibration and thresholds do where the truth is known, because it was drawn: the simulated tables of docs/calibration.md.

    python benchmarks/promises.py

The first table is how far calibrated logits are from the right ones, if classes share what is known, stand alone, or are one. The
second is how often the interval of a threshold holds what comes on fresh images.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from trm_losses import Calibration, choose_thresholds
from trm_pipeline.report.markdown import markdown

METRICS = ("precision", "recall", "f1", "cost")


def _of(z: Tensor) -> tuple[Tensor, Tensor]:
    return z.sigmoid(), z.sigmoid()


WORLDS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "calibrated": lambda z: _of(2 * z - 1),
    "rare classes": lambda z: _of(2 * z - 2.5),
    "too unsure": lambda z: ((2 * z - 1.5).sigmoid(), 0.93 * (3 * z - 2.25).sigmoid()),
    "says little": lambda z: ((2 * z).sigmoid(), (0.5 * z - 0.5).sigmoid()),
}
"""From normal numbers to scores and to the chances of labels."""


def apart(classes: int, images: int, spread: tuple[float, float], seed: int) -> tuple[float, float, float]:
    """Mean squared errors of logits: one scale and shift for all classes, each class alone, and shared."""
    draw = torch.Generator().manual_seed(seed)
    logits, differs = torch.randn(images, classes, generator=draw), torch.randn(2, classes, generator=draw)
    right = 2 * torch.exp(spread[0] * differs[0]) * logits + spread[1] * differs[1] - 1
    labels = (torch.rand(images, classes, generator=draw) < right.sigmoid()).long()
    shared = Calibration(classes).fit(logits, labels)
    together = shared.pooled[0] * logits + shared.pooled[1]
    alone = together.clone()
    for c in range(classes):
        if 0 < int(labels[:, c].sum()) < images:  # else it says nothing by itself
            alone[:, c] = Calibration(1).fit(logits[:, c : c + 1], labels[:, c : c + 1])(logits[:, c : c + 1])[:, 0]
    return tuple(float((found - right).square().mean()) for found in (together, alone, shared(logits)))  # type: ignore[return-value]


def held(world: str, metric: str, images: int, draws: int, seed: int) -> tuple[float, float]:
    """Share (%) of draws, each a class, whose interval holds the value on fresh images; and the mean width of the interval."""
    draw = torch.Generator().manual_seed(seed)
    scores, chance = WORLDS[world](torch.randn(images, draws, generator=draw))
    labels = (torch.rand(images, draws, generator=draw) < chance).long()
    found = choose_thresholds(scores, labels, metric=metric, at_least=0.8)  # type: ignore[arg-type]
    fresh, chance = WORLDS[world](torch.randn(100_000, 1, generator=draw))
    said = (fresh > found.threshold).double()
    hits, alarms, present = (said * chance).sum(dim=0), (said * (1 - chance)).sum(dim=0), chance.sum()
    real = {
        "precision": hits / (hits + alarms),
        "recall": hits / present,
        "f1": 2 * hits / (hits + alarms + present),
        "cost": (alarms + present - hits) / len(fresh),
    }[metric]
    asked = found.chosen & real.isfinite()
    inside = ((found.low <= real) & (real <= found.high))[asked].double().mean()
    return 100 * float(inside), float((found.high - found.low)[asked].mean())


def main(argv: list[str] | None = None) -> None:
    """Both tables."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--draws", type=int, default=200, help="of the second table; of the first a twentieth")
    p.add_argument("--images", type=int, nargs="+", default=[40, 200, 1000], help="known labels of a class")
    args = p.parse_args(argv)
    rows: list[tuple[str, ...]] = [("classes, known labels of each", "pooled alone", "each class alone", "shared")]
    for classes, images, spread in ((20, 50, (0.3, 1.5)), (20, 300, (0.3, 1.5)), (80, 50, (0.3, 1.5)), (20, 50, (0.0, 0.0))):
        found = [apart(classes, images, spread, seed) for seed in range(max(1, args.draws // 20))]
        name = f"{classes}, {images}{'' if any(spread) else ', all alike'}"
        rows.append((name, *(f"{statistics.mean(values):.2f}" for values in zip(*found, strict=True))))
    print(f"Mean squared error of the logits\n{markdown(rows)}\n")
    rows = [("known labels", *METRICS, "width, precision")]
    for images in args.images:
        kept = {
            metric: [held(world, metric, images, args.draws, seed) for seed, world in enumerate(WORLDS)] for metric in METRICS
        }
        widths = [width for _, width in kept["precision"]]
        least = (f"{min(share for share, _ in kept[metric]):.0f} %" for metric in METRICS)
        rows.append((f"{images:,}", *least, f"{min(widths):.2f} to {max(widths):.2f}"))
    print(f"How often the interval holds, the least of {len(WORLDS)} kinds of scores\n{markdown(rows)}")


if __name__ == "__main__":
    main()
