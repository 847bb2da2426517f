"""Prototypes of the classes, and the pseudo-labels of the prototype rule."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tests.helpers.oracles.numbers import Array, array, sigmoid, softmax, unit


class Bank:
    """Prototypes after any number of updates."""

    def __init__(self, init: Any, momentum: float = 0.99, text_momentum: float = 0.99) -> None:
        self.visual = np.array([unit(row) for row in array(init)])
        self.text = self.visual.copy()
        self.count, self.text_count = [0] * len(self.text), 0
        self.momentum, self.text_momentum = momentum, text_momentum

    @property
    def seen(self) -> list[bool]:
        return [n > 0 for n in self.count]

    def update(self, regions: Any, targets: Any, weights: Any = None, text: Any = None) -> None:
        z, y = array(regions), array(targets)
        w = np.ones_like(y) if weights is None else array(weights)
        for c in range(len(self.count)):
            own = [b for b in range(len(y)) if y[b, c] == 1 and w[b, c] > 0]
            if own:
                mean = sum(w[b, c] * unit(z[b, c]) for b in own) / sum(w[b, c] for b in own)
                m = min(self.momentum, self.count[c] / (self.count[c] + 1))
                self.visual[c] = unit(m * self.visual[c] + (1 - m) * mean)
                self.count[c] += 1
        if text is not None:
            m = min(self.text_momentum, self.text_count / (self.text_count + 1))
            for c, row in enumerate(array(text)):
                self.text[c] = unit(m * self.text[c] + (1 - m) * unit(row))
            self.text_count += 1


def discriminant(
    images: Any, text: Any, targets: Any = None, padding: Any = None, k: int = 100, scale: float = 20, label_weight: float = 10
) -> tuple[Array, Array, Array, list[int]]:
    """Prototypes, mean and covariance (not shrunk) of a training-free classifier, and what each prototype is made of.

    ``images`` is a list of (N, D), with as many rows of targets (C,) and of padding (N,) where there are any.
    """
    t = [unit(row) for row in array(text)]
    classes = range(len(t))
    found: list[list[tuple[float, int, float, Array]]] = [[] for _ in classes]  # doubt, place in the stream, weight, token
    regions: list[list[Array]] = [[] for _ in classes]
    tokens: list[Array] = []
    for i, image in enumerate(images):
        seen = [unit(x) for n, x in enumerate(array(image)) if padding is None or not padding[i][n]]
        shares = []
        for x in seen:
            cosines = [float(x @ c) for c in t]
            p = softmax([scale * c for c in cosines])
            shares.append(p)
            own = max(classes, key=p.__getitem__)
            doubt = -sum(v * math.log(v) for v in p if v > 0) if len(t) > 1 else -cosines[0]
            if targets is None or targets[i][own] != 0:
                found[own].append((doubt, len(tokens), p[own], x))
            tokens.append(x)
        for c in classes:
            if targets is not None and targets[i][c] == 1 and seen:
                total = sum(p[c] for p in shares)
                regions[c].append(unit(sum(p[c] / total * x for p, x in zip(shares, seen, strict=True))))
    kept = [sorted(f, key=lambda each: each[:2])[:k] for f in found]
    mean = sum(tokens) / len(tokens)
    prototypes = []
    for c in classes:
        mass = sum(w for _, _, w, _ in kept[c]) + label_weight * len(regions[c])
        summed = sum(w * x for _, _, w, x in kept[c]) + label_weight * sum(regions[c])
        prototypes.append(summed / mass if mass else t[c])
    labels = sum(map(len, regions))
    covariance = np.zeros((len(mean), len(mean)))
    for c in classes:
        for _, _, _, x in kept[c]:
            covariance += np.outer(x - prototypes[c], x - prototypes[c])
    covariance += labels * sum(np.outer(x - mean, x - mean) for x in tokens) / len(tokens)
    covariance /= max(1, sum(map(len, kept)) + labels)
    return np.array(prototypes), mean, covariance, [len(kept[c]) + len(regions[c]) for c in classes]


def discriminant_scores(
    images: Any, prototypes: Any, mean: Any, covariance: Any, padding: Any = None, shrinkage: float = 0.1, sharpness: float = 4
) -> Array:
    """Whitened cosines of the tokens of each image and the prototypes, averaged with their own softmax over tokens."""
    m, sigma = array(mean), array(covariance)
    sigma = (1 - shrinkage) * sigma + shrinkage * np.trace(sigma) / len(m) * np.eye(len(m))
    values, vectors = np.linalg.eigh(sigma)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    out = np.zeros((len(images), len(array(prototypes))))
    for i, image in enumerate(array(images)):
        seen = [unit(root @ (unit(x) - m)) for n, x in enumerate(image) if padding is None or not padding[i][n]]
        for c, prototype in enumerate(array(prototypes)):
            cosines = [float(x @ unit(root @ (prototype - m))) for x in seen]
            out[i, c] = sum(w * cosine for w, cosine in zip(softmax([sharpness * x for x in cosines]), cosines, strict=True))
    return out


def similarities(
    regions: Any, visual: Any, text: Any, seen: Any, temperature_visual: float = 0.07, temperature_text: float = 0.02
) -> tuple[Array, Array, Array, Array]:
    """Intra visual, intra text, inter visual (over seen classes, 0 for the others), inter text."""
    z, v, t = array(regions), [unit(row) for row in array(visual)], [unit(row) for row in array(text)]
    out = tuple(np.zeros(z.shape[:2]) for _ in range(4))
    classes = range(len(v))
    known = [c for c in classes if seen is None or bool(seen[c])]
    for b, c in np.ndindex(*z.shape[:2]):
        f = unit(z[b, c])
        out[0][b, c], out[1][b, c] = f @ v[c], f @ t[c]
        if c in known:
            out[2][b, c] = softmax([float(f @ v[k]) / temperature_visual for k in known])[known.index(c)]
        out[3][b, c] = softmax([float(f @ t[k]) / temperature_text for k in classes])[c]
    return out[0], out[1], out[2], out[3]


class Labeler:
    """Pseudo-labels of the prototype rule: every similarity met so far is kept in a list, with the step it was met at.

    Settings are those of the rule and of the labeler.
    """

    def __init__(self, classes: int, **settings: Any) -> None:
        self.classes = classes
        self.positive, self.negative = settings.get("positive", 0.8), settings.get("negative", 0.1)
        self.weight_pos, self.weight_neg = settings.get("weight_pos", 1.0), settings.get("weight_neg", 0.5)
        self.tau_v, self.tau_t = settings.get("temperature_visual", 0.07), settings.get("temperature_text", 0.02)
        self.momentum = settings.get("momentum", 0.99)
        self.warmup, self.ramp_steps = settings.get("warmup_steps", 0), settings.get("ramp_steps", 0)
        self.cap, self.expected = settings.get("cap", True), settings.get("expected_positives")
        self.step = 0
        self.met: list[tuple[int, int, int, int, float]] = []  # step, modality, class, label, similarity
        self.known = [[0, 0] for _ in range(classes)]  # absent, present

    def update(self, regions: Any, targets: Any, bank: Any) -> None:
        y = array(targets)
        s_v, s_t, _, _ = similarities(regions, bank.visual, bank.text, None)
        for b, c in np.ndindex(*y.shape):
            if y[b, c] in (0, 1):
                label = int(y[b, c])
                self.known[c][label] += 1
                if bool(bank.seen[c]):
                    self.met.append((self.step, 0, c, label, float(s_v[b, c])))
                self.met.append((self.step, 1, c, label, float(s_t[b, c])))
        self.step += 1

    def mean(self, modality: int, label: int, c: int | None) -> float | None:
        """Decayed mean similarity of a class (None: of all classes), or None where there is no data."""
        total = mass = 0.0
        for step, m, k, y, s in self.met:
            if m == modality and y == label and c in (None, k):
                decay = self.momentum ** (self.step - 1 - step)
                total, mass = total + decay * s, mass + decay
        return total / mass if mass else None

    def calibrated(self, s: Array, unknown: Array, modality: int, b: int, c: int) -> float | None:
        """q of one entry, or None where the term abstains."""
        pooled_absent, pooled_present = self.mean(modality, 0, None), self.mean(modality, 1, None)
        if pooled_present is None:
            return None
        own_absent, own_present = self.mean(modality, 0, c), self.mean(modality, 1, c)
        enough = self.known[c][1] >= 10 and own_present is not None
        if pooled_absent is None:  # no absent label at all: unknown entries of the batch stand for them
            free = [s[i, c] for i in range(len(s)) if unknown[i, c]]
            everywhere = [s[i] for i in np.ndindex(*s.shape) if unknown[i]]
            absent = sum(free) / len(free) if free else 0.0
            pooled_absent = sum(everywhere) / len(everywhere) if everywhere else 0.0
            present = own_present if enough else pooled_present
        else:
            enough = enough and own_absent is not None
            absent, present = (own_absent, own_present) if enough else (pooled_absent, pooled_present)
        assert absent is not None and present is not None
        if present <= absent:
            return None
        gap = max(present - absent, 0.5 * (pooled_present - pooled_absent), 0.02)
        return sigmoid(6 * (s[b, c] - 0.5 * (present + absent)) / gap)

    def scores(self, regions: Any, targets: Any, bank: Any) -> Array:
        s_v, s_t, pi_v, pi_t = similarities(regions, bank.visual, bank.text, bank.seen, self.tau_v, self.tau_t)
        unknown = array(targets) == -1
        out = np.full(s_v.shape, 0.5)
        for b, c in np.ndindex(*out.shape):
            parts: list[float] = []
            q_v, q_t = self.calibrated(s_v, unknown, 0, b, c), self.calibrated(s_t, unknown, 1, b, c)
            seen = [bool(x) for x in bank.seen]
            if seen[c] and q_v is not None:
                parts.append(q_v)
            if seen[c] and sum(seen) > 1:
                parts.append(pi_v[b, c])
            if np.any(array(bank.text)[c] != 0):
                if q_t is not None:
                    parts.append(q_t)
                if self.classes > 1:
                    parts.append(pi_t[b, c])
            if parts:
                out[b, c] = sum(parts) / len(parts)
        return out

    @property
    def ramp(self) -> float:
        if self.step < self.warmup:
            return 0.0
        return min(1.0, (self.step - self.warmup) / self.ramp_steps) if self.ramp_steps else 1.0

    @property
    def expected_positives(self) -> float:
        if self.expected is not None:
            return float(self.expected)
        pooled = sum(k[1] for k in self.known) / max(1, sum(map(sum, self.known)))
        return sum(k[1] / sum(k) if sum(k) else pooled for k in self.known)

    def __call__(self, regions: Any, targets: Any, bank: Any) -> tuple[Array, Array, Array]:
        """Targets, weights, scores."""
        q, y = self.scores(regions, targets, bank), array(targets)
        labels, weights = np.full(q.shape, -1.0), np.zeros(q.shape)
        if self.step < self.warmup:
            return labels, weights, q
        for b in range(len(q)):
            free = [c for c in range(self.classes) if y[b, c] == -1]
            candidates = [c for c in free if q[b, c] >= self.positive]
            absent = [c for c in free if q[b, c] <= self.negative]
            if self.cap:
                room = math.floor(max(1.0, 2 * self.expected_positives - sum(y[b] == 1)))
                candidates = sorted(candidates, key=lambda c: -q[b, c])[:room]
            for c in candidates:
                labels[b, c], weights[b, c] = q[b, c], self.ramp * self.weight_pos
            for c in absent:
                labels[b, c], weights[b, c] = 0.0, self.ramp * self.weight_neg
        return labels, weights, q
