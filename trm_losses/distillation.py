"""RegionDistillationLoss: what the region head knows goes into the query head."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from . import functional as TF
from ._checks import Dims, check_choice, check_finite, check_number
from ._distributed import Distributed, resolve_group

__all__ = ["RegionDistillationLoss"]


class RegionDistillationLoss(nn.Module):
    r"""The region head (teacher) teaches the query head (student), by their logits or by their features.

    .. math::
        L_\mathrm{class} &= \frac{T^2}{B} \sum_b
            \mathrm{KL}(\mathrm{softmax}(\ell^r_b / T)\,\|\,\mathrm{softmax}(\ell^q_b / T)) \\
        L_\mathrm{binary} &= \frac{T^2}{B} \sum_b \sum_c
            \mathrm{KL}(\sigma(\ell^r_{bc} / T)\,\|\,\sigma(\ell^q_{bc} / T)) \\
        L_\mathrm{cosine} &= \frac{1}{\sum W} \sum_{bc} W_{bc} (1 - \hat z_{bc} \cdot \hat r_{bc})

    Over classes (the default) both logits come without the bias of the classes, which would otherwise compete in the
    softmax; of each class by itself they come with it, for only then are their sigmoids probabilities. The teacher gets no
    gradient.

    Args:
        form: ``"kl_class"``, ``"kl_binary"`` or ``"cosine"``, which compares features.
        temperature: T; ``"cosine"`` has none.
        reduction: ``"mean"`` over images (``"cosine"``: over the weights), ``"sum"`` or ``"none"``.
        distributed: False, True or a process group: mean and sum are then of the images, or entries, of all ranks.
        validate: look for NaN and infinity (waits for the device).

    Shape:
        student_logits, teacher_logits (B, C), weights (B,) -> scalar, or (B,) with ``reduction="none"``;
        with ``form="cosine"`` features (B, C, D), weights (B, C) -> scalar, or (B, C).

    Raises:
        ValueError: shapes, devices, option words, NaN or infinity, each by name. TypeError: not a floating-point tensor.

    Example:
        >>> import torch
        >>> logits = torch.randn(4, 20)
        >>> float(RegionDistillationLoss()(logits + 3.0, logits).abs()) < 1e-5  # a constant shift changes nothing
        True

    Reference: region-level teaches query-level is TRM-ML's (patent); logits over classes at T = 4 follow a distillation
    loss in the authors' other code, which sums over the batch; the mean and the two other forms are our choice, the cosine
    takes the patent's word "feature" literally.
    """

    def __init__(
        self,
        *,
        form: Literal["kl_class", "kl_binary", "cosine"] = "kl_class",
        temperature: float = 4.0,
        reduction: TF.Reduction = "mean",
        distributed: Distributed = False,
        validate: bool = True,
    ) -> None:
        super().__init__()
        check_choice(type(self).__name__, "form", form, ("kl_class", "kl_binary", "cosine"))
        check_number(type(self).__name__, "temperature", temperature, 0, strict=True)
        check_choice(type(self).__name__, "reduction", reduction, ("none", "mean", "sum"))
        self.form, self.temperature, self.reduction = form, temperature, reduction
        self.distributed, self.validate = distributed, validate

    def forward(self, student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
        """How far the student's logits (B, C), or features (B, C, D), are from the teacher's; see the class."""
        dims = Dims(type(self).__name__)
        kind, letters, rows = ("features", "B C D", "B C") if self.form == "cosine" else ("logits", "B C", "B")
        dims.check(f"student_{kind}", student, letters)
        dims.check(f"teacher_{kind}", teacher, letters)
        if weights is not None:
            dims.check("weights", weights, rows, hint=f"one factor for each {'image' if rows == 'B' else 'entry'}")
        if self.validate:
            check_finite(dims.owner, f"student_{kind}", student)
            check_finite(dims.owner, f"teacher_{kind}", teacher)
            if weights is not None:
                check_finite(dims.owner, "weights", weights)
        group = resolve_group(self.distributed)
        if self.form == "cosine":
            return TF.feature_distillation(student, teacher, weights, reduction=self.reduction, group=group)
        return TF.region_distillation(
            student,
            teacher,
            weights,
            form=self.form,
            temperature=self.temperature,
            reduction=self.reduction,
            group=group,
        )

    def extra_repr(self) -> str:
        return f"form={self.form!r}, temperature={self.temperature}, reduction={self.reduction!r}"
