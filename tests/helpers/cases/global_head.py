"""Cases of GlobalHead, and the images that it is made from."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

import trm_losses as tl
from tests.helpers import oracles
from tests.helpers.cases.case import Case, integers, refused
from tests.helpers.cases.discriminant import discriminant, token_stream
from tests.helpers.values import CLASSES, Inputs, normal, with_padding

FEATURES = 6
Images = list[tuple[Tensor, Tensor, Tensor, Tensor]]


def labelled_images(classes: int = CLASSES) -> Images:
    """Batches of tokens, penultimate features that know something of them, labels and padding."""
    return [
        (x, 3 + x.mean(dim=1)[:, :FEATURES] + 0.2 * normal(len(x), FEATURES, seed=100 + len(x)), y, mask)
        for x, y, mask in token_stream(classes)
    ]


def unfitted(classes: int = CLASSES, views: str = "both", **settings: Any) -> tl.GlobalHead:
    width, prior = None if views == "prior" else FEATURES, None if views == "penultimate" else discriminant(classes)
    return tl.GlobalHead(classes, **{"width": width, "prior": prior, **settings})  # type: ignore[arg-type]


def global_head(classes: int = CLASSES, views: str = "both", **settings: Any) -> tl.GlobalHead:
    return unfitted(classes, views, **settings).fit(labelled_images(classes))


def slow_head(
    module: tl.GlobalHead, images: Images, expected_positives: float | None = None, estimates: Any = None
) -> oracles.GlobalHead:
    """The oracle, of what the module's prior says of these images."""
    g, f = zip(*(seen(module, x, penultimate, mask) for x, penultimate, _, mask in images), strict=True)
    y = np.concatenate([oracles.array(batch[2]) for batch in images])
    settings = {key: getattr(module, key) for key in ("spread", "shrinkage", "unknown_weight")}
    return oracles.GlobalHead(
        np.concatenate(g), np.concatenate(f), y, expected_positives=expected_positives, estimates=estimates, **settings
    )


def seen(module: tl.GlobalHead, tokens: Any, penultimate: Any, mask: Any = None) -> tuple[Any, Any]:
    """What the two views have of some images."""
    images = len(penultimate if tokens is None else tokens)
    g = np.zeros((images, module.num_classes))
    if module.prior is not None:
        g = oracles.array(module.prior(tokens, key_padding_mask=mask))
    return g, np.zeros((images, 0)) if module.width is None else oracles.array(penultimate)


def head_inputs(batch: int, classes: int) -> Inputs:
    x = {key: value for key, value in with_padding(batch, classes).items() if key != "text"}
    return {**x, "penultimate": 3 + normal(batch, FEATURES, seed=19)}


def whole_images(batch: int, classes: int) -> Inputs:
    return {"penultimate": head_inputs(batch, classes)["penultimate"]}


STATE = ("scale", "weight", "center", "bias", "mix", "total")
PRIOR_STATE = tuple(f"prior.{key}" for key in ("prototypes", "mean", "whitening", "count", "total"))

CASES = [
    Case(
        name="global head",
        owner="GlobalHead",
        build=global_head,
        inputs=head_inputs,
        call=lambda m, x: m(x["tokens"], x["penultimate"], key_padding_mask=x["key_padding_mask"]),
        oracle=lambda m, x: slow_head(m, labelled_images(m.num_classes)).logits(
            *seen(m, x["tokens"], x["penultimate"], x["key_padding_mask"])
        ),
        wrong={**refused(tokens="B N D", penultimate="B W", key_padding_mask="B N"), **integers("tokens", "penultimate")},
        state=(*STATE, *PRIOR_STATE),
        finite=("penultimate", "tokens"),
        shows=("num_classes=5", "width=6", "spread=3.0", "shrinkage=1.0", "GaussianDiscriminant"),
    ),
    Case(
        name="global head, penultimate alone",
        owner="GlobalHead",
        build=lambda c: global_head(c, "penultimate", shrinkage=0.3),
        inputs=whole_images,
        call=lambda m, x: m(None, x["penultimate"]),
        oracle=lambda m, x: slow_head(m, labelled_images(m.num_classes)).logits(*seen(m, None, x["penultimate"])),
        wrong={key: how for key, how in refused(penultimate="B W").items() if not key.endswith("device")},
        state=STATE,
        finite=("penultimate",),
    ),
]
