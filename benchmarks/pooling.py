"""Time and peak memory of pooling, and of pooling to logits, against nn.MultiheadAttention; and of classes in chunks.

    python benchmarks/pooling.py --sizes full --rounds 9 --only "pool and match"

Sizes read images x classes x tokens x width. Before a pair is timed our side is compared with the equation written out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from losses import Pair, arguments, backward, labels, report
from torch import Tensor, nn

from trm_losses import RegionPooler, Regions, TextRegionMatchingLoss, TRMHead, TRMObjective
from trm_losses.region_pooler import class_chunk

Size = tuple[int, int, int, int]

POOLING: dict[str, list[Size]] = {
    "tiny": [(2, 5, 6, 32)],
    "small": [(16, 20, 196, 512), (16, 80, 196, 512), (4, 80, 49, 512)],
    "full": [(16, 20, 196, 512), (16, 80, 196, 512), (32, 80, 49, 1024), (8, 312, 196, 512), (8, 80, 784, 512)],
}
MATCHING: dict[str, list[Size]] = {
    "tiny": [(2, 40, 6, 32)],
    "small": [(16, 80, 196, 512), (4, 2000, 49, 512)],
    "full": [(16, 80, 196, 512), (8, 312, 196, 512), (4, 2000, 196, 512), (8, 9605, 49, 512), (16, 2000, 49, 1024)],
}
STEPS: dict[str, list[Size]] = {
    "tiny": [(2, 40, 6, 32)],
    "small": [(8, 80, 49, 512), (8, 800, 49, 512)],
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


def same(name: str, actual: Tensor, expected: Tensor) -> None:
    """Both sides must say the same before their times are compared."""
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4, msg=lambda text: f"{name}: {text}")


def called(size: Size) -> str:
    return "x".join(map(str, size))


def pooling_pair(size: Size, heads: int) -> Pair:
    batch, classes, tokens, dim = size
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(batch, tokens, dim, generator=g), torch.randn(classes, dim, generator=g).requires_grad_()
    ours = RegionPooler(classes, dim, num_heads=heads, query_head=False, validate=False)
    attention = nn.MultiheadAttention(dim, heads, batch_first=True)
    name = f"regions {called(size)}, {heads} head(s)"
    same(name, ours(x, text).region, plain_regions(ours, x, text))
    return Pair(
        name,
        backward(lambda: ours(x, text).region.sum(), text, *ours.parameters()),
        backward(lambda: attention(text.expand(batch, -1, -1), x, x)[0].sum(), text, *attention.parameters()),
        "nn.MultiheadAttention",
    )


def matching_pair(size: Size, heads: int) -> Pair:
    """Logits of all classes and the regions of one positive in a hundred."""
    batch, classes, tokens, dim = size
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(batch, tokens, dim, generator=g), torch.randn(classes, dim, generator=g).requires_grad_()
    positive = torch.rand(batch, classes, generator=g) < 0.01
    pooler = RegionPooler(classes, dim, num_heads=heads, query_head=False, validate=False)
    matching = TextRegionMatchingLoss(classes, normalize_regions=True, validate=False)
    attention = nn.MultiheadAttention(dim, heads, batch_first=True)
    chunk = class_chunk(batch, classes, tokens, dim)

    def use(regions: Regions, part: slice) -> dict[str, Tensor]:
        return {"logits": matching.logits(regions.region, text[part], classes=part)}

    def ours() -> tuple[Tensor, Tensor]:
        if chunk == classes:
            regions = pooler(x, text).region
            return matching.logits(regions, text), regions[positive]
        prepared = pooler.prepare(x, text)
        return pooler.map_classes(use, prepared, chunk)["logits"], pooler.entries(prepared, positive).features

    def peer() -> tuple[Tensor, Tensor]:
        regions = attention(text.expand(batch, -1, -1), x, x, need_weights=False)[0]
        return (F.normalize(regions, dim=-1) * F.normalize(text, dim=-1)).sum(dim=-1), regions[positive]

    def total(made: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        logits, regions = made()
        return logits.square().sum() + regions.sum()

    name = f"pool and match {called(size)}, {heads} head(s), chunks of {chunk}"
    plain = plain_regions(pooler, x, text)
    logits = matching.scale * F.cosine_similarity(plain, text.expand_as(plain), dim=-1) - matching.bias
    for actual, expected in zip(ours(), (logits, plain[positive]), strict=True):
        same(name, actual, expected)
    leaves = (text, *pooler.parameters(), *matching.parameters())
    return Pair(
        name,
        backward(lambda: total(ours), *leaves),
        backward(lambda: total(peer), text, *attention.parameters()),
        "nn.MultiheadAttention, normalise, multiply, sum",
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
    same(name, head.predict(x), head.predict(x, chunk=classes))
    return Pair(name, lambda: head.predict(x), lambda: head.predict(x, chunk=classes), "all classes at once")


def step_pair(size: Size, *, labeler: bool) -> Pair:
    """A training step with query head and frozen text: forward, backward, update."""
    batch, classes, tokens, dim = size
    g = torch.Generator().manual_seed(0)
    text, x, y = torch.randn(classes, dim, generator=g), torch.randn(batch, tokens, dim, generator=g), labels(batch, classes, g)
    y[y == 1] = (torch.rand(int((y == 1).sum()), generator=g) < 3.2 / classes / 0.04).float()  # some three labels an image
    module = TRMObjective.from_text(text, total_steps=1000, validate=False)
    if not labeler:
        module.labeler = None
    chunk = min((classes + 1) // 2, class_chunk(batch, classes, tokens, dim, whole=0))

    def step(class_chunk: int | None) -> Callable[[], object]:
        def once() -> None:
            module.class_chunk = class_chunk
            output = module(x, text, y)
            torch.autograd.grad(output.loss, [*module.parameters()])
            module.update(output)

        return once

    name = f"step {called(size)}, {'all parts' if labeler else 'no labeller'}, chunks of {chunk}"
    with torch.no_grad():
        module.eval()
        module.class_chunk = chunk
        in_chunks = module(x, text, y).loss
        module.class_chunk = None
        same(name, in_chunks, module(x, text, y).loss)
        module.train()
    return Pair(name, step(chunk), step(None), "all classes at once")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", choices=POOLING, default="small", help="full: up to 10,000 classes, which takes gigabytes")
    args = parser.parse_args()
    torch.manual_seed(0)

    def wanted(word: str) -> bool:
        return not args.only or any(given.startswith(word) or word.startswith(given) for given in args.only)

    made: list[Callable[[], Pair]] = []
    if wanted("regions"):
        made += [partial(pooling_pair, size, heads) for size in POOLING[args.sizes] for heads in (1, 4, 8)]
    if wanted("pool and match"):
        made += [partial(matching_pair, size, heads) for size in MATCHING[args.sizes] for heads in (1, 4)]
    if wanted("score"):
        made += [partial(head_pair, size) for size in STEPS[args.sizes]]
    if wanted("step"):
        made += [partial(step_pair, size, labeler=some) for size in STEPS[args.sizes] for some in (False, True)]
    report((make() for make in made), args)


if __name__ == "__main__":
    main()
