"""Time and peak memory of the parts against their usual replacements, paired in one run.

    python benchmarks/losses.py --rounds 20 --only contrast matching
    python benchmarks/losses.py --sizes full --json figures.json
    python benchmarks/losses.py --compiled

Where two candidates compute the same, their values and gradients are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from trm_losses import MultimodalContrastiveLoss, PrototypeBank, TextRegionMatchingLoss
from trm_losses.functional import Entries
from trm_losses.functional.similarities import intra_similarities
from trm_losses.metrics import average_precision
from trm_losses.pseudo import PrototypeRule
from trm_pipeline.files import write_json


class Pair(NamedTuple):
    """Two ways to do the same work; each does one forward and, where there is a gradient, one backward."""

    name: str
    ours: Callable[[], object]
    peer: Callable[[], object]
    peer_name: str
    tolerance: float | None = None
    """Largest difference of values and gradients, as a share of the peer's largest; None where the two are not the same."""
    in_torch: bool = True
    """Whether the peer's memory is torch's: no other is measured."""


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


def library(module: str, row: str) -> ModuleType | None:
    """A peer's module; where it does not import, a line in place of its row says so."""
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError):  # the latter where a wheel beside it was built for another torch
        print(f"{row:58} left out: {module} does not import here")
        return None


def asl_pairs(batch: int, classes: int, *, compiled: bool = False) -> list[Pair]:
    """Half of the labels unknown; timm's loss has no unknown labels, so beside it every label is known."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, classes, generator=g).requires_grad_()
    y = labels(batch, classes, g)
    loss = TextRegionMatchingLoss(classes, validate=False).loss
    name = f"asymmetric loss {batch}x{classes}"
    if compiled:
        return with_compiled(name, loss, published_asl, "published formula", (x, y), x)
    pairs = [Pair(name, backward(lambda: loss(x, y), x), backward(lambda: published_asl(x, y), x), "published formula", 1e-4)]
    if timm := library("timm.loss", name):
        known = (y == 1).float()
        theirs = timm.AsymmetricLossMultiLabel(gamma_neg=2, gamma_pos=1, clip=0.05, reduction="mean")
        ours, peer = backward(lambda: loss(x, known), x), backward(lambda: theirs(x, known), x)
        pairs.append(Pair(f"{name}, all known", ours, peer, "timm AsymmetricLossMultiLabel", 1e-4))
    return pairs


Loss = Callable[..., Tensor]


def with_compiled(name: str, loss: Loss, peer: Loss, peer_name: str, given: tuple[Tensor, ...], *leaves: Tensor) -> list[Pair]:
    """Our loss compiled beside the usual form as it is written, and beside that compiled too."""
    made, peer_made = torch.compile(loss, fullgraph=True), torch.compile(peer)
    ours = backward(lambda: made(*given), *leaves)
    return [
        Pair(f"{name}, compiled", ours, backward(lambda: peer(*given), *leaves), peer_name, 1e-4),
        Pair(f"{name}, compiled", ours, backward(lambda: peer_made(*given), *leaves), f"{peer_name}, compiled", 1e-4),
    ]


def matching_pairs(batch: int, classes: int, dim: int, *, compiled: bool = False) -> list[Pair]:
    g = torch.Generator().manual_seed(0)
    # Of unit length, as regions are: longer ones meet the clamp of the published formula, which has no gradient there.
    regions = F.normalize(torch.randn(batch, classes, dim, generator=g), dim=-1).requires_grad_()
    text = torch.randn(classes, dim, generator=g).requires_grad_()
    y = labels(batch, classes, g)
    loss = TextRegionMatchingLoss(classes, validate=False)

    def usual(regions: Tensor, text: Tensor, y: Tensor) -> Tensor:
        return published_asl(20 * (regions * F.normalize(text, dim=-1)).sum(dim=-1), y)

    name, peer_name = f"matching {batch}x{classes}x{dim}", "multiply, sum + published formula"
    if compiled:
        return with_compiled(name, loss, usual, peer_name, (regions, text, y), regions, text)
    ours = backward(lambda: loss(regions, text, y), regions, text)
    return [Pair(name, ours, backward(lambda: usual(regions, text, y), regions, text), peer_name, 1e-4)]


def contrast_pairs(batch: int, classes: int, dim: int, share: float = 1.0, *, compiled: bool = False) -> list[Pair]:
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
    if compiled:  # every entry is an anchor, as compiled code takes them
        usual = lambda regions, *_: published_sup_con(regions.flatten(0, 1), own)  # noqa: E731
        return with_compiled(name, loss, usual, "published N x N formula", (regions, text, y), regions)
    ours = backward(lambda: loss(regions, text, y), regions)
    peers = {"published N x N formula": backward(lambda: published_sup_con(regions[anchors], own), regions)}
    if pml := library("pytorch_metric_learning.losses", name):
        supcon = pml.SupConLoss(temperature=0.1)
        peers["pytorch-metric-learning SupConLoss"] = backward(lambda: supcon(regions[anchors], own), regions)
    return [Pair(name, ours, peer, peer_name, 1e-4) for peer_name, peer in peers.items()]


def anchored(batch: int, classes: int, dim: int, count: int, generator: torch.Generator) -> tuple[Entries, Tensor]:
    """``count`` entries of a batch, regions with gradient, and the labels (B, C) that make them anchors."""
    y = torch.zeros(batch, classes)
    y.view(-1)[torch.randperm(y.numel(), generator=generator)[:count]] = 1
    row, own = y.nonzero(as_tuple=True)
    return Entries(torch.randn(count, dim, generator=generator).requires_grad_(), row, own), y


def class_contrast_pairs(batch: int, classes: int, dim: int, count: int) -> list[Pair]:
    """Only regions (and texts of classes present) are anchors; regions, and all texts and prototypes, are keys."""
    g = torch.Generator().manual_seed(0)
    regions, y = anchored(batch, classes, dim, count, g)
    features, own = regions.features, regions.own
    text, prototypes = torch.randn(classes, dim, generator=g).requires_grad_(), torch.randn(classes, dim, generator=g)
    loss = MultimodalContrastiveLoss(text_prototype=0, validate=False)

    def usual() -> Tensor:
        f, t, p = (F.normalize(x, dim=-1) for x in (features, text, prototypes))
        others = 1 - torch.eye(len(f))
        positive = (own[:, None] == own[None]).float() * others
        logits = f @ f.T / 0.1
        logits = logits - logits.max(dim=1, keepdim=True).values.detach()
        log_p = logits - torch.log((torch.exp(logits) * others).sum(dim=1, keepdim=True))
        partners = positive.sum(dim=1)
        region_region = -((positive * log_p).sum(dim=1) / partners.clamp(min=1)).sum() / (partners > 0).sum().clamp(min=1)
        of_text = F.log_softmax(t @ f.T / 0.07, dim=1)[own, torch.arange(len(own))] / torch.bincount(own)[own]
        to_text, to_prototypes = F.cross_entropy(f @ t.T / 0.07, own), F.cross_entropy(f @ p.T / 0.07, own)
        return region_region + 0.5 * to_text - 0.5 * of_text.sum() / len(own.unique()) + to_prototypes

    ours = backward(lambda: loss(regions, text, y, prototypes=prototypes), features, text)
    name = f"contrast {batch}x{classes}x{dim} ({count} anchors, {count + 2 * classes} keys)"
    return [Pair(name, ours, backward(usual, features, text), "each against all, as matrices", 1e-4)]


def clip_pairs(batch: int, dim: int) -> list[Pair]:
    """As many classes as images, each with its one text: then regions against texts, both ways, are CLIP's loss."""
    name = f"contrast {batch}x{batch}x{dim} (one text an image)"
    if (open_clip := library("open_clip", name)) is None:
        return []
    g = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(batch, dim, generator=g).requires_grad_() for _ in range(2))
    every, y = torch.arange(batch), torch.eye(batch)
    loss = MultimodalContrastiveLoss(region_region=0, region_prototype=0, text_prototype=0, temperature=0.07, validate=False)
    clip = open_clip.ClipLoss()
    ours = backward(lambda: loss(Entries(images, every, every), texts, y), images, texts)
    peer = backward(lambda: clip(F.normalize(images, dim=-1), F.normalize(texts, dim=-1), 1 / 0.07), images, texts)
    return [Pair(name, ours, peer, "open_clip ClipLoss", 1e-4)]


def bank_pairs(batch: int, classes: int, dim: int) -> list[Pair]:
    """Regions of all classes, of which the present ones are taken."""
    g = torch.Generator().manual_seed(0)
    regions = torch.randn(batch, classes, dim, generator=g)
    y = labels(batch, classes, g)
    row, own = (y == 1).nonzero(as_tuple=True)
    name = f"prototypes {batch}x{classes}x{dim}"
    return prototype_loops(name, lambda bank: bank.update(regions, y), regions[row, own], own, classes)[:1]


def mean_pairs(batch: int, classes: int, dim: int, count: int) -> list[Pair]:
    """Regions of ``count`` entries alone."""
    entries, y = anchored(batch, classes, dim, count, torch.Generator().manual_seed(0))
    features = entries.features.detach()
    given = entries._replace(features=features)
    name = f"prototypes {batch}x{classes}x{dim} ({count} entries)"
    return prototype_loops(name, lambda bank: bank.update(given, y), features, entries.own, classes)


def prototype_loops(
    name: str, update: Callable[[PrototypeBank], None], features: Tensor, own: Tensor, classes: int
) -> list[Pair]:
    """Our update beside the same mean class by class, and beside sample by sample, which is another rule."""
    dim, momentum = features.shape[1], 0.99
    ours = PrototypeBank(classes, dim, momentum=momentum, validate=False)
    by_class, by_sample, count = torch.zeros(classes, dim), torch.zeros(classes, dim), [0] * classes

    def updated() -> Tensor:
        update(ours)
        return ours.visual

    def over_classes() -> Tensor:
        for c in range(classes):
            rows = features[own == c]
            if len(rows):
                m = min(momentum, count[c] / (count[c] + 1))
                mean = F.normalize(rows, dim=-1).mean(dim=0)
                by_class[c] = F.normalize(m * by_class[c] + (1 - m) * mean, dim=-1)
                count[c] += 1
        return by_class

    def over_samples() -> Tensor:
        for z, c in zip(F.normalize(features, dim=-1), own.tolist(), strict=True):
            by_sample[c] = F.normalize(momentum * by_sample[c] + (1 - momentum) * z, dim=-1)
        return by_sample

    return [Pair(name, updated, over_classes, "loop over classes", 1e-4), Pair(name, updated, over_samples, "loop over samples")]


def pseudo_label_pairs(batch: int, classes: int, dim: int, *, relations: bool = False) -> list[Pair]:
    """What the prototype rule reads of regions: similarities to prototype and text of the own class; or all four relations."""
    g = torch.Generator().manual_seed(0)
    regions = torch.randn(batch, classes, dim, generator=g)
    bank = PrototypeBank(classes, dim, validate=False)
    bank.visual.copy_(F.normalize(torch.randn(bank.visual.shape, generator=g), dim=-1))
    bank.text.copy_(F.normalize(torch.randn(classes, dim, generator=g), dim=-1))
    bank.count.fill_(1)
    visual, text, rule = bank.visual, bank.text, PrototypeRule(classes)

    def ours() -> tuple[Tensor, ...]:
        return rule.similarities(regions, bank) if relations else intra_similarities(regions, visual, text)

    def loop() -> tuple[Tensor, ...]:
        found = torch.empty(4 if relations else 2, batch, classes)
        for c in range(classes):
            z = F.normalize(regions[:, c], dim=-1)
            found[0, :, c], found[1, :, c] = z @ visual[c], z @ text[c]
            if relations:
                found[2, :, c] = torch.softmax(z @ visual.T / rule.temperature_visual, dim=1)[:, c]
                found[3, :, c] = torch.softmax(z @ text.T / rule.temperature_text, dim=1)[:, c]
        return found.unbind()

    def broadcast() -> tuple[Tensor, ...]:
        cosine = nn.CosineSimilarity(dim=-1)
        return cosine(regions, visual), cosine(regions, text)

    if relations:
        return [Pair(f"relations {batch}x{classes}x{dim}", ours, loop, "loop over classes", 1e-4)]
    name = f"pseudo-labels {batch}x{classes}x{dim}"
    return [Pair(name, ours, loop, "loop over classes", 1e-4), Pair(name, ours, broadcast, "nn.CosineSimilarity", 1e-4)]


def relation_pairs(batch: int, classes: int, dim: int) -> list[Pair]:
    return pseudo_label_pairs(batch, classes, dim, relations=True)


def metric_pairs(images: int, classes: int) -> list[Pair]:
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(images, classes, generator=g)
    y = (torch.rand(images, classes, generator=g) < 0.1).long()
    name = f"average precision {images}x{classes}"
    peers: dict[str, Callable[[], Tensor]] = {}
    if torchmetrics := library("torchmetrics.functional.classification", name):
        every = torchmetrics.multilabel_average_precision
        peers["torchmetrics"] = lambda: every(scores, y, num_labels=classes, average="none")
    if sklearn := library("sklearn.metrics", name):
        one = sklearn.average_precision_score
        columns = list(zip(y.T.numpy(), scores.T.numpy(), strict=True))
        peers["scikit-learn, a loop"] = lambda: torch.tensor([one(*column) for column in columns])
    ours = partial(average_precision, scores, y)
    return [Pair(name, ours, peer, peer_name, 1e-4, peer_name == "torchmetrics") for peer_name, peer in peers.items()]


Build = Callable[..., list[Pair]]

Sizes = list[tuple[Build, tuple[Any, ...]]]

SMALL: Sizes = [
    *((asl_pairs, size) for size in ((64, 20), (128, 80), (128, 312), (128, 9605))),
    *((matching_pairs, size) for size in ((8, 20, 512), (64, 20, 512), (64, 80, 512), (32, 312, 512))),
    (contrast_pairs, (9, 59, 512)),
    (contrast_pairs, (21, 80, 512)),
    (contrast_pairs, (256, 200, 512, 0.02)),
    (class_contrast_pairs, (64, 2000, 512, 512)),
    (clip_pairs, (256, 512)),
    (bank_pairs, (64, 80, 512)),
    (mean_pairs, (64, 80, 512, 371)),
    (mean_pairs, (128, 200, 512, 1280)),
    (pseudo_label_pairs, (64, 80, 512)),
    (pseudo_label_pairs, (32, 312, 512)),
    (relation_pairs, (64, 80, 512)),
    (metric_pairs, (4952, 20)),
]
SIZES: dict[str, Sizes] = {
    "small": SMALL,
    "full": [
        *SMALL,
        (asl_pairs, (128, 200)),
        (matching_pairs, (4, 9605, 512)),
        *((contrast_pairs, size) for size in ((4, 34, 512), (41, 64, 512), (64, 64, 512), (64, 80, 512, 0.02))),
        (class_contrast_pairs, (64, 9605, 512, 1024)),
        (clip_pairs, (1024, 512)),
        (bank_pairs, (128, 200, 512)),
        (mean_pairs, (32, 312, 512, 3968)),
        (mean_pairs, (16, 9605, 512, 1024)),
        (pseudo_label_pairs, (8, 9605, 512)),
        (relation_pairs, (32, 312, 512)),
        (metric_pairs, (5000, 80)),
        (metric_pairs, (10000, 200)),
    ],
    "compiled": [
        *((partial(asl_pairs, compiled=True), size) for size in ((128, 80), (128, 9605))),
        (partial(matching_pairs, compiled=True), (64, 80, 512)),
        (partial(contrast_pairs, compiled=True), (9, 59, 512)),
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
    events = trace.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(pair: Pair, rounds: int, warmup: int) -> dict[str, Any]:
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
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    memory = peak_memory(pair.ours), peak_memory(pair.peer)
    return {
        "pair": pair.name,
        "peer": pair.peer_name,
        "difference": apart,
        "milliseconds": 1e3 * statistics.median(ours),
        "time_ratio": middle,
        "time_ratio_quartiles": [low, high],
        "memory_ratio": memory[0] / memory[1] if memory[1] and pair.in_torch else float("nan"),
        "peak_mib": memory[0] / 2**20,
        "peer_milliseconds": 1e3 * statistics.median(theirs),
        "peer_peak_mib": memory[1] / 2**20,
    }


def versions() -> dict[str, str]:
    """Of what is measured and of what it is measured against."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "torch": torch.__version__}
    for name in ("open_clip_torch", "pytorch-metric-learning", "scikit-learn", "timm", "torchmetrics"):
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
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser


def main(typed: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", choices=["small", "full"], default="small", help="full takes some ten minutes")
    parser.add_argument("--compiled", action="store_true", help="compiled forms alone; they take a minute to compile")
    args = parser.parse_args(typed)
    torch.manual_seed(0)
    sizes = SIZES["compiled" if args.compiled else args.sizes]
    report((pair for build, size in sizes for pair in build(*size)), args)


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
        low, high = row["time_ratio_quartiles"]
        apart = "" if row["difference"] is None else f"{row['difference']:.0e}"
        print(
            f"{pair.name:58} {row['milliseconds']:8.2f}  {row['time_ratio']:5.2f} ({low:.2f}-{high:.2f})"
            f"{row['memory_ratio']:19.2f}  {apart:>7}  {pair.peer_name}",
            flush=True,
        )
    made = {key: make() for key, make in more.items()}
    if args.json:
        write_json(args.json, {**setting, "pairs": figures, **made})


if __name__ == "__main__":
    main()
