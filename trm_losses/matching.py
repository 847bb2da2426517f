"""TextRegionMatchingLoss: each class text is matched with its one region."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import functional as TF
from ._checks import Dims, check_choice, check_finite, check_number, check_numbers
from ._distributed import Distributed, resolve_group
from ._precision import upcast
from ._state import PerClassState


class TextRegionMatchingLoss(PerClassState):
    r"""One text, one region: a logit for each class, and an asymmetric loss over the known labels.

    .. math:: \ell_{bc} = s\, r_{bc} \cdot \hat t_c - \beta_c

    followed by :func:`trm_losses.functional.asymmetric_loss`. Scale s (through its logarithm) and the bias of each class
    are trained. Unknown labels (-1) give no loss and no gradient; soft labels and weights are welcome. The mean runs over
    known entries, so the loss has the same size whatever the share of known labels. Regions keep their length: one that is
    spread over disagreeing tokens is short, which is evidence of absence.

    Args:
        num_classes: C.
        gamma_pos, gamma_neg, margin: of the asymmetric loss; all 0 gives binary cross-entropy.
        scale: start of s, held to at most 100 in training; the gradient is that of the scale which is used.
        bias: start of :math:`\beta`; :meth:`calibrate_bias` sets it from data.
        reduction: ``"mean"`` over known entries, ``"sum"`` or ``"none"``.
        distributed: False, True or a process group: mean and sum are then of the known entries of all ranks.
        validate: check label values and look for NaN (waits for the device).

    Shape:
        regions (B, C, D), text (C, D), targets and weights (B, C) -> scalar, or (B, C) with ``reduction="none"``.

    Raises:
        ValueError: shapes, devices, label values or NaN, each by name. TypeError: not a tensor, not floating point.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> matching = TextRegionMatchingLoss(3)
        >>> regions, text = torch.randn(2, 3, 8, requires_grad=True), torch.randn(3, 8)
        >>> loss = matching(regions, text, torch.tensor([[1., 0., -1.], [-1., -1., -1.]]))
        >>> loss.backward()
        >>> regions.grad[1].abs().sum()  # nothing is known of the second image
        tensor(0.)

    Reference: one-to-one matching is TRM-ML's (paper). The asymmetric loss with 1 / 2 / 0.05 is DualCoOp's and the
    authors'. Scale, bias and the mean over known entries are our choice.
    """

    max_scale = 100.0

    _class_axes = {"bias": (0,)}

    def __init__(
        self,
        num_classes: int,
        *,
        gamma_pos: float = 1.0,
        gamma_neg: float = 2.0,
        margin: float = 0.05,
        scale: float = 20.0,
        bias: float = 0.0,
        reduction: TF.Reduction = "mean",
        distributed: Distributed = False,
        validate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_number(name, "num_classes", num_classes, 1)
        check_numbers(name, 0, gamma_pos=gamma_pos, gamma_neg=gamma_neg)
        check_number(name, "margin", margin, 0, 0.99)
        check_number(name, "scale", scale, 0, self.max_scale, strict=True)
        check_number(name, "bias", bias)
        check_choice(name, "reduction", reduction, ("none", "mean", "sum"))
        self.num_classes, self.reduction = num_classes, reduction
        self.gamma_pos, self.gamma_neg, self.margin = gamma_pos, gamma_neg, margin
        self.distributed, self.validate = distributed, validate
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.full((num_classes,), float(bias), device=device, dtype=dtype))

    @property
    def scale(self) -> Tensor:
        """s, at most 100. Above the limit ``log_scale`` keeps its gradient: a step too far would otherwise be for good."""
        log_scale = upcast(self.log_scale)
        above = (log_scale - math.log(self.max_scale)).clamp(min=0)
        return (log_scale - above.detach()).exp()

    def logits(self, regions: Tensor, text: Tensor, *, bias: bool = True, classes: slice = slice(None)) -> Tensor:
        """Logits (B, C); ``bias=False`` leaves the bias of the classes out, as distillation wants it.

        ``classes`` are those that regions and texts are of, where they are of a part of the classes.
        """
        dims = Dims(type(self).__name__, C=len(range(self.num_classes)[classes]))
        dims.check("regions", regions, "B C D", hint="one region for each class of num_classes")
        dims.check("text", text, "C D", hint="text and regions share the width D of the joint space")
        if self.validate:
            check_finite(dims.owner, "regions", regions)
            check_finite(dims.owner, "text", text)
        return TF.text_region_logits(regions, text, self.scale, self.bias[classes] if bias else None)

    def loss(
        self, logits: Tensor, targets: Tensor, weights: Tensor | None = None, *, reduction: TF.Reduction | None = None
    ) -> Tensor:
        """The loss of logits (B, C) already at hand."""
        dims = Dims(type(self).__name__, C=self.num_classes)
        dims.check("logits", logits, "B C")
        targets = dims.targets(targets, "B C", validate=self.validate)
        if weights is not None:
            dims.check("weights", weights, "B C")
        if self.validate:
            for name, value in (("logits", logits), ("weights", weights)):
                if value is not None:  # at unknown entries it may be anything
                    check_finite(dims.owner, name, torch.where(targets >= 0, value, 0.0))
        return TF.asymmetric_loss(
            logits,
            targets,
            weights,
            gamma_pos=self.gamma_pos,
            gamma_neg=self.gamma_neg,
            margin=self.margin,
            reduction=reduction or self.reduction,
            group=resolve_group(self.distributed),
        )

    def forward(self, regions: Tensor, text: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss of regions (B, C, D) against text (C, D); see the class."""
        return self.loss(self.logits(regions, text), targets, weights)

    @torch.no_grad()
    def calibrate_bias(self, regions: Tensor, text: Tensor, prior: float) -> None:
        """Set the bias of each class so that its mean probability over ``regions`` is ``prior``, by bisection.

        A cosine of a vision-language model says little about presence in absolute terms, and classes have levels of their own:
        without this start all would begin far too probable, and training would first have to bring them together.

        Args:
            regions: (B, C, D) of the first batches.
            text: (C, D).
            prior: expected share of present labels, such as present / known over the training labels.

        Raises:
            ValueError: no image, a prior outside (0, 1), or regions so long that the bias overflows.
        """
        check_number(type(self).__name__, "prior", prior, 0, 1, strict=True)
        logits = self.logits(regions, text, bias=False).cpu().double()
        if not logits.numel():
            raise ValueError(f"{type(self).__name__}: regions must hold at least one image, got shape {tuple(regions.shape)}")
        low, high = logits.amin(dim=0) - 20, logits.amax(dim=0) + 20
        for _ in range(60):
            middle = (low + high) / 2
            too_high = torch.sigmoid(logits - middle).mean(dim=0) > prior
            low, high = torch.where(too_high, middle, low), torch.where(too_high, high, middle)
        bias = ((low + high) / 2).to(self.bias)
        if not torch.isfinite(bias).all():
            longest = float(regions.detach().float().norm(dim=-1).max())
            raise ValueError(
                f"{type(self).__name__}: regions must lead to a bias that {bias.dtype} can hold, got regions of a length up to "
                f"{longest:g}; normalise them"
            )
        self.bias.copy_(bias)
