"""ImageContrastiveLoss: images pulled together by the labels they share."""

from __future__ import annotations

import torch
from torch import Tensor

from . import functional as TF
from ._checks import Dims, check_finite, check_number
from ._distributed import Distributed, DistributedModule, resolve_group, uncompiled


class ImageContrastiveLoss(DistributedModule):
    r"""Supervised contrast of images that carry any number of labels, from one feature each.

    .. math:: L = -\operatorname{mean}_{(b,c)} \frac{1}{|P_{bc}|} \sum_{p \in P_{bc}}
        \log \frac{\exp(f_b \cdot f_p / \tau)}{\sum_{a \neq b} \exp(f_b \cdot f_a / \tau)}

    Every positive label (b, c) is an anchor. Its positives :math:`P_{bc}` are the other images with class c, and the
    denominator runs over all other images with a positive label, each once. Labels without a partner are left out of the
    mean. Where each image has exactly one label this is SupCon. Unknown and absent labels are no anchors; an image without
    a positive label takes no part.

    Args:
        temperature: :math:`\tau`.
        anchor_threshold: least target of an anchor.
        distributed: False, True or a process group: images of all ranks are contrasted, with gradient.
        validate: check label values and look for NaN (waits for the device).

    Shape:
        features (B, D), targets (B, C), weights (B, C) factors of the anchors -> scalar.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes, label values or NaN, each by name.

    Example:
        >>> import torch
        >>> labels = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
        >>> round(ImageContrastiveLoss()(torch.eye(3), labels).item(), 4)  # two others, equally far: log 2
        0.6931

    Reference: our choice, after MulSupCon (Zhang and Wu, AAAI 2024) and SupCon (Khosla et al., NeurIPS 2020).
    """

    def __init__(
        self, *, temperature: float = 0.1, anchor_threshold: float = 0.9, distributed: Distributed = False, validate: bool = True
    ) -> None:
        super().__init__()
        check_number(type(self).__name__, "temperature", temperature, 0, strict=True)
        check_number(type(self).__name__, "anchor_threshold", anchor_threshold, 0, 1, strict=True)
        self.temperature, self.anchor_threshold = temperature, anchor_threshold
        self.distributed, self.validate = distributed, validate

    def forward(self, features: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """The contrast of features (B, D) by their labels (B, C); see the class."""
        dims = Dims(type(self).__name__)
        dims.check("features", features, "B D", hint="one feature of each image")
        targets = dims.targets(targets, "B C", validate=self.validate)
        if weights is not None:
            dims.check("weights", weights, "B C")
        if self.validate:
            check_finite(dims.owner, "features", features)
            if weights is not None:
                check_finite(dims.owner, "weights", torch.where(targets >= self.anchor_threshold, weights, 0.0))
        group = resolve_group(self.distributed)
        # Over ranks gradients are asked for in the forward pass, which compiled code cannot give.
        contrast = TF.multi_label_contrastive if group is None else uncompiled(TF.multi_label_contrastive)
        return contrast(
            features, targets, weights=weights, temperature=self.temperature, anchor_threshold=self.anchor_threshold, group=group
        )
