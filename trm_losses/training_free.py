"""GaussianDiscriminant: a classifier of tokens built from class texts and unlabelled images, without training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from . import functional as TF
from ._checks import Dims, check_finite, check_number, check_numbers
from ._distributed import Distributed, resolve_group, sum_over_ranks
from ._precision import full_precision, unit
from ._state import FullPrecisionState
from ._token_stream import TokenStream
from .regions import class_chunk

Batch: TypeAlias = "Tensor | Sequence[Tensor | None]"
"""Tokens (B, N, D), or (tokens, targets) or (tokens, targets, key_padding_mask), of which the last two may be None."""


class GaussianDiscriminant(FullPrecisionState):
    r"""A training-free classifier: class texts pick the tokens, the tokens make the prototypes, a covariance whitens both.

    .. math::
        P_n &= \mathrm{softmax}_C(s\,\hat x_n \cdot \hat t_c),\quad
        \mu_c = \frac{\sum_{n \in K_c} P_{nc}\hat x_n + \lambda \sum_{b \in Y_c} \hat z_{bc}}
            {\sum_{n \in K_c} P_{nc} + \lambda |Y_c|},\quad
        \Sigma = \frac{S_K + |Y|\,T}{|K| + |Y|} \\
        A &= \big((1-\rho)\Sigma + \rho\,\tfrac{\mathrm{tr}\,\Sigma}{D} I\big)^{-1/2},\quad
        \cos_{nc} = \cos\big(A(\hat x_n - m), A(\mu_c - m)\big),\quad
        \mathrm{score}_c = \sum_n \mathrm{softmax}_N(\kappa \cos_{nc}) \cos_{nc}

    :math:`K_c` are the k tokens of the stream with the smallest entropy of P among those whose largest entry is c,
    :math:`S_K` is their scatter around the prototypes, m the mean of all tokens. Without labels that is all: Y is empty.

    Known labels join. A token that points to a class which its image is known not to show is not kept. An image that is known to
    show c (:math:`b \in Y_c`) says where to look: its tokens, averaged by their :math:`P_{nc}`, give a region z, which counts as
    :math:`\lambda` kept tokens. Regions hold background, so each such label moves the covariance towards T, that of all tokens.

    The stream is read once, in chunks: memory holds k tokens a class and some matrices (C, D) and (D, D), whatever the number
    of images. A class that no token points to has its text for a prototype (``count`` is 0), and tokens without any spread are
    not whitened. One class alone has no entropy: its most similar tokens are kept. The state is float32 in buffers.

    Args:
        num_classes, dim: C, D.
        tokens_per_class: k.
        scale: s, on the cosines of tokens and texts.
        shrinkage: :math:`\rho`, above 0, so that any number of tokens gives a covariance that can be inverted.
        sharpness: :math:`\kappa`, of the mean over tokens.
        label_weight: :math:`\lambda`.
        distributed: False, True or a process group: :meth:`fit` reads the streams of all ranks as one.
        validate: check values for NaN and label values, and that :meth:`fit` came first (waits for the device).

    Attributes:
        prototypes: (C, D), :math:`\mu`. mean: (D,), m. whitening: (D, D), A. count: (C,) tokens and labels that each prototype
        is made of. total: tokens in the stream.

    Shape:
        tokens (B, N, D), key_padding_mask (B, N) bool with True at padding -> scores (B, C), from -1 to 1. They rank images; no
        level stands for present.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes, NaN, settings, each by name. RuntimeError: scores before :meth:`fit`.

    Example:
        >>> import torch
        >>> text, stream = torch.eye(2, 3), [torch.eye(3).expand(4, 3, 3)]
        >>> classifier = GaussianDiscriminant(2, 3).fit(stream, text)
        >>> classifier(torch.tensor([[[1., 0., 0.]], [[0., 1., 0.]]])).argmax(dim=1).tolist(), classifier.count.tolist()
        ([0, 1], [8, 4])

    Reference: a Gaussian discriminant from the least doubtful tokens is PIAA's (Wang et al., ICML 2026). The cosine of whitened
    vectors in place of the discriminant, softmax over tokens, shrinkage and what labels do are our choice.
    """

    prototypes: Tensor
    mean: Tensor
    whitening: Tensor
    count: Tensor
    total: Tensor

    _class_axes = dict.fromkeys(("prototypes", "count"), (0,))

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        tokens_per_class: int = 100,
        scale: float = 20.0,
        shrinkage: float = 0.1,
        sharpness: float = 4.0,
        label_weight: float = 10.0,
        distributed: Distributed = False,
        validate: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_numbers(name, 1, num_classes=num_classes, dim=dim, tokens_per_class=tokens_per_class)
        check_number(name, "scale", scale, 0, strict=True)
        check_number(name, "shrinkage", shrinkage, 0, 1, strict=True)
        check_numbers(name, 0, sharpness=sharpness, label_weight=label_weight)
        self.num_classes, self.dim, self.tokens_per_class = num_classes, dim, tokens_per_class
        self.scale, self.shrinkage, self.sharpness, self.label_weight = scale, shrinkage, sharpness, label_weight
        self.distributed, self.validate = distributed, validate
        self.register_buffer("prototypes", torch.zeros(num_classes, dim, device=device))
        self.register_buffer("mean", torch.zeros(dim, device=device))
        self.register_buffer("whitening", torch.zeros(dim, dim, device=device))
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64, device=device))
        self.register_buffer("total", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def fit(self, batches: Iterable[Batch], text: Tensor) -> GaussianDiscriminant:
        """Build the classifier anew from a stream of tokens; a refused one leaves it as it was.

        Args:
            batches: tokens (B, N, D), or (tokens, targets), or (tokens, targets, key_padding_mask), of any numbers of images and
                tokens, read once. Targets (B, C): 1 present, 0 absent, all others say nothing; every batch has them or none.
            text: (C, D) class texts.

        Returns:
            The module itself.
        """
        dims = Dims(type(self).__name__, C=self.num_classes, D=self.dim)
        dims.check("text", text, "C D", hint="text and tokens share the width D of the joint space")
        if self.validate:
            check_finite(dims.owner, "text", text)
        with full_precision(text):
            found = TokenStream(unit(text), self.tokens_per_class, self.scale)
            for batch in batches:
                found.add(*self._checked(batch, text.device))
            self._build(found, resolve_group(self.distributed))
        return self

    def _checked(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Tokens, with zeros under the padding, targets and padding."""
        name = type(self).__name__
        parts = [batch] if isinstance(batch, Tensor) else list(batch) if isinstance(batch, tuple | list) else []
        if not 1 <= len(parts) <= 3:
            got = f"{len(parts)} parts" if parts else type(batch).__name__
            raise ValueError(
                f"{name}: a batch must be tokens (B, N, D), (tokens, targets) or (tokens, targets, key_padding_mask), got {got}"
            )
        tokens, targets, padding = (*parts, None, None)[:3]
        dims = Dims(name, C=self.num_classes, D=self.dim)
        dims.device = device
        dims.check("tokens", tokens, "B N D", hint="batches is a list or stream of such tensors: pass [tokens] if there is one")
        assert tokens is not None
        tokens = dims.without_padding(tokens, padding)
        if targets is not None:
            targets = dims.targets(targets, "B C", validate=self.validate)
        if self.validate:
            check_finite(name, "tokens", tokens)
        return tokens, targets, padding

    def _build(self, found: TokenStream, group: torch.distributed.ProcessGroup | None) -> None:
        """Prototypes, mean and whitening, in float64 on the CPU: the sums of ranks are those of one process then."""
        device, text = found.text.device, found.text.cpu().double()

        def joined(value: Tensor) -> Tensor:
            return value if group is None else sum_over_ranks(value.to(device), group).cpu()

        kept = found.kept(group)
        sums, mass = map(torch.cat, zip(*(TF.class_sums(x.transpose(0, 1), w.T) for _, x, w in found.chunks(kept)), strict=True))
        sums, mass, labels, label_sums = joined(sums), joined(mass), joined(found.labels), joined(found.label_sums)
        total, number = joined(found.total), joined(found.number)
        if not number:
            raise ValueError(f"{type(self).__name__}: batches must hold at least one token, got none; a generator is read once")
        mean, kept_count = total / number, joined(kept.sum(dim=1).cpu())
        mass = mass + self.label_weight * labels
        some = mass > 0
        prototypes = (sums + self.label_weight * label_sums) / torch.where(some, mass, 1.0)[:, None]
        prototypes = torch.where(some[:, None], prototypes, text)
        scatter = text.new_zeros(self.dim, self.dim)
        for part, x, w in found.chunks(kept):
            apart = (x - prototypes[part, None])[w > 0]
            scatter += apart.T @ apart
        covariance = joined(scatter)
        if labels.any():
            covariance += labels.sum() * (joined(found.square) / number - torch.outer(mean, mean))
        covariance /= (kept_count.sum() + labels.sum()).clamp(min=1)
        for buffer, value in (
            (self.prototypes, prototypes),
            (self.mean, mean),
            (self.whitening, _inverse_root(covariance, self.shrinkage)),
            (self.count, kept_count + labels.long()),
            (self.total, number),
        ):
            buffer.copy_(value)

    @torch.no_grad()
    def with_classes(self, keep: Sequence[int | None], *, text: Tensor | None = None) -> GaussianDiscriminant:
        """A classifier of its own for another set of classes: those that stay keep their prototypes, a new one has its text.

        Args:
            keep: for each class of the new set its place in this one, or None for a new class.
            text: (C, D) texts of the new set, of which the rows of new classes are read; may be left out without any.

        Example:
            >>> import torch
            >>> classifier = GaussianDiscriminant(2, 3).fit([torch.eye(3).expand(4, 3, 3)], torch.eye(2, 3))
            >>> classifier.with_classes([1, None], text=torch.eye(3)[1:]).count.tolist()
            [4, 0]
        """
        made = self._keep_classes(keep)
        new = torch.tensor([place is None for place in keep], device=made.prototypes.device)
        if text is None:
            if bool(new.any()):
                raise ValueError(f"{type(self).__name__}: text must be given for new classes; pass text (C, D) of the new set")
            return made
        dims = Dims(type(self).__name__, C=made.num_classes, D=self.dim)
        dims.check("text", text, "C D")
        read = torch.where(new.to(text.device)[:, None], text, 0.0)
        check_finite(dims.owner, "text", read)
        made.prototypes.copy_(torch.where(new[:, None], unit(read).to(made.prototypes), made.prototypes))
        return made

    def whiten(self, tokens: Tensor) -> Tensor:
        """Unit tokens (..., D) less the mean of all, whitened: where prototypes differ and tokens of a class do not."""
        self._check_fitted()
        with full_precision(tokens):
            x = unit(tokens)
            return (x - self.mean.to(x)) @ self.whitening.to(x)

    @property
    def whitened_text(self) -> Tensor:
        """(C, D) prototypes less the mean of all tokens, whitened: what stands for the class texts among whitened tokens."""
        self._check_fitted()
        with full_precision(self.mean):
            return (self.prototypes - self.mean) @ self.whitening

    def forward(self, tokens: Tensor, *, key_padding_mask: Tensor | None = None, chunk: int | None = None) -> Tensor:
        """Scores (B, C) of tokens (B, N, D); an image of padding alone has zeros.

        Many classes go through in chunks, of ``chunk`` classes or as many as :func:`trm_losses.regions.class_chunk` says;
        compiled code and gradients take all. The scores are the same.
        """
        dims = Dims(type(self).__name__, D=self.dim)
        dims.check("tokens", tokens, "B N D")
        tokens = dims.without_padding(tokens, key_padding_mask)
        if self.validate:
            check_finite(dims.owner, "tokens", tokens)
        if chunk is None:
            whole = torch.compiler.is_compiling() or torch.is_grad_enabled()
            chunk = self.num_classes if whole else class_chunk(tokens.shape[0], self.num_classes, tokens.shape[1], self.dim)
        check_number(dims.owner, "chunk", chunk, 1)
        with full_precision(tokens):
            x, directions = unit(self.whiten(tokens)), unit(self.whitened_text)
            scores = []
            for own in directions.to(x).split(chunk):
                cosines = x @ own.T
                weight = self.sharpness * cosines
                if key_padding_mask is not None:
                    cosines = cosines.masked_fill(key_padding_mask[..., None], 0.0)
                    weight = weight.masked_fill(key_padding_mask[..., None], torch.finfo(weight.dtype).min)
                scores.append((torch.softmax(weight, dim=1) * cosines).sum(dim=1))
            return torch.cat(scores, dim=1)

    def _check_fitted(self) -> None:
        if self.validate and not torch.compiler.is_compiling() and not self.total:
            raise RuntimeError(f"{type(self).__name__}: nothing was fitted yet; call fit(batches, text), or load a state, first")


def _inverse_root(covariance: Tensor, shrinkage: float) -> Tensor:
    """The inverse square root of a covariance shrunk to its trace; the identity where there is no spread at all."""
    dim = len(covariance)
    spread = covariance.trace() / dim
    identity = torch.eye(dim, dtype=covariance.dtype, device=covariance.device)
    if spread < 1e-14:  # of unit vectors, rounded to float32
        return identity
    values, vectors = torch.linalg.eigh((1 - shrinkage) * covariance + shrinkage * spread * identity)
    root: Tensor = (vectors * values.rsqrt()) @ vectors.T
    return root
