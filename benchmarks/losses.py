"""Time and peak memory of the parts against their usual replacements, paired in one run.

    python benchmarks/losses.py --rounds 20 --only contrast matching
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from trm_losses import MultimodalContrastiveLoss, PrototypeBank, RegionPooler, TextRegionMatchingLoss
from trm_losses.functional import asymmetric_loss
from trm_losses.metrics import average_precision


class Pair(NamedTuple):
    """Two ways to do the same work; each does one forward and, where there is a gradient, one backward."""

    name: str
    ours: Callable[[], object]
    peer: Callable[[], object]
    peer_name: str


def published_asl(logits: Tensor, targets: Tensor) -> Tensor:
    """The asymmetric loss as it is usually written: clamped probabilities, powers, every entry known."""
    p = torch.sigmoid(logits)
    q = (1 - p + 0.05).clamp(max=1)
    known = (targets >= 0).float()
    y = (targets == 1).float()
    loss = y * torch.log(p.clamp(min=1e-8)) + (1 - y) * torch.log(q.clamp(min=1e-8))
    focus = torch.pow(1 - p * y - q * (1 - y), y + 2 * (1 - y))
    return -(known * loss * focus).sum() / known.sum()


def backward(loss: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], object]:
    """One forward and backward; nothing is kept, so that every call allocates the same."""
    return lambda: torch.autograd.grad(loss(), leaves, allow_unused=True)


def labels(batch: int, classes: int, generator: torch.Generator) -> Tensor:
    """Half of the labels unknown, 4 % of the others present."""
    truth = (torch.rand(batch, classes, generator=generator) < 0.04).float()
    return torch.where(torch.rand(batch, classes, generator=generator) < 0.5, truth, -1.0)


def asl_pair(batch: int, classes: int) -> Pair:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, classes, generator=g).requires_grad_()
    y = labels(batch, classes, g)
    return Pair(
        f"asymmetric loss {batch}x{classes}",
        backward(lambda: asymmetric_loss(x, y), x),
        backward(lambda: published_asl(x, y), x),
        "published formula",
    )


def matching_pair(batch: int, classes: int, dim: int) -> Pair:
    g = torch.Generator().manual_seed(0)
    regions = torch.randn(batch, classes, dim, generator=g).requires_grad_()
    text = torch.randn(classes, dim, generator=g).requires_grad_()
    y = labels(batch, classes, g)
    ours = TextRegionMatchingLoss(classes, normalize_regions=True, validate=False)

    def peer() -> Tensor:
        cosine = (F.normalize(regions, dim=-1) * F.normalize(text, dim=-1)).sum(dim=-1)
        return published_asl(20 * cosine, y)

    return Pair(
        f"matching {batch}x{classes}x{dim}",
        backward(lambda: ours(regions, text, y), regions, text),
        backward(peer, regions, text),
        "normalise, multiply, sum + published formula",
    )


def contrast_pair(batch: int, classes: int, dim: int) -> Pair | None:
    try:
        from pytorch_metric_learning.losses import SupConLoss
    except ImportError:
        return None
    g = torch.Generator().manual_seed(0)
    regions = torch.randn(batch, classes, dim, generator=g).requires_grad_()
    text = torch.randn(classes, dim, generator=g)
    y = labels(batch, classes, g)
    ours = MultimodalContrastiveLoss(region_text=0, region_prototype=0, text_prototype=0, validate=False)
    supcon = SupConLoss(temperature=0.1)
    anchors = y == 1
    own = torch.arange(classes).expand_as(y)[anchors]
    return Pair(
        f"contrast {batch}x{classes}x{dim} ({int(anchors.sum())} anchors)",
        backward(lambda: ours(regions, text, y), regions),
        backward(lambda: supcon(regions[anchors], own), regions),
        "pytorch-metric-learning SupConLoss (one of our five terms)",
    )


def pooler_pair(batch: int, classes: int, tokens: int, dim: int) -> Pair:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, dim, generator=g)
    text = torch.randn(classes, dim, generator=g).requires_grad_()
    ours = RegionPooler(classes, dim, num_heads=1, query_head=False, validate=False)
    attention = nn.MultiheadAttention(dim, 1, batch_first=True)
    return Pair(
        f"pooler {batch}x{classes}x{tokens}x{dim}, 1 head, regions only",
        backward(lambda: ours(x, text).region.sum(), text, *ours.parameters()),
        backward(lambda: attention(text.expand(batch, -1, -1), x, x)[0].sum(), text, *attention.parameters()),
        "nn.MultiheadAttention",
    )


def bank_pair(batch: int, classes: int, dim: int) -> Pair:
    g = torch.Generator().manual_seed(0)
    regions = torch.randn(batch, classes, dim, generator=g)
    y = labels(batch, classes, g)
    ours = PrototypeBank(classes, dim, validate=False)
    state = torch.zeros(classes, dim)

    def loop() -> None:
        for c in range(classes):
            rows = regions[:, c][y[:, c] == 1]
            if len(rows):
                state[c] = F.normalize(0.99 * state[c] + 0.01 * F.normalize(rows, dim=-1).mean(dim=0), dim=-1)

    return Pair(f"prototypes {batch}x{classes}x{dim}", lambda: ours.update(regions, y), loop, "loop over classes")


def metric_pair(images: int, classes: int) -> Pair | None:
    try:
        from torchmetrics.functional.classification import multilabel_average_precision
    except ImportError:
        return None
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(images, classes, generator=g)
    y = (torch.rand(images, classes, generator=g) < 0.1).long()
    return Pair(
        f"average precision {images}x{classes}",
        lambda: average_precision(scores, y),
        lambda: multilabel_average_precision(scores, y, num_labels=classes, average="none"),
        "torchmetrics",
    )


def peak_memory(work: Callable[[], object]) -> int:
    """Peak of the bytes that one call holds beyond what was there before, from the allocator's own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    held = peak = 0
    events = trace.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(pair: Pair, rounds: int, warmup: int) -> dict[str, object]:
    """Interleaved rounds; the ratio is taken within each round."""
    ours, ratios = [], []
    for index in range(warmup + rounds):
        times = []
        for work in (pair.ours, pair.peer) if index % 2 else (pair.peer, pair.ours):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        first, second = times if index % 2 else times[::-1]
        if index >= warmup:
            ours.append(first)
            ratios.append(first / second)
    low, middle, high = statistics.quantiles(ratios, n=4)
    memory = peak_memory(pair.ours), peak_memory(pair.peer)
    return {
        "pair": pair.name,
        "peer": pair.peer_name,
        "milliseconds": 1e3 * statistics.median(ours),
        "time_ratio": middle,
        "time_ratio_quartiles": [low, high],
        "memory_ratio": memory[0] / memory[1] if memory[1] else float("nan"),
        "peak_mib": memory[0] / 2**20,
    }


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What every benchmark of pairs takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], help="words that a pair's name must begin with")
    parser.add_argument("--json", help="file for the figures")
    return parser


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.manual_seed(0)
    pairs = [
        asl_pair(128, 80),
        asl_pair(128, 9605),
        matching_pair(64, 20, 512),
        matching_pair(64, 80, 512),
        contrast_pair(64, 80, 512),
        contrast_pair(256, 200, 512),
        pooler_pair(16, 20, 196, 512),
        pooler_pair(16, 80, 196, 512),
        bank_pair(64, 80, 512),
        metric_pair(5000, 80),
    ]
    report(pairs, args)


def report(pairs: Iterable[Pair | None], args: argparse.Namespace) -> None:
    """Measure the pairs that were asked for, print them and write them down."""
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {platform.machine()}, {args.threads} thread(s), {args.rounds} rounds")
    print(f"{'pair':58} {'ms':>8}  time / peer (quartiles)   memory / peer  peer")
    figures = []
    for pair in pairs:
        if pair is None or (args.only and not pair.name.startswith(tuple(args.only))):
            continue
        row = measure(pair, args.rounds, args.warmup)
        figures.append(row)
        low, high = row["time_ratio_quartiles"]  # type: ignore[misc]
        print(
            f"{pair.name:58} {row['milliseconds']:8.2f}  {row['time_ratio']:5.2f} ({low:.2f}-{high:.2f})"
            f"{row['memory_ratio']:19.2f}  {pair.peer_name}",
            flush=True,
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"torch": torch.__version__, "threads": args.threads, "pairs": figures}, file, indent=1)


if __name__ == "__main__":
    main()
