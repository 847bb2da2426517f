"""Regions of an image, one class, head and token at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tests.helpers.oracles.numbers import Array, array, softmax, unit


def layer_norm(v: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Array:
    centred = v - v.mean()
    return centred / math.sqrt((centred**2).mean() + eps) * weight + bias


def pool(state: dict[str, Any], tokens: Any, queries: Any, heads: int, *, padding: Any = None) -> tuple[Array, Array, Array]:
    """R (B, C, D), Z (B, C, D) and A (B, C, N) of a pooler's parameters, one image, class, head and token at a time."""
    p = {key: array(value) for key, value in state.items()}
    v, q = array(tokens), array(queries)
    images, count, width = v.shape
    slice_width = width // heads
    kappa = math.exp(float(p["log_attention_scale"]))
    region = np.zeros((images, len(q), width))
    query = np.zeros_like(region)
    saliency = np.zeros((images, len(q), count))
    for b in range(images):
        real = [n for n in range(count) if padding is None or not bool(padding[b][n])]
        for c in range(len(q)):
            output = np.zeros(width)
            for h in range(heads):
                rows = slice(h * slice_width, (h + 1) * slice_width)
                q_h = p["query_weight"][rows] @ unit(q[c])
                scores = []
                for n in real:
                    scores.append(kappa * heads * float(q_h @ (p["key_weight"][rows] @ unit(v[b, n]))))
                for n, a in zip(real, softmax(scores), strict=True):
                    saliency[b, c, n] += a / heads
                    if "value_weight" in p:
                        normed = layer_norm(v[b, n], p["value_norm.weight"], p["value_norm.bias"])
                        output[rows] += a * (p["value_weight"][rows] @ normed)
            for n in real:
                region[b, c] += saliency[b, c, n] * unit(v[b, n])
            query[b, c] = region[b, c]
            if "mlp.1.weight" in p:
                o = p["output.weight"] @ output + p["output.bias"]
                normed = layer_norm(o, p["mlp.0.weight"], p["mlp.0.bias"])
                hidden = p["mlp.1.weight"] @ normed + p["mlp.1.bias"]
                hidden = np.array([0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in hidden])
                query[b, c] += p["mlp.4.weight"] @ hidden + p["mlp.4.bias"]
    return region, query, saliency
