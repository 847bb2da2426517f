"""Probabilities out of known labels: logits are scaled and shifted until they say how often they are right."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import Dims, check_expected_positives, check_finite, check_number, check_targets, signed
from ._precision import full_precision, upcast
from ._state import FullPrecisionState
from .labels import UNKNOWN

# Known present and known absent labels that a class needs for numbers of its own.
LEAST = 5

# Numbers that are worked on at a time: their temporaries stay in the processor's cache.
_BLOCK = 1 << 15


class Calibration(FullPrecisionState):
    r"""Logits whose sigmoid is a probability: a scale and a shift for each class, found from known labels.

    .. math::
        \hat\ell_{bc} = a_c\, \ell_{bc} + s_c, \qquad a_c > 0

    A class keeps the order of its images, and so its average precision. Before :meth:`fit` nothing is changed.

    **With known absent labels.** Logits are standardised over known entries, :math:`x = (\ell - m) / d`. One scale and shift for
    all classes come first, then those of each class, held near them:

    .. math::
        \min_{a, s} \sum_{bc\ \mathrm{known}} \mathrm{BCE}(a x_{bc} + s, y_{bc}) + \tfrac{1}{\tau_a^2} h(a / a_0)
        + \frac{(s - s_0)^2}{2 \tau_s^2}, \qquad h(r) = r - 1 - \log r

    h is :math:`\frac12 (\log r)^2` near r = 1, it keeps the scale positive, and the whole is convex: Newton's method finds the
    minimum. For all classes together :math:`a_0 = 1, s_0 = 0, \tau_a = 3, \tau_s = 10`, which bounds the scale where a logit
    separates the labels. For a class :math:`a_0, s_0` are the pooled ones. How far classes lie apart is found from the data by
    ten rounds of expectation maximisation, from :math:`\tau_a = 0.3, \tau_s = 1`, which also count as one class more:

    .. math::
        \tau_a^2 = \frac{0.3^2 + \sum_c \big(\log^2 (a_c / a_0) + v^a_c\big)}{1 + C'}, \qquad
        \tau_s^2 = \frac{1 + \sum_c \big((s_c - s_0)^2 + v^s_c\big)}{1 + C'}

    v are the variances by the curvature at the minimum. A class with fewer than five known present or five known absent labels is
    not among the :math:`C'`, and takes the pooled numbers.

    **With single positives** no absent label is known, and one scale and shift serve all classes. The shift makes the mean
    probability over all entries ``expected_positives`` / C. The scale is the likeliest, given that each image lists one of its
    present classes, each as likely as the others. With independent :math:`p_{bc}`:

    .. math::
        P(k\ \mathrm{listed}) = \frac{\int_0^1 p_k \prod_{c \ne k} (1 - p_c + p_c t)\, dt}{1 - \prod_c (1 - p_c)}

    16 Gauss-Legendre points give the integral, exactly for up to 32 classes. Of an image with several listed classes each
    counts by one over their number. h of the scale, with :math:`\tau_a = 3`, bounds it here too.

    Args:
        num_classes: C.
        validate: check logits for NaN (waits for the device); :meth:`fit` always does.

    Attributes:
        scale, shift: (C,), a and s. pooled: (2,), scale and shift of a class that nothing is known of.

    Shape:
        logits (B, C) -> logits (B, C), in float32 for half precision.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes, NaN, settings, each by name.

    Example:
        >>> import torch
        >>> probability = torch.arange(0.05, 1, 0.1).repeat_interleave(20)[:, None]  # ten values, twenty images each
        >>> targets = (torch.arange(0.025, 1, 0.05).repeat(10)[:, None] < probability).long()  # as many as it says are present
        >>> calibration = Calibration(1).fit(torch.logit(probability) / 3, targets)  # logits that are too small
        >>> round(calibration.scale.item(), 1)
        3.0

    Reference: a scale and shift of logits are Platt's (1999), one scale for all is the temperature of Guo et al. (ICML 2017). The
    priors, what classes borrow from each other and the likelihood of single positives are our choice.
    """

    scale: Tensor
    shift: Tensor
    pooled: Tensor

    _class_axes = dict.fromkeys(("scale", "shift"), (0,))

    def __init__(self, num_classes: int, *, validate: bool = True, device: torch.device | str | None = None) -> None:
        super().__init__()
        check_number(type(self).__name__, "num_classes", num_classes, 1)
        self.num_classes, self.validate = num_classes, validate
        self.register_buffer("scale", torch.ones(num_classes, device=device))
        self.register_buffer("shift", torch.zeros(num_classes, device=device))
        self.register_buffer("pooled", torch.tensor([1.0, 0.0], device=device))

    def forward(self, logits: Tensor) -> Tensor:
        """Logits (B, C)."""
        name = type(self).__name__
        Dims(name, C=self.num_classes).check("logits", logits, "B C")
        if self.validate:
            check_finite(name, "logits", logits)
        with full_precision(self.scale):
            return upcast(logits) * self.scale + self.shift

    @torch.no_grad()
    def fit(self, logits: Tensor, targets: Tensor, *, expected_positives: float | None = None) -> Calibration:
        """Find scale and shift anew from images that training did not see; a refused call leaves them as they were.

        Known entries must be a fair draw of all entries, such as labels hidden at random. Logits of unknown entries change
        nothing, unless there are single positives, whose rate is over all entries.

        Args:
            logits: (B, C), not calibrated.
            targets: (B, C), 1 present, 0 absent, -1 unknown.
            expected_positives: mean number of present classes of an image, for single positives alone.

        Returns:
            The module itself.

        Raises:
            ValueError: soft labels; logits that are not finite; nothing known; no known present label; no known absent label
                and no ``expected_positives``, or both.
        """
        name = type(self).__name__
        dims = Dims(name, C=self.num_classes)
        dims.check("logits", logits, "B C")
        dims.check("targets", targets, "B C", floating=False)
        y = check_targets(name, signed(targets), soft=False).cpu()
        values = logits.cpu()
        check_finite(name, "logits", values, "")
        if expected_positives is not None:
            check_expected_positives(name, expected_positives, self.num_classes)
        present, absent = int((y == 1).sum()), int((y == 0).sum())
        if not present:
            raise ValueError(f"{name}: targets must hold known present labels, got {present} present and {absent} absent")
        if absent and expected_positives is not None:
            raise ValueError(
                f"{name}: expected_positives is for targets without a known absent label, got {absent} absent; leave it out"
            )
        if not absent and expected_positives is None:
            raise ValueError(
                f"{name}: targets must hold known absent labels, got {present} present and 0 absent; give expected_positives, "
                "the mean number of present classes of an image"
            )
        with torch.device("cpu"):
            if expected_positives is None:
                scale, shift, pooled = _platt(values, y)
            else:
                pooled = _single_positives(values, y, expected_positives / self.num_classes)
                scale, shift = pooled.expand(self.num_classes, 2).unbind(dim=1)
        found = [part.float() for part in (scale, shift, pooled)]
        if not all(bool(torch.isfinite(part).all()) for part in found) or float(found[0].min()) < torch.finfo(torch.float32).tiny:
            raise ValueError(f"{name}: logits must be of a size that float32 holds, got up to {float(values.abs().max()):g}")
        for buffer, value in zip((self.scale, self.shift, self.pooled), found, strict=True):
            buffer.copy_(value)
        return self

    @torch.no_grad()
    def with_classes(self, keep: Sequence[int | None]) -> Calibration:
        """A calibration for another set of classes: those that stay keep their numbers, a new one takes the pooled ones.

        Args:
            keep: for each class of the new set its place in this one, or None for a new class.
        """
        made = self._keep_classes(keep)
        new = torch.tensor([place is None for place in keep], device=self.scale.device)
        made.scale.copy_(torch.where(new, self.pooled[0], made.scale))
        made.shift.copy_(torch.where(new, self.pooled[1], made.shift))
        return made


def _standard(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation, which is 1 of what is constant; the values are standardised in place."""
    mean, size = values.mean(), torch.maximum(values.max(), -values.min()).clamp(min=1e-300)
    apart = values.sub_(mean)
    deviation = (apart / size).square_().mean().sqrt() * size
    deviation = torch.where(deviation > 1e-9 * size, deviation, 1.0)
    apart.div_(deviation)
    return mean, deviation


def _platt(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales (C,), shifts (C,) and the pooled two (2,) from the known entries, each of which is a number in a flat list."""
    classes = logits.shape[1]
    count = torch.stack([(y == label).sum(dim=0) for label in (0, 1)])
    known = (y != UNKNOWN).flatten().nonzero().flatten()
    x, y, group = logits.flatten()[known].double(), y.flatten()[known] == 1, (known % classes).int()
    del known
    mean, deviation = _standard(x)
    start = torch.tensor([[1.0, 0.0]], dtype=x.dtype)
    pooled, _ = _minimum(x, y, torch.zeros_like(group), start, start[0], torch.tensor([3.0, 10.0], dtype=x.dtype))
    found = pooled.repeat(classes, 1)
    own = (count >= LEAST).all(dim=0)
    if bool(own.any()):
        if not bool(own.all()):
            entries = own[group]
            x, y, group = x[entries], y[entries], (own.cumsum(dim=0, dtype=torch.int32) - 1)[group[entries]]
        theta, first = found[own], torch.tensor([0.3, 1.0], dtype=x.dtype)
        spread = first
        for _ in range(10):
            theta, variance = _minimum(x, y, group, theta, pooled[0], spread)
            apart = torch.stack([(theta[:, 0] / pooled[0, 0]).log(), theta[:, 1] - pooled[0, 1]], dim=1)
            spread = ((first.square() + (apart.square() + variance).sum(dim=0)) / (1 + len(theta))).sqrt()
        found[own] = theta
    both = torch.cat([found, pooled])
    scale = both[:, 0] / deviation
    shift = both[:, 1] - scale * mean
    return scale[:-1], shift[:-1], torch.stack([scale[-1], shift[-1]])


def _minimum(x: Tensor, y: Tensor, group: Tensor, start: Tensor, centre: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift (G, 2) of each group of entries by Newton's method, and the variances of log scale and shift (G, 2).

    Args:
        x, y, group: of the entries, flat; y bool.
        start: (G, 2). centre, spread: (2,), the prior's; of the scale the spread of its log.
    """
    tight = spread.pow(-2)

    def derived(theta: Tensor) -> Tensor:
        """Value, gradient by scale and shift, curvature by both, each and each other: (6, G). Infinite at no scale."""
        a, s = theta[:, 0].clamp(min=1e-300), theta[:, 1]
        ratio, found = a / centre[0], torch.zeros(6, len(a), dtype=a.dtype)
        for v, t, g in zip(*(entries.split(_BLOCK) for entries in (x, y, group)), strict=True):
            z = a.index_select(0, g) * v + s.index_select(0, g)
            p = torch.sigmoid(z)
            w, wrong = p * (1 - p), p - t.to(p)
            parts = (F.softplus(z) - t * z, wrong * v, wrong, w * v * v, w, w * v)
            for row, part in zip(found, parts, strict=True):
                row.index_add_(0, g, part)  # half the time of bincount
        found[0] += tight[0] * (ratio - 1 - ratio.log()) + tight[1] / 2 * (s - centre[1]).square()
        found[1] += tight[0] * (1 / centre[0] - 1 / a)
        found[2] += tight[1] * (s - centre[1])
        found[3] += tight[0] / a.square()
        found[4] += tight[1]
        found[0].masked_fill_(theta[:, 0] <= 0, torch.inf)
        return found

    theta, at = start, derived(start)
    for _ in range(100):
        value, by_a, by_s, aa, ss, mixed = at
        determinant = aa * ss - mixed.square()
        step = torch.stack([ss * by_a - mixed * by_s, aa * by_s - mixed * by_a], dim=1) / determinant[:, None]
        if (step[:, 0] * by_a + step[:, 1] * by_s).max() < 1e-12:
            break
        length = torch.ones_like(value)
        for _ in range(60):
            tried = theta - length[:, None] * step
            there = derived(tried)
            worse = there[0] > value + 1e-12 * value.abs()
            if not bool(worse.any()):
                break
            length = torch.where(worse, length / 2, length)
        theta, at = torch.where(worse[:, None], theta, tried), torch.where(worse, at, there)
    return theta, torch.stack([ss / determinant / theta[:, 0].square(), aa / determinant], dim=1)


def _single_positives(logits: Tensor, y: Tensor, rate: float) -> Tensor:
    """The pooled scale and shift (2,): the likeliest scale whose shift leads to this rate."""
    x = logits.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    mean, deviation = _standard(x)
    listed = y == 1
    rows = listed.any(dim=1)
    told, listed = x[rows], listed[rows]
    nodes, weights = _gauss_legendre(16)
    shift = math.log(rate / (1 - rate))

    def objective(log_scale: float) -> float:
        nonlocal shift
        a = math.exp(log_scale)
        shift = _shift(x, a, rate, shift)
        total = 0.0
        step = max(1, 4 * _BLOCK // (x.shape[1] * len(nodes)))
        for part, chosen in zip(told.split(step), listed.split(step), strict=True):
            p = torch.sigmoid(a * part + shift)
            factors = 1 - p[..., None] * (1 - nodes)
            product = factors.prod(dim=1)
            row, column = chosen.nonzero(as_tuple=True)
            mass = p[row, column] * (weights * product[row] / factors[row, column]).sum(dim=1)
            some = 1 - (1 - p).prod(dim=1)
            tiny = torch.finfo(x.dtype).tiny
            share = (mass.clamp(min=tiny) / some.clamp(min=tiny)[row]).log() / chosen.sum(dim=1)[row]
            total -= float(share.sum())
        return total + (a - 1 - log_scale) / 9

    scale = math.exp(_golden(objective, -5.0, 5.0))
    shift = _shift(x, scale, rate, shift)
    a = scale / float(deviation)
    return torch.tensor([a, shift - a * float(mean)], dtype=x.dtype)


def _shift(x: Tensor, scale: float, rate: float, start: float) -> float:
    """What added to the scaled values makes the mean probability the rate: Newton's method inside a bracket."""
    wanted = math.log(rate / (1 - rate))
    low, high = wanted - scale * float(x.max()), wanted - scale * float(x.min())
    shift = min(max(start, low), high)
    for _ in range(100):
        mean, slope = 0.0, 0.0
        for part in x.view(-1).split(_BLOCK):
            p = torch.sigmoid(scale * part + shift)
            mean, slope = mean + float(p.sum()) / x.numel(), slope + float((p * (1 - p)).sum()) / x.numel()
        apart = mean - rate
        low, high = (low, shift) if apart > 0 else (shift, high)
        if abs(apart) < 1e-12 * rate or high - low < 1e-12:
            break
        tried = shift - apart / slope if slope > 0 else low
        shift = tried if low < tried < high else (low + high) / 2
    return shift


def _golden(objective: Callable[[float], float], low: float, high: float) -> float:
    """Where a function of one number is least, by golden section, to some 1e-5."""
    share = (math.sqrt(5) - 1) / 2
    left, right = high - share * (high - low), low + share * (high - low)
    at_left, at_right = objective(left), objective(right)
    while high - low > 1e-5:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - share * (high - low)
            at_left = objective(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + share * (high - low)
            at_right = objective(right)
    return (low + high) / 2


def _gauss_legendre(points: int) -> tuple[Tensor, Tensor]:
    """Points and weights on [0, 1] by the eigenvalues of the Jacobi matrix (Golub and Welsch)."""
    k = torch.arange(1, points, dtype=torch.float64)
    side = k / (4 * k * k - 1).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(side, 1) + torch.diag(side, -1))
    return (values + 1) / 2, vectors[0].square()
