"""The head of whole images, by Newton's method from its equations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.optimize import brentq

from tests.helpers.oracles.numbers import Array, array


class GlobalHead:
    """Of images of which a prior says g (n, C) and a tower f (n, W); a view that is not there is (n, C) or (n, 0) zeros.

    The logits are linear in theta: w_c of every class in turn, then b, alpha and eta.
    """

    def __init__(
        self,
        g: Any,
        f: Any,
        targets: Any,
        *,
        spread: float,
        shrinkage: float,
        unknown_weight: float,
        expected_positives: float | None = None,
        estimates: Any = None,
    ) -> None:
        y = array(targets)
        n, classes = y.shape
        self.g_mean, self.g_deviation = moments(array(g))
        self.f_mean, self.f_deviation = moments(array(f))
        x = (array(f) - self.f_mean) / self.f_deviation
        values, vectors = np.linalg.eigh((1 - shrinkage) * x.T @ x / n + shrinkage * np.eye(x.shape[1]))
        self.root = vectors @ np.diag(values**-0.5) @ vectors.T
        x, prior = x @ self.root, (array(g) - self.g_mean) / self.g_deviation
        self.v = np.linalg.inv(x.T @ x / n + np.eye(x.shape[1])) @ x.T @ prior / n
        self.v /= moments(x @ self.v)[1]
        known = y != -1
        rate = float(y[known].mean()) if known.any() else 0.5
        if expected_positives is not None:
            rate = expected_positives / classes
        rate = min(max(rate, 1e-4), 1 - 1e-4)
        base = math.log(rate / (1 - rate))
        theta = np.full(y.shape, -1.0) if estimates is None else array(estimates)
        told = theta >= 0
        alone = expected_positives is not None and bool((y == 1).any()) and not told.any()
        self.u = np.where(known, 1.0, np.where(told | alone, unknown_weight, 0.0))
        self.y = np.where(known, y, np.where(told, theta, 0.0))
        kappa = float((x * x).sum()) / n / spread**2
        self.start = np.array([0.0] * x.shape[1] * classes + [base] * classes + [1.0, 0.0])
        self.precision = np.array([kappa] * x.shape[1] * classes + [spread**-2] * classes + [1.0, 1.0])
        self.rows = self.design(g, f)
        self.theta, self.shift = self.minimum(), 0.0
        if expected_positives is not None:
            self.shift = self.move(rate)
        if alone:  # unknown labels are what the first minimum makes of them
            self.y = np.where(known, y, 1 / (1 + np.exp(-self.rows @ self.theta - self.shift)))
            self.theta = self.minimum()
            self.shift = self.move(rate)

    def move(self, rate: float) -> float:
        """What makes the mean probability of the images ``rate``."""
        found = self.rows @ self.theta
        return float(brentq(lambda move: float((1 / (1 + np.exp(-found - move))).mean()) - rate, -60, 60))

    def design(self, g: Any, f: Any) -> Array:
        """What each number of theta adds to each logit: (n, C, P)."""
        x = (array(f) - self.f_mean) / self.f_deviation @ self.root
        prior, carried = (array(g) - self.g_mean) / self.g_deviation, x @ self.v
        n, classes = prior.shape
        rows = np.zeros((n, classes, len(self.start)))
        for b, c in np.ndindex(n, classes):
            width = x.shape[1]
            rows[b, c, c * width : (c + 1) * width] = x[b]
            rows[b, c, classes * width + c] = 1.0
            rows[b, c, -2:] = prior[b, c], carried[b, c]
        return rows

    def logits(self, g: Any, f: Any) -> Array:
        found: Array = self.design(g, f) @ self.theta + self.shift
        return found

    def objective(self, theta: Array) -> float:
        logits = self.rows @ theta
        entries = np.logaddexp(0, logits) - self.y * logits
        return float((self.u * entries).sum() + 0.5 * self.precision @ (theta - self.start) ** 2)

    def gradient(self, theta: Array) -> Array:
        errors = self.u * (1 / (1 + np.exp(-self.rows @ theta)) - self.y)
        return np.einsum("bc,bcp->p", errors, self.rows) + self.precision * (theta - self.start)  # type: ignore[no-any-return]

    def minimum(self) -> Array:
        theta = self.start.copy()
        for _ in range(100):
            p = 1 / (1 + np.exp(-self.rows @ theta))
            hessian = np.einsum("bc,bcp,bcq->pq", self.u * p * (1 - p), self.rows, self.rows) + np.diag(self.precision)
            step = np.linalg.lstsq(hessian, self.gradient(theta), rcond=None)[0]
            while self.objective(theta - step) > self.objective(theta) + 1e-12:
                step = step / 2
            theta = theta - step
        assert np.abs(self.gradient(theta)).max() < 1e-8
        return theta


def moments(x: Array) -> tuple[Array, Array]:
    """Mean and deviation of columns; one that is constant has the deviation 1, and is zero once its mean is off."""
    mean = x.mean(axis=0)
    deviation = np.sqrt(((x - mean) ** 2).mean(axis=0))
    return mean, np.where(deviation > 1e-9 * (1 + np.abs(mean)), deviation, 1.0)
