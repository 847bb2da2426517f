"""MultimodalContrastiveLoss: classes pulled together and apart, within and across modalities."""

from __future__ import annotations

import torch
from torch import Tensor

from . import functional as TF
from ._checks import Dims, check_finite, check_number, check_numbers
from ._distributed import Distributed, DistributedModule, resolve_group, uncompiled
from ._entries import check_regions


class MultimodalContrastiveLoss(DistributedModule):
    r"""Contrast between regions, class texts and class prototypes.

    .. math:: L = \alpha_{rr} L_{rr} + \tfrac12 \alpha_{rt} (L_{rt} + L_{tr}) + \alpha_{rp} L_{rp} + \alpha_{tp} L_{tp}

    with the five terms of :func:`trm_losses.functional.multimodal_contrastive`. Anchors are the known positives, and the
    pseudo-positives whose soft target reaches ``anchor_threshold``. Unknown and absent entries are neither positives nor
    negatives.

    Args:
        temperature: of all terms but region-region.
        temperature_region: of the region-region term.
        anchor_threshold: least target of an anchor.
        region_region, region_text, region_prototype, text_prototype: the weights :math:`\alpha`; 0 switches a term off, and
            it is not computed.
        distributed: False, True or a process group: anchors of all ranks are contrasted, with gradient.
        validate: check label values and look for NaN (waits for the device).

    Shape:
        regions (B, C, D) or :class:`trm_losses.functional.Entries` of the anchors, text (C, D), targets (B, C),
        prototypes (C, D), seen (C,) bool, weights (B, C) -> scalar.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes, label values or NaN, each by name.

    Example:
        >>> import torch
        >>> contrast = MultimodalContrastiveLoss()
        >>> regions = torch.randn(4, 3, 8, requires_grad=True)
        >>> contrast(regions, torch.randn(3, 8), torch.full((4, 3), -1.0)).item()  # no anchor: 0, still on the graph
        0.0

    Reference: the aims and the prototypes are TRM-ML's (paper, patent); the form follows SADCL and SupCon, our choice.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        temperature_region: float = 0.1,
        anchor_threshold: float = 0.9,
        region_region: float = 1.0,
        region_text: float = 1.0,
        region_prototype: float = 1.0,
        text_prototype: float = 1.0,
        distributed: Distributed = False,
        validate: bool = True,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_numbers(name, 0, strict=True, temperature=temperature, temperature_region=temperature_region)
        check_number(name, "anchor_threshold", anchor_threshold, 0, 1, strict=True)
        check_numbers(name, 0, region_region=region_region, region_text=region_text)
        check_numbers(name, 0, region_prototype=region_prototype, text_prototype=text_prototype)
        self.alphas = {
            "region_region": region_region,
            "region_text": 0.5 * region_text,
            "text_region": 0.5 * region_text,
            "region_prototype": region_prototype,
            "text_prototype": text_prototype,
        }
        self.temperature, self.temperature_region = temperature, temperature_region
        self.anchor_threshold, self.distributed, self.validate = anchor_threshold, distributed, validate

    def forward(
        self,
        regions: Tensor | TF.Entries,
        text: Tensor,
        targets: Tensor,
        *,
        prototypes: Tensor | None = None,
        seen: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum of the terms; see the class."""
        dims = Dims(type(self).__name__)
        check_regions(dims, regions)
        dims.check("text", text, "C D", hint="text and regions share classes and width")
        targets = dims.targets(targets, "B C", validate=self.validate)
        if prototypes is not None:
            dims.check("prototypes", prototypes, "C D")
        if seen is not None:
            dims.mask("seen", seen, "C")
        if weights is not None:
            dims.check("weights", weights, "B C")
        if self.validate:
            is_anchor = targets >= self.anchor_threshold
            check_regions(dims, regions, needed=is_anchor)
            check_finite(dims.owner, "regions", regions.features if isinstance(regions, TF.Entries) else regions)
            check_finite(dims.owner, "text", text)
            if weights is not None:
                check_finite(dims.owner, "weights", torch.where(is_anchor, weights, 0.0))
            if prototypes is not None:  # also of classes not seen: 0 * NaN would reach the gradient
                check_finite(dims.owner, "prototypes", prototypes)
        group = resolve_group(self.distributed)
        # Over ranks gradients are asked for in the forward pass, which compiled code cannot give.
        contrast = TF.multimodal_contrastive if group is None else uncompiled(TF.multimodal_contrastive)
        terms = contrast(
            regions,
            text,
            targets,
            prototypes=prototypes,
            seen=seen,
            weights=weights,
            temperature=self.temperature,
            temperature_region=self.temperature_region,
            anchor_threshold=self.anchor_threshold,
            only=[key for key, alpha in self.alphas.items() if alpha],
            group=group,
        )
        return torch.stack([self.alphas[key] * term for key, term in terms.items()]).sum()
