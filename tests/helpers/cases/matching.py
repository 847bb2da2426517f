"""Cases of the losses of logits: text-region matching and distillation."""

from __future__ import annotations

from functools import partial
from typing import Any

import trm_losses as tl
from tests.helpers import oracles
from tests.helpers.cases.case import Case, encodings, integers, refused
from tests.helpers.values import Inputs, Result, region_text, shaken, two_logits, with_weights
from trm_losses import functional as TF


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


MATCHING_STATE = ("log_scale", "bias")

matching_refuses = {
    **refused(regions="B C D", text="C D", targets="B C", weights="B C"),
    **integers("regions", "text", "weights"),
    **encodings(),
}


matching = partial(
    Case,
    owner="TextRegionMatchingLoss",
    call=call_matching,
    oracle=matching_oracle,
    twin=matching_twin,
    learns=("regions", "text"),
    state=MATCHING_STATE,
    is_loss=True,
    finite=("regions", "text"),
)

CASES = [
    matching(
        name="matching",
        build=lambda c: shaken(tl.TextRegionMatchingLoss(c, scale=5.0)),
        inputs=with_weights,
        wrong=matching_refuses,
        finite=("regions", "text", "weights"),
        shows=("num_classes=5", "gamma_neg=2.0", "margin=0.05", "mean"),
    ),
    matching(
        name="matching, sum",
        build=lambda c: shaken(tl.TextRegionMatchingLoss(c, scale=5.0, gamma_neg=0.5, margin=0.1, reduction="sum")),
        inputs=region_text,
    ),
    matching(
        name="matching, without margin, none",
        build=lambda c: shaken(tl.TextRegionMatchingLoss(c, gamma_pos=0.5, gamma_neg=3.0, margin=0.0, reduction="none")),
        inputs=with_weights,
    ),
    Case(
        name="distillation",
        owner="RegionDistillationLoss",
        build=lambda c: tl.RegionDistillationLoss(temperature=3.0),
        inputs=two_logits,
        call=lambda m, x: m(x["student_logits"], x["teacher_logits"]),
        oracle=lambda m, x: oracles.distillation(x["student_logits"], x["teacher_logits"], m.temperature).mean(),
        twin=lambda m, x: TF.region_distillation(x["student_logits"], x["teacher_logits"], temperature=m.temperature),
        learns=("student_logits",),
        wrong={**refused(student_logits="B C", teacher_logits="B C"), **integers("student_logits", "teacher_logits")},
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
        finite=("student_logits", "teacher_logits"),
    ),
]
