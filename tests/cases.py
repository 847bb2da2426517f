"""One case for each Module: how to build and call it, its oracle, its pure twin, and the inputs it must refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

import baseline_oracles
import numpy as np
import oracles
import torch
from torch import Tensor, nn

import trm_losses as tl
from trm_losses import baselines, pseudo
from trm_losses import functional as TF
from trm_losses._precision import unit

BATCH, CLASSES, WIDTH, TOKENS = 4, 5, 8, 6
Inputs = dict[str, Tensor]
Result = Any


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def labels(batch: int = BATCH, classes: int = CLASSES, seed: int = 0, soft: bool = True) -> Tensor:
    """Present, absent, unknown and some soft labels; a class with two positives where there is room."""
    y = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    y = y[torch.randint(0, 3, (batch, classes), generator=generator(seed))]
    y[:2, 0] = 1
    y[0, -1] = 0 if classes > 1 else 1
    if soft and batch > 2 and classes > 2:
        y[2, 1], y[1, 2] = 0.3, 0.95
    return y


def shaken(module: nn.Module, seed: int = 7) -> nn.Module:
    """Parameters moved off their start, so that no zero or identity hides a term; without dropout."""
    source = generator(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=source))
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return module


def filled_bank(classes: int = CLASSES, width: int = WIDTH) -> tl.PrototypeBank:
    """Two updates old; the last of several classes has never been seen."""
    bank = tl.PrototypeBank(classes, width, init=normal(classes, width, seed=20))
    for seed in (21, 22):
        y = torch.ones(3, classes)
        if classes > 1:
            y[:, -1] = 0
        bank.update(normal(3, classes, width, seed=seed), y, text=normal(classes, width, seed=seed + 2))
    return bank


def labeler_by_prototypes(classes: int = CLASSES, **settings: Any) -> tl.PseudoLabeler:
    """Settings of labeler, prototype rule and what decides, by quantiles if ``share`` is given: those of oracles.Labeler."""
    own = {key: settings.pop(key) for key in ("temperature_visual", "temperature_text", "momentum") if key in settings}
    decider: pseudo.Quantiles | pseudo.Thresholds
    if "share" in settings:
        decider = pseudo.Quantiles(classes, share=settings.pop("share"), momentum=own.get("momentum", 0.99))
    else:
        decider = pseudo.Thresholds(settings.pop("positive", 0.8), settings.pop("negative", 0.1))
    return tl.PseudoLabeler(classes, pseudo.PrototypeRule(classes, decider, **own), **settings)


def evidence(known: list[list[int]], targets: Tensor | None = None, expected: float | None = None) -> pseudo.Evidence:
    """Of known labels (absent, present) of each class, and nothing else."""
    y, bank = torch.full((1, len(known)), -1.0) if targets is None else targets, tl.PrototypeBank(len(known), WIDTH)
    return pseudo.Evidence(None, y, bank, bank.text, None, None, torch.tensor(known).T, expected, None)


def fillings(classes: int) -> Iterator[tuple[Tensor, Tensor, tl.PrototypeBank]]:
    """Batches after which some classes, and not all, have the ten known positives that their own statistics need."""
    bank = filled_bank(classes)
    for seed in (31, 32):
        yield normal(14, classes, WIDTH, seed=seed) + bank.visual, labels(14, classes, seed), bank


def filled_labeler(classes: int = CLASSES, **settings: Any) -> tl.PseudoLabeler:
    labeler = labeler_by_prototypes(classes, **settings)
    for batch in fillings(classes):
        labeler.update(*batch)
    return labeler


def filled_oracle(classes: int = CLASSES, **settings: Any) -> oracles.Labeler:
    slow = oracles.Labeler(classes, **settings)
    for batch in fillings(classes):
        slow.update(*batch)
    return slow


OBJECTIVE_RULE = {"positive": 0.6, "negative": 0.4, "weight_pos": 0.7, "weight_neg": 0.3}


def objective(
    classes: int = CLASSES,
    distributed: Any = False,
    *,
    pooler: dict[str, Any] | None = None,
    matching: dict[str, Any] | None = None,
    distillation: dict[str, Any] | None = None,
    **settings: Any,
) -> tl.TRMObjective:
    """With all parts; a ``class_chunk`` makes it the one that takes classes in chunks."""
    torch.manual_seed(0)
    module = (tl.ChunkedTRMObjective if "class_chunk" in settings else tl.TRMObjective)(
        tl.RegionPooler(classes, WIDTH, num_heads=2, dropout=0.0, **pooler or {}),
        tl.TextRegionMatchingLoss(classes, scale=5.0, distributed=distributed, **matching or {}),
        distillation=tl.RegionDistillationLoss(distributed=distributed, **distillation or {}),
        contrast=tl.MultimodalContrastiveLoss(distributed=distributed),
        bank=filled_bank(classes),
        labeler=filled_labeler(classes, **OBJECTIVE_RULE),
        anchor_score=0.65,
        bank_confidence=0.5,
        bank_pseudo_score=0.62,
        **settings,
    )
    module.bank.distributed = module.labeler.distributed = distributed  # filled with the same on every rank before
    return shaken(module)  # type: ignore[return-value]


@dataclass
class Case:
    """``build(classes)`` and ``inputs(batch, classes)`` in float64; ``call`` gives a tensor or a tuple of tensors."""

    name: str
    build: Callable[[int], nn.Module]
    inputs: Callable[[int, int], Inputs]
    call: Callable[[Any, Inputs], Result]
    state: tuple[str, ...]
    owner: str
    oracle: Callable[[Any, Inputs], Any] | None = None
    twin: Callable[[Any, Inputs], Result] | None = None
    learns: tuple[str, ...] = ()
    wrong: dict[str, tuple[Callable[[Inputs], Inputs], type[Exception], str]] = field(default_factory=dict)
    is_loss: bool = False
    compiles: bool = True
    finite: tuple[str, ...] = ()
    shows: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return self.name


def change(name: str, function: Callable[[Tensor], Any]) -> Callable[[Inputs], Inputs]:
    """The inputs with one of them changed; skipped parts stay."""
    return lambda inputs: {**inputs, name: function(inputs[name])}


def refused(**letters: str) -> dict[str, tuple[Callable[[Inputs], Inputs], type[Exception], str]]:
    """What every tensor argument must refuse by name: another size, another rank, integers, another device, no tensor."""
    table: dict[str, tuple[Callable[[Inputs], Inputs], type[Exception], str]] = {}
    for name, shape in letters.items():
        wanted = shape.replace(" ", ", ")
        last = len(shape.split()) - 1
        table[f"{name}: size"] = (
            change(name, lambda x, d=last: torch.cat([x, x.narrow(d, 0, 1)], dim=d)),
            ValueError,
            r"must have shape \(.*\) = \(.*\), got \(",  # of this one, or of the next that no longer fits it
        )
        table[f"{name}: rank"] = (change(name, lambda x: x[None]), ValueError, rf"{name} must have shape \({wanted},?\)")
        table[f"{name}: list"] = (change(name, lambda x: x.tolist()), TypeError, f"{name} must be a torch.Tensor, got list")
        table[f"{name}: device"] = (change(name, lambda x: x.to("meta")), ValueError, "is on .*, the other tensors are on")
    return table


def integers(*names: str) -> dict[str, tuple[Callable[[Inputs], Inputs], type[Exception], str]]:
    return {
        f"{name}: integer": (
            change(name, lambda x: x.to(torch.int64)),
            TypeError,
            rf"{name} must be a floating-point tensor, got torch.int64",
        )
        for name in names
    }


def encodings(name: str = "targets") -> dict[str, tuple[Callable[[Inputs], Inputs], type[Exception], str]]:
    """Label values that the encoding does not have."""

    def put(value: float) -> Callable[[Tensor], Tensor]:
        def function(y: Tensor) -> Tensor:
            y = y.clone()
            y[0, 0] = value
            return y

        return function

    return {
        f"{name}: {value}": (change(name, put(value)), ValueError, rf"{name} must be 1 \(present\).*, got {value:g}")
        for value in (2.0, -0.5, -2.0, float("nan"))
    }


def region_text(batch: int, classes: int) -> Inputs:
    return {
        "regions": 0.4 * normal(batch, classes, WIDTH, seed=1),
        "text": normal(classes, WIDTH, seed=2),
        "targets": labels(batch, classes, seed=3),
    }


def with_weights(batch: int, classes: int) -> Inputs:
    weights = torch.rand(batch, classes, generator=generator(4), dtype=torch.float64)
    weights[-1, 0] = 0.0
    return {**region_text(batch, classes), "weights": weights}


def with_prototypes(batch: int, classes: int) -> Inputs:
    seen = torch.ones(classes, dtype=torch.bool)
    seen[classes // 2] = classes == 1
    return {**with_weights(batch, classes), "prototypes": normal(classes, WIDTH, seed=5), "seen": seen}


def image_labels(batch: int, classes: int) -> Inputs:
    weights = torch.rand(batch, classes, generator=generator(4), dtype=torch.float64)
    return {"features": normal(batch, WIDTH, seed=1), "targets": labels(batch, classes, seed=8), "weights": weights}


def token_text(batch: int, classes: int) -> Inputs:
    return {"tokens": normal(batch, TOKENS, WIDTH, seed=6), "text": normal(classes, WIDTH, seed=7)}


def with_padding(batch: int, classes: int) -> Inputs:
    mask = torch.zeros(batch, TOKENS, dtype=torch.bool)
    mask[0, 4:] = mask[-1, 0] = True
    return {**token_text(batch, classes), "key_padding_mask": mask}


def call_pooler(module: tl.RegionPooler, x: Inputs) -> Result:
    return tuple(module(x["tokens"], x.get("text"), key_padding_mask=x.get("key_padding_mask")))


def pooler_oracle(module: tl.RegionPooler, x: Inputs) -> Any:
    return oracles.pool(
        dict(module.state_dict()),
        x["tokens"],
        x["text"] if module.query is None else module.query,
        module.num_heads,
        padding=x.get("key_padding_mask"),
    )


def call_matching(module: tl.TextRegionMatchingLoss, x: Inputs) -> Result:
    return module(x["regions"], x["text"], x["targets"], x.get("weights"))


def matching_oracle(module: tl.TextRegionMatchingLoss, x: Inputs) -> Any:
    logits = oracles.matching_logits(x["regions"], x["text"], float(module.log_scale.detach().exp()), module.bias)
    entries = oracles.asymmetric(logits, x["targets"], x.get("weights"), module.gamma_pos, module.gamma_neg, module.margin)
    if module.reduction == "none":
        return entries
    return entries.sum() / (max(1, int((x["targets"] >= 0).sum())) if module.reduction == "mean" else 1)


def matching_twin(module: tl.TextRegionMatchingLoss, x: Inputs) -> Result:
    return TF.asymmetric_loss(
        TF.text_region_logits(x["regions"], x["text"], module.log_scale.exp(), module.bias),
        x["targets"],
        x.get("weights"),
        gamma_pos=module.gamma_pos,
        gamma_neg=module.gamma_neg,
        margin=module.margin,
        reduction=module.reduction,
    )


def two_logits(batch: int, classes: int) -> Inputs:
    return {
        "student_logits": 3 * normal(batch, classes, seed=8),
        "teacher_logits": 3 * normal(batch, classes, seed=9),
        "weights": torch.rand(batch, generator=generator(10), dtype=torch.float64),
    }


def contrast_options(x: Inputs) -> dict[str, Any]:
    return {key: x[key] for key in ("prototypes", "seen", "weights") if key in x}


def call_contrast(module: tl.MultimodalContrastiveLoss, x: Inputs) -> Result:
    return module(x["regions"], x["text"], x["targets"], **contrast_options(x))


def call_image_contrast(module: tl.ImageContrastiveLoss, x: Inputs) -> Result:
    return module(x["features"], x["targets"], x["weights"])


ALPHAS = {"region_region": 0.7, "region_text": 0.9, "region_prototype": 1.3, "text_prototype": 0.4}


def weighted(terms: dict[str, Any], alphas: dict[str, float]) -> Any:
    """The sum that the equation of the loss makes of the five terms."""
    return (
        alphas["region_region"] * terms["region_region"]
        + alphas["region_text"] * 0.5 * (terms["region_text"] + terms["text_region"])
        + alphas["region_prototype"] * terms["region_prototype"]
        + alphas["text_prototype"] * terms["text_prototype"]
    )


def contrast_settings(module: tl.MultimodalContrastiveLoss) -> dict[str, Any]:
    return {
        "temperature": module.temperature,
        "temperature_region": module.temperature_region,
        "anchor_threshold": module.anchor_threshold,
    }


def call_bank(module: tl.PrototypeBank, x: Inputs) -> Result:
    module.reset()
    module.update(x["regions"], x["targets"], weights=x.get("weights"), text=x["text"])
    module.update(x["regions"].roll(1, 0), x["targets"], weights=x.get("weights"), text=x["text"].roll(1, 0))
    return module.visual.clone(), module.text.clone(), module.count.clone()


def bank_oracle(module: tl.PrototypeBank, x: Inputs) -> Any:
    bank = oracles.Bank(module.init)
    bank.update(x["regions"], x["targets"], x.get("weights"), x["text"])
    bank.update(x["regions"].roll(1, 0), x["targets"], x.get("weights"), x["text"].roll(1, 0))
    return bank.visual, bank.text, np.array(bank.count)


def bank_twin(module: tl.PrototypeBank, x: Inputs) -> Result:
    visual, count = module.init, torch.zeros(len(module.init), dtype=torch.int64)
    mass = torch.where(x["targets"] == 1, x["weights"].float(), 0.0)
    for z in (x["regions"], x["regions"].roll(1, 0)):
        visual, count = TF.update_prototypes(visual, count, *TF.class_sums(z, mass), momentum=module.momentum)
    first, second = unit(x["text"]).float(), unit(x["text"].roll(1, 0)).float()
    return visual, unit(0.5 * first + 0.5 * second), count


DISCRIMINANT = {"tokens_per_class": 7, "scale": 5.0, "shrinkage": 0.2, "sharpness": 3.0, "label_weight": 2.0}


def token_stream(classes: int = CLASSES) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Batches of different sizes with some labels, and with padding; a class's tokens lean to its text."""
    text, stream = normal(classes, WIDTH, seed=7), []
    for seed, (batch, tokens) in enumerate([(9, 6), (1, 3), (12, 4)]):
        shown = torch.randint(classes, (batch, tokens), generator=generator(60 + seed))
        mask = torch.rand(batch, tokens, generator=generator(70 + seed)) < 0.2
        y = labels(batch, classes, seed=80 + seed) if batch > 1 else torch.full((1, classes), -1.0, dtype=torch.float64)
        stream.append((text[shown] + normal(batch, tokens, WIDTH, seed=90 + seed), y, mask))
    return stream


def discriminant(classes: int = CLASSES, **settings: Any) -> tl.GaussianDiscriminant:
    module = tl.GaussianDiscriminant(classes, WIDTH, **{**DISCRIMINANT, **settings})
    return module.fit(token_stream(classes), normal(classes, WIDTH, seed=7))


def discriminant_oracle(module: tl.GaussianDiscriminant, x: Inputs) -> Any:
    images, y, mask = ([row for batch in token_stream(module.num_classes) for row in batch[part].numpy()] for part in range(3))
    made = oracles.discriminant(images, normal(module.num_classes, WIDTH, seed=7), y, mask, k=7, scale=5, label_weight=2)
    return oracles.discriminant_scores(x["tokens"], *made[:3], padding=x["key_padding_mask"], shrinkage=0.2, sharpness=3)


LABELER_BANKS = {classes: filled_bank(classes) for classes in (1, 2, 3, CLASSES)}  # made outside of what is compiled


def call_labeler(module: tl.PseudoLabeler, x: Inputs) -> Result:
    bank = LABELER_BANKS[module.num_classes]
    return tuple(module(x["regions"], x["targets"], bank, **{key: x.get(key) for key in ("text", "logits", "ids")}))


def labeler_inputs(batch: int, classes: int) -> Inputs:
    return {
        "regions": normal(batch, classes, WIDTH, seed=11) + filled_bank(classes).visual.double(),
        "targets": labels(batch, classes, seed=12),
    }


def labeler_ids(batch: int, classes: int) -> Inputs:
    return {**labeler_inputs(batch, classes), "ids": torch.arange(batch).flip(0)}


SAMPLES = 6


def refreshed_labeler(classes: int) -> tl.PseudoLabeler:
    rule = pseudo.NeighbourRule(classes, SAMPLES, neighbours=3, temperature=0.3, steps=2)
    labeler = tl.PseudoLabeler(classes, rule, weight_pos=0.8, weight_neg=0.6)
    labeler.refresh(*training_set(classes))
    return labeler


def training_set(classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Regions, logits and labels of all samples."""
    return normal(SAMPLES, classes, WIDTH, seed=51), 2 * normal(SAMPLES, classes, seed=52), labels(SAMPLES, classes, seed=53)


def neighbour_rule_oracle(module: tl.PseudoLabeler, x: Inputs) -> Any:
    z, logits, known = (oracles.array(part) for part in training_set(module.num_classes))
    said = known.copy()
    for i in zip(*np.where(known == -1), strict=True):
        said[i] = oracles.sigmoid(logits[i])
    scores = oracles.neighbour_scores(z, said, 3, 0.3, known=known != -1, steps=2)[oracles.array(x["ids"]).astype(int)]
    unknown = oracles.array(x["targets"]) == -1
    return np.where(unknown, scores, -1.0), np.where(unknown, np.where(scores >= 0.5, 0.8, 0.6), 0.0), scores


def labeler_oracle(module: tl.PseudoLabeler, x: Inputs, **settings: Any) -> Any:
    return filled_oracle(module.num_classes, **settings)(x["regions"], x["targets"], filled_bank(module.num_classes))


def names(classes: int) -> tl.PromptEmbeddings:
    """Embedded class names of different lengths, as a text tower without learned parts would get them."""
    eot = torch.arange(classes) % 3 + 2
    return tl.PromptEmbeddings(normal(classes, 7, WIDTH, seed=14, dtype=torch.float32), eot)


def prompts_oracle(module: tl.PromptLearner, x: Inputs) -> Any:
    embeddings, eot, _ = names(module.num_classes)
    context, e = oracles.array(module.context), oracles.array(embeddings)
    longest = int(eot.max()) + 1
    rows = []
    for c in range(len(e)):
        own = context if module.mode == "shared" else context[c]
        rows.append(np.stack([e[c, 0], *own, *e[c, 1:longest]]))
    alike = bool((e[:, 0] == e[0, 0]).all())
    prefix = (1 + (len(context) if module.mode == "shared" else 0)) * alike
    return np.stack(rows), oracles.array(eot) + context.shape[-2], prefix


def call_objective(module: tl.TRMObjective, x: Inputs) -> Result:
    return module(x["tokens"], x["text"], x["targets"]).loss


def objective_inputs(batch: int, classes: int) -> Inputs:
    return {**token_text(batch, classes), "targets": labels(batch, classes, seed=15)}


def objective_oracle(module: tl.TRMObjective, x: Inputs) -> Any:
    """The whole loss from the equation, parts and normalisers alike."""
    terms = objective_terms(module, x)
    return sum(terms.values())


def objective_terms(module: tl.TRMObjective, x: Inputs) -> dict[str, float]:
    y = oracles.array(x["targets"])
    batch, classes = y.shape
    region, query, _ = pooler_oracle(module.pooler, x)
    matching = module.matching
    scale, bias = float(matching.log_scale.detach().exp()), matching.bias
    focus = (matching.gamma_pos, matching.gamma_neg, matching.margin)
    guessed, weights, scores = filled_oracle(classes, **OBJECTIVE_RULE)(torch.tensor(query), x["targets"], module.bank)
    known = max(1, int((y >= 0).sum()))
    terms: dict[str, float] = {}
    logits = {}
    for head, of_head, factor in (("query", query, 1.0), ("region", region, module.lambda_region)):
        logits[head] = oracles.matching_logits(of_head, x["text"], scale, bias)
        entries = oracles.asymmetric(logits[head], y, None, *focus)
        terms[f"matching_{head}"] = factor * classes * entries.sum() / known
        entries = oracles.asymmetric(logits[head], guessed, weights, *focus)
        terms[f"pseudo_{head}"] = module.lambda_pseudo * factor * classes * entries.sum() / y.size
    without_bias = [oracles.matching_logits(features, x["text"], scale) for features in (query, region)]
    terms["distillation"] = module.lambda_distillation * oracles.distillation(*without_bias, 4.0).sum() / batch
    anchors, anchor_weights = y.copy(), np.ones_like(y)
    for i in np.ndindex(*y.shape):
        if y[i] == -1:
            anchor_weights[i] = weights[i]
            if guessed[i] > 0 and scores[i] >= module.anchor_score:
                anchors[i] = 1.0
    contrast = oracles.contrast(
        query, x["text"], anchors, prototypes=module.bank.visual, seen=module.bank.seen, weights=anchor_weights
    )
    terms["contrast"] = module.lambda_contrast * weighted(contrast, dict.fromkeys(ALPHAS, 1.0))
    return terms


def head(classes: int, query: Any = "tied") -> tl.TRMHead:
    pooler = tl.RegionPooler(classes, WIDTH, num_heads=2, query=query)
    text, class_names = normal(classes, WIDTH, seed=16, dtype=torch.float32), [f"class {c}" for c in range(classes)]
    return shaken(tl.TRMHead(pooler, tl.TextRegionMatchingLoss(classes), text, class_names))  # type: ignore[return-value]


def head_oracle(module: tl.TRMHead, x: Inputs) -> Any:
    _, query, _ = pooler_oracle(module.pooler, {**x, "text": module.text})
    scale = float(module.matching.log_scale.detach().exp())
    return oracles.matching_logits(query, module.text, scale, module.matching.bias)


POOLER_STATE = (
    "query_weight",
    "key_weight",
    "log_attention_scale",
    "value_norm.weight",
    "value_norm.bias",
    "value_weight",
    "output.weight",
    "output.bias",
    "mlp.0.weight",
    "mlp.0.bias",
    "mlp.1.weight",
    "mlp.1.bias",
    "mlp.4.weight",
    "mlp.4.bias",
)
BANK_STATE = ("init", "visual", "text", "count", "text_count")
COUNTS = ("step", "known_count")  # of a labeler, whatever its rule
LABELER_STATE = (*COUNTS, "rule.similarity_sum", "rule.similarity_mass")
MATCHING_STATE = ("log_scale", "bias")

pooler_refuses = {
    **refused(tokens="B N D", text="C D"),
    **integers("tokens", "text"),
    "text: missing": (lambda x: {k: v for k, v in x.items() if k != "text"}, ValueError, "text must be given"),
}
matching_refuses = {
    **refused(regions="B C D", text="C D", targets="B C", weights="B C"),
    **integers("regions", "text", "weights"),
    **encodings(),
}

CASES = [
    Case(
        name="pooler",
        owner="RegionPooler",
        build=lambda c: shaken(tl.RegionPooler(c, WIDTH, num_heads=2)),
        inputs=token_text,
        call=call_pooler,
        oracle=pooler_oracle,
        learns=("tokens", "text"),
        wrong=pooler_refuses,
        state=POOLER_STATE,
        finite=("tokens", "text"),
        shows=("num_classes=5", "num_heads=2", "tied"),
    ),
    Case(
        name="pooler, free queries, padding",
        owner="RegionPooler",
        build=lambda c: shaken(tl.RegionPooler(c, WIDTH, num_heads=4, query="free", mlp_ratio=1.5)),
        inputs=with_padding,
        call=call_pooler,
        oracle=pooler_oracle,
        learns=("tokens",),
        wrong={
            **refused(tokens="B N D", key_padding_mask="B N"),
            "mask: integers": (change("key_padding_mask", lambda m: m.long()), TypeError, "key_padding_mask must be bool"),
        },
        state=("query", *POOLER_STATE),
        finite=("tokens",),
        shows=("free",),
    ),
    Case(
        name="pooler, region only",
        owner="RegionPooler",
        build=lambda c: shaken(tl.RegionPooler(c, WIDTH, num_heads=1, query_head=False)),
        inputs=with_padding,
        call=call_pooler,
        oracle=pooler_oracle,
        learns=("tokens", "text"),
        wrong=pooler_refuses,
        state=("query_weight", "key_weight", "log_attention_scale"),
        finite=("tokens", "text"),
        shows=("query_head=False",),
    ),
    Case(
        name="matching",
        owner="TextRegionMatchingLoss",
        build=lambda c: shaken(tl.TextRegionMatchingLoss(c, scale=5.0)),
        inputs=with_weights,
        call=call_matching,
        oracle=matching_oracle,
        twin=matching_twin,
        learns=("regions", "text"),
        wrong=matching_refuses,
        state=MATCHING_STATE,
        is_loss=True,
        finite=("regions", "text"),
        shows=("num_classes=5", "gamma_neg=2.0", "margin=0.05", "mean"),
    ),
    Case(
        name="matching, sum",
        owner="TextRegionMatchingLoss",
        build=lambda c: shaken(tl.TextRegionMatchingLoss(c, scale=5.0, gamma_neg=0.5, margin=0.1, reduction="sum")),
        inputs=region_text,
        call=call_matching,
        oracle=matching_oracle,
        twin=matching_twin,
        learns=("regions", "text"),
        state=MATCHING_STATE,
        is_loss=True,
        finite=("regions", "text"),
    ),
    Case(
        name="matching, without margin, none",
        owner="TextRegionMatchingLoss",
        build=lambda c: shaken(tl.TextRegionMatchingLoss(c, gamma_pos=0.5, gamma_neg=3.0, margin=0.0, reduction="none")),
        inputs=with_weights,
        call=call_matching,
        oracle=matching_oracle,
        twin=matching_twin,
        learns=("regions", "text"),
        state=MATCHING_STATE,
        is_loss=True,
        finite=("regions", "text"),
    ),
    Case(
        name="distillation",
        owner="RegionDistillationLoss",
        build=lambda c: tl.RegionDistillationLoss(temperature=3.0),
        inputs=two_logits,
        call=lambda m, x: m(x["student_logits"], x["teacher_logits"], x["weights"]),
        oracle=lambda m, x: (
            oracles.distillation(x["student_logits"], x["teacher_logits"], m.temperature, x["weights"]).sum() / len(x["weights"])
        ),
        twin=lambda m, x: TF.region_distillation(
            x["student_logits"], x["teacher_logits"], x["weights"], temperature=m.temperature
        ),
        learns=("student_logits",),
        wrong={
            **refused(student_logits="B C", teacher_logits="B C", weights="B"),
            **integers("student_logits", "teacher_logits", "weights"),
        },
        state=(),
        finite=("student_logits", "teacher_logits"),
        shows=("temperature=3.0", "mean"),
    ),
    Case(
        name="distillation, none",
        owner="RegionDistillationLoss",
        build=lambda c: tl.RegionDistillationLoss(reduction="none"),
        inputs=two_logits,
        call=lambda m, x: m(x["student_logits"], x["teacher_logits"]),
        oracle=lambda m, x: oracles.distillation(x["student_logits"], x["teacher_logits"], 4.0),
        twin=lambda m, x: TF.region_distillation(x["student_logits"], x["teacher_logits"], reduction="none"),
        learns=("student_logits",),
        state=(),
        finite=("student_logits", "teacher_logits"),
    ),
    Case(
        name="contrast",
        owner="MultimodalContrastiveLoss",
        build=lambda c: tl.MultimodalContrastiveLoss(),
        inputs=region_text,
        call=call_contrast,
        oracle=lambda m, x: weighted(oracles.contrast(x["regions"], x["text"], x["targets"]), dict.fromkeys(ALPHAS, 1.0)),
        twin=lambda m, x: weighted(TF.multimodal_contrastive(x["regions"], x["text"], x["targets"]), dict.fromkeys(ALPHAS, 1.0)),
        learns=("regions", "text"),
        state=(),
        is_loss=True,
        finite=("regions", "text"),
        shows=("temperature=0.07", "temperature_region=0.1", "anchor_threshold=0.9"),
    ),
    Case(
        name="contrast, prototypes",
        owner="MultimodalContrastiveLoss",
        build=lambda c: tl.MultimodalContrastiveLoss(temperature=0.2, temperature_region=0.3, anchor_threshold=0.97, **ALPHAS),
        inputs=with_prototypes,
        call=call_contrast,
        oracle=lambda m, x: weighted(
            oracles.contrast(x["regions"], x["text"], x["targets"], **contrast_options(x), **contrast_settings(m)), ALPHAS
        ),
        twin=lambda m, x: weighted(
            TF.multimodal_contrastive(x["regions"], x["text"], x["targets"], **contrast_options(x), **contrast_settings(m)),
            ALPHAS,
        ),
        learns=("regions", "text"),
        wrong={
            **refused(regions="B C D", text="C D", targets="B C", weights="B C", prototypes="C D", seen="C"),
            **integers("regions", "text", "weights", "prototypes"),
            **encodings(),
            "seen: integers": (change("seen", lambda s: s.long()), TypeError, "seen must be bool, got torch.int64"),
        },
        state=(),
        finite=("regions", "text"),
    ),
    Case(
        name="contrast of images",
        owner="ImageContrastiveLoss",
        build=lambda c: tl.ImageContrastiveLoss(),
        inputs=image_labels,
        call=call_image_contrast,
        oracle=lambda m, x: oracles.multi_label(x["features"], x["targets"], x["weights"]),
        twin=lambda m, x: TF.multi_label_contrastive(**x),
        learns=("features",),
        wrong={
            **refused(features="B D", targets="B C", weights="B C"),
            **integers("features", "weights"),
            **encodings(),
            "features: size": (change("features", lambda x: x[1:]), ValueError, r"targets must have shape \(B, C\) = \(3, C\)"),
        },
        state=(),
        finite=("features",),
        shows=("temperature=0.1", "anchor_threshold=0.9"),
    ),
    Case(
        name="contrast of images, settings",
        owner="ImageContrastiveLoss",
        build=lambda c: tl.ImageContrastiveLoss(temperature=0.3, anchor_threshold=0.97),
        inputs=image_labels,
        call=call_image_contrast,
        oracle=lambda m, x: oracles.multi_label(x["features"], x["targets"], x["weights"], 0.3, 0.97),
        twin=lambda m, x: TF.multi_label_contrastive(**x, temperature=0.3, anchor_threshold=0.97),
        learns=("features",),
        state=(),
    ),
    Case(
        name="bank",
        owner="PrototypeBank",
        build=lambda c: tl.PrototypeBank(c, WIDTH, init=normal(c, WIDTH, seed=17)),
        inputs=with_weights,
        call=call_bank,
        oracle=bank_oracle,
        twin=bank_twin,
        wrong={**refused(regions="B C D", text="C D", targets="B C", weights="B C"), **integers("regions", "text", "weights")},
        state=BANK_STATE,
        compiles=False,
        finite=("text",),
        shows=("num_classes=5", "dim=8", "momentum=0.99"),
    ),
    Case(
        name="discriminant",
        owner="GaussianDiscriminant",
        build=discriminant,
        inputs=lambda b, c: {key: x for key, x in with_padding(b, c).items() if key != "text"},
        call=lambda m, x: m(x["tokens"], key_padding_mask=x["key_padding_mask"]),
        oracle=discriminant_oracle,
        learns=("tokens",),
        wrong={
            **refused(tokens="B N D", key_padding_mask="B N"),
            **integers("tokens"),
            "mask: integers": (change("key_padding_mask", lambda m: m.long()), TypeError, "key_padding_mask must be bool"),
        },
        state=("prototypes", "mean", "whitening", "count", "total"),
        finite=("tokens",),
        shows=("num_classes=5", "tokens_per_class=7", "shrinkage=0.2"),
    ),
    Case(
        name="labeler",
        owner="PseudoLabeler",
        build=lambda c: filled_labeler(c),
        inputs=labeler_inputs,
        call=call_labeler,
        oracle=labeler_oracle,
        wrong={**refused(regions="B C D", targets="B C"), **integers("regions"), **encodings()},
        state=LABELER_STATE,
        finite=("regions",),
        shows=("num_classes=5", "PrototypeRule", "positive=0.8, negative=0.1", "warmup_steps=0"),
    ),
    *(
        Case(
            name=f"labeler, quantiles{name}",
            owner="PseudoLabeler",
            build=lambda c, settings=settings: filled_labeler(c, **settings),
            inputs=labeler_inputs,
            call=call_labeler,
            oracle=lambda m, x, settings=settings: labeler_oracle(m, x, **settings),
            state=(*LABELER_STATE, "rule.decider.histogram"),
            shows=("Quantiles", "share=0.6"),
        )
        for name, settings in (("", {"share": 0.6}), (", given positives", {"share": 0.6, "expected_positives": 1.5}))
    ),
    Case(
        name="labeler, neighbour rule",
        owner="PseudoLabeler",
        build=refreshed_labeler,
        inputs=labeler_ids,
        call=call_labeler,
        oracle=neighbour_rule_oracle,
        wrong={
            **refused(regions="B C D", targets="B C", ids="B"),
            "ids: missing": (
                lambda x: {k: v for k, v in x.items() if k != "ids"},
                ValueError,
                "ids must be given, NeighbourRule needs them",
            ),
            "ids: outside": (change("ids", lambda i: i + 5), ValueError, "ids must be from 0 to num_samples - 1 = 5, got 5 to 8"),
        },
        state=(*COUNTS, "rule.estimates"),
        shows=("NeighbourRule", "num_samples=6"),
    ),
    Case(
        name="prompts, residual",
        owner="PromptLearner",
        build=lambda c: shaken(tl.PromptLearner("residual", text=normal(c, WIDTH, seed=18, dtype=torch.float32))),
        inputs=lambda b, c: {},
        call=lambda m, x: m(),
        oracle=lambda m, x: (
            np.array([oracles.unit(t) for t in oracles.array(normal(len(m.delta), WIDTH, seed=18, dtype=torch.float32))])
            + oracles.array(m.delta)
        ),
        state=("reference", "delta"),
        shows=("residual", "num_classes=5"),
    ),
    Case(
        name="prompts, shared",
        owner="PromptLearner",
        build=lambda c: shaken(tl.PromptLearner("shared", names=names(c), num_context=3)),
        inputs=lambda b, c: {},
        call=lambda m, x: tuple(m()),
        oracle=prompts_oracle,
        state=("start", "rest", "eot", "context"),
        shows=("shared",),
    ),
    Case(
        name="prompts, csc",
        owner="PromptLearner",
        build=lambda c: shaken(tl.PromptLearner("csc", names=names(c), num_context=2)),
        inputs=lambda b, c: {},
        call=lambda m, x: tuple(m()),
        oracle=prompts_oracle,
        state=("start", "rest", "eot", "context"),
    ),
    Case(
        name="prompts, some classes",
        owner="PromptLearner",
        build=lambda c: shaken(tl.PromptLearner("csc", names=names(c), num_context=2)),
        inputs=lambda b, c: {"classes": torch.arange(0, c, 2).flip(0)},
        call=lambda m, x: tuple(m(x["classes"])),
        oracle=lambda m, x: tuple(y if isinstance(y, int) else y[x["classes"].numpy()] for y in prompts_oracle(m, x)),
        wrong={key: how for key, how in refused(classes="K").items() if key in ("classes: rank", "classes: list")},
        state=("start", "rest", "eot", "context"),
    ),
    Case(
        name="objective",
        owner="TRMObjective",
        build=lambda c: objective(c),
        inputs=objective_inputs,
        call=call_objective,
        oracle=objective_oracle,
        learns=("tokens", "text"),
        wrong={**refused(tokens="B N D", text="C D", targets="B C"), **integers("tokens", "text"), **encodings()},
        state=(
            *(f"pooler.{key}" for key in POOLER_STATE),
            *(f"matching.{key}" for key in MATCHING_STATE),
            *(f"bank.{key}" for key in BANK_STATE),
            *(f"labeler.{key}" for key in LABELER_STATE),
        ),
        finite=("tokens", "text"),
    ),
    Case(
        name="objective, classes in chunks",
        owner="ChunkedTRMObjective",
        build=lambda c: objective(c, class_chunk=2),
        inputs=objective_inputs,
        call=call_objective,
        oracle=objective_oracle,
        learns=("tokens", "text"),
        wrong={**refused(tokens="B N D", text="C D", targets="B C"), **integers("tokens", "text"), **encodings()},
        state=(
            *(f"pooler.{key}" for key in POOLER_STATE),
            *(f"matching.{key}" for key in MATCHING_STATE),
            *(f"bank.{key}" for key in BANK_STATE),
            *(f"labeler.{key}" for key in LABELER_STATE),
        ),
        finite=("tokens", "text"),
    ),
    Case(
        name="head",
        owner="TRMHead",
        build=head,
        inputs=lambda b, c: {"tokens": token_text(b, c)["tokens"]},
        call=lambda m, x: m(x["tokens"]),
        oracle=head_oracle,
        learns=("tokens",),
        wrong={**refused(tokens="B N D"), **integers("tokens")},
        state=("text", *(f"pooler.{key}" for key in POOLER_STATE), *(f"matching.{key}" for key in MATCHING_STATE)),
        finite=("tokens",),
        shows=("classes=5", "query"),
    ),
    Case(
        name="head, free queries, padding",
        owner="TRMHead",
        build=lambda c: head(c, "free"),
        inputs=lambda b, c: {k: x for k, x in with_padding(b, c).items() if k != "text"},
        call=lambda m, x: m(x["tokens"], key_padding_mask=x["key_padding_mask"]),
        oracle=head_oracle,
        learns=("tokens",),
        wrong=refused(tokens="B N D", key_padding_mask="B N"),
        state=(
            "text",
            "pooler.query",
            *(f"pooler.{key}" for key in POOLER_STATE),
            *(f"matching.{key}" for key in MATCHING_STATE),
        ),
        finite=("tokens",),
        shows=("free",),
    ),
]


# Baselines: one signature, so one shape of case. ``oracle(module, x, y, held, ids)`` is of plain numbers; ``state`` what is
# saved; ``smooth`` says that no gradient is stopped, so that gradcheck agrees. --------------------------------------------


class BaselineCase(NamedTuple):
    owner: str
    build: Callable[[int], Any]
    oracle: Callable[[Any, Any, Any, Any, Any], float]
    state: tuple[str, ...] = ()
    smooth: bool = True
    shows: tuple[str, ...] = ()


def baseline_inputs(batch: int, classes: int) -> Inputs:
    """Images of a training set of SAMPLES, not in its order."""
    ids = torch.arange(batch).flip(0) + SAMPLES - batch
    return {"logits": 2 * normal(batch, classes, seed=61), "targets": labels(batch, classes, seed=62), "ids": ids}


def call_baseline(module: Any, x: Inputs) -> Result:
    return module(x["logits"], x["targets"], ids=x.get("ids"))


def begun(module: Any, epoch: int = 1, epochs: int = 10) -> Any:
    module.begin_epoch(epoch, epochs)
    return module


def filled(module: Any, classes: int) -> Any:
    """A loss that keeps labels, after an update over a training set of which nothing is known, and in its last epoch."""
    module.begin_epoch(1, 10)
    unknown = torch.full((SAMPLES, classes), -1.0)
    module.update(2 * normal(SAMPLES, classes, seed=63), unknown, ids=torch.arange(SAMPLES))
    return begun(module, 9)


def role_loss(classes: int) -> Any:
    return baselines.ROLELoss(labels(SAMPLES, classes, seed=65), 1.5, generator=generator(66))


def large(scheme: Any, classes: int, delta: float = 0.15) -> Any:
    if scheme != "correct_permanently":
        return begun(baselines.LargeLoss(scheme=scheme, delta=delta), 2)
    module = baselines.LargeLoss(scheme=scheme, delta=delta, num_samples=SAMPLES, num_classes=classes)
    return filled(module, classes)


def large_oracle(module: Any, x: Any, y: Any, held: Any, ids: Any) -> float:
    permanent = module.scheme == "correct_permanently"
    if permanent:
        y = np.where((y == -1) & oracles.array(module.flipped)[ids].astype(bool), 1, y)
    rate = Fraction(str(module.delta)) * (1 if permanent else 2)
    return baseline_oracles.large_loss(x, y, held, module.scheme, rate)


PASL = {"gamma_pos": 1.0, "gamma_neg": 2.0, "gamma_unknown": 3.0}


def partial_asl(policy: Any, classes: int, **settings: Any) -> Any:
    return baselines.PartialASLLoss(classes, policy=policy, **{**PASL, **settings})


def partial_asl_oracle(module: Any, x: Any, y: Any, held: Any, ids: Any) -> float:
    out = {
        "negative": set(),
        "ignore": {i for i in np.ndindex(*y.shape) if y[i] == -1},
        "selective": baseline_oracles.left_out(held, y, module.prior.tolist(), module.prior_threshold, module.likely),
    }[module.policy]
    scale = 1 if module.reduction == "sum" else x.size
    return baseline_oracles.partial_asl(x, y, held, tuple(PASL.values()), module.margin, out) / scale


def vlpl(classes: int, **settings: Any) -> Any:
    similarities = 0.03 * normal(SAMPLES, classes, seed=67, dtype=torch.float32)
    return baselines.VLPLLoss(similarities, alpha=0.2, beta=0.7, temperature=0.02, **settings)


def splc_oracle(module: Any, x: Any, y: Any, held: Any, ids: Any) -> float:
    total = baseline_oracles.splc(x, y, held, module.threshold, module.margin, module.gamma, bool(module.correcting))
    return total if module.reduction == "sum" else total / x.size


def hill_oracle(module: Any, x: Any, y: Any, held: Any, ids: Any) -> float:
    total = baseline_oracles.hill(x, y, held, module.strength, module.margin, module.gamma)
    return total if module.reduction == "sum" else total / x.size


def em_apl_oracle(m: Any, x: Any, y: Any, held: Any, ids: Any) -> float:
    soft, labelled = oracles.array(m.soft)[ids], oracles.array(m.labelled)[ids]
    return baseline_oracles.em_apl(x, y, held, m.alpha, m.beta, soft, labelled)


def role_oracle(m: Any, x: Any, y: Any, held: Any, ids: Any) -> float:
    theta = oracles.array(m.estimates)[ids]
    return baseline_oracles.role(x, theta, y, held, theta, 1.5)


BASELINES = {
    "assume negative": BaselineCase(
        "AssumeNegativeLoss",
        lambda c: baselines.AssumeNegativeLoss(),
        lambda m, x, y, held, ids: baseline_oracles.assume_negative(x, y, held),
    ),
    "assume negative, smoothing": BaselineCase(
        "AssumeNegativeLoss",
        lambda c: baselines.AssumeNegativeLoss(smoothing=0.1),
        lambda m, x, y, held, ids: baseline_oracles.assume_negative(x, y, held, 0.1),
        shows=("smoothing=0.1",),
    ),
    "weak assume negative": BaselineCase(
        "WeakAssumeNegativeLoss",
        lambda c: baselines.WeakAssumeNegativeLoss(),
        lambda m, x, y, held, ids: baseline_oracles.weak_assume_negative(x, y, held),
    ),
    "EPR": BaselineCase(
        "EPRLoss",
        lambda c: baselines.EPRLoss(1.5),
        lambda m, x, y, held, ids: baseline_oracles.epr(x, y, held, 1.5),
        shows=("expected_positives=1.5",),
    ),
    "ROLE": BaselineCase("ROLELoss", role_loss, role_oracle, state=("estimates",), smooth=False, shows=("num_samples=6",)),
    "EM": BaselineCase(
        "EMLoss",
        lambda c: baselines.EMLoss(alpha=0.3),
        lambda m, x, y, held, ids: baseline_oracles.em(x, y, held, 0.3),
        shows=("alpha=0.3",),
    ),
    "EM+APL": BaselineCase(
        "EMAPLLoss",
        lambda c: filled(baselines.EMAPLLoss(SAMPLES, c, alpha=0.3, beta=0.6, label_share=0.5, warmup=9), c),
        em_apl_oracle,
        state=("soft", "labelled", "passes"),
        shows=("beta=0.6", "warmup=9"),
    ),
    "large loss, reject": BaselineCase("LargeLoss", lambda c: large("reject", c), large_oracle, state=("rate",)),
    "large loss, correct": BaselineCase("LargeLoss", lambda c: large("correct", c), large_oracle, state=("rate",)),
    "large loss, correct permanently": BaselineCase(
        "LargeLoss",
        lambda c: large("correct_permanently", c),
        large_oracle,
        state=("rate", "flipped"),
        shows=("scheme='correct_permanently'", "delta=0.15"),
    ),
    "SPLC, first epoch": BaselineCase("SPLCLoss", lambda c: baselines.SPLCLoss(), splc_oracle, state=("correcting",)),
    "SPLC": BaselineCase(
        "SPLCLoss",
        lambda c: begun(baselines.SPLCLoss(threshold=0.55, margin=0.7, gamma=1.5, reduction="mean")),
        splc_oracle,
        state=("correcting",),
        shows=("threshold=0.55", "reduction='mean'"),
    ),
    "Hill": BaselineCase("HillLoss", lambda c: baselines.HillLoss(), hill_oracle, shows=("strength=1.5",)),
    "Hill, mean": BaselineCase(
        "HillLoss", lambda c: baselines.HillLoss(strength=1.3, margin=0.5, gamma=1.0, reduction="mean"), hill_oracle
    ),
    "partial BCE": BaselineCase(
        "PartialBCELoss",
        lambda c: baselines.PartialBCELoss(),
        lambda m, x, y, held, ids: baseline_oracles.partial_bce(x, y, held, -4.45, 5.45, 1),
    ),
    "partial BCE, mean of each image": BaselineCase(
        "PartialBCELoss",
        lambda c: baselines.PartialBCELoss(alpha=1.0, beta=0.0, gamma=-1.0),
        lambda m, x, y, held, ids: baseline_oracles.partial_bce(x, y, held, 1, 0, -1),
        shows=("gamma=-1.0",),
    ),
    "partial ASL, ignore": BaselineCase(
        "PartialASLLoss",
        lambda c: partial_asl("ignore", c, margin=0.05),
        partial_asl_oracle,
        state=("prior", "prior_steps"),
        smooth=False,
    ),
    "partial ASL, negative": BaselineCase(
        "PartialASLLoss",
        lambda c: partial_asl("negative", c, reduction="mean"),
        partial_asl_oracle,
        state=("prior", "prior_steps"),
        smooth=False,
    ),
    "partial ASL, selective": BaselineCase(
        "PartialASLLoss",
        lambda c: partial_asl("selective", c, margin=0.05, prior=torch.arange(c, 0.0, -1) / 10, prior_threshold=0.35, likely=1),
        partial_asl_oracle,
        state=("prior", "prior_steps"),
        smooth=False,
        shows=("policy='selective'", "likely=1"),
    ),
    "VLPL": BaselineCase(
        "VLPLLoss",
        lambda c: vlpl(c),
        lambda m, x, y, held, ids: baseline_oracles.vlpl(x, y, held, oracles.array(m.scores)[ids], 0.2, 0.7, 0.3, 0),
        state=("scores",),
    ),
    "VLPL, lowest left out": BaselineCase(
        "VLPLLoss",
        lambda c: vlpl(c, threshold=0.4, negative_share=0.4),
        lambda m, x, y, held, ids: baseline_oracles.vlpl(
            x, y, held, oracles.array(m.scores)[ids], 0.2, 0.7, 0.4, 2 * x.shape[1] // 5
        ),
        state=("scores",),
        shows=("negative_share=0.4",),
    ),
}


def baseline_value(case: BaselineCase, module: Any, inputs: Inputs) -> Callable[[Any], float]:
    """The oracle as a function of the logits, with those of the inputs where no gradient passes."""
    y, ids, held = oracles.array(inputs["targets"]), inputs["ids"].numpy(), oracles.array(inputs["logits"])
    return lambda x: case.oracle(module, x, y, held, ids)


def baseline_case(name: str, case: BaselineCase) -> Case:
    return Case(
        name=name,
        owner=case.owner,
        build=case.build,
        inputs=baseline_inputs,
        call=call_baseline,
        oracle=lambda m, x: np.float64(baseline_value(case, m, x)(oracles.array(x["logits"]))),
        learns=("logits",) if case.smooth else (),
        wrong={
            **refused(logits="B C", targets="B C", ids="B"),
            **integers("logits"),
            **encodings(),
            "ids: float": (change("ids", lambda i: i.float()), TypeError, "ids must be int64, got torch.float32"),
        },
        state=case.state,
        finite=("logits",),
        shows=case.shows,
    )


CASES += [baseline_case(name, case) for name, case in BASELINES.items()]
