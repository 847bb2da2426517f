"""GlobalHead: logits of whole images, out of a prior that needs no labels and what the tower has before its projection."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import Dims, check_estimates, check_expected_positives, check_finite, check_number
from ._distributed import Distributed, resolve_group, sum_over_ranks
from ._precision import full_precision, upcast
from ._state import FullPrecisionState
from .labels import UNKNOWN
from .training_free import GaussianDiscriminant

__all__ = ["GlobalHead"]

Batch: TypeAlias = "Sequence[Tensor | None]"
"""(tokens (B, N, D), penultimate (B, W), targets (B, C)), key_padding_mask (B, N) as a fourth, estimates (B, C) as a fifth."""


class GlobalHead(FullPrecisionState):
    r"""Logits of whole images: a prior without labels, carried over to the penultimate features, and a layer on these.

    .. math::
        \ell_c = \alpha \hat g_c + (\eta\, v_c + w_c) \cdot \hat f + b_c, \qquad
        \hat f = R_\rho^{-1/2} \tfrac{f - \bar f}{\sigma_f}, \qquad
        V = \big(\tfrac1n \hat F^\top \hat F + I\big)^{-1} \tfrac1n \hat F^\top \hat G

    g are the scores of a :class:`GaussianDiscriminant` and f the penultimate features, each standardised over the training
    images; :math:`R_\rho = (1 - \rho) R + \rho I` is their correlation matrix, shrunk. V, with columns scaled so that
    :math:`v_c \cdot \hat f` has deviation 1, is a ridge regression of the prior on f: what the class texts say of the images,
    seen by another view, without any label. The labels then choose

    .. math::
        \min_{w, b, \alpha, \eta} \sum_{bc} u_{bc}\, \mathrm{BCE}(\ell_{bc}, y_{bc})
        + \frac{\kappa}{2} \lVert w \rVert^2 + \sum_c \frac{(b_c - b_0)^2}{2 \tau^2} + \frac{(\alpha - 1)^2 + \eta^2}{2},
        \qquad \kappa = \frac{\mathrm{E} \lVert \hat f \rVert^2}{\tau^2}

    u is 1 where a label is known and 0 where it is not. So :math:`\tau` is how far the layer is expected to move a logit, and
    with few labels the prior is left: without any the logits are :math:`\hat g + b_0`.

    If present labels alone are known, unknown ones join with u = ``unknown_weight``. First they count as absent. Then the
    minimum is sought once more, with y what the first one makes of them, at the level that :meth:`fit` is told to expect.
    Estimates of another view can be given: then unknown labels join with these, and one minimum is enough.

    The minimum is found by L-BFGS on all images at once, in seconds for thousands of images; memory holds some 4 n W + 9 n C +
    12 C W numbers.

    It is no part of a training loop. :class:`TRMHead` merges it with the logits of a trained region head, and its
    :meth:`~TRMHead.finish` gives the estimates. :class:`trm_losses.pseudo.TeacherRule` is the other way round.

    Args:
        num_classes: C.
        width: W of the penultimate features; None: there are none.
        prior: a fitted classifier of tokens without labels; None: there is none. It is kept, frozen; its gradient passes to the
            tokens.
        spread: :math:`\tau`, in logits.
        shrinkage: :math:`\rho` from 0 (whitened; above 0 where there are more features than images) to 1 (standardised alone).
        unknown_weight: u of unknown labels, if present ones alone are known or estimates are given.
        distributed: False, True or a process group: :meth:`fit` takes the images of all ranks together.
        validate: check values for NaN and label values, and that :meth:`fit` came first (waits for the device).

    Attributes:
        scale: (C,), what multiplies g. weight: (C, W), what multiplies :math:`f - \bar f`. center: (W,), :math:`\bar f`.
        bias: (C,). mix: :math:`(\alpha, \eta)` as they were found. total: images it was fitted to.

    Shape:
        tokens (B, N, D), penultimate (B, W), key_padding_mask (B, N) bool with True at padding -> logits (B, C). What no view
        reads may be None. Scores (B, C) that the prior gave may stand for the tokens: it is then not asked again.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes, NaN, settings, each by name; neither view; present labels alone without
            what is expected of them. RuntimeError: logits before :meth:`fit`.

    Example:
        >>> import torch
        >>> tokens, penultimate, text = torch.randn(8, 9, 4), torch.randn(8, 6), torch.randn(2, 4)
        >>> targets = torch.tensor([[1, 0], [0, 1], [-1, 1], [1, -1]] * 2)
        >>> head = GlobalHead(2, 6, GaussianDiscriminant(2, 4).fit([tokens], text))
        >>> head.fit([(tokens, penultimate, targets)])(tokens, penultimate).shape
        torch.Size([8, 2])

    Reference: our choice. Merging a global with a local logit is known of the authors' configurations, not how either is made.
    """

    scale: Tensor
    weight: Tensor
    center: Tensor
    bias: Tensor
    mix: Tensor
    total: Tensor

    _class_axes = dict.fromkeys(("scale", "weight", "bias"), (0,))

    def __init__(
        self,
        num_classes: int,
        width: int | None = None,
        prior: GaussianDiscriminant | None = None,
        *,
        spread: float = 3.0,
        shrinkage: float = 1.0,
        unknown_weight: float = 0.3,
        distributed: Distributed = False,
        validate: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_number(name, "num_classes", num_classes, 1)
        if width is None and prior is None:
            raise ValueError(f"{name}: width or prior must be given, or there is nothing to tell images apart by")
        if width is not None:
            check_number(name, "width", width, 1)
        if prior is not None and prior.num_classes != num_classes:
            raise ValueError(f"{name}: prior must have num_classes = {num_classes}, got {prior.num_classes}")
        check_number(name, "spread", spread, 0, strict=True)
        check_number(name, "shrinkage", shrinkage, 0, 1)
        check_number(name, "unknown_weight", unknown_weight, 0, 1)
        self.num_classes, self.width, self.prior = num_classes, width, prior
        self.spread, self.shrinkage, self.unknown_weight = spread, shrinkage, unknown_weight
        self.distributed, self.validate = distributed, validate
        self.register_buffer("scale", torch.zeros(num_classes, device=device))
        self.register_buffer("weight", torch.zeros(num_classes, width or 0, device=device))
        self.register_buffer("center", torch.zeros(width or 0, device=device))
        self.register_buffer("bias", torch.zeros(num_classes, device=device))
        self.register_buffer("mix", torch.zeros(2, device=device))
        self.register_buffer("total", torch.zeros((), dtype=torch.int64, device=device))

    def fit(self, batches: Iterable[Batch], *, expected_positives: float | None = None) -> GlobalHead:
        r"""Find the weights anew from images and what is known of their labels; a refused call leaves the head as it was.

        Args:
            batches: (tokens, penultimate, targets), or with key_padding_mask as a fourth, or with estimates as a fifth, read
                once. An image seen in several ways, such as mirrored, is best given as the mean of its penultimate features.
                Estimates (B, C) are probabilities of the unknown labels; NaN or -1: none, and the entry is left out.
            expected_positives: mean number of present classes of an image, if nothing is known to be absent; probabilities
                are then at this level. None: b_0 stands for the share of present labels among the known ones.

        Returns:
            The module itself.
        """
        name = type(self).__name__
        rate = None
        if expected_positives is not None:
            check_expected_positives(name, expected_positives, self.num_classes)
            rate = expected_positives / self.num_classes
        group, device = resolve_group(self.distributed), self.bias.device
        with torch.inference_mode(False):  # whose tensors cannot be differentiated
            g, f, targets, estimates = self._read(batches)
        count = float(sum_over_ranks(torch.tensor(len(targets), device=device), group))
        if not count:
            raise ValueError(f"{name}: batches must hold at least one image, got none; a generator is read once")
        with full_precision(self.bias), torch.inference_mode(False), torch.enable_grad():
            prior, layer = (_Standard(values, count, group) for values in (g, f))
            root, energy = self._root(layer, count, group)
            x = layer.values if root is None else layer.values @ root
            carried = _carry(x, prior.values, count, group)
            known = targets != UNKNOWN
            told = (estimates != UNKNOWN) & ~known
            counts = torch.stack([torch.where(known, targets, 0.0).sum(), known.sum(), told.sum()])
            present, asked, estimated = sum_over_ranks(counts, group).tolist()
            if rate is None and 0 < asked == present and not estimated and asked < count * self.num_classes:
                raise ValueError(
                    f"{name}: targets must hold known absent labels, got {asked:.0f} present and 0 absent; give "
                    f"expected_positives, the mean number of present classes of an image"
                )
            # Present labels alone: all unknown ones join, as absent at first, and then as the first minimum has them.
            own_estimates = rate is not None and present > 0 and not estimated
            joins = ~known if own_estimates else told
            importance = torch.where(known, 1.0, self.unknown_weight * joins.to(targets))
            wanted = torch.where(known, targets, torch.where(told, estimates, 0.0))
            share = (present / asked if asked else 0.5) if rate is None else rate
            level = 0.0
            for _ in range(2 if own_estimates else 1):
                found, bias, mix = self._minimum(prior.values, x, carried, energy, wanted, importance, share, group)
                if rate is not None:
                    logits = mix[0] * prior.values + x @ found.T + bias
                    level = _shift(logits, rate, count, group)
                    if own_estimates:
                        wanted = torch.where(known, targets, torch.sigmoid(logits + level))
            bias = bias + level
        scale = mix[0] / prior.deviation
        found = (found if root is None else found @ root.T) / layer.deviation
        for buffer, value in (
            (self.scale, scale),
            (self.weight, found),
            (self.center, layer.mean),
            (self.bias, bias - scale * prior.mean),
            (self.mix, mix),
            (self.total, torch.tensor(int(count), device=device)),
        ):
            buffer.copy_(value)
        return self

    @torch.no_grad()
    def _read(self, batches: Iterable[Batch]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores of the prior (n, C), features (n, W), targets and estimates (n, C) of a stream; without a view it is zeros."""
        name, parts = type(self).__name__, []
        for batch in batches:
            if not isinstance(batch, tuple | list) or len(batch) not in (3, 4, 5):
                got = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
                raise ValueError(
                    f"{name}: a batch must be (tokens, penultimate, targets), or with key_padding_mask as a fourth, "
                    f"or with estimates as a fifth, got {got}"
                )
            tokens, penultimate, targets, padding, estimates = (*batch, None, None)[:5]
            dims = Dims(name, C=self.num_classes)
            dims.check("targets", targets, "B C", floating=False)
            assert targets is not None
            targets = dims.targets(targets, "B C", validate=self.validate).float()
            if estimates is None:
                estimates = torch.full_like(targets, float(UNKNOWN))
            else:
                dims.check("estimates", estimates, "B C")
                estimates = check_estimates(name, estimates, validate=self.validate)
            parts.append((*self._views(dims, tokens, penultimate, padding), targets, estimates))
        if not parts:
            none = self.bias.new_zeros(0, self.num_classes)
            parts.append((none, none.new_zeros(0, self.width or 0), none, none))
        g, f, targets, estimates = map(torch.cat, zip(*parts, strict=True))
        return g, f, targets, estimates

    def _views(
        self, dims: Dims, tokens: Tensor | None, penultimate: Tensor | None, padding: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Scores of the prior (B, C) and features (B, W), float32; zeros where a view is not there."""
        if self.prior is not None and tokens is None:
            raise ValueError(f"{dims.owner}: tokens must be given where there is a prior, got None")
        scored = isinstance(tokens, Tensor) and tokens.ndim == 2
        if tokens is not None:
            hint = "tokens are (B, N, D), and scores that the prior gave them (B, C)"
            dims.check("tokens", tokens, "B C" if scored else "B N D", hint=hint)
            if scored and padding is not None:
                raise ValueError(f"{dims.owner}: key_padding_mask must be None beside scores of the prior, which hold it already")
            if scored and self.validate:
                check_finite(dims.owner, "tokens", tokens)
        if self.width is None:
            f = self.bias.new_zeros(dims.sizes["B"], 0)
        else:
            hint = "backbones give it, and so do features written with it"
            if penultimate is None:
                raise ValueError(f"{dims.owner}: penultimate must be given where there is a width, got None; {hint}")
            dims.sizes["W"] = self.width
            dims.check("penultimate", penultimate, "B W", hint=hint)
            if self.validate:
                check_finite(dims.owner, "penultimate", penultimate)
            f = upcast(penultimate).float()
        if self.prior is None or tokens is None:
            return self.bias.new_zeros(dims.sizes["B"], self.num_classes), f
        return (tokens if scored else self.prior(tokens, key_padding_mask=padding)).float(), f

    def _root(self, layer: _Standard, count: float, group: torch.distributed.ProcessGroup | None) -> tuple[Tensor | None, Tensor]:
        """The inverse root of the shrunk correlations (W, W), or None for the identity; and E|f|² behind it."""
        x = layer.values
        correlation = _joined(x.T @ x, group) / count
        if self.shrinkage == 1:
            return None, correlation.trace().to(x)
        shrunk = (1 - self.shrinkage) * correlation
        shrunk.diagonal().add_(max(self.shrinkage, 1e-6))
        values, vectors = torch.linalg.eigh(shrunk)
        root = (vectors * values.rsqrt()) @ vectors.T
        return root.to(x), (root @ correlation @ root).trace().to(x)

    def _minimum(
        self,
        g: Tensor,
        x: Tensor,
        carried: Tensor,
        energy: Tensor,
        wanted: Tensor,
        importance: Tensor,
        rate: float,
        group: torch.distributed.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """eta v + w (C, W), b (C,) and the mix (alpha, eta), by L-BFGS over the images of all ranks."""
        rate = min(max(rate, 1e-4), 1 - 1e-4)
        base = math.log(rate / (1 - rate))
        h = x @ carried.T
        weight = torch.zeros_like(carried, requires_grad=True)
        bias = x.new_full((self.num_classes,), base, requires_grad=True)
        mix = x.new_tensor([1.0, 0.0], requires_grad=True)
        parameters = [weight, bias, mix]
        decay = energy / self.spread**2
        optimizer = torch.optim.LBFGS(
            parameters, max_iter=100, history_size=10, tolerance_change=1e-6, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            logits = mix[0] * g + mix[1] * h + x @ weight.T + bias
            loss = F.binary_cross_entropy_with_logits(logits, wanted, importance, reduction="sum")
            apart = torch.stack([mix[0] - 1, mix[1]]).square().sum() / 2  # the penalty is the same on every rank
            penalty = decay / 2 * weight.square().sum() + (bias - base).square().sum() / (2 * self.spread**2) + apart
            gradients = (torch.autograd.grad(value, parameters) for value in (loss, penalty))
            for parameter, own, same in zip(parameters, *gradients, strict=True):
                parameter.grad = sum_over_ranks(own, group) + same
            return sum_over_ranks(loss.detach(), group) + penalty.detach()

        optimizer.step(closure)
        return mix[1].detach() * carried + weight.detach(), bias.detach(), mix.detach()

    def forward(
        self, tokens: Tensor | None, penultimate: Tensor | None = None, *, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Logits (B, C)."""
        if self.validate and not torch.compiler.is_compiling() and not self.total:
            raise RuntimeError(f"{type(self).__name__}: nothing was fitted yet; call fit(batches), or load a state, first")
        with full_precision(self.bias):
            dims = Dims(type(self).__name__, C=self.num_classes)
            g, f = self._views(dims, tokens, penultimate, key_padding_mask)
            return self.scale * g + (f - self.center) @ self.weight.T + self.bias

    @torch.no_grad()
    def with_classes(self, keep: Sequence[int | None], *, text: Tensor | None = None) -> GlobalHead:
        """A head of its own for another set of classes: a new one has its prior, on the mean scale, and no layer.

        Args:
            keep: for each class of the new set its place in this one, or None for a new class.
            text: (C, D) texts of the new set for the prior's new classes.

        Raises:
            ValueError: places that are none, new classes without a text, or without a prior to know them by.
        """
        new = torch.tensor([place is None for place in keep], device=self.bias.device)
        if self.prior is None and bool(new.any()):
            raise ValueError(f"{type(self).__name__}: keep must name trained classes where there is no prior, got a new one")
        made = self._keep_classes(keep)
        made.prior = None if self.prior is None else self.prior.with_classes(keep, text=text)
        made.scale.copy_(torch.where(new, self.scale.mean(), made.scale))
        made.bias.copy_(torch.where(new, self.bias.mean(), made.bias))
        return made


class _Standard:
    """Values (n, K) standardised in place over the rows of all ranks; a constant column is zeros."""

    def __init__(self, values: Tensor, count: float, group: torch.distributed.ProcessGroup | None) -> None:
        size = _joined(_squares(values), group) / count
        self.mean = (_joined(values.sum(dim=0), group) / count).to(values)
        values -= self.mean
        square = _joined(_squares(values), group) / count
        constant = square <= 1e-10 * size
        self.deviation = torch.where(constant, 1.0, square.sqrt()).to(values)
        values /= self.deviation
        self.values = values.masked_fill_(constant.to(values.device), 0.0)


def _squares(values: Tensor) -> Tensor:
    """(K,) sums of squares of the columns, some at a time: the squares of all may be gigabytes."""
    return torch.cat([part.square().sum(dim=0) for part in values.split(256, dim=1)])


def _joined(value: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
    """The sum over ranks, in float64 on the CPU: not every device has it."""
    return sum_over_ranks(value, group).cpu().double()


def _carry(x: Tensor, g: Tensor, count: float, group: torch.distributed.ProcessGroup | None) -> Tensor:
    """V (C, W): the ridge regression of the prior on the features, whose answers have deviation 1."""
    moments = _joined(torch.cat([x, g], dim=1).T @ x, group) / count
    inner, cross = moments[: x.shape[1]], moments[x.shape[1] :]
    carried = torch.linalg.solve(inner + torch.eye(len(inner), dtype=inner.dtype, device=inner.device), cross.T).T
    size = ((carried @ inner) * carried).sum(dim=1, keepdim=True).sqrt()
    return torch.where(size > 1e-9, carried / size.clamp(min=1e-9), 0.0).to(x)


def _shift(logits: Tensor, rate: float, count: float, group: torch.distributed.ProcessGroup | None) -> float:
    """What makes the mean probability of logits (n, C) ``rate``, by bisection."""
    low, high = -30.0, 30.0
    for _ in range(40):
        middle = (low + high) / 2
        total = sum_over_ranks(torch.sigmoid(logits + middle).sum(), group)
        low, high = (middle, high) if float(total) < rate * count * logits.shape[1] else (low, middle)
    return low
