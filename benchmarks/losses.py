"""Time and peak memory of the parts against their usual replacements, paired in one run.

    python benchmarks/losses.py --rounds 20 --only contrast matching
    python benchmarks/losses.py --sizes full --json figures.json

Where two candidates compute the same, their values and gradients are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from typing import Any, NamedTuple

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
    tolerance: float | None = None
    """Largest difference of values and gradients, as a share of the peer's largest; None where the two are not the same."""


def published_asl(logits: Tensor, targets: Tensor) -> Tensor:
    """The asymmetric loss as it is usually written: clamped probabilities, powers, every entry known."""
    p = torch.sigmoid(logits)
    q = (1 - p + 0.05).clamp(max=1)
    known = (targets >= 0).float()
    y = (targets == 1).float()
    loss = y * torch.log(p.clamp(min=1e-8)) + (1 - y) * torch.log(q.clamp(min=1e-8))
    focus = torch.pow(1 - p * y - q * (1 - y), y + 2 * (1 - y))
    return -(known * loss * focus).sum() / known.sum()


def published_sup_con(features: Tensor, own: Tensor, temperature: float = 0.1) -> Tensor:
    """Supervised contrast as it is usually written: matrices of all pairs, and masks of positives and of the diagonal."""
    f = F.normalize(features, dim=-1)
    logits = f @ f.T / temperature
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    others = 1 - torch.eye(len(f))
    positive = (own[:, None] == own[None]).float() * others
    log_p = logits - torch.log((torch.exp(logits) * others).sum(dim=1, keepdim=True))
    return -((positive * log_p).sum(dim=1) / positive.sum(dim=1)).mean()


def backward(loss: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], object]:
    """One forward and backward, the value and its gradients; nothing is kept, so that every call allocates the same."""

    def run() -> tuple[Tensor | None, ...]:
        value = loss()
        return (value.detach(), *torch.autograd.grad(value, leaves, allow_unused=True))

    return run


def labels(batch: int, classes: int, generator: torch.Generator) -> Tensor:
    """Half of the labels unknown, 4 % of the others present."""
    truth = (torch.rand(batch, classes, generator=generator) < 0.04).float()
    return torch.where(torch.rand(batch, classes, generator=generator) < 0.5, truth, -1.0)


def asl_pairs(batch: int, classes: int) -> list[Pair]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, classes, generator=g).requires_grad_()
    y = labels(batch, classes, g)
    ours, peer = backward(lambda: asymmetric_loss(x, y), x), backward(lambda: published_asl(x, y), x)
    return [Pair(f"asymmetric loss {batch}x{classes}", ours, peer, "published formula", 1e-4)]


def matching_pairs(batch: int, classes: int, dim: int) -> list[Pair]:
    g = torch.Generator().manual_seed(0)
    regions = torch.randn(batch, classes, dim, generator=g).requires_grad_()
    text = torch.randn(classes, dim, generator=g).requires_grad_()
    y = labels(batch, classes, g)
    loss = TextRegionMatchingLoss(classes, normalize_regions=True, validate=False)

    def product() -> Tensor:
        return (F.normalize(regions, dim=-1) * F.normalize(text, dim=-1)).sum(dim=-1)

    def function() -> Tensor:
        return F.cosine_similarity(regions, text[None], dim=-1)

    ours = backward(lambda: loss(regions, text, y), regions, text)
    pairs = []
    for cosine, name in ((product, "normalise, multiply, sum"), (function, "F.cosine_similarity")):
        peer = backward(lambda cosine=cosine: published_asl(20 * cosine(), y), regions, text)  # type: ignore[misc]
        pairs.append(Pair(f"matching {batch}x{classes}x{dim}", ours, peer, f"{name} + published formula", 1e-4))
    return pairs


def contrast_pairs(batch: int, classes: int, dim: int, share: float = 1.0) -> list[Pair]:
    """The region-region term alone; ``share`` of the entries are anchors."""
    g = torch.Generator().manual_seed(0)
    regions = torch.randn(batch, classes, dim, generator=g).requires_grad_()
    text = torch.randn(classes, dim, generator=g)
    y = (torch.rand(batch, classes, generator=g) < share).float()
    y[:2] = 1  # SupCon has no answer for an anchor without a partner
    loss = MultimodalContrastiveLoss(region_text=0, region_prototype=0, text_prototype=0, validate=False)
    anchors = y == 1
    own = torch.arange(classes).expand_as(y)[anchors]
    name = f"contrast {batch}x{classes}x{dim} ({int(anchors.sum())} anchors)"
    ours = backward(lambda: loss(regions, text, y), regions)
    peers = {"published N x N formula": backward(lambda: published_sup_con(regions[anchors], own), regions)}
    try:
        from pytorch_metric_learning.losses import SupConLoss
    except ImportError:
        pass
    else:
        supcon = SupConLoss(temperature=0.1)
        peers["pytorch-metric-learning SupConLoss"] = backward(lambda: supcon(regions[anchors], own), regions)
    return [Pair(name, ours, peer, peer_name, 1e-4) for peer_name, peer in peers.items()]


def pooler_pairs(batch: int, classes: int, tokens: int, dim: int) -> list[Pair]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, dim, generator=g)
    text = torch.randn(classes, dim, generator=g).requires_grad_()
    ours = RegionPooler(classes, dim, num_heads=1, query_head=False, validate=False)
    attention = nn.MultiheadAttention(dim, 1, batch_first=True)
    pair = Pair(
        f"pooler {batch}x{classes}x{tokens}x{dim}, 1 head, regions only",
        backward(lambda: ours(x, text).region.sum(), text, *ours.parameters()),
        backward(lambda: attention(text.expand(batch, -1, -1), x, x)[0].sum(), text, *attention.parameters()),
        "nn.MultiheadAttention",
    )
    return [pair]


def bank_pairs(batch: int, classes: int, dim: int) -> list[Pair]:
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

    return [Pair(f"prototypes {batch}x{classes}x{dim}", lambda: ours.update(regions, y), loop, "loop over classes")]


def metric_pairs(images: int, classes: int) -> list[Pair]:
    try:
        from torchmetrics.functional.classification import multilabel_average_precision
    except ImportError:
        return []
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(images, classes, generator=g)
    y = (torch.rand(images, classes, generator=g) < 0.1).long()

    def peer() -> Tensor:
        return multilabel_average_precision(scores, y, num_labels=classes, average="none")

    return [Pair(f"average precision {images}x{classes}", lambda: average_precision(scores, y), peer, "torchmetrics", 1e-4)]


Build = Callable[..., list[Pair]]

SIZES: dict[str, list[tuple[Build, tuple[Any, ...]]]] = {
    "small": [
        (asl_pairs, (128, 80)),
        (asl_pairs, (128, 9605)),
        (matching_pairs, (64, 20, 512)),
        (matching_pairs, (64, 80, 512)),
        (contrast_pairs, (9, 59, 512)),
        (contrast_pairs, (256, 200, 512, 0.02)),
        (pooler_pairs, (16, 20, 196, 512)),
        (pooler_pairs, (16, 80, 196, 512)),
        (bank_pairs, (64, 80, 512)),
        (metric_pairs, (5000, 80)),
    ],
    "full": [
        *((asl_pairs, (batch, classes)) for batch, classes in ((64, 20), (128, 80), (128, 200), (128, 312), (128, 9605))),
        *((matching_pairs, (batch, classes, 512)) for batch, classes in ((64, 20), (64, 80), (32, 312), (4, 9605))),
        *((contrast_pairs, (batch, classes, 512)) for batch, classes in ((4, 34), (9, 59), (21, 80), (64, 64))),
        (contrast_pairs, (64, 80, 512, 0.02)),
        (contrast_pairs, (256, 200, 512, 0.02)),
        (pooler_pairs, (16, 20, 196, 512)),
        (pooler_pairs, (16, 80, 196, 512)),
        (pooler_pairs, (32, 80, 49, 1024)),
        (pooler_pairs, (8, 312, 196, 512)),
        (bank_pairs, (64, 80, 512)),
        (bank_pairs, (128, 200, 512)),
        (metric_pairs, (4952, 20)),
        (metric_pairs, (5000, 80)),
        (metric_pairs, (10000, 200)),
    ],
}


def tensors(result: object) -> list[Tensor]:
    """The tensors of a result, in order."""
    return [x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, Tensor)]


def difference(pair: Pair) -> float | None:
    """How far values and gradients of the two are apart, as a share of the peer's largest."""
    if pair.tolerance is None:
        return None
    ours, theirs = tensors(pair.ours()), tensors(pair.peer())
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))
    if not worst <= pair.tolerance:
        raise SystemExit(f"{pair.name} and {pair.peer_name} differ by {worst:.1e}, more than {pair.tolerance:.0e}; not timed")
    return worst


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
    """Interleaved rounds; the ratio is taken within each round. First of all the two are compared."""
    apart = difference(pair)
    ours, theirs, ratios = [], [], []
    for index in range(warmup + rounds):
        times = []
        for work in (pair.ours, pair.peer) if index % 2 else (pair.peer, pair.ours):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        first, second = times if index % 2 else times[::-1]
        if index >= warmup:
            ours.append(first)
            theirs.append(second)
            ratios.append(first / second)
    low, middle, high = statistics.quantiles(ratios, n=4)
    memory = peak_memory(pair.ours), peak_memory(pair.peer)
    return {
        "pair": pair.name,
        "peer": pair.peer_name,
        "difference": apart,
        "milliseconds": 1e3 * statistics.median(ours),
        "time_ratio": middle,
        "time_ratio_quartiles": [low, high],
        "memory_ratio": memory[0] / memory[1] if memory[1] else float("nan"),
        "peak_mib": memory[0] / 2**20,
        "peer_milliseconds": 1e3 * statistics.median(theirs),
        "peer_peak_mib": memory[1] / 2**20,
    }


def versions() -> dict[str, str]:
    """Of what is measured and of what it is measured against."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "torch": torch.__version__}
    for name in ("open_clip_torch", "pytorch-metric-learning", "torchmetrics"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def enough_rounds(text: str) -> int:
    """A value of ``--rounds``."""
    if int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2 for quartiles, got {text}")
    return int(text)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What every benchmark of pairs takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=enough_rounds, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], help="words that a pair's name must begin with")
    parser.add_argument("--json", help="file for the figures")
    return parser


def main(typed: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", choices=list(SIZES), default="small", help="full takes some minutes")
    args = parser.parse_args(typed)
    torch.manual_seed(0)
    report((pair for build, size in SIZES[args.sizes] for pair in build(*size)), args)


def report(pairs: Iterable[Pair | None], args: argparse.Namespace, **more: Callable[[], object]) -> None:
    """Measure the pairs that were asked for, print them and write them down, with ``more`` figures made after."""
    torch.set_num_threads(args.threads)
    setting = {**versions(), "threads": args.threads, "rounds": args.rounds}
    print(", ".join(f"{key} {value}" for key, value in setting.items()))
    print(f"{'pair':58} {'ms':>8}  time / peer (quartiles)   memory / peer  {'differ':>7}  peer")
    figures = []
    for pair in pairs:
        if pair is None or (args.only and not pair.name.startswith(tuple(args.only))):
            continue
        row = measure(pair, args.rounds, args.warmup)
        figures.append(row)
        low, high = row["time_ratio_quartiles"]  # type: ignore[misc]
        apart = "" if row["difference"] is None else f"{row['difference']:.0e}"
        print(
            f"{pair.name:58} {row['milliseconds']:8.2f}  {row['time_ratio']:5.2f} ({low:.2f}-{high:.2f})"
            f"{row['memory_ratio']:19.2f}  {apart:>7}  {pair.peer_name}",
            flush=True,
        )
    made = {key: make() for key, make in more.items()}
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**setting, "pairs": figures, **made}, file, indent=1)


if __name__ == "__main__":
    main()
