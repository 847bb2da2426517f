"""The contrasts of regions and of images, pair by pair."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.helpers.oracles.numbers import Array, array, log_sum_exp, unit


def contrast(
    regions: Any,
    text: Any,
    targets: Any,
    *,
    prototypes: Any = None,
    seen: Any = None,
    weights: Any = None,
    temperature: float = 0.07,
    temperature_region: float = 0.1,
    anchor_threshold: float = 0.9,
) -> dict[str, float]:
    """The five contrasts, pair by pair."""
    f, t, y = array(regions), [unit(row) for row in array(text)], array(targets)
    w = np.ones_like(y) if weights is None else array(weights)
    classes = range(len(t))
    anchors = [(b, c) for b, c in np.ndindex(*y.shape) if y[b, c] >= anchor_threshold]
    feature = {a: unit(f[a]) for a in anchors}
    mean = dict.fromkeys(("region_region", "region_text", "text_region", "region_prototype", "text_prototype"), 0.0)

    rows = []
    for a in anchors:
        partners = [feature[p] for p in anchors if p[1] == a[1] and p[0] != a[0]]
        others = [feature[o] for o in anchors if o != a]
        if partners:
            bottom = log_sum_exp([float(feature[a] @ o) / temperature_region for o in others])
            log_ratio = [float(feature[a] @ p) / temperature_region - bottom for p in partners]
            rows.append(-w[a] * sum(log_ratio) / len(partners))
    mean["region_region"] = sum(rows) / len(rows) if rows else 0.0

    rows = []
    for a in anchors:
        scores = [float(feature[a] @ t[c]) / temperature for c in classes]
        rows.append(w[a] * (log_sum_exp(scores) - float(feature[a] @ t[a[1]]) / temperature))
    mean["region_text"] = sum(rows) / len(rows) if rows else 0.0

    rows = []
    for c in classes:
        own = [a for a in anchors if a[1] == c]
        scores = [float(t[c] @ feature[a]) / temperature for a in anchors]
        if own:
            part = [w[a] * (log_sum_exp(scores) - float(t[c] @ feature[a]) / temperature) for a in own]
            rows.append(sum(part) / len(own))
    mean["text_region"] = sum(rows) / len(rows) if rows else 0.0

    if prototypes is not None:
        proto = [unit(p) for p in array(prototypes)]
        known = [c for c in classes if seen is None or bool(seen[c])]

        def near(v: Array, c: int) -> float:
            return float(v @ proto[c]) / temperature

        rows = []
        for a in anchors:
            if a[1] in known:
                rows.append(w[a] * (log_sum_exp([near(feature[a], c) for c in known]) - near(feature[a], a[1])))
        mean["region_prototype"] = sum(rows) / len(rows) if rows else 0.0
        rows = [log_sum_exp([near(t[c], k) for k in known]) - near(t[c], c) for c in known]
        mean["text_prototype"] = sum(rows) / len(rows) if rows else 0.0
    return mean


def multi_label(
    features: Any, targets: Any, weights: Any = None, temperature: float = 0.1, anchor_threshold: float = 0.9
) -> float:
    """Every label of an image against all other images that carry any, label by label and pair by pair."""
    y, f, rows = array(targets), [unit(row) for row in array(features)], []
    w = np.ones_like(y) if weights is None else array(weights)
    carries = [[c for c in range(y.shape[1]) if y[b, c] >= anchor_threshold] for b in range(len(y))]
    for b in range(len(y)):
        for c in carries[b]:
            others = [a for a in range(len(y)) if a != b and carries[a]]
            partners = [a for a in others if c in carries[a]]
            if partners:
                bottom = log_sum_exp([float(f[b] @ f[a]) / temperature for a in others])
                log_ratio = [float(f[b] @ f[p]) / temperature - bottom for p in partners]
                rows.append(-w[b, c] * sum(log_ratio) / len(partners))
    return float(sum(rows) / len(rows)) if rows else 0.0
