"""RegionDistillationLoss: what the region head knows goes into the query head."""

from __future__ import annotations

from torch import Tensor

from . import functional as TF
from ._checks import Dims, check_choice, check_finite, check_number
from ._distributed import Distributed, DistributedModule, resolve_group


class RegionDistillationLoss(DistributedModule):
    r"""The region head (teacher) teaches the query head (student) by their logits over the classes of an image.

    .. math:: L = \frac{T^2}{B} \sum_b \mathrm{KL}(\mathrm{softmax}(\ell^r_b / T)\,\|\,\mathrm{softmax}(\ell^q_b / T))

    Both logits come without the bias of the classes, which would otherwise compete in the softmax. The teacher gets no
    gradient.

    Args:
        temperature: T.
        reduction: ``"mean"`` over images, ``"sum"`` or ``"none"``.
        distributed: False, True or a process group: mean and sum are then of the images of all ranks.
        validate: look for NaN and infinity (waits for the device).

    Shape:
        student_logits, teacher_logits (B, C) -> scalar, or (B,) with ``reduction="none"``.

    Raises:
        ValueError: shapes, devices, option words, NaN or infinity, each by name. TypeError: not a floating-point tensor.

    Example:
        >>> import torch
        >>> logits = torch.randn(4, 20)
        >>> float(RegionDistillationLoss()(logits + 3.0, logits).abs()) < 1e-5  # a constant shift changes nothing
        True

    Reference: region-level teaches query-level is TRM-ML's (patent). Logits over classes at T = 4 follow a distillation
    loss in the authors' other code, which sums over the batch. The mean is our choice.
    """

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        reduction: TF.Reduction = "mean",
        distributed: Distributed = False,
        validate: bool = True,
    ) -> None:
        super().__init__()
        check_number(type(self).__name__, "temperature", temperature, 0, strict=True)
        check_choice(type(self).__name__, "reduction", reduction, ("none", "mean", "sum"))
        self.temperature, self.reduction = temperature, reduction
        self.distributed, self.validate = distributed, validate

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """How far the student's logits (B, C) are from the teacher's; see the class."""
        dims = Dims(type(self).__name__)
        dims.check("student_logits", student_logits, "B C")
        dims.check("teacher_logits", teacher_logits, "B C")
        if self.validate:
            check_finite(dims.owner, "student_logits", student_logits)
            check_finite(dims.owner, "teacher_logits", teacher_logits)
        return TF.region_distillation(
            student_logits,
            teacher_logits,
            temperature=self.temperature,
            reduction=self.reduction,
            group=resolve_group(self.distributed),
        )
