"""Time and peak memory of pooling, and of pooling to logits, against nn.MultiheadAttention; and of classes in chunks.

    python benchmarks/pooling.py --sizes full --rounds 9 --only "pool and match"

Sizes read images x classes x tokens x width. Before a pair is timed our side is compared with the equation written out, in
value and in gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from losses import Pair, arguments, backward, labels, report
from torch import Tensor, nn

from trm_losses import ChunkedTRMObjective, RegionPooler, Regions, TextRegionMatchingLoss, TRMHead
from trm_losses.labels import sample_classes
from trm_losses.regions import class_chunk

Size = tuple[int, int, int, int]

POOLING: dict[str, list[Size]] = {
    "tiny": [(2, 5, 6, 32)],
    "small": [(16, 20, 196, 512), (16, 80, 196, 512), (4, 80, 49, 512)],
    "full": [(16, 20, 196, 512), (16, 80, 196, 512), (32, 80, 49, 1024), (8, 312, 196, 512), (8, 80, 784, 512)],
}
DECODER: dict[str, list[Size]] = {"tiny": [(2, 5, 6, 32)], "small": [(16, 80, 196, 512)], "full": [(16, 80, 196, 512)]}
BROADCAST: dict[str, list[Size]] = {"tiny": [(2, 5, 6, 32)], "small": [(2, 20, 49, 512)], "full": [(4, 20, 196, 512)]}
MATCHING: dict[str, list[Size]] = {
    "tiny": [(2, 40, 6, 36)],
    "small": [(16, 80, 196, 512), (4, 2000, 49, 512)],
    "full": [(16, 80, 196, 512), (8, 312, 196, 512), (4, 2000, 196, 512), (8, 9605, 49, 512), (16, 2000, 49, 1024)],
}
STEPS: dict[str, list[Size]] = {
    "tiny": [(2, 40, 6, 32)],
    "small": [(8, 80, 49, 512), (8, 400, 49, 512)],
    "full": [(8, 80, 49, 512), (8, 1000, 49, 512), (8, 10000, 49, 512)],
}


def plain_regions(pooler: RegionPooler, tokens: Tensor, text: Tensor) -> Tensor:
    """R = A V with A the mean of softmax(kappa h q k) over heads, as the equation says it."""
    heads, width = pooler.num_heads, pooler.dim // pooler.num_heads
    v, q = F.normalize(tokens, dim=-1), F.normalize(text, dim=-1) @ pooler.query_weight.T
    k = v @ pooler.key_weight.T
    maps = []
    for i in range(heads):
        part = slice(i * width, (i + 1) * width)
        maps.append(torch.softmax(pooler.log_attention_scale.exp() * heads * q[:, part] @ k[..., part].mT, dim=-1))
    return torch.stack(maps).mean(dim=0) @ v


def same(name: str, ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> None:
    """Both sides must say the same, values and gradients, before their times are compared."""
    for actual, expected in zip(ours, theirs, strict=True):
        if actual is not None and expected is not None and actual.numel():
            apart = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
            if not apart <= 1e-3:
                raise SystemExit(f"{name} and the equation written out differ by {apart:.1e}; not timed")


def called(size: Size) -> str:
    return "x".join(map(str, size))


class Broadcast(nn.Module):
    """Semantic decoupling as in SSGRL, SST and SARB: every token meets every class in a value of its own, (B, N, C, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token, self.word = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.joint, self.score = nn.Linear(dim, dim), nn.Linear(dim, 1)

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        met = self.joint(torch.tanh(self.token(tokens)[:, :, None] * self.word(text)))
        return torch.softmax(self.score(met).squeeze(-1), dim=1).mT @ tokens


PEERS = {
    "attention": "nn.MultiheadAttention",
    "decoder": "Q2L decoder layer (self-attention and MLP too)",
    "broadcast": "SARB's broadcast of tokens and classes",
}


def pooling_pair(size: Size, heads: int, peer: Literal["attention", "decoder", "broadcast"], query_head: bool = False) -> Pair:
    batch, classes, tokens, dim = size
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(batch, tokens, dim, generator=g), torch.randn(classes, dim, generator=g).requires_grad_()
    ours = RegionPooler(classes, dim, num_heads=heads, query_head=query_head, validate=False)
    queries = text.expand(batch, -1, -1)
    module: nn.Module
    if peer == "attention":
        module = nn.MultiheadAttention(dim, heads, batch_first=True)
    elif peer == "decoder":
        module = nn.TransformerDecoderLayer(dim, heads, 4 * dim, batch_first=True)
    else:
        module = Broadcast(dim)

    def theirs() -> Tensor:
        given = (x, text) if peer == "broadcast" else (queries, x, x) if peer == "attention" else (queries, x)
        made = module(*given)
        return (made[0] if peer == "attention" else made).sum()  # type: ignore[no-any-return]

    name = f"regions {called(size)}, {heads} head(s){', query head' if query_head else ''}"
    weight = torch.randn(batch, classes, dim, generator=g)
    leaves = (text, ours.query_weight, ours.key_weight, ours.log_attention_scale)
    plain = backward(lambda: (plain_regions(ours, x, text) * weight).sum(), *leaves)
    same(name, backward(lambda: (ours(x, text).region * weight).sum(), *leaves)(), plain())  # type: ignore[arg-type]
    return Pair(
        name,
        backward(lambda: ours(x, text).query.sum(), text, *ours.parameters()),
        backward(theirs, text, *module.parameters()),
        PEERS[peer],
    )


def matching_pair(size: Size, heads: int) -> Pair:
    """Logits of all classes and the regions of one positive in a hundred."""
    batch, classes, tokens, dim = size
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(batch, tokens, dim, generator=g), torch.randn(classes, dim, generator=g).requires_grad_()
    positive = torch.rand(batch, classes, generator=g) < 0.01
    pooler = RegionPooler(classes, dim, num_heads=heads, query_head=False, validate=False)
    matching = TextRegionMatchingLoss(classes, validate=False)
    attention = nn.MultiheadAttention(dim, heads, batch_first=True)
    size_of_chunk = class_chunk(batch, classes, tokens, dim)

    def use(regions: Regions, part: slice) -> dict[str, Tensor]:
        return {"logits": matching.logits(regions.region, text[part], classes=part)}

    def ours() -> tuple[Tensor, Tensor]:
        prepared = pooler.prepare(x, text)
        if size_of_chunk < classes:
            logits = pooler.map_classes(use, prepared, size_of_chunk)["logits"]
            return logits, pooler.entries(prepared, positive).features
        regions = pooler.pool(prepared).region
        return matching.logits(regions, text), regions[positive]

    def peer() -> tuple[Tensor, Tensor]:
        regions = attention(text.expand(batch, -1, -1), x, x, need_weights=False)[0]
        return (regions * F.normalize(text, dim=-1)).sum(dim=-1), regions[positive]

    def plain() -> tuple[Tensor, Tensor]:
        regions = plain_regions(pooler, x, text)
        logits = matching.scale * (regions * F.normalize(text, dim=-1)).sum(dim=-1) - matching.bias
        return logits, regions[positive]

    def total(made: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        logits, regions = made()
        return logits.square().sum() + regions.square().sum()

    name = f"pool and match {called(size)}, {heads} head(s), chunks of {size_of_chunk}"
    leaves = (text, *pooler.parameters(), *matching.parameters())
    with torch.no_grad():
        same(name, ours(), plain())
    same(name, backward(lambda: total(ours), *leaves)(), backward(lambda: total(plain), *leaves)())  # type: ignore[arg-type]
    return Pair(
        name,
        backward(lambda: total(ours), *leaves),
        backward(lambda: total(peer), text, *attention.parameters()),
        "nn.MultiheadAttention, multiply, sum",
    )


def head_pair(size: Size) -> Pair:
    """Scores by the query head; the same logits with all classes at once."""
    batch, classes, tokens, dim = size
    head = TRMHead(
        RegionPooler(classes, dim, validate=False),
        TextRegionMatchingLoss(classes, validate=False),
        torch.randn(classes, dim, generator=torch.Generator().manual_seed(0)),
        [str(c) for c in range(classes)],
    ).eval()
    x = torch.randn(batch, tokens, dim, generator=torch.Generator().manual_seed(1))
    name = f"score {called(size)}, query head"
    same(name, [head.predict(x)], [head.predict(x, chunk=classes)])
    return Pair(name, lambda: head.predict(x), lambda: head.predict(x, chunk=classes), "all classes at once")


def step_pair(size: Size, *, labeler: bool) -> Pair:
    """A training step with query head and frozen text: forward, backward, update; at least two chunks."""
    batch, classes, tokens, dim = size
    text, x, y = step_inputs(size)
    module = ChunkedTRMObjective.from_text(text, total_steps=1000, recipe="paper", validate=False)
    if not labeler:
        module.labeler = None
    chunk = min((classes + 1) // 2, class_chunk(batch, classes, tokens, dim))

    def once(class_chunk: int) -> tuple[Tensor | None, ...]:
        module.class_chunk = class_chunk
        output = module(x, text, y)
        found = torch.autograd.grad(output.loss, [*module.parameters()])
        if module.training:
            module.update(output)
        return (output.loss.detach(), *found)

    name = f"step {called(size)}, {'all parts' if labeler else 'no labeller'}, chunks of {chunk}"
    module.eval()  # without dropout, which has draws of its own in chunks
    same(name, once(chunk), once(classes))
    module.train()
    return Pair(name, lambda: once(chunk), lambda: once(classes), "all classes at once")


def sampled_pair(size: Size, number: int) -> Pair:
    """What a step costs on ``number`` of the classes, drawn anew each time, beside one on all; matching and distillation."""
    text, x, y = step_inputs(size)
    draws = torch.Generator().manual_seed(0)

    def step(classes: int) -> Callable[[], object]:
        bare: dict[str, Any] = {"contrast": None, "labeler": None}  # they, and the bank, keep a row for each class
        module = ChunkedTRMObjective.from_text(text[:classes], total_steps=1000, recipe="paper", validate=False, **bare)
        module.class_chunk = class_chunk(size[0], classes, size[2], size[3])

        def once() -> object:
            chosen = sample_classes(y, classes, generator=draws)
            return torch.autograd.grad(module(x, text[chosen], y[:, chosen]).loss, [*module.parameters()])

        return once

    number = min(number, size[1])
    return Pair(f"step {called(size)}, {number} of the classes", step(number), step(size[1]), "all of them")


def step_inputs(size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Text, tokens and labels, some three present an image."""
    batch, classes, tokens, dim = size
    g = torch.Generator().manual_seed(0)
    text, x, y = torch.randn(classes, dim, generator=g), torch.randn(batch, tokens, dim, generator=g), labels(batch, classes, g)
    y[y == 1] = (torch.rand(int((y == 1).sum()), generator=g) < 3.2 / classes / 0.04).float()
    return text, x, y


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=7, warmup=1)
    parser.add_argument("--sizes", choices=POOLING, default="small", help="full: up to 10,000 classes, which takes gigabytes")
    args = parser.parse_args()
    torch.manual_seed(0)
    sizes = args.sizes

    def wanted(word: str) -> bool:
        return not args.only or any(given.startswith(word) or word.startswith(given) for given in args.only)

    made: list[Callable[[], Pair]] = []
    if wanted("regions"):
        made += [partial(pooling_pair, size, heads, "attention") for size in POOLING[sizes] for heads in (1, 4, 8)]
        made += [partial(pooling_pair, size, 1, "decoder") for size in DECODER[sizes]]
        made += [partial(pooling_pair, size, 4, "decoder", True) for size in DECODER[sizes]]
        made += [partial(pooling_pair, size, 1, "broadcast") for size in BROADCAST[sizes]]
    if wanted("pool and match"):
        some = (1, 4, 8) if sizes == "full" else (1, 4)
        made += [partial(matching_pair, size, heads) for size in MATCHING[sizes] for heads in some]
    if wanted("score"):
        made += [partial(head_pair, size) for size in STEPS[sizes]]
    if wanted("step"):
        made += [partial(step_pair, size, labeler=labeler) for size in STEPS[sizes] for labeler in (False, True)]
    report((make() for make in made), args)


if __name__ == "__main__":
    main()
