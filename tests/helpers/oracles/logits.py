"""The losses of logits: text-region matching and distillation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tests.helpers.oracles.numbers import Array, array, sigmoid, softmax, unit

# Text-region matching -------------------------------------------------------------------------------------------------


def asymmetric(
    logits: Any, targets: Any, weights: Any = None, gamma_pos: float = 1, gamma_neg: float = 2, margin: float = 0.05
) -> Array:
    """Loss of each entry: hard labels focused and shifted, soft ones plain cross-entropy, unknown ones 0."""
    x, y = array(logits), array(targets)
    w = np.ones_like(x) if weights is None else array(weights)
    loss = np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        p = sigmoid(x[i])
        shifted = max(p - margin, 0.0)
        if y[i] == 1:
            loss[i] = -((1 - p) ** gamma_pos) * math.log(p)
        elif y[i] == 0:
            loss[i] = -(shifted**gamma_neg) * math.log(1 - shifted)
        elif y[i] > 0:
            loss[i] = -y[i] * math.log(p) - (1 - y[i]) * math.log(1 - p)
        loss[i] *= w[i] if y[i] >= 0 else 0.0
    return loss


def asymmetric_gradient(
    logits: Any, targets: Any, gamma_pos: float, gamma_neg: float, margin: float, detach_focus: bool
) -> Array:
    """The derivative of each entry's loss by its logit, worked out by hand; with and without the focusing factors'."""
    x, y = array(logits), array(targets)
    slope = np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        p = sigmoid(x[i])
        if y[i] == 1:
            slope[i] = -((1 - p) ** gamma_pos) * (1 - p)
            if not detach_focus:
                slope[i] += gamma_pos * p * (1 - p) ** gamma_pos * math.log(p)
        elif y[i] == 0 and p > margin:
            q = p - margin
            slope[i] = q**gamma_neg * p * (1 - p) / (1 - q)
            if not detach_focus:
                slope[i] -= gamma_neg * q ** (gamma_neg - 1) * p * (1 - p) * math.log(1 - q)
        elif 0 < y[i] < 1:
            slope[i] = p - y[i]
    return slope


def matching_logits(regions: Any, text: Any, scale: float, bias: Any = None) -> Array:
    """s r.t - beta, with the region as it is."""
    r, t = array(regions), array(text)
    out = np.zeros(r.shape[:2])
    for b, c in np.ndindex(*out.shape):
        out[b, c] = scale * sum(r[b, c] * unit(t[c])) - (0.0 if bias is None else array(bias)[c])
    return out


# Distillation ---------------------------------------------------------------------------------------------------------


def distillation(student: Any, teacher: Any, temperature: float) -> Array:
    """T^2 KL(teacher || student) of each image."""
    s, t = array(student), array(teacher)
    out = np.zeros(len(s))
    for b in range(len(s)):
        p = softmax([x / temperature for x in t[b]])
        q = softmax([x / temperature for x in s[b]])
        out[b] = temperature**2 * sum(i * math.log(i / j) for i, j in zip(p, q, strict=True))
    return out
