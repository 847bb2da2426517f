"""Cases of the contrasts of regions and of images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import trm_losses as tl
from tests.helpers import oracles
from tests.helpers.cases.case import Case, change, encodings, integers, refused
from tests.helpers.values import Inputs, Result, image_labels, labels, normal, region_text, with_prototypes
from trm_losses import functional as TF

SCENES: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights": {"weights": normal(6, 4, seed=5).abs()},
    "prototypes": {"prototypes": normal(4, 8, seed=6)},
    "seen": {"prototypes": normal(4, 8, seed=6), "seen": torch.tensor([True, False, True, False])},
    "none seen": {"prototypes": normal(4, 8, seed=6), "seen": torch.zeros(4, dtype=torch.bool)},
    "settings": {"temperature": 0.3, "temperature_region": 0.2, "anchor_threshold": 0.95},
    "everything": {
        "weights": normal(6, 4, seed=5).clamp(min=0),
        "prototypes": normal(4, 8, seed=6),
        "seen": torch.tensor([True, True, True, False]),
        "temperature": 0.15,
        "anchor_threshold": 0.5,
    },
}


def pseudo_positives() -> Tensor:
    """Known labels, and soft labels on both sides of the thresholds."""
    y = labels(6, 4, seed=3)
    y[3, :3] = torch.tensor([0.93, 0.97, 0.6], dtype=torch.float64)
    return y


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


CASES = [
    Case(
        name="contrast",
        owner="MultimodalContrastiveLoss",
        build=lambda c: tl.MultimodalContrastiveLoss(),
        inputs=region_text,
        call=call_contrast,
        oracle=lambda m, x: weighted(oracles.contrast(x["regions"], x["text"], x["targets"]), dict.fromkeys(ALPHAS, 1.0)),
        twin=lambda m, x: weighted(TF.multimodal_contrastive(x["regions"], x["text"], x["targets"]), dict.fromkeys(ALPHAS, 1.0)),
        learns=("regions", "text"),
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
        finite=("regions", "text", "weights", "prototypes"),
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
        finite=("features", "weights"),
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
    ),
]
