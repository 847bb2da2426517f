"""Regions of an image, one class, head and token at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tests.helpers.oracles.numbers import Array, array, softmax, unit


def layer_norm(v: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Array:
    centred = v - v.mean()
    return centred / math.sqrt((centred**2).mean() + eps) * weight + bias


def sinkhorn(scores: Array, mass: Array, iterations: int) -> Array:
    """A (C, N) of one image: rows of sum 1, columns of C times the mass; a number at a time."""
    classes, tokens = scores.shape
    f, g = [1.0] * classes, [0.0] * tokens
    for _ in range(iterations):
        for n in range(tokens):
            g[n] = classes * mass[n] / sum(f[c] * math.exp(scores[c, n]) for c in range(classes))
        for c in range(classes):
            f[c] = 1 / sum(g[n] * math.exp(scores[c, n]) for n in range(tokens))
    return np.array([[f[c] * math.exp(scores[c, n]) * g[n] for n in range(tokens)] for c in range(classes)])


def transport(cosines: Array, scale: float, temperature: float = 0.1, smoothness: float = 0.1, iterations: int = 100) -> Array:
    """A (C, N) of one image's cosines (C, N), without its padding."""
    classes, tokens = cosines.shape
    mass = softmax([max(cosines[:, n]) / temperature for n in range(tokens)])
    scores = np.zeros_like(cosines)
    for n in range(tokens):
        for c, share in enumerate(softmax([scale * x for x in cosines[:, n]])):
            scores[c, n] = -(1 - share) / smoothness
    return sinkhorn(scores, np.array(mass), iterations)


def pool(
    state: dict[str, Any], tokens: Any, queries: Any, heads: int, *, padding: Any = None, assignment: str = "softmax"
) -> tuple[Array, Array, Array]:
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
        plan = None
        if assignment == "transport" and real:
            cosines = [[unit(t) @ p["query_weight"].T @ p["key_weight"] @ unit(v[b, n]) for n in real] for t in q]
            plan = transport(np.array(cosines), kappa)
        for c in range(len(q)):
            output = np.zeros(width)
            for h in range(heads):
                rows = slice(h * slice_width, (h + 1) * slice_width)
                q_h = p["query_weight"][rows] @ unit(q[c])
                scores = []
                for n in real:
                    scores.append(kappa * heads * float(q_h @ (p["key_weight"][rows] @ unit(v[b, n]))))
                for n, a in zip(real, softmax(scores) if plan is None else plan[c], strict=True):
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
