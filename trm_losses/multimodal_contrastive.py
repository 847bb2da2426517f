"""MultimodalContrastiveLoss: classes pulled together and apart, within and across modalities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional as TF
from ._checks import Dims, check_finite, check_number
from ._distributed import Distributed, resolve_group, uncompiled
from ._entries import check_regions

__all__ = ["MultimodalContrastiveLoss"]


class _Projection(nn.Module):
    """Two layers, D -> D -> ``out_dim``, for unit vectors of any leading shape."""

    def __init__(self, dim: int, out_dim: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.output = nn.Linear(dim, out_dim, device=device, dtype=dtype)

    def forward(self, vectors: Tensor) -> Tensor:
        projected: Tensor = self.output(F.relu(self.hidden(vectors.to(self.hidden.weight.dtype))))
        return projected


class MultimodalContrastiveLoss(nn.Module):
    r"""Contrast between regions, class texts and class prototypes.

    .. math:: L = \alpha_{rr} L_{rr} + \tfrac12 \alpha_{rt} (L_{rt} + L_{tr}) + \alpha_{rp} L_{rp} + \alpha_{tp} L_{tp}

    with the five terms of :func:`trm_losses.functional.multimodal_contrastive`. Anchors are the known positives, and the
    pseudo-positives whose soft target reaches ``anchor_threshold``. Unknown and absent entries are neither positives nor
    negatives (but see ``absent_negatives``).

    Without text, features (B, D) of whole images are contrasted by their labels, any number an image:
    :math:`\alpha_{rr}` times :func:`trm_losses.functional.multi_label_contrastive`, at ``temperature_region``.

    With ``head_dim`` unit regions, texts and prototypes are all compared behind one small projection (linear, ReLU,
    linear), which learns from each of them, although prototypes do not. Without it the loss acts in the joint
    space itself, as closing the gap between the modalities needs.

    Args:
        temperature: of all terms but region-region.
        temperature_region: of the region-region term.
        anchor_threshold: least target of an anchor.
        region_region, region_text, region_prototype, text_prototype: the weights :math:`\alpha`; 0 switches a term off, and
            it is not computed.
        overlap: classes whose saliency maps share more than this with an anchor's leave its denominator against texts and
            prototypes: a region that shows two classes is not pushed away from one of them. None for no such rule; 0.7 is a
            good start.
        absent_negatives: regions whose class is known to be absent are negatives of its text in the text-region term.
        dim, head_dim: D and the width of the projection, 256 for instance; None for no projection.
        distributed: False, True or a process group: anchors of all ranks are contrasted, with gradient.
        validate: check label values and look for NaN (waits for the device).

    Shape:
        regions (B, C, D) or :class:`trm_losses.functional.Entries` of the anchors (and, with ``absent_negatives``, of the known
        absent), text (C, D), targets (B, C), prototypes (C, D), seen (C,) bool, weights (B, C),
        saliency (B, C, N) -> scalar; or regions (B, D), text None, targets
        (B, C), weights (B, C) -> scalar.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes, label values or NaN, each by name; ``saliency`` missing if
            ``overlap`` is set.

    Example:
        >>> import torch
        >>> contrast = MultimodalContrastiveLoss()
        >>> regions = torch.randn(4, 3, 8, requires_grad=True)
        >>> contrast(regions, torch.randn(3, 8), torch.full((4, 3), -1.0)).item()  # no anchor: 0, still on the graph
        0.0
        >>> labels = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
        >>> round(contrast(torch.eye(3), None, labels).item(), 4)  # two others, equally far: log 2
        0.6931

    Reference: the aims and the prototypes are TRM-ML's (paper, patent); the form follows SADCL and SupCon, our choice;
    projection after SADCL; overlap and absent negatives are our choice.
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
        overlap: float | None = None,
        absent_negatives: bool = False,
        dim: int | None = None,
        head_dim: int | None = None,
        distributed: Distributed = False,
        validate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_number(name, "temperature", temperature, 0, strict=True)
        check_number(name, "temperature_region", temperature_region, 0, strict=True)
        check_number(name, "anchor_threshold", anchor_threshold, 0, 1, strict=True)
        if overlap is not None:
            check_number(name, "overlap", overlap, 0, 1)
        self.alphas = {
            "region_region": region_region,
            "region_text": 0.5 * region_text,
            "text_region": 0.5 * region_text,
            "region_prototype": region_prototype,
            "text_prototype": text_prototype,
        }
        for key, alpha in self.alphas.items():
            check_number(name, key, alpha, 0)
        self.temperature, self.temperature_region = temperature, temperature_region
        self.overlap, self.absent_negatives = overlap, absent_negatives
        self.anchor_threshold, self.distributed, self.validate = anchor_threshold, distributed, validate
        self.dim, self.head_dim = dim, head_dim
        self.head: _Projection | None = None
        if head_dim is not None:
            check_number(name, "head_dim", head_dim, 1)
            if dim is None:
                raise ValueError(f"{name}: dim must be given with head_dim: the width D of regions and text")
            check_number(name, "dim", dim, 1)
            self.head = _Projection(dim, head_dim, device, dtype)

    def _dims(self) -> Dims:
        return Dims(type(self).__name__) if self.head is None or self.dim is None else Dims(type(self).__name__, D=self.dim)

    def terms(
        self,
        regions: Tensor | TF.Entries,
        text: Tensor,
        targets: Tensor,
        *,
        prototypes: Tensor | None = None,
        seen: Tensor | None = None,
        weights: Tensor | None = None,
        saliency: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The five terms by name, before their weights; 0 where the weight is 0."""
        dims = self._dims()
        check_regions(dims, regions)
        dims.check("text", text, "C D", hint="text and regions share classes and width")
        targets = dims.targets(targets, "B C", validate=self.validate)
        if prototypes is not None:
            dims.check("prototypes", prototypes, "C D")
        if seen is not None:
            dims.check("seen", seen, "C", floating=False)
            if seen.dtype != torch.bool:
                raise TypeError(f"{dims.owner}: seen must be bool, got {seen.dtype}")
        if weights is not None:
            dims.check("weights", weights, "B C")
        if self.overlap is not None:
            if saliency is None:
                raise ValueError(f"{dims.owner}: saliency (B, C, N) must be given where overlap is set, got None")
            dims.check("saliency", saliency, "B C N")
        if self.validate:
            needed = targets >= self.anchor_threshold
            check_regions(dims, regions, needed=needed | (targets == 0) if self.absent_negatives else needed)
            check_finite(dims.owner, "regions", regions.features if isinstance(regions, TF.Entries) else regions)
            check_finite(dims.owner, "text", text)
            if weights is not None:
                check_finite(dims.owner, "weights", torch.where(needed, weights, 0.0))
            # Also where nothing is compared: a gradient that is 0 there would still be 0 * NaN.
            for name, value in (("prototypes", prototypes), ("saliency", None if self.overlap is None else saliency)):
                if value is not None:
                    check_finite(dims.owner, name, value)
        group = resolve_group(self.distributed)
        # Over ranks gradients are asked for in the forward pass, which compiled code cannot give.
        contrast = TF.multimodal_contrastive if group is None else uncompiled(TF.multimodal_contrastive)
        return contrast(
            regions,
            text,
            targets,
            prototypes=prototypes,
            seen=seen,
            weights=weights,
            saliency=None if self.overlap is None else saliency,
            temperature=self.temperature,
            temperature_region=self.temperature_region,
            anchor_threshold=self.anchor_threshold,
            overlap=1.0 if self.overlap is None else self.overlap,
            absent_negatives=self.absent_negatives,
            project=self.head,
            only=[key for key, alpha in self.alphas.items() if alpha],
            group=group,
        )

    def _by_label(self, features: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """The contrast of features (B, D) by their labels (B, C)."""
        dims = self._dims()
        dims.check("regions", features, "B D", hint="without text, one feature of each image")
        targets = dims.targets(targets, "B C", validate=self.validate)
        if weights is not None:
            dims.check("weights", weights, "B C")
        if self.validate:
            check_finite(dims.owner, "regions", features)
            if weights is not None:
                check_finite(dims.owner, "weights", torch.where(targets >= self.anchor_threshold, weights, 0.0))
        group = resolve_group(self.distributed)
        contrast = TF.multi_label_contrastive if group is None else uncompiled(TF.multi_label_contrastive)
        return self.alphas["region_region"] * contrast(
            features,
            targets,
            weights=weights,
            temperature=self.temperature_region,
            anchor_threshold=self.anchor_threshold,
            project=self.head,
            group=group,
        )

    def forward(
        self,
        regions: Tensor | TF.Entries,
        text: Tensor | None,
        targets: Tensor,
        *,
        prototypes: Tensor | None = None,
        seen: Tensor | None = None,
        weights: Tensor | None = None,
        saliency: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum of the terms; see the class."""
        if text is None:
            if prototypes is not None:
                raise ValueError(f"{type(self).__name__}: prototypes must be None where text is None: they belong to regions")
            if isinstance(regions, TF.Entries):
                raise TypeError(f"{type(self).__name__}: regions must be a torch.Tensor (B, D) where text is None, got Entries")
            return self._by_label(regions, targets, weights)
        terms = self.terms(
            regions,
            text,
            targets,
            prototypes=prototypes,
            seen=seen,
            weights=weights,
            saliency=saliency,
        )
        return torch.stack([self.alphas[key] * term for key, term in terms.items()]).sum()

    def extra_repr(self) -> str:
        text = (
            f"temperature={self.temperature}, temperature_region={self.temperature_region}, "
            f"anchor_threshold={self.anchor_threshold}"
        )
        if self.overlap is not None:
            text += f", overlap={self.overlap}"
        return text + (", absent_negatives=True" if self.absent_negatives else "")
