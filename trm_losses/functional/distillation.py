"""The region head teaches the query head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from .._checks import check_choice
from .._distributed import count_per_rank, sum_per_rank
from .._precision import full_precision, upcast
from ._shapes import Reduction, check_shapes


def region_distillation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    """The equation of :class:`trm_losses.RegionDistillationLoss`: the region head teaches the query head.

    Args:
        student_logits, teacher_logits: (B, C), without the bias of the classes. The teacher gets no gradient.
        temperature: T.
        reduction: ``"mean"`` over images, ``"sum"``, or ``"none"`` -> (B,).
        group: process group over which ``"mean"`` counts the images, and whose average ``"sum"`` makes a sum.

    Reference: region teaches query is the patent's; the form over classes is what the authors' other code suggests.
    """
    check_choice("region_distillation", "reduction", reduction, ("none", "mean", "sum"))
    check_shapes("region_distillation", student_logits=(student_logits, "B C"), teacher_logits=(teacher_logits, "B C"))
    with full_precision(student_logits):
        student, teacher = upcast(student_logits) / temperature, upcast(teacher_logits.detach()) / temperature
        divergence = F.kl_div(F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1), log_target=True, reduction="none")
        loss = temperature**2 * divergence.sum(dim=-1)
        if reduction == "none":
            return loss
        if reduction == "sum":
            return sum_per_rank(loss.sum(), group)
        count = count_per_rank(loss.new_full((), loss.shape[0]), group)
        return loss.sum() / torch.where(count > 0, count, 1.0)
