"""Cases of the whole: TRMObjective, the same for classes in chunks, and TRMHead."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import trm_losses as tl
from tests.helpers import oracles
from tests.helpers.cases.bank import BANK_STATE, filled_bank
from tests.helpers.cases.case import Case, encodings, integers, refused
from tests.helpers.cases.contrast import ALPHAS, weighted
from tests.helpers.cases.labeler import LABELER_STATE, filled_labeler, filled_oracle
from tests.helpers.cases.matching import MATCHING_STATE
from tests.helpers.cases.pooling import POOLER_STATE, pooler_oracle
from tests.helpers.values import CLASSES, WIDTH, Inputs, Result, labels, normal, shaken, token_text, with_padding

OBJECTIVE_RULE = {"positive": 0.6, "negative": 0.4, "weight_pos": 0.7, "weight_neg": 0.3}


def objective(
    classes: int = CLASSES,
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
        tl.TextRegionMatchingLoss(classes, scale=5.0, **matching or {}),
        distillation=tl.RegionDistillationLoss(**distillation or {}),
        contrast=tl.MultimodalContrastiveLoss(),
        bank=filled_bank(classes),
        labeler=filled_labeler(classes, **OBJECTIVE_RULE),
        **settings,
    )
    module.sure, module.confident = 0.65, 0.5
    return shaken(module)  # type: ignore[return-value]


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
            if guessed[i] > 0 and scores[i] >= module.sure:
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


HEAD_STATE = (*(f"pooler.{key}" for key in POOLER_STATE), *(f"matching.{key}" for key in MATCHING_STATE))

CASES = [
    *(
        Case(
            name=f"objective{name}",
            owner=owner,
            build=lambda c, options=options: objective(c, **options),
            inputs=objective_inputs,
            call=call_objective,
            oracle=objective_oracle,
            learns=("tokens", "text"),
            wrong={**refused(tokens="B N D", text="C D", targets="B C"), **integers("tokens", "text"), **encodings()},
            state=(*HEAD_STATE, *(f"bank.{key}" for key in BANK_STATE), *(f"labeler.{key}" for key in LABELER_STATE)),
            finite=("tokens", "text"),
            decides=True,
        )
        for name, owner, options in (("", "TRMObjective", {}), (", classes in chunks", "ChunkedTRMObjective", {"class_chunk": 2}))
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
        state=("text", *HEAD_STATE),
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
        state=("text", "pooler.query", *HEAD_STATE),
        finite=("tokens",),
        shows=("free",),
    ),
]
