"""Cases of PromptLearner."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

import trm_losses as tl
from tests.helpers import oracles
from tests.helpers.cases.case import Case, refused
from tests.helpers.values import WIDTH, Inputs, normal, shaken


def names(classes: int) -> tl.PromptEmbeddings:
    """Embedded class names of different lengths, as a text tower without learned parts would get them."""
    eot = torch.arange(classes) % 3 + 2
    return tl.PromptEmbeddings(normal(classes, 7, WIDTH, seed=14, dtype=torch.float32), eot)


def prompts_oracle(module: tl.PromptLearner, x: Inputs) -> Any:
    embeddings, eot, _ = names(module.num_classes)
    context, e = oracles.array(module.context), oracles.array(embeddings)
    longest = int(eot.max()) + 1
    start = int((e[:, 0] == e[0, 0]).all())  # whether the names begin with a token of the tokenizer's own
    rows = []
    for c in range(len(e)):
        own = context if module.mode == "shared" else context[c]
        rows.append(np.stack([*e[c, :start], *own, *e[c, start:longest]]))
    prefix = start + (len(context) if module.mode == "shared" else 0)
    return np.stack(rows), oracles.array(eot) + context.shape[-2], prefix


prompts = partial(
    Case,
    owner="PromptLearner",
    inputs=lambda b, c: {},
    call=lambda m, x: tuple(m()),
    oracle=prompts_oracle,
    state=("start", "rest", "eot", "context"),
)

CASES = [
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
    prompts(
        name="prompts, shared",
        build=lambda c: shaken(tl.PromptLearner("shared", names=names(c), num_context=3)),
        shows=("shared",),
    ),
    prompts(name="prompts, csc", build=lambda c: shaken(tl.PromptLearner("csc", names=names(c), num_context=2))),
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
]
