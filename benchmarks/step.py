"""One whole training step with learned contexts, beside the same step as research code writes it; and where ours goes.

    python benchmarks/step.py --rounds 5 --json figures.json

Cached 14x14 tokens of width 512, the text tower of CLIP RN101 with random weights, all terms on: both heads, distillation,
contrast, prototypes, pseudo-labels; forward, backward, optimiser, update. Size reads images x classes x tokens. The other
side is written below, one function a part, and reads the same parameters and buffers; before anything is timed its terms
and gradients are compared with ours.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from losses import Pair, arguments, report
from prompts import RN101_TEXT, every_token, small_model, whole_names
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from trm_losses import (
    PromptLearner,
    PrototypeBank,
    PseudoLabeler,
    PseudoLabels,
    RegionPooler,
    Regions,
    TRMObjective,
    param_groups,
)
from trm_losses.backbones import OpenClipBackbone
from trm_losses.pseudo import PrototypeRule


class Size(NamedTuple):
    batch: int
    classes: int
    tokens: int
    num_context: int = 16


SIZES = {"small": Size(32, 80, 196), "tiny": Size(4, 6, 9, 3)}
TOWERS = {"small": RN101_TEXT, "tiny": {**RN101_TEXT, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2}}


class Model(NamedTuple):
    """What a step trains and what it is trained with."""

    backbone: OpenClipBackbone
    prompts: PromptLearner
    names: Tensor
    objective: TRMObjective
    optimizer: torch.optim.Optimizer

    def parameters(self) -> dict[str, Tensor]:
        return dict([*self.prompts.named_parameters(), *self.objective.named_parameters()])

    def copy(self) -> Model:
        """The same start, apart from the frozen tower."""
        prompts, objective = copy.deepcopy(self.prompts), copy.deepcopy(self.objective)
        return self._replace(prompts=prompts, objective=objective, optimizer=adam(objective, prompts))


def adam(objective: TRMObjective, prompts: PromptLearner) -> torch.optim.Optimizer:
    return torch.optim.AdamW(param_groups(objective, prompts), lr=1e-5)


def draw(size: Size, text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens (B, N, D) and targets (B, C): some three classes an image, each on some tokens; half of the labels unknown."""
    direction = F.normalize(text - text.mean(dim=0), dim=-1)
    truth = torch.rand(size.batch, size.classes, generator=generator) < min(0.4, 3.2 / size.classes)
    tokens = F.normalize(torch.randn(size.batch, size.tokens, text.shape[1], generator=generator), dim=-1)
    for b, c in truth.nonzero().tolist():
        tokens[b, torch.randint(size.tokens, (size.tokens // 8 + 1,), generator=generator)] += 2 * direction[c].to(tokens)
    unknown = torch.rand(size.batch, size.classes, generator=generator) < 0.5
    return tokens.to(text), torch.where(unknown, -1.0, truth.float())


def build(size: Size, backbone: OpenClipBackbone) -> tuple[Model, Tensor, Tensor]:
    """A model some steps into its training, with tokens and targets of a batch."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    names = backbone.embed_prompts(whole_names(backbone, size.classes))
    prompts = PromptLearner("shared", names=names, num_context=size.num_context, context_length=backbone.context_length)
    with torch.no_grad():
        text = backbone.encode_prompts(prompts())
    plain = {"gamma_pos": 0.0, "gamma_neg": 0.0, "margin": 0.0}  # a cross-entropy, on both sides
    objective = TRMObjective.from_text(text, total_steps=20, recipe="paper", matching=plain).to(text.dtype)
    torch.nn.init.normal_(
        next(objective.pooler.mlp[-1].parameters()), std=1e-3
    )  # at 0, as it starts, nothing below has a gradient
    with torch.no_grad():
        for step in range(12):  # statistics, prototypes, and past warm-up and ramp
            tokens, targets = draw(size, text, g)
            if not step:
                objective.matching.calibrate_bias(objective.pooler(tokens, text).query, text, 3.2 / max(8, size.classes))
            objective.update(objective(tokens, text, targets))
    model = Model(backbone, prompts, names.embeddings, objective, adam(objective, prompts))
    return model, *draw(size, text, g)


def finish(model: Model, terms: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The terms and the gradients by name, which are let go of: every call allocates the same."""
    gradients = [p.grad for _, p in sorted(model.parameters().items()) if p.grad is not None]
    model.optimizer.zero_grad()
    return (*(term.detach() for _, term in sorted(terms.items())), *gradients)


PART = "part: "


def held_by_part(work: Callable[[], object]) -> dict[str, int]:
    """The most bytes that each part of ``work`` holds: what was allocated in its turns, less what was freed in them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    events = sorted(trace.profiler.kineto_results.events(), key=lambda e: (e.start_ns(), -e.duration_ns()))
    held: dict[str, int] = defaultdict(int)
    most: dict[str, int] = defaultdict(int)
    inside: list[tuple[str, int]] = []
    for event in events:
        while inside and inside[-1][1] < event.start_ns():
            inside.pop()
        if event.name().startswith(PART):
            inside.append((event.name().removeprefix(PART), event.start_ns() + event.duration_ns()))
        elif event.name() == "[memory]" and inside:
            name = inside[-1][0]
            held[name] += event.nbytes()
            most[name] = max(most[name], held[name])
    return most


class Clock:
    """Seconds by name; what is timed inside another part is taken off it. A profile sees the parts by their names too."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._inside.append(0.0)
        start = time.perf_counter()
        with record_function(PART + name):
            yield
        spent = time.perf_counter() - start
        self.seconds[name] += spent - self._inside.pop()
        if self._inside:
            self._inside[-1] += spent

    def hook(self, module: torch.nn.Module, name: str) -> list[torch.utils.hooks.RemovableHandle]:
        """Count every call of a module as the part ``name``."""
        open_parts = []

        def enter(*_: object) -> None:
            open_parts.append(self.part(name))
            open_parts[-1].__enter__()

        def leave(*_: object) -> None:
            open_parts.pop().__exit__(None, None, None)

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


TOWER, POOLER, MATCHING, CONTRAST, BANK, OPTIMISER = (
    *("text tower", "pooler", "matching and distillation", "contrast", "bank and labeller", "optimiser"),
)
Losses = tuple[dict[str, Tensor], Callable[[], None]]
"""Terms by name, and what is to be called after the optimiser's step."""


# Ours.


def our_step(model: Model, tokens: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    output = model.objective(tokens, our_text(model), targets)
    output.loss.backward()
    model.optimizer.step()
    model.objective.update(output)
    return finish(model, output.terms)


def our_text(model: Model) -> Tensor:
    return model.backbone.encode_prompts(model.prompts())


def our_losses(model: Model, regions: Regions, text: Tensor, targets: Tensor, clock: Clock) -> Losses:
    objective = model.objective
    assert objective.contrast is not None and objective.labeler is not None
    hooks = [*clock.hook(objective.contrast, CONTRAST), *clock.hook(objective.labeler, BANK)]
    output = objective(regions, text, targets)
    for hook in hooks:
        hook.remove()
    return output.terms, lambda: objective.update(output)


# The same as research code writes it.


def usual_regions(pooler: RegionPooler, tokens: Tensor, text: Tensor) -> Regions:
    """Attention with its projections of every token, and of the queries of every image."""

    def heads(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], pooler.num_heads, -1).transpose(1, 2)

    unit_tokens = F.normalize(tokens, dim=-1)
    queries = F.normalize(text, dim=-1).expand(len(tokens), -1, -1)
    q = heads(F.linear(queries, pooler.query_weight))
    k = heads(F.linear(unit_tokens, pooler.key_weight))
    v = heads(F.linear(pooler.value_norm(tokens), pooler.value_weight))
    attention = torch.softmax(pooler.log_attention_scale.exp() * pooler.num_heads * q @ k.transpose(-2, -1), dim=-1)
    saliency = attention.mean(dim=1)
    region = saliency @ unit_tokens
    output = pooler.output((attention @ v).transpose(1, 2).flatten(2))
    return Regions(region, region + pooler.mlp(pooler.dropout(output)), saliency)


def usual_similarity(features: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return scale * (features * F.normalize(text, dim=-1)).sum(dim=-1)


def usual_matching(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each entry, 0 if it is unknown."""
    crossed = F.binary_cross_entropy_with_logits(logits, targets.clamp(min=0).to(logits), reduction="none")
    return crossed * (targets >= 0)


def usual_distillation(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    teacher = F.softmax(teacher.detach() / temperature, dim=-1)
    return temperature**2 * F.kl_div(F.log_softmax(student / temperature, dim=-1), teacher, reduction="batchmean")


@torch.no_grad()
def usual_pseudo_labels(labeler: PseudoLabeler, bank: PrototypeBank, features: Tensor, targets: Tensor) -> PseudoLabels:
    """Scores from prototypes and calibrated similarities one class after another, then the cap one image after another."""
    z = F.normalize(features, dim=-1)
    rule, known = labeler.rule, labeler.known_count
    assert isinstance(rule, PrototypeRule)
    sums, mass = rule.similarity_sum, rule.similarity_mass
    seen = bank.count > 0
    visual, text = (F.normalize(prototypes.to(z), dim=-1) for prototypes in (bank.visual, bank.text))
    scores = torch.full_like(targets, 0.5, dtype=z.dtype)
    for c in range(targets.shape[1]):
        parts = []
        for m, (prototypes, usable) in enumerate(((visual, seen), (text, torch.ones_like(seen)))):
            if not usable[c]:
                continue
            cosine = z[:, c] @ prototypes.T
            temperature = (rule.temperature_visual, rule.temperature_text)[m]
            if usable.sum() > 1:
                parts.append((cosine / temperature).masked_fill(~usable, -1e9).softmax(dim=1)[:, c])
            pooled = sums[m].sum(dim=1) / mass[m].sum(dim=1)
            own = known[1, c] >= 10 and (mass[m, :, c] > 0).all()
            absent, present = sums[m, :, c] / mass[m, :, c] if own else pooled
            if present > absent:
                gap = max(present - absent, 0.5 * (pooled[1] - pooled[0]), 0.02)
                parts.append(torch.sigmoid(6 * (cosine[:, c] - 0.5 * (present + absent)) / gap))
        if parts:
            scores[:, c] = sum(parts) / len(parts)
    unknown = targets == -1
    positive, negative = unknown & (scores >= rule.positive), unknown & (scores <= rule.negative)
    counted = known.sum(dim=0)
    prior = torch.where(counted > 0, known[1] / counted.clamp(min=1), known[1].sum() / counted.sum())
    for b in range(len(targets)):
        room = max(int(2 * prior.sum() - (targets[b] == 1).sum()), 1)
        ranked = sorted(positive[b].nonzero().flatten().tolist(), key=lambda c: -float(scores[b, c]))
        positive[b, ranked[room:]] = False
    ramp = min(max((int(labeler.step) - labeler.warmup_steps) / labeler.ramp_steps, 0.0), 1.0)
    decided = torch.where(positive, scores, torch.where(negative, 0.0, -1.0))
    return PseudoLabels(decided, ramp * (positive.to(z) + 0.5 * negative.to(z)), scores)


def usual_contrast(features: Tensor, text: Tensor, anchors: Tensor, weights: Tensor, prototypes: Tensor, seen: Tensor) -> Tensor:
    """Five contrasts: regions N x N under masks, and regions, texts and prototypes against each other."""
    f, t, p = F.normalize(features, dim=-1), F.normalize(text, dim=-1), F.normalize(prototypes, dim=-1).to(text)
    image, own = torch.nonzero(anchors >= 0.9, as_tuple=True)
    f, w = f[image, own], weights[image, own]

    logits = f @ f.T / 0.1
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    others = 1 - torch.eye(len(f)).to(f)
    positive = (own[:, None] == own[None]).to(f) * others
    log_p = logits - torch.log((torch.exp(logits) * others).sum(dim=1, keepdim=True))
    partners = positive.sum(dim=1)
    region_region = (-w * (positive * log_p).sum(dim=1) / partners.clamp(min=1)).sum() / (partners > 0).sum().clamp(min=1)

    region_text = (w * F.cross_entropy(f @ t.T / 0.07, own, reduction="none")).mean()
    log_share = F.log_softmax(t @ f.T / 0.07, dim=1)
    each = [-(w[own == c] * log_share[c, own == c]).mean() for c in own.unique().tolist()]
    text_region = torch.stack(each).mean()

    met = seen[own]
    to_prototypes = (f @ p.T / 0.07).masked_fill(~seen, -1e9)
    region_prototype = (w * F.cross_entropy(to_prototypes, own, reduction="none"))[met].sum() / met.sum().clamp(min=1)
    of_texts = (t @ p.T / 0.07)[seen][:, seen]
    text_prototype = F.cross_entropy(of_texts, torch.arange(len(of_texts)))
    return region_region + 0.5 * region_text + 0.5 * text_region + region_prototype + text_prototype


@torch.no_grad()
def usual_update(
    objective: TRMObjective, features: Tensor, text: Tensor, targets: Tensor, logits: Tensor, pseudo: PseudoLabels
) -> None:
    """Statistics of the labeller, then prototypes, one class after another."""
    labeler, bank = objective.labeler, objective.bank
    assert labeler is not None and bank is not None and isinstance(labeler.rule, PrototypeRule)
    rule = labeler.rule
    z, confidence = F.normalize(features, dim=-1), torch.sigmoid(logits)
    sums, mass = torch.zeros_like(rule.similarity_sum), torch.zeros_like(rule.similarity_mass)
    for c in range(targets.shape[1]):
        for m, prototypes in enumerate((bank.visual, bank.text)):
            if m == 1 or bank.count[c] > 0:
                cosine = z[:, c] @ F.normalize(prototypes[c], dim=-1).to(z)
                for label in (0, 1):
                    rows = targets[:, c] == label
                    sums[m, label, c], mass[m, label, c] = cosine[rows].sum(), rows.sum()
        for label in (0, 1):
            labeler.known_count[label, c] += (targets[:, c] == label).sum()
    rule.similarity_sum.mul_(rule.momentum).add_(sums)
    rule.similarity_mass.mul_(rule.momentum).add_(mass)
    started = labeler.step >= labeler.warmup_steps
    labeler.step += 1
    for c in range(targets.shape[1]):
        sure = (targets[:, c] == 1) & (~started | (confidence[:, c] >= objective.confident))
        sure = sure | ((pseudo.targets[:, c] > 0) & (pseudo.scores[:, c] >= objective.sure))
        if sure.any():
            weight = confidence[sure, c]
            mean = (weight[:, None] * z[sure, c]).sum(dim=0) / weight.sum()
            n = int(bank.count[c])
            kept = min(bank.momentum, n / (n + 1))
            bank.visual[c] = F.normalize(kept * bank.visual[c] + (1 - kept) * mean.to(bank.visual), dim=-1)
            bank.count[c] += 1
    n = int(bank.text_count)
    kept = min(bank.text_momentum, n / (n + 1))
    bank.text.copy_(F.normalize(kept * bank.text + (1 - kept) * F.normalize(text, dim=-1).to(bank.text), dim=-1))
    bank.text_count += 1


def usual_text(model: Model) -> Tensor:
    return every_token(model.backbone.model, model.prompts, model.names)


def usual_losses(model: Model, regions: Regions, text: Tensor, targets: Tensor, clock: Clock) -> Losses:
    objective = model.objective
    matching, bank, labeler = objective.matching, objective.bank, objective.labeler
    assert bank is not None and labeler is not None
    scale, bias = matching.log_scale.exp(), matching.bias
    query, region = usual_similarity(regions.query, text, scale), usual_similarity(regions.region, text, scale)
    with clock.part(BANK):
        pseudo = usual_pseudo_labels(labeler, bank, regions.query, targets)
    classes, known = targets.shape[1], (targets >= 0).sum()
    terms = {}
    for name, logits in (("query", query - bias), ("region", region - bias)):
        terms[f"matching_{name}"] = classes * usual_matching(logits, targets).sum() / known
        terms[f"pseudo_{name}"] = (pseudo.weights * usual_matching(logits, pseudo.targets)).sum() / len(targets)
    terms["distillation"] = usual_distillation(query, region)
    sure = (pseudo.targets > 0) & (pseudo.scores >= objective.sure)
    anchors = torch.where(sure, 1.0, targets)
    weights = torch.where(targets == -1, pseudo.weights, 1.0)
    with clock.part(CONTRAST):
        contrast = usual_contrast(regions.query, text, anchors, weights, bank.visual, bank.count > 0)
        terms["contrast"] = objective.lambda_contrast * contrast
    logits = (query - bias).detach()
    return terms, lambda: usual_update(objective, regions.query.detach(), text.detach(), targets, logits, pseudo)


def usual_step(model: Model, tokens: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    text = usual_text(model)
    regions = usual_regions(model.objective.pooler, tokens, text)
    terms, update = usual_losses(model, regions, text, targets, Clock())
    torch.stack(list(terms.values())).sum().backward()
    model.optimizer.step()
    update()
    return finish(model, terms)


# Both.


class Side(NamedTuple):
    step: Callable[[Model, Tensor, Tensor], tuple[Tensor, ...]]
    text: Callable[[Model], Tensor]
    regions: Callable[[RegionPooler, Tensor, Tensor], Regions]
    losses: Callable[[Model, Regions, Tensor, Tensor, Clock], Losses]


OURS = Side(our_step, our_text, RegionPooler.__call__, our_losses)
USUAL = Side(usual_step, usual_text, usual_regions, usual_losses)


def in_parts(side: Side, model: Model, tokens: Tensor, targets: Tensor) -> tuple[dict[str, float], tuple[Tensor, ...]]:
    """The same step with the graph cut between the parts, so that the backward pass of each is timed by itself."""
    clock = Clock()
    with clock.part(TOWER):
        text = side.text(model)
    text_leaf = text.detach().requires_grad_()
    with clock.part(POOLER):
        pooled = side.regions(model.objective.pooler, tokens, text_leaf)
    region, query = (x.detach().requires_grad_() for x in (pooled.region, pooled.query))
    with clock.part(MATCHING):
        terms, update = side.losses(model, Regions(region, query, pooled.saliency.detach()), text_leaf, targets, clock)
    with clock.part(CONTRAST):
        terms["contrast"].backward()
    with clock.part(MATCHING):
        torch.stack([term for name, term in terms.items() if name != "contrast"]).sum().backward()
    with clock.part(POOLER):
        torch.autograd.backward([pooled.region, pooled.query], [region.grad, query.grad])
    with clock.part(TOWER):
        text.backward(text_leaf.grad)
    with clock.part(OPTIMISER):
        model.optimizer.step()
    with clock.part(BANK):
        update()
    return dict(clock.seconds), finish(model, terms)


def step_pair(size: Size, model: Model, tokens: Tensor, targets: Tensor) -> Pair:
    """Both steps from the same start."""

    def repeated(side: Side) -> Callable[[], object]:
        own = model.copy()

        def once() -> object:
            torch.manual_seed(0)  # the same dropout
            return side.step(own, tokens, targets)

        return once

    name = f"step {size.batch}x{size.classes}x{size.tokens}, shared contexts, all terms"
    return Pair(name, repeated(OURS), repeated(USUAL), "research code", 2e-3)


def parts(model: Model, tokens: Tensor, targets: Tensor, rounds: int) -> list[dict[str, object]]:
    """Print and give the median seconds of each part, forward and backward, and what it holds, on both sides; ours by share."""
    sides = {side: model.copy() for side in (OURS, USUAL)}
    in_parts(OURS, sides[OURS], tokens, targets)  # the first run of all is slower
    runs = [[in_parts(side, own, tokens, targets)[0] for side, own in sides.items()] for _ in range(rounds)]
    ours, theirs = ({name: statistics.median(run[i][name] for run in runs) for name in runs[0][0]} for i in (0, 1))
    ratios = {name: statistics.median(ours[name] / theirs[name] for ours, theirs in runs) for name in ours}
    held, peer_held = (held_by_part(partial(in_parts, side, own, tokens, targets)) for side, own in sides.items())
    total = sum(ours.values())
    rows: list[dict[str, object]] = []
    print(f"{'part':26} {'before':>10} {'after':>10} {'share':>7} {'ratio':>6}   {'before':>12} {'after':>12} {'ratio':>6}")
    for name in sorted(ours, key=lambda name: -ours[name]):
        share, mib, peer_mib = ours[name] / total, held[name] / 2**20, peer_held[name] / 2**20
        print(
            f"{name:26} {theirs[name]:8.3f} s {ours[name]:8.3f} s {share:7.1%} {ratios[name]:6.2f}   "
            f"{peer_mib:8.1f} MiB {mib:8.1f} MiB {mib / peer_mib if peer_mib else math.nan:6.2f}",
            flush=True,
        )
        times = {"seconds": ours[name], "share": share, "peer_seconds": theirs[name], "time_ratio": ratios[name]}
        rows.append({"part": name, **times, "peak_mib": mib, "peer_peak_mib": peer_mib})
    return rows


def main(typed: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=3, warmup=0)  # the comparison before has warmed up
    parser.add_argument("--sizes", choices=list(SIZES), default="small", help="tiny is to see that it runs")
    args = parser.parse_args(typed)
    torch.set_num_threads(args.threads)
    size = SIZES[args.sizes]
    start = build(size, small_model(TOWERS[args.sizes]))
    report([step_pair(size, *start)], args, parts=lambda: parts(*start, max(1, args.rounds - 1)))


if __name__ == "__main__":
    main()
