"""Cases of GaussianDiscriminant, and a stream of tokens that it is made from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import trm_losses as tl
from tests.helpers import oracles
from tests.helpers.cases.case import Case, change, integers, refused
from tests.helpers.values import CLASSES, WIDTH, Inputs, generator, labels, normal, with_padding

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


CASES = [
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
    )
]
