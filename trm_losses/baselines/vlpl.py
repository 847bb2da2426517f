"""VLPLLoss: a frozen vision-language model says which unknown labels are present."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import Dims, check_finite, check_number, check_numbers
from .._distributed import Distributed
from .._precision import upcast
from ._baseline import Baseline, cross_entropy, entropy


class VLPLLoss(Baseline):
    r"""VLPL: pseudo-positives from a softmax of the teacher's similarities, and large entropy for what remains unknown.

    .. math::
        L &= \frac{1}{BC} \Big[ \sum_{bc:\,y \ge 0} \mathrm{BCE}(y_{bc}, p_{bc})
            + \beta \sum_{bc \in P} \mathrm{BCE}(0.9, p_{bc}) - \alpha \sum_{bc \in U} H(p_{bc}) \Big] \\
        r_b &= \mathrm{softmax}_c(\hat x_b \cdot \hat t_c / \tau), \qquad P = \{bc: y_{bc} = -1,\ r_{bc} > \theta\}

    U are the unknown entries that are neither in P nor among the :math:`\lfloor \delta C \rfloor` smallest r of their image,
    which give nothing. r is a softmax over the classes, so what :math:`\theta` means depends on their number and on how many
    of them are present.

    Args:
        similarities: (n, C) cosines :math:`\hat x_b \cdot \hat t_c` of the training images with the class texts, of the frozen
            teacher; published is CLIP ViT-L/14 at 336 pixels, on the views that the student sees.
        alpha: :math:`\alpha`, 0.2 (VOC), 0.1 (COCO, NUS), 0.01 (CUB). beta: :math:`\beta`.
        temperature: :math:`\tau`. threshold: :math:`\theta`.
        negative_share: :math:`\delta`.

    Shape:
        logits, targets (B, C), ids (B,) int64 -> scalar.

    Example:
        >>> loss = VLPLLoss(torch.tensor([[0.3, 0.2, 0.2]]))
        >>> logits = torch.zeros(1, 3, requires_grad=True)
        >>> loss(logits, torch.full((1, 3), -1.), ids=torch.tensor([0])).backward()
        >>> logits.grad[0] < 0  # the first class is taken for present, the others stay undecided
        tensor([ True, False, False])

    Reference: Xing et al., CVPR 2024 workshop LIMIT, for single positives. The term of known absent labels is ours, and that
    r is computed once for each image, where the published loop computes it for each view.
    """

    scores: Tensor

    def __init__(
        self,
        similarities: Tensor,
        *,
        alpha: float = 0.1,
        beta: float = 0.7,
        temperature: float = 0.01,
        threshold: float = 0.3,
        negative_share: float = 0.0,
        distributed: Distributed = False,
        validate: bool = True,
    ) -> None:
        name = type(self).__name__
        Dims(name).check("similarities", similarities, "n C")
        check_finite(name, "similarities", similarities)
        samples, classes = similarities.shape
        super().__init__(num_samples=samples, num_classes=classes, distributed=distributed, validate=validate)
        check_numbers(name, 0, alpha=alpha, beta=beta)
        check_number(name, "temperature", temperature, 0, strict=True)
        check_numbers(name, 0, 1, threshold=threshold, negative_share=negative_share)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        self.threshold, self.negative_share = threshold, negative_share
        self.register_buffer("scores", (upcast(similarities.detach()) / temperature).softmax(dim=1))

    def _loss(self, x: Tensor, y: Tensor, ids: Tensor | None) -> Tensor:
        scores, unknown = self.scores[ids], y == -1
        found = unknown & (scores > self.threshold)
        lowest = scores.topk(int(self.negative_share * x.shape[1] + 1e-6), largest=False).indices
        undecided = (unknown & ~found).scatter(1, lowest, False)
        weights = torch.ones_like(x).masked_fill(found, self.beta)
        taught = cross_entropy(x, y.masked_fill(found, 0.9), weights)
        return self._mean(taught - self.alpha * torch.where(undecided, entropy(x), 0.0).sum(), x)
